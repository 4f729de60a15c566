# SPDX-License-Identifier: Apache-2.0
"""select on CUDA's kernels, emulated or real: masses and choice against the fp64 reference, bits
against the CPU's kernels. Orders and pools are the CPU's, so that select alone is tested."""

import functools

import cases
import pytest
import torch
from harness import bits_of, config_of, cut_of, geometry_of, sequences_of
from numerics import assert_blocks, assert_close, unpack

from pbs_attn import ops, reference
from pbs_attn.selection import PERMUTES_QUERIES

BF16, FP16 = torch.bfloat16, torch.float16
SMALL = {"block_size": 64, "segment_size": 128}
SCHEDULES = ((1, "lazy"), (2, "random"), (3, "random"))
NEAR = 2e-6  # of mass: what fp32 masses of two backends may differ by at a threshold


def plan(q, k, v, config, geometry):
    """The arguments of select that other verbs made."""
    cut = {"geometry": geometry, "gqa": config.gqa, **cut_of(config)}
    score = None
    if config.permute in ("keys", "both"):
        score = ops.score(q, k, order=config.order, seed=config.seed, **cut)
    k_perm, q_perm, k_pool, *_ = ops.permute(q, k, v, score, mode=config.permute, pack=False, **cut)
    q_perm = q_perm if config.permute in PERMUTES_QUERIES else None
    return {
        "k_pool": k_pool, "k_perm": k_perm, "q_perm": q_perm, "mode": config.permute,
        "method": config.select, "stride": config.stride, "reduce": config.reduce,
        "rule": config.rule, "normalize": config.normalize, "tau": config.tau,
        "return_mass": True, **cut,
    }  # fmt: skip


def product_noise(backend, seq, config):
    """exp and log of a strip cost a few units in the last place. A real tensor core cuts off what
    its partial sums have no room for, once every 16 products; logits are about 8 at most."""
    real = backend.name == "cuda" and config.select == "antidiagonal"
    return 4e-7 + (config.stride * seq.q.shape[-1] / 16 * 8 * 2.0**-24 if real else 0.0)


def check(backend, q, k, v, config, case=None, tau_heads=None):
    geometry = geometry_of(case)
    options = plan(q, k, v, config, geometry) | {"tau_heads": tau_heads}
    got, count, mass = backend.ops.select(q, k, **options)
    cpu, *_ = ops.select(q, k, **options)
    for seq in sequences_of(q, k, v, case):
        scorer = f"{config.select} {config.normalize} {config.permute}"
        what = f"{backend} select {scorer} {case and case.name}"
        bits = bits_of(got, seq, config)
        assert torch.equal(count[seq.index, :, : bits.shape[1]], bits.sum(-1).int()), what
        assert not count[seq.index, :, bits.shape[1] :].any(), what
        if not bits.numel():
            continue
        masses = mass[seq.index, :, : bits.shape[1], : bits.shape[2]]
        noise = product_noise(backend, seq, config)
        exact = check_masses(seq, masses, config, options, noise, what)
        tau = config.tau if tau_heads is None else tau_heads
        assert_blocks(bits, exact, rule=config.rule, tau=tau, what=what)
        if not torch.equal(bits, bits_of(cpu, seq, config)):
            assert_blocks(bits, exact, rule=config.rule, tau=tau, tolerance=NEAR, what=what)
    return got, count, mass


def check_masses(seq, mass, config, options, noise, what):
    """The reference's selection."""
    seqlen_q, seqlen_k = seq.q.shape[1], seq.k.shape[1]
    q_perm, tau = options["q_perm"], options["tau_heads"]
    select = functools.partial(
        reference.select,
        k_perm=options["k_perm"][seq.index, :, :seqlen_k].long(),
        q_perm=None if q_perm is None else q_perm[seq.index, :, :seqlen_q].long(),
        permute=config.permute, method=config.select, stride=config.stride, reduce=config.reduce,
        rule=config.rule, normalize=config.normalize,
        tau=config.tau if tau is None else tau, **cut_of(config),
    )  # fmt: skip
    exact = select(seq.q.double(), seq.k.double())
    low = select(seq.q.float(), seq.k.float())
    assert_close(mass, exact.mass, low.mass, what=f"{what} mass", noise=noise)
    return exact


