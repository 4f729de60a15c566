# SPDX-License-Identifier: Apache-2.0
"""The fused prefill on CUDA's kernels, emulated or real: bit for bit their four verbs, exact over
its own plan, the plan that the CPU's kernels would make, the same bits wherever and whenever."""

import abi
import cases
import pytest
import test_golden
import torch
from harness import bits_of, check_prefill, config_of, cut_of, geometry_of, sequences_of
from numerics import assert_blocks, assert_k_perm
from test_emu_score import NOISE

from pbs_attn import ops, reference
from pbs_attn.selection import PERMUTES_QUERIES

BF16, FP16 = torch.bfloat16, torch.float16
SMALL = {"block_size": 64, "segment_size": 128}
NAMES = ("out", "lse", "count", "bits", "k_perm")  # what prefill gives
GEOMETRIES = cases.geometries(64, 128)


def check(backend, q, k, v, config, case=None, **heads):
    """prefill with its plan against the four verbs, the reference and the CPU's kernels."""
    geometry = geometry_of(case)
    got = backend.ops.prefill(
        q, k, v, config, geometry=geometry, return_lse=True, return_plan=True, **heads
    )
    out, lse, count, bits, k_perm = got
    run = backend.four_verbs(q, k, v, config, geometry, **heads)
    assert torch.equal(bits, run.bits) and torch.equal(count, run.count)
    assert torch.equal(k_perm, run.k_perm)
    assert torch.equal(out, run.out) and torch.equal(lse, run.lse)
    q_perm = run.q_perm if config.permute in PERMUTES_QUERIES else None
    what = f"{backend} prefill {config.permute} {config.select} {case and case.name}"
    check_prefill(out, lse, q, k, v, bits, k_perm, config, case, q_perm, what)
    check_plan(backend, q, k, v, bits, k_perm, q_perm, config, case, what, **heads)
    return got


def check_plan(backend, q, k, v, bits, k_perm, q_perm, config, case, what, **heads):
    """The order is that of the CPU's scores and the blocks are those of the exact masses, up to
    neighbours that fp32 cannot tell apart."""
    ordered = config.permute in ("keys", "both") and not {"k_perm_in", "permute_heads"} & set(heads)
    if ordered:
        score = ops.score(
            q, k, geometry=geometry_of(case), gqa=config.gqa, order=config.order, seed=config.seed,
            **cut_of(config),
        )  # fmt: skip
    tau = heads.get("tau_heads")
    for seq in sequences_of(q, k, v, case):
        keys, rows = seq.k.shape[1], seq.q.shape[1]
        own = k_perm[seq.index, :, :keys]
        if ordered:
            # two scores, each as far off as test_emu_score.py allows on a real GPU
            tolerance = 4 * NOISE[backend.name] or 1e-5
            assert_k_perm(
                own, score[seq.index, :, :keys], segment_size=config.segment_size,
                tolerance=tolerance, what=what,
            )  # fmt: skip
        if not rows or not keys:
            continue
        exact = reference.select(
            seq.q.double(), seq.k.double(), k_perm=own.long(),
            q_perm=None if q_perm is None else q_perm[seq.index, :, :rows].long(),
            permute=config.permute, method=config.select, stride=config.stride,
            reduce=config.reduce, rule=config.rule, normalize=config.normalize,
            tau=config.tau if tau is None else tau, **cut_of(config),
        )  # fmt: skip
        assert_blocks(
            bits_of(bits, seq, config), exact, rule=config.rule,
            tau=config.tau if tau is None else tau, what=what,
        )  # fmt: skip


@pytest.mark.parametrize("seqlen", [1, 63, 64, 65, 127, 129, 449])
def test_lengths(backend, seqlen):
    check(backend, *cases.make_inputs(61, (2, 1), seqlen, dtype=BF16), config_of(**SMALL))


