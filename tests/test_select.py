# SPDX-License-Identifier: Apache-2.0
"""select through the op: masses, the rule's choice, forced blocks, against the fp64 reference."""

import cases
import pytest
import torch
from harness import (
    ISAS,
    bits_of,
    config_of,
    cut_of,
    four_verbs,
    geometry_of,
    sequences_of,
    takes,
)
from numerics import assert_blocks, assert_close

from pbs_attn import ops, reference


def check(q, k, v, config, case=None, isa="auto", tau_heads=None):
    run = four_verbs(q, k, v, config, geometry_of(case), tau_heads=tau_heads, isa=isa)
    assert (run.count >= 0).all()
    for seq in sequences_of(q, k, v, case):
        scorer = f"{config.select} {config.normalize} {config.permute}"
        what = f"select {scorer} {case and case.name} {isa}"
        bits = bits_of(run.bits, seq, config)
        assert torch.equal(run.count[seq.index, :, : bits.shape[1]], bits.sum(-1).int()), what
        seqlen_q, seqlen_k = seq.q.shape[1], seq.k.shape[1]
        if not bits.numel():
            continue
        options = dict(
            k_perm=run.k_perm[seq.index, :, :seqlen_k],
            q_perm=run.q_perm[seq.index, :, :seqlen_q] if run.q_perm is not None else None,
            permute=config.permute,
            method=config.select,
            stride=config.stride,
            reduce=config.reduce,
            rule=config.rule,
            normalize=config.normalize,
            tau=config.tau if tau_heads is None else tau_heads,
            **cut_of(config),
        )
        exact = reference.select(seq.q.double(), seq.k.double(), **options)
        low = reference.select(seq.q.float(), seq.k.float(), **options)
        mass = run.mass[seq.index, :, : bits.shape[1], : bits.shape[2]]
        # exp and log of a strip cost a few units in the last place on top
        noise = 4e-7
        assert_close(mass, exact.mass, low.mass, what=f"{what} mass", noise=noise)
        assert_blocks(bits, exact, rule=config.rule, tau=options["tau"], what=what)
    return run


@pytest.mark.parametrize("scorer, permute", cases.scored_orders())
@pytest.mark.parametrize("seqlen", cases.lengths())
def test_lengths(scorer, permute, seqlen):
    inputs = cases.make_inputs(21, (2, 1), seqlen)
    check(*inputs, config_of(permute=permute, **scorer))


@pytest.mark.parametrize("scorer, permute", cases.scored_orders(["none", "keys"]))
@pytest.mark.parametrize("rule, tau", cases.RULES)
def test_rules(scorer, rule, tau, permute):
    inputs = cases.make_inputs(22, (4, 2), 1100)
    check(*inputs, config_of(rule=rule, tau=tau, permute=permute, **scorer))


@pytest.mark.parametrize("stride", [1, 4, 16, 128])
@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize(
    "scorer, permute", cases.scored_orders(["none", "keys"], cases.SCORERS[1:])
)
def test_antidiagonal_strides(stride, reduce, scorer, permute):
    inputs = cases.make_inputs(23, (2, 1), 700)
    check(*inputs, config_of(stride=stride, reduce=reduce, permute=permute, **scorer))


@pytest.mark.parametrize("block_size", cases.BLOCK_SIZES)
@pytest.mark.parametrize("stride", [8, 16, 32, 64])
def test_antidiagonal_after_a_prefix(block_size, stride):
    """More groups of keys than the kernels meet at once, ragged ends on both sides."""
    seqlen_q, seqlen_k = block_size + stride + 5, 64 * stride + 2 * block_size + 77
    case = cases.Case("after a prefix", seqlen_q, seqlen_k, batch=1)
    inputs = cases.make_inputs(33, (2, 1), case=case)
    blocks = {"block_size": block_size, "segment_size": block_size}
    for permute, reduce in (("keys", "max"), ("none", "sum")):
        options = {"permute": permute, "reduce": reduce, "stride": stride, **blocks}
        check(*inputs, config_of(select="antidiagonal", **options), case)
    options = {"permute": "keys", "reduce": "max", "stride": stride, **cases.ROW, **blocks}
    check(*inputs, config_of(**options), case)