# ---- the grid of cases.py ------------------------------------------------------------------------


@pytest.mark.parametrize("scorer, permute", cases.scored_orders())
@pytest.mark.parametrize("seqlen", [1, 64, 65, 129, 257, 421])
def test_lengths(backend, scorer, permute, seqlen):
    inputs = cases.make_inputs(21, (2, 1), seqlen, head_dim=32, dtype=BF16)
    check(backend, *inputs, config_of(permute=permute, **scorer, **SMALL))


@pytest.mark.parametrize("scorer", cases.SCORERS)
@pytest.mark.parametrize("case", cases.geometries(64, 128), ids=lambda case: case.name)
def test_geometries_and_nan_padding(backend, scorer, case):
    inputs = cases.make_inputs(24, (2, 1), case=case, head_dim=32, dtype=BF16, nan_padding=True)
    for permute in ("keys", "identity") if scorer is cases.ROW else ("keys", "none", "both"):
        check(backend, *inputs, config_of(permute=permute, **scorer, **SMALL), case)


@pytest.mark.parametrize("scorer", cases.SCORERS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("head_dim", cases.HEAD_DIMS)
def test_dtypes_and_head_dims(backend, scorer, dtype, head_dim):
    inputs = cases.make_inputs(27, (1, 1), 70, 300, head_dim=head_dim, dtype=dtype)
    check(backend, *inputs, config_of(**scorer, **SMALL))


@pytest.mark.parametrize("heads", cases.HEAD_RATIOS)
@pytest.mark.parametrize("gqa", ["per_head", "group"])
@pytest.mark.parametrize("scorer", cases.SCORERS)
def test_head_ratios(backend, heads, gqa, scorer):
    inputs = cases.make_inputs(25, heads, 70, 300, head_dim=16, dtype=BF16, batch=2)
    check(backend, *inputs, config_of(gqa=gqa, **scorer, **SMALL))


@pytest.mark.parametrize("block_size, segment_size", [(64, 64), (64, 192), (128, 256), (256, 512)])
@pytest.mark.parametrize("scorer", cases.SCORERS)
def test_sizes(backend, block_size, segment_size, scorer):
    config = config_of(block_size=block_size, segment_size=segment_size, **scorer)
    inputs = cases.make_inputs(26, (1, 1), 2 * block_size + 9, 3 * segment_size + 77, 16, BF16)
    check(backend, *inputs, config)


@pytest.mark.parametrize("layout", cases.LAYOUTS[1:])
@pytest.mark.parametrize("method", cases.METHODS)
def test_layouts(backend, layout, method):
    plain = cases.make_inputs(33, (2, 1), 130, 300, head_dim=24, dtype=FP16, batch=2)
    config = config_of(select=method, permute="both", **SMALL)
    options = plan(*plain, config, geometry_of(None))
    laid = [cases.lay_out(x, layout) for x in plain[:2]]
    want = backend.ops.select(*plain[:2], **options)
    assert all(map(torch.equal, want, backend.ops.select(*laid, **options)))


# ---- the rule: logits of our choice, through one-hot queries and pools ---------------------------


def chosen_logits(logits, rows=3):
    """q, k and the options of select for which every query block has these logits [H, Tk]."""
    heads, blocks = logits.shape
    q = torch.zeros(1, heads, 64 * rows, 8, dtype=BF16)
    q[..., 0] = 1.0
    k = torch.zeros(1, 1, 64 * blocks + 64 * rows, 8, dtype=BF16)
    k_pool = torch.zeros(1, heads, blocks + rows, 8)
    k_pool[0, :, :blocks, 0] = logits
    options = {
        "k_pool": k_pool, "mode": "identity", "softmax_scale": 1.0, "block_size": 64,
        "segment_size": 64, "return_mass": True,
    }  # fmt: skip
    return q, k, options


def rule_inputs(seed, blocks):
    """Rows [H, Tk] of logits: plain, with many ties, a few values only, one of -inf, steep."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(6, blocks, generator=g) * 2
    x[1] = x[1].round()
    x[2] = (x[2] > 0).float()
    x[3] = 0.25
    x[4, 1::2] = -torch.inf
    x[5] = -30.0 * torch.rand(blocks, generator=g)
    return x


TAUS = {
    "prefix": (0.0, 1e-6, 0.25, 0.5, 0.9, 0.999, 1.0),
    "relative": (0.0, 0.1, 0.5, 1.0, 1.5),
    "absolute": (0.0, 1e-3, 0.05, 1.5),
    "budget": (0.0, 1.0, 2.5, 7.0, 1e6),
}


@pytest.mark.parametrize("blocks", [1, 5, 32, 33, 100])
@pytest.mark.parametrize("rule", TAUS)
def test_rules(backend, rule, blocks):
    logits = rule_inputs(blocks, blocks)
    q, k, options = chosen_logits(logits, rows=1)
    mass = logits.double().softmax(-1)
    for tau in TAUS[rule]:
        got, count, _ = backend.ops.select(q, k, rule=rule, tau=tau, **options)
        want, *_ = ops.select(q, k, rule=rule, tau=tau, **options)
        got, want = (unpack(x[0, :, 0], blocks) for x in (got, want))
        assert torch.equal(count[0, :, 0], got.sum(-1).int())
        for h in (got != want).any(-1).nonzero().flatten().tolist():
            exact = reference.choose(rule, tau, mass[h, None], torch.ones(1, blocks).bool())
            exact[:, 0] = True  # token 0's block
            row = reference.Selection(
                exact[None], exact[None], mass[h, None, None], torch.ones(1, 1, blocks).bool()
            )
            assert_blocks(got[h, None, None], row, rule=rule, tau=tau, tolerance=NEAR)


def test_ties_go_to_the_lower_index(backend):
    """Equal masses are equal keys: the first few of them stay, exactly as many as are needed."""
    logits = torch.zeros(2, 100)
    logits[1, 40:] = 1.0
    q, k, options = chosen_logits(logits, rows=1)
    for tau, flat in ((0.095, 10), (0.1 + 1e-6, 11), (0.5, 50)):
        bits, *_ = backend.ops.select(q, k, tau=tau, **options)
        kept = unpack(bits[0, :, 0], 100)
        assert kept[0].nonzero().flatten().tolist() == list(range(flat))
        steep = kept[1].nonzero().flatten().tolist()[1:]  # behind token 0's block
        assert steep == list(range(40, 40 + len(steep)))
        share = torch.e / (60 * torch.e + 40)
        assert len(steep) == -(-tau // share)
    bits, *_ = backend.ops.select(q, k, rule="budget", tau=7.0, **options)
    assert unpack(bits[0, 0, 0], 100).nonzero().flatten().tolist() == list(range(7))


def test_the_last_bit_of_tau_counts(backend):
    """Masses of 1/64: 32 blocks are exactly half, and not a hair more than half."""
    q, k, options = chosen_logits(torch.zeros(1, 64), rows=1)
    half = torch.tensor(0.5)
    for tau, blocks in ((half, 32), (torch.nextafter(half, half + 1), 33)):
        _, count, _ = backend.ops.select(q, k, tau=tau.item(), **options)
        assert count.item() == blocks


@pytest.mark.parametrize("rule, tau", cases.RULES)
def test_rows_without_a_number(backend, rule, tau):
    """NaN, overflow and rows where nothing has a finite logit end as on the CPU."""
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    logits[0, 7] = torch.nan
    logits[1] = -torch.inf
    logits[2, 3] = torch.inf
    logits[3] *= 1e30
    logits[4] = 3e38
    q, k, options = chosen_logits(logits)
    got = backend.ops.select(q, k, rule=rule, tau=tau, **options)
    want = ops.select(q, k, rule=rule, tau=tau, **options)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    torch.testing.assert_close(got[2], want[2], equal_nan=True, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", cases.METHODS)
@pytest.mark.parametrize("size", [1e3, 1e30])
def test_huge_logits(backend, method, size):
    q, k, v = cases.make_inputs(34, (2, 1), 70, 300, head_dim=16, dtype=BF16)
    config = config_of(select=method, **SMALL)
    options = plan(q, k, v, config, geometry_of(None))
    q, options["k_pool"] = q * size, options["k_pool"] * (size if method == "mean_pool" else 1)
    k = k * size if method == "antidiagonal" else k
    got = backend.ops.select(q, k, **options)
    want = ops.select(q, k, **options)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert torch.equal(got[2].isnan(), want[2].isnan())


def test_tau_per_head(backend):
    q, k, v = cases.make_inputs(28, (4, 2), 200, 700, head_dim=16, dtype=BF16)
    tau = torch.tensor([0.1, 0.5, 0.9, 1.0])
    bits, *_ = check(backend, q, k, v, config_of(**SMALL), tau_heads=tau)
    for h, value in enumerate(tau.tolist()):
        alone, *_ = check(backend, q, k, v, config_of(tau=value, **SMALL))
        assert torch.equal(bits[:, h], alone[:, h])


def test_token_zero_is_always_kept(backend):
    q, k, v = cases.make_inputs(30, (2, 1), 700, head_dim=16, dtype=BF16)
    config = config_of(rule="budget", tau=0.0, block_size=64, segment_size=256)
    options = plan(q, k, v, config, geometry_of(None))
    options["k_perm"][:, 0, :256] = torch.arange(255, -1, -1)  # in the segment's last block
    bits, count, _ = backend.ops.select(q, k, **options)
    first = (options["k_perm"] == 0).int().argmax(-1)[0] // 64
    assert first[0] == 3
    for m in range(bits.shape[2]):
        for h in range(2):
            want = 1 << int(first[h]) if m >= 4 else 0
            assert int(bits[0, h, m, 0]) == want and int(count[0, h, m]) == (want > 0)


# ---- sizes that change where things lie ----------------------------------------------------------


@pytest.mark.parametrize("method, stride, blocks", [
    ("mean_pool", 8, 1100), ("mean_pool", 8, 1300), ("antidiagonal", 64, 1300),
    ("antidiagonal", 64, 1600),
])  # fmt: skip
def test_many_key_blocks(backend, method, stride, blocks):
    """Beyond 1024 blocks; strips in shared memory, and in the workspace where they do not fit."""
    inputs = cases.make_inputs(35, (1, 1), 70, 64 * blocks + 9, head_dim=8, dtype=BF16)
    check(backend, *inputs, config_of(select=method, stride=stride, permute="identity", **SMALL))


@pytest.mark.parametrize("method", cases.METHODS)
def test_more_strips_than_slots_of_workspace(backend, method):
    """Blocks of threads that take a second strip find clean memory."""
    inputs = cases.make_inputs(36, (300, 1), 2, 200, head_dim=8, dtype=BF16)
    config = config_of(select=method, stride=1, permute="none", **SMALL)
    options = plan(*inputs, config, geometry_of(None))
    (_, count, mass), want = (x.select(*inputs[:2], **options) for x in (backend.ops, ops))
    assert torch.equal(count, want[1])
    torch.testing.assert_close(mass, want[2], rtol=1e-4, atol=1e-6)


# ---- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", cases.METHODS)
def test_same_bits_under_every_schedule(backend, method):
    """Threads in any order, copies early or late: a difference is a race."""
    q, k, v = cases.make_inputs(37, (2, 1), 200, 700, head_dim=40, dtype=BF16)
    config = config_of(select=method, permute="both", **SMALL)
    options = plan(q, k, v, config, geometry_of(None))
    want = backend.ops.select(q, k, **options)
    for seed, delivery in SCHEDULES:
        backend.schedule(seed, delivery)
        again = backend.ops.select(q, k, **options)
        assert all(map(torch.equal, want, again)), f"seed {seed}, {delivery}"


@pytest.mark.parametrize("method", cases.METHODS)
@pytest.mark.parametrize("name", ["left_padding", "packed", "no_keys"])
def test_same_bits_at_any_place_in_a_batch(backend, method, name):
    case = next(case for case in cases.geometries(64, 128) if case.name == name)
    inputs = cases.make_inputs(38, (2, 1), case=case, head_dim=16, dtype=BF16)
    config = config_of(select=method, **SMALL)
    got = backend.ops.select(*inputs[:2], **plan(*inputs, config, geometry_of(case)))
    for seq in sequences_of(*inputs, case):
        if not seq.q.shape[1]:
            continue
        own = [x[None] for x in (seq.q, seq.k, seq.v)]
        alone = backend.ops.select(*own[:2], **plan(*own, config, geometry_of(None)))
        for whole, part in zip(got, alone, strict=True):
            cut = tuple(slice(size) for size in part.shape[1:])
            assert torch.equal(whole[seq.index][cut], part[0])