@pytest.mark.parametrize("seqlen_q", [1, 37, 64, 129])
def test_chunks_over_many_segments(backend, seqlen_q):
    inputs = cases.make_inputs(62, (1, 1), seqlen_q, 769, dtype=BF16)
    check(backend, *inputs, config_of())


@pytest.mark.parametrize("scorer, permute", cases.scored_orders())
@pytest.mark.parametrize("correction", cases.CORRECTIONS)
def test_modes_and_methods(backend, permute, scorer, correction):
    inputs = cases.make_inputs(63, (2, 1), 193, 449, dtype=BF16)
    config = config_of(permute=permute, tau=0.6, correction=correction, **scorer, **SMALL)
    check(backend, *inputs, config)


PEAK = {**cases.PEAK, **SMALL}


@pytest.mark.parametrize("permute", ["identity", "keys"])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(65, 65), (37, 769), (449, 449)])
def test_peak(backend, permute, seqlen_q, seqlen_k):
    inputs = cases.make_inputs(76, (4, 2), seqlen_q, seqlen_k, dtype=BF16)
    check(backend, *inputs, config_of(**{**PEAK, "permute": permute, "tau": 0.08}))


@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda case: case.name)
def test_peak_geometries_and_nan_padding(backend, case):
    inputs = cases.make_inputs(77, (2, 1), case=case, dtype=BF16, nan_padding=True)
    check(backend, *inputs, config_of(**{**PEAK, "tau": 0.08}), case)


def test_peak_keeps_every_block_of_a_query_that_is_no_number(backend):
    """Nothing is left out for its head's block; the rows beside it are dense attention's."""
    q, k, v = cases.make_inputs(78, (2, 1), 449, dtype=BF16)
    q[0, 1, 330] = torch.nan
    _, _, count, _, _ = backend.ops.prefill(
        q, k, v, config_of(**{**PEAK, "tau": 0.5}), return_plan=True
    )
    assert count[0, 1, 5] == 4 and count[0, 0, 5] < 4


@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda case: case.name)
def test_geometries_and_nan_padding(backend, case):
    inputs = cases.make_inputs(64, (1, 1), case=case, dtype=BF16, nan_padding=True)
    check(backend, *inputs, config_of(**SMALL), case)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("head_dim", [8, 96, 128, 200])
def test_dtypes_and_head_dims(backend, dtype, head_dim):
    inputs = cases.make_inputs(65, (1, 1), 130, 300, head_dim=head_dim, dtype=dtype)
    check(backend, *inputs, config_of(**SMALL))


@pytest.mark.parametrize("heads", [(3, 1), (4, 2)])
@pytest.mark.parametrize("gqa", ["per_head", "group"])
def test_head_ratios(backend, heads, gqa):
    inputs = cases.make_inputs(66, heads, 100, 385, dtype=BF16)
    check(backend, *inputs, config_of(gqa=gqa, **SMALL))


@pytest.mark.parametrize("rule, tau", cases.RULES)
def test_rules(backend, rule, tau):
    inputs = cases.make_inputs(67, (1, 1), 65, 640, dtype=BF16)
    check(backend, *inputs, config_of(rule=rule, tau=tau, **SMALL))


@pytest.mark.parametrize("order", cases.ORDERS[1:])
def test_orders(backend, order):
    inputs = cases.make_inputs(68, (2, 1), 100, 400, dtype=BF16)
    check(backend, *inputs, config_of(order=order, seed=3, **SMALL))


def test_per_head_tau_and_order(backend):
    inputs = cases.make_inputs(69, (4, 2), 70, 450, dtype=BF16)
    tau = torch.tensor([0.2, 0.6, 0.9, 1.0])
    heads = torch.tensor([1, 0, 1, 0], dtype=torch.int32)
    check(backend, *inputs, config_of(**SMALL), tau_heads=tau, permute_heads=heads)


def test_a_given_order_is_used(backend):
    inputs = cases.make_inputs(70, (2, 1), 70, 450, dtype=BF16)
    want = check(backend, *inputs, config_of(**SMALL))
    again = check(backend, *inputs, config_of(**SMALL), k_perm_in=want[4])
    assert all(map(torch.equal, want, again))