@pytest.mark.parametrize("scorer, permute", cases.scored_orders(["none", "identity", "keys"]))
@pytest.mark.parametrize("case", cases.geometries(), ids=lambda case: case.name)
def test_geometries_and_nan_padding(scorer, permute, case):
    inputs = cases.make_inputs(24, (4, 2), case=case, nan_padding=True)
    check(*inputs, config_of(permute=permute, **scorer), case)


@pytest.mark.parametrize("heads", cases.HEAD_RATIOS)
@pytest.mark.parametrize("gqa", ["per_head", "group"])
def test_head_ratios(heads, gqa):
    check(*cases.make_inputs(25, heads, 900), config_of(gqa=gqa))


@pytest.mark.parametrize("block_size, segment_size", [(64, 64), (64, 192), (256, 512)])
@pytest.mark.parametrize("scorer", cases.SCORERS)
def test_sizes(block_size, segment_size, scorer):
    config = config_of(block_size=block_size, segment_size=segment_size, **scorer)
    check(*cases.make_inputs(26, (2, 1), 3 * segment_size + 77), config)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("scorer", cases.SCORERS)
def test_every_isa(isa, dtype, scorer):
    inputs = cases.make_inputs(27, (2, 1), 700, head_dim=40, dtype=dtype)
    if takes(isa, dtype):
        check(*inputs, config_of(**scorer), isa=isa)


def test_tau_per_head():
    inputs = cases.make_inputs(28, (4, 2), 1500)
    tau = torch.tensor([0.1, 0.5, 0.9, 1.0])
    run = check(*inputs, config_of(), tau_heads=tau)
    for h, value in enumerate(tau.tolist()):
        alone = four_verbs(*inputs, config_of(tau=value))
        assert torch.equal(run.bits[:, h], alone.bits[:, h])


@pytest.mark.parametrize("scorer, permute", cases.scored_orders(["none", "identity", "keys"]))
def test_larger_tau_never_removes_a_block(scorer, permute):
    inputs = cases.make_inputs(29, (2, 1), 1500)
    before = None
    for tau in (0.0, 0.3, 0.6, 0.9, 0.99, 1.0):
        bits = four_verbs(*inputs, config_of(tau=tau, permute=permute, **scorer)).bits
        if before is not None:
            assert (before & ~bits).sum() == 0
        before = bits


def test_token_zero_is_always_kept():
    q, k, v = cases.make_inputs(30, (2, 1), 1500)
    run = four_verbs(q, k, v, config_of(rule="budget", tau=0.0))
    first = (run.k_perm == 0).int().argmax(-1) // 128  # block of token 0, [1, 2]
    for m in range(run.bits.shape[2]):
        for h in range(2):
            want = 1 << int(first[0, h]) if m >= 2 else 0
            assert int(run.bits[0, h, m, 0]) == want


def test_group_equals_per_head_where_every_query_head_has_its_keys():
    inputs = cases.make_inputs(31, (3, 3), 1000)
    one, other = (four_verbs(*inputs, config_of(gqa=gqa)) for gqa in ("per_head", "group"))
    for name in ("score", "k_perm", "k_pool", "v_pool", "bits", "count", "mass", "out", "lse"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_mass_is_optional():
    q, k, v = cases.make_inputs(32, (2, 1), 700)
    k_pool = ops.permute(q, k, v, mode="identity", pack=False)[2]
    full = ops.select(q, k, k_pool, mode="identity", return_mass=True)
    bare = ops.select(q, k, k_pool, mode="identity")
    assert bare[2].shape == (1, 2, 0, 0) and full[2].shape == (1, 2, 6, 6)
    assert torch.equal(bare[0], full[0]) and torch.equal(bare[1], full[1])
