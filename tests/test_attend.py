# SPDX-License-Identifier: Apache-2.0
"""attend through the op: own-span modes, packed panels, masks, against the fp64 reference."""

import cases
import pytest
import torch
from harness import (
    ISAS,
    check_attention,
    check_prefill,
    config_of,
    four_verbs,
    geometry_of,
    sequences_of,
    takes,
)
from numerics import assert_close, low_precision_attend, pack

from pbs_attn import ops, reference


def random_blocks(heads, seqlen_q, seqlen_k, block_q=128, block_k=128, density=0.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (heads, -(-seqlen_q // block_q), -(-seqlen_k // block_k))
    return torch.rand(shape, generator=g) < density


def check(
    q, k, v, blocks, case=None, own="segment", isa="auto", scale=None, *, ops=ops, **cut
):  # fmt: skip
    """blocks bool [heads_sel, Tq, Tk], for every sequence; k in natural order."""
    cut = {"block_q": 128, "block_k": 128, "segment_size": 256} | cut
    geometry = geometry_of(case)
    num = geometry.num_sequences(q.shape[0])
    bits = pack(blocks)[None].expand(num, -1, -1, -1).contiguous()
    out, lse = ops.attend(
        q,
        k,
        v,
        bits if own != "all" else None,
        geometry=geometry,
        own=own,
        return_lse=True,
        isa=isa,
        softmax_scale=scale,
        **cut,
    )
    assert out.shape == q.shape and out.transpose(1, 2).is_contiguous()
    live = torch.zeros(out.shape[0], out.shape[2], dtype=torch.bool)
    for seq in sequences_of(q, k, v, case):
        live[seq.row, seq.rows] = True
        tq, tk = -(-seq.q.shape[1] // cut["block_q"]), -(-seq.k.shape[1] // cut["block_k"])
        check_attention(
            out[seq.row, :, seq.rows],
            lse[seq.row, :, seq.rows],
            seq,
            blocks[:, :tq, :tk],
            own=own,
            softmax_scale=scale,
            what=f"attend {own} {case and case.name} {isa} {cut}",
            **cut,
        )
    outside = ~live[:, None].expand(out.shape[:3])
    assert (out[outside] == 0).all() and torch.isneginf(lse[outside]).all()
    return out, lse


OWNS = ("segment", "block", "mask", "none", "all")
OWN_AND_CORRECTION = [
    (own, correction)
    for own in OWNS
    for correction in cases.CORRECTIONS
    if own != "all" or correction == "none"
]


@pytest.mark.parametrize("own, correction", OWN_AND_CORRECTION)
@pytest.mark.parametrize("seqlen", cases.lengths())
def test_lengths(own, correction, seqlen):
    inputs = cases.make_inputs(41, (2, 1), seqlen)
    check(*inputs, random_blocks(2, seqlen, seqlen), own=own, correction=correction)


@pytest.mark.parametrize("own, correction", OWN_AND_CORRECTION)
@pytest.mark.parametrize("case", cases.geometries(), ids=lambda case: case.name)
def test_geometries_and_nan_padding(own, correction, case):
    inputs = cases.make_inputs(42, (2, 1), case=case, nan_padding=True)
    blocks = random_blocks(2, case.seqlen_q, case.seqlen_k)
    check(*inputs, blocks, case, own=own, correction=correction)


@pytest.mark.parametrize("heads", cases.HEAD_RATIOS)
@pytest.mark.parametrize("per_kv_head", [False, True])
@pytest.mark.parametrize("correction", cases.CORRECTIONS)
def test_head_ratios(heads, per_kv_head, correction):
    inputs = cases.make_inputs(43, heads, 700)
    blocks = random_blocks(heads[per_kv_head], 700, 700)
    check(*inputs, blocks, own="mask", correction=correction)


@pytest.mark.parametrize("head_dim", cases.HEAD_DIMS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("correction", cases.CORRECTIONS)
def test_head_dims_and_dtypes(head_dim, dtype, correction):
    inputs = cases.make_inputs(44, (2, 1), 530, head_dim=head_dim, dtype=dtype)
    check(*inputs, random_blocks(2, 530, 530), correction=correction)


@pytest.mark.parametrize("block_q", cases.BLOCK_SIZES)
@pytest.mark.parametrize("block_k", cases.BLOCK_SIZES)
@pytest.mark.parametrize("correction", cases.CORRECTIONS)
def test_block_sizes_of_a_mask(block_q, block_k, correction):
    inputs = cases.make_inputs(45, (2, 1), 900)
    blocks = random_blocks(2, 900, 900, block_q, block_k)
    cut = {"block_q": block_q, "block_k": block_k, "correction": correction}
    check(*inputs, blocks, own="mask", **cut)


@pytest.mark.parametrize("block, segment", [(64, 64), (64, 192), (256, 512), (128, 1024)])
@pytest.mark.parametrize("correction", cases.CORRECTIONS)
def test_sizes_of_segments(block, segment, correction):
    inputs = cases.make_inputs(46, (1, 1), 1300)
    blocks = random_blocks(1, 1300, 1300, block, block)
    cut = {"block_q": block, "block_k": block, "segment_size": segment}
    check(*inputs, blocks, correction=correction, **cut)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(layout):
    laid = cases.make_inputs(47, (4, 2), 530, batch=2, layout=layout)
    plain = cases.make_inputs(47, (4, 2), 530, batch=2)
    blocks = random_blocks(4, 530, 530)
    assert all(map(torch.equal, check(*laid, blocks), check(*plain, blocks)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("head_dim", [40, 64, 256])
@pytest.mark.parametrize("own, correction", [x for x in OWN_AND_CORRECTION if x[0] in
                                             ("segment", "mask", "all")])  # fmt: skip
def test_every_isa(isa, dtype, head_dim, own, correction):
    inputs = cases.make_inputs(48, (2, 1), 400, head_dim=head_dim, dtype=dtype)
    if takes(isa, dtype):
        check(*inputs, random_blocks(2, 400, 400), own=own, isa=isa, correction=correction)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("own", ["segment", "block", "mask", "none"])
def test_empty_and_full_selection(density, own):
    inputs = cases.make_inputs(49, (2, 1), 900)
    out, lse = check(*inputs, random_blocks(2, 900, 900, density=density), own=own)
    if density == 0.0 and own in ("mask", "none"):
        assert (out == 0).all() and torch.isneginf(lse).all()
    if density == 1.0 and own != "none":
        dense = ops.attend(*inputs, own="all", return_lse=True)
        low = low_precision_attend(*(x[0] for x in inputs), None, own="all")
        exact = reference.attend(*(x[0].double() for x in inputs), own="all")
        assert_close(out[0], exact[0], low[0], what="full selection")
        assert_close(dense[0][0], exact[0], low[0], what="dense")


@pytest.mark.parametrize("correction", cases.CORRECTIONS)
def test_softmax_scale(correction):
    inputs = cases.make_inputs(50, (2, 1), 530)
    check(*inputs, random_blocks(2, 530, 530), scale=0.37, correction=correction)


@pytest.mark.parametrize("correction", cases.CORRECTIONS)
def test_two_calls_merge_through_lse(correction):
    """History alone (own="none") and the own span alone give the whole, weighted by exp(lse).
    Means of dropped blocks belong to history."""
    q, k, v = cases.make_inputs(51, (2, 1), 900)
    blocks = random_blocks(2, 900, 900)
    whole, whole_lse = check(q, k, v, blocks, own="segment", correction=correction)
    history, history_lse = check(q, k, v, blocks, own="none", correction=correction)
    own, own_lse = check(q, k, v, torch.zeros_like(blocks), own="segment")
    lse = torch.logaddexp(history_lse, own_lse)
    merged = sum(
        out * (part - lse).exp().unsqueeze(-1)
        for out, part in ((history, history_lse), (own, own_lse))
    )
    torch.testing.assert_close(merged, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, whole_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gqa", ["per_head", "group"])
@pytest.mark.parametrize("permute", cases.PERMUTES)
@pytest.mark.parametrize("correction", cases.CORRECTIONS)
def test_packed_panels_of_permute(gqa, permute, correction):
    """Panels packed by permute, permuted history and original own span, give the selection."""
    config = config_of(permute=permute, gqa=gqa, tau=0.6, correction=correction)
    inputs = cases.make_inputs(52, (4, 2), 811, dtype=torch.bfloat16)
    run = four_verbs(*inputs, config)
    q_perm = run.q_perm
    check_prefill(run.out, run.lse, *inputs, run.bits, run.k_perm, config, q_perm=q_perm)


@pytest.mark.parametrize("correction", cases.CORRECTIONS)
def test_natural_order_needs_no_packed(correction):
    inputs = cases.make_inputs(53, (2, 1), 900)
    config = config_of(permute="identity", tau=0.6, correction=correction)
    run = four_verbs(*inputs, config)
    out, lse = ops.attend(*inputs, run.bits, return_lse=True, correction=correction)
    assert torch.equal(out, run.out) and torch.equal(lse, run.lse)


def test_packed_with_means_serves_a_call_without():
    inputs = cases.make_inputs(56, (2, 1), 900)
    plain, mean = config_of(tau=0.6), config_of(tau=0.6, correction="mean")
    want, other = four_verbs(*inputs, plain), four_verbs(*inputs, mean)
    assert other.packed.numel() > want.packed.numel()
    out, lse = ops.attend(*inputs, want.bits, packed=other.packed, return_lse=True)
    assert torch.equal(out, want.out) and torch.equal(lse, want.lse)


def test_lse_is_optional_and_changes_nothing():
    inputs = cases.make_inputs(54, (2, 1), 600)
    with_lse = ops.attend(*inputs, own="all", return_lse=True)
    without = ops.attend(*inputs, own="all")
    assert torch.equal(with_lse[0], without[0]) and without[1].shape == (0,)


def test_out_variant_leaves_other_rows_alone():
    case = next(case for case in cases.geometries() if case.name == "left_padding")
    q, k, v = cases.make_inputs(55, (4, 2), case=case, nan_padding=True)
    out = torch.full((2, case.seqlen_q, 4, 96), 7.0)[..., :64]  # rows with a gap between them
    lse = torch.full((2, 4, case.seqlen_q), 7.0)
    ops.attend_out(q, k, v, None, out, lse, geometry=geometry_of(case), own="all")
    want, want_lse = ops.attend(q, k, v, geometry=geometry_of(case), own="all", return_lse=True)
    inside = torch.zeros(2, case.seqlen_q, dtype=torch.bool)
    for seq in sequences_of(q, k, v, case):
        inside[seq.row, seq.rows] = True
    assert torch.equal(out[inside], want.transpose(1, 2)[inside])
    assert (out[~inside] == 7).all()
    assert torch.equal(lse.transpose(1, 2)[inside], want_lse.transpose(1, 2)[inside])
    assert (lse.transpose(1, 2)[~inside] == 7).all()