@pytest.mark.parametrize("layout", cases.LAYOUTS[1:])
def test_layouts(backend, layout):
    plain = cases.make_inputs(71, (2, 1), 70, 300, dtype=FP16, batch=2)
    laid = [cases.lay_out(x, layout) for x in plain]
    options = {"return_lse": True, "return_plan": True}
    want = backend.ops.prefill(*plain, config_of(**SMALL), **options)
    assert all(map(torch.equal, want, backend.ops.prefill(*laid, config_of(**SMALL), **options)))


@pytest.mark.parametrize(
    ("launches", "options"),
    [
        (5, {}),  # rows of the probe; their keys' scores, order, rows; select; order; attend
        (4, {"seqlen": 100}),  # no segment is whole: nothing is scored
        (4, {"permute": "identity"}),
        (4, {"permute": "identity", "select": "antidiagonal", "correction": "mean"}),
        (6, {"permute": "both"}),
        (6, {"gqa": "group"}),  # the probe is a mean
        (7, {"order": "mean_query"}),  # of all rows
        (5, {"order": "random"}),  # no probe; scores and order one after the other
    ],
)
def test_launches(backend, launches, options):
    options = {"seqlen": 300, **SMALL, **options}
    seqlen = options.pop("seqlen")
    inputs = cases.make_inputs(79, (4, 2), seqlen, seqlen, dtype=BF16)
    before = backend.launches()
    backend.ops.prefill(*inputs, config_of(**options))
    assert backend.launches() - before == launches


def test_same_bits_under_every_schedule(backend):
    """Threads in any order, copies early or late: a difference is a race."""
    inputs = cases.make_inputs(72, (2, 1), 130, 400, dtype=BF16)
    want = backend.ops.prefill(*inputs, config_of(**SMALL), return_lse=True, return_plan=True)
    for seed, delivery in ((1, "lazy"), (2, "random"), (3, "random"), (4, "eager")):
        backend.schedule(seed, delivery)
        again = backend.ops.prefill(*inputs, config_of(**SMALL), return_lse=True, return_plan=True)
        assert all(map(torch.equal, want, again)), f"seed {seed}, {delivery}"


@pytest.mark.parametrize("name", ["left_padding", "packed", "no_keys"])
def test_same_bits_at_any_place_in_a_batch(backend, name):
    case = next(case for case in GEOMETRIES if case.name == name)
    inputs = cases.make_inputs(73, (2, 1), case=case, dtype=BF16)
    options = {"return_lse": True, "return_plan": True}
    out, lse, count, bits, k_perm = backend.ops.prefill(
        *inputs, config_of(**SMALL), geometry=geometry_of(case), **options
    )
    for seq in sequences_of(*inputs, case):
        if not seq.q.shape[1]:
            continue
        own = (x[None] for x in (seq.q, seq.k, seq.v))
        alone = backend.ops.prefill(*own, config_of(**SMALL), **options)
        assert torch.equal(out[seq.row, :, seq.rows], alone[0][0])
        assert torch.equal(lse[seq.row, :, seq.rows], alone[1][0])
        tq, w = alone[2].shape[2], alone[3].shape[3]
        assert torch.equal(count[seq.index, :, :tq], alone[2][0])
        assert torch.equal(bits[seq.index, :, :tq, :w], alone[3][0])
        assert torch.equal(k_perm[seq.index, :, : seq.k.shape[1]], alone[4][0])


