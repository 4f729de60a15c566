# SPDX-License-Identifier: Apache-2.0
"""permute through the op: exact stable order, pools, rows by centroid, given orders."""

import cases
import pytest
import torch
from harness import ISAS, geometry_of, sequences_of, takes
from numerics import assert_close, assert_k_perm

from pbs_attn import ops, reference


def check(q, k, v, case=None, mode="keys", gqa="per_head", isa="auto", *, ops=ops, **cut):
    cut = {"block_size": 128, "segment_size": 256} | cut
    geometry = geometry_of(case)
    score = None
    if mode in ("keys", "both"):
        score = ops.score(q, k, geometry=geometry, gqa=gqa, isa=isa, **cut)
    k_perm, q_perm, k_pool, v_pool, packed = ops.permute(
        q, k, v, score, geometry=geometry, mode=mode, gqa=gqa, isa=isa, **cut
    )
    assert packed.numel() and k_perm.dtype == torch.int32
    for seq in sequences_of(q, k, v, case):
        seqlen_k, seqlen_q = seq.k.shape[1], seq.q.shape[1]
        what = f"permute {mode} {case and case.name} {isa} sequence {seq.index}"
        perm = k_perm[seq.index, :, :seqlen_k]
        if mode in ("keys", "both"):
            own_score = score[seq.index, :, :seqlen_k]
            assert_k_perm(perm, own_score, segment_size=cut["segment_size"], what=what)
        else:
            assert (perm == torch.arange(seqlen_k)).all(), what
        beyond = k_perm[seq.index, :, seqlen_k:]
        rest = torch.arange(seqlen_k, k_perm.shape[2])
        assert (beyond == rest).all(), f"{what}: not the identity beyond the sequence"
        check_pools(seq, perm, k_pool, v_pool, cut["block_size"], what)
        if mode in ("queries", "both"):
            # Fixed inputs without near ties: rows must be the very same.
            exact = reference.permute(
                seq.q.double(), seq.k.double(), own_score.double() if mode == "both" else None,
                permute=mode, gqa=gqa, k_perm=perm if mode == "both" else None, **cut,
            )[1]  # fmt: skip
            assert torch.equal(q_perm[seq.index, :, :seqlen_q].long(), exact), what
        else:
            assert q_perm.shape[2] == 0
    return k_perm, q_perm, k_pool, v_pool


def pool_in_order(x, block_size, perm):
    """reference.pool by fp32 sums row after row: honest arithmetic for a contract that says so."""
    x = x.float().gather(1, perm.long()[..., None].expand_as(x))
    means = []
    for block in x.split(block_size, 1):
        total = torch.zeros_like(block[:, 0])
        for row in block.unbind(1):
            total = total + row
        means.append(total / max(block.shape[1], 1))
    return torch.stack(means, 1)


def check_pools(seq, perm, k_pool, v_pool, block_size, what):
    heads = perm.shape[0]
    for name, pool, x in (("k_pool", k_pool, seq.k), ("v_pool", v_pool, seq.v)):
        each = x.repeat_interleave(heads // x.shape[0], 0)
        if not x.shape[1]:
            continue
        exact = reference.pool(each.double(), block_size, perm)
        low = pool_in_order(each, block_size, perm)
        got = pool[seq.index, :, : exact.shape[1]]
        assert_close(got, exact, low, what=f"{what} {name}")


@pytest.mark.parametrize("mode", cases.PERMUTES)
@pytest.mark.parametrize("seqlen", cases.lengths())
def test_lengths(mode, seqlen):
    check(*cases.make_inputs(11, (4, 2), seqlen), mode=mode)


@pytest.mark.parametrize("mode", ["keys", "queries", "both"])
@pytest.mark.parametrize("heads", cases.HEAD_RATIOS)
@pytest.mark.parametrize("gqa", ["per_head", "group"])
def test_head_ratios(mode, heads, gqa):
    check(*cases.make_inputs(12, heads, 530), mode=mode, gqa=gqa)


@pytest.mark.parametrize("mode", ["keys", "both"])
@pytest.mark.parametrize("case", cases.geometries(), ids=lambda case: case.name)
def test_geometries_and_nan_padding(mode, case):
    check(*cases.make_inputs(13, (4, 2), case=case, nan_padding=True), case, mode=mode)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(layout):
    laid = check(*cases.make_inputs(14, (4, 2), 530, batch=2, layout=layout), mode="both")
    plain = check(*cases.make_inputs(14, (4, 2), 530, batch=2), mode="both")
    assert all(map(torch.equal, laid, plain))


@pytest.mark.parametrize("block_size, segment_size", [(64, 64), (64, 192), (256, 512), (128, 2048)])
def test_sizes(block_size, segment_size):
    inputs = cases.make_inputs(15, (2, 1), 2 * segment_size + 77)
    check(*inputs, block_size=block_size, segment_size=segment_size)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_every_isa(isa, dtype):
    if takes(isa, dtype):
        check(*cases.make_inputs(16, (2, 1), 530, head_dim=40, dtype=dtype), isa=isa)


def test_ties_go_by_position():
    q, k, v = cases.make_inputs(17, (2, 1), 600)
    score = torch.zeros(1, 2, 600)
    score[:, :, 5::7] = 1.0
    score[:, :, 300:310] = -0.0  # equal to +0.0, so nothing moves
    k_perm = ops.permute(q, k, v, score, pack=False)[0]
    assert_k_perm(k_perm[0], score[0], what="ties")


def test_heads_in_natural_order():
    q, k, v = cases.make_inputs(18, (4, 2), 600)
    score = ops.score(q, k)
    heads = torch.tensor([1, 0, 0, 1], dtype=torch.int32)
    every = ops.permute(q, k, v, score)[0]
    some = ops.permute(q, k, v, score, permute_heads=heads)[0]
    natural = torch.arange(600, dtype=torch.int32)
    for h, on in enumerate(heads.tolist()):
        assert torch.equal(some[0, h], every[0, h] if on else natural)


def test_a_given_order_is_taken():
    q, k, v = cases.make_inputs(19, (2, 1), 600)
    score = torch.rand(1, 2, 600, generator=torch.Generator().manual_seed(0))
    given = ops.permute(q, k, v, score)[0]
    again = ops.permute(q, k, v, None, k_perm_in=given)
    direct = ops.permute(q, k, v, score)
    assert all(map(torch.equal, again, direct))


def test_one_segment_or_less_is_not_permuted():
    for seqlen in (1, 100, 256):
        q, k, v = cases.make_inputs(20, (2, 1), seqlen)
        k_perm = ops.permute(q, k, v, ops.score(q, k))[0]
        assert torch.equal(k_perm, torch.arange(seqlen, dtype=torch.int32).expand(1, 2, -1))