@pytest.mark.parametrize("permute", ["keys", "both", "peak"])
@pytest.mark.parametrize("given", ["nothing", "heads", "order"])
def test_waves_of_one_head_give_the_same_bits(backend, permute, given):
    """Every pointer of the call is moved on for every wave: to its sequence and its heads."""
    options = {**PEAK, "permute": "keys"} if permute == "peak" else {"permute": permute, **SMALL}
    config = config_of(**options)
    case = cases.Case("two", 70, 300, (5, 0), (65, 50), (0, 30), (300, 260))
    inputs = cases.make_inputs(74, (4, 2), case=case, dtype=BF16)
    heads = {}
    if given == "heads":
        heads["tau_heads"] = torch.tensor([0.2, 0.9, 0.5, 1.0])
        heads["permute_heads"] = torch.tensor([1, 0, 0, 1], dtype=torch.int32)
    if given == "order":
        heads["k_perm_in"] = orders(2, 4, case.seqlen_k, case.kv_len)
    geometry = geometry_of(case)
    want = backend.ops.prefill(
        *inputs, config, geometry=geometry, return_lse=True, return_plan=True, **heads
    )
    there = [x.to(backend.device) for x in inputs]
    options = {name: x.to(backend.device) for name, x in heads.items()}
    options["geometry"] = [x.to(backend.device) for x in geometry.vectors]
    library = abi.Library(backend.path)
    *whole, most = library.prefill(*there, config, **options)
    *waves, least = library.prefill(*there, config, workspace_cap=1, **options)  # one head fits
    assert least < most
    for name, *three in zip(NAMES, want, whole, waves, strict=True):
        assert torch.equal(three[0], three[1].cpu()), f"{name} of one wave"
        assert torch.equal(three[0], three[2].cpu()), f"{name} of several waves"


def test_counters_of_the_host_are_refused(backend):
    x = torch.randn(1, 1, 128, 64).bfloat16().to(backend.device)
    counters = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(AssertionError, match='status 8: counters: given; the backend "cuda"'):
        abi.Library(backend.path).prefill(x, x, x, config_of(**SMALL), counters=counters)
    assert not counters.any()


def orders(batch, heads, seqlen, lengths, segment=SMALL["segment_size"]):
    """int32 [B, H, N]: another order in every segment of every head; the tail keeps its own."""
    g = torch.Generator().manual_seed(0)
    k_perm = torch.arange(seqlen).repeat(batch, heads, 1)
    for b in range(batch):
        for begin in range(0, lengths[b] // segment * segment, segment):
            for h in range(heads):
                k_perm[b, h, begin : begin + segment] = begin + torch.randperm(segment, generator=g)
    return k_perm.int()


def test_out_variant_equals_the_functional_op(backend):
    case = next(case for case in GEOMETRIES if case.name == "right_padding")
    inputs = cases.make_inputs(75, (2, 1), case=case, dtype=BF16, nan_padding=True)
    options = {"geometry": geometry_of(case)}
    config = config_of(**SMALL)
    want, want_lse, *_ = backend.ops.prefill(*inputs, config, return_lse=True, **options)
    strided = torch.zeros(2, 2, case.seqlen_q, 64, dtype=BF16)  # (B, H, N, D) memory
    lse = torch.full_like(want_lse, -torch.inf)
    backend.ops.prefill_out(*inputs, config, strided.transpose(1, 2), lse, **options)
    assert torch.equal(strided, want) and torch.equal(lse, want_lse)


# ---- the vectors made with the authors' code: blocks and orders exactly as on the CPU ------------
LABELS = [x for x, g in test_golden.GOLDEN.items() if x.startswith("cut-") and g["q"].dtype == BF16]


@pytest.mark.parametrize("gqa", ["per_head", "group"])
@pytest.mark.parametrize("label", LABELS)
def test_golden_orders_and_blocks(backend, label, gqa):
    test_golden.test_k_perm(label, backend, gqa)
    for tau in test_golden.TAUS:
        test_golden.test_blocks(label, backend, gqa, tau)


@pytest.mark.parametrize("label", LABELS)
def test_golden_natural_order_and_antidiagonals(backend, label):
    test_golden.test_mean_pooling(label, backend)
    for method in ("xattn", "pbsplus"):
        test_golden.test_antidiagonal(label, backend, method)
