# SPDX-License-Identifier: Apache-2.0
"""attend on CUDA's kernels, emulated or real: every own mode against fp64, packed and permuted
rows, NaN outside the sequences, the same bits whatever the schedule and the place in a batch.

Blocks of 64 keep it small; Nk of three segments and more, so that a walk has all of its parts."""

import itertools

import cases
import pytest
import test_attend
import torch
from harness import check_prefill, config_of, geometry_of, sequences_of
from numerics import assert_close, low_precision_attend, pack
from test_attend import random_blocks

from pbs_attn import ops, reference
from pbs_attn.geometry import Geometry

BF16, FP16 = torch.bfloat16, torch.float16
OWNS = test_attend.OWNS
SMALL = {"block_q": 64, "block_k": 64, "segment_size": 128}
GEOMETRIES = cases.geometries(64, 128)


def blocks_of(heads, seqlen_q, seqlen_k, seed=0, density=0.5):
    return random_blocks(heads, seqlen_q, seqlen_k, 64, 64, density, seed)


def check(backend, inputs, blocks, case=None, **options):
    return test_attend.check(*inputs, blocks, case, ops=backend.ops, **{**SMALL, **options})


@pytest.mark.parametrize("own", OWNS)
@pytest.mark.parametrize("seqlen", cases.lengths(64, 128))
def test_lengths(backend, own, seqlen):
    inputs = cases.make_inputs(141, (2, 1), seqlen, dtype=BF16)
    check(backend, inputs, blocks_of(2, seqlen, seqlen), own=own)


@pytest.mark.parametrize("own", OWNS)
@pytest.mark.parametrize("seqlen_q", [1, 2, 31, 63, 64, 65, 127, 128, 129])
def test_few_rows_against_six_segments(backend, own, seqlen_q):
    """Chunks whose first row stands anywhere in a tile: 769 - seqlen_q."""
    inputs = cases.make_inputs(142, (2, 1), seqlen_q, 769, dtype=FP16)
    check(backend, inputs, blocks_of(2, seqlen_q, 769), own=own)


@pytest.mark.parametrize("own", OWNS)
@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda case: case.name)
def test_geometries_and_nan_padding(backend, own, case):
    inputs = cases.make_inputs(143, (2, 1), case=case, dtype=BF16, nan_padding=True)
    check(backend, inputs, blocks_of(2, case.seqlen_q, case.seqlen_k), case, own=own)


@pytest.mark.parametrize("heads", cases.HEAD_RATIOS)
@pytest.mark.parametrize("per_kv_head", [False, True])
@pytest.mark.parametrize("own", ["segment", "mask"])
def test_head_ratios(backend, heads, per_kv_head, own):
    inputs = cases.make_inputs(144, heads, 300, dtype=BF16)
    check(backend, inputs, blocks_of(heads[per_kv_head], 300, 300), own=own)


@pytest.mark.parametrize("head_dim", cases.HEAD_DIMS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("block", [64, 128])
def test_head_dims_and_dtypes(backend, isa, head_dim, dtype, block):
    """Every kernel that is built: each head_dim with 64 and with 128 rows a block."""
    inputs = cases.make_inputs(145, (2, 1), 3 * 128 + 53, head_dim=head_dim, dtype=dtype)
    blocks = random_blocks(2, 437, 437, block, block)
    check(backend, inputs, blocks, block_q=block, block_k=block, isa=isa)


@pytest.mark.parametrize("block_q", cases.BLOCK_SIZES)
@pytest.mark.parametrize("block_k", cases.BLOCK_SIZES)
@pytest.mark.parametrize("own", ["mask", "all"])
def test_block_sizes_of_a_mask(backend, block_q, block_k, own):
    inputs = cases.make_inputs(146, (1, 1), 300, 570, dtype=BF16)
    blocks = random_blocks(1, 300, 570, block_q, block_k)
    check(backend, inputs, blocks, own=own, block_q=block_q, block_k=block_k)


@pytest.mark.parametrize("block, segment", [(64, 64), (64, 192), (128, 256), (256, 512)])
@pytest.mark.parametrize("own", ["segment", "none"])
def test_sizes_of_segments(backend, block, segment, own):
    inputs = cases.make_inputs(147, (1, 1), 90, 3 * segment + 41, dtype=BF16)
    blocks = random_blocks(1, 90, 3 * segment + 41, block, block)
    check(backend, inputs, blocks, own=own, block_q=block, block_k=block, segment_size=segment)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(backend, layout):
    laid = cases.make_inputs(148, (4, 2), 300, batch=2, dtype=BF16, layout=layout)
    plain = cases.make_inputs(148, (4, 2), 300, batch=2, dtype=BF16)
    blocks = blocks_of(4, 300, 300)
    assert all(map(torch.equal, check(backend, laid, blocks), check(backend, plain, blocks)))


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("own", OWNS[:4])
def test_empty_and_full_selection(backend, density, own):
    inputs = cases.make_inputs(149, (2, 1), 450, dtype=BF16)
    out, lse = check(backend, inputs, blocks_of(2, 450, 450, density=density), own=own)
    if density == 0.0 and own in ("mask", "none"):
        assert (out == 0).all() and torch.isneginf(lse).all()
    if density == 1.0 and own != "none":
        low = low_precision_attend(*(x[0] for x in inputs), None, own="all", block_q=64)
        exact = reference.attend(*(x[0].double() for x in inputs), own="all", block_q=64)
        assert_close(out[0], exact[0], low[0], what="full selection")


def test_lists_longer_than_a_word(backend):
    """70 key blocks: three words of bits, an empty one among them; one row block reads them all."""
    inputs = cases.make_inputs(150, (2, 1), 20, 4480, head_dim=16, dtype=FP16)
    blocks = blocks_of(2, 20, 4480, density=0.3)
    blocks[:, :, 32:64] = False
    check(backend, inputs, blocks)
    blocks[1] = False
    blocks[1, :, 0] = True
    check(backend, inputs, blocks)


def test_softmax_scale_and_large_logits(backend):
    """Logits of some thousands: only differences to the row maximum may enter an exponential."""
    q, k, v = cases.make_inputs(151, (2, 1), 300, dtype=FP16)
    check(backend, (q, k, v), blocks_of(2, 300, 300), scale=0.37)
    check(backend, (40 * q, 4 * k, v), blocks_of(2, 300, 300))
    check(backend, (-40 * q, 4 * k, v), blocks_of(2, 300, 300), own="none")


@pytest.mark.parametrize("gqa", ["per_head", "group"])
@pytest.mark.parametrize("permute", cases.PERMUTES)
def test_packed_rows_of_permute(backend, isa, gqa, permute):
    """Permuted history, original own span, queries by index: all four verbs of one backend."""
    config = config_of(permute=permute, gqa=gqa, tau=0.6, block_size=64, segment_size=128)
    inputs = cases.make_inputs(152, (4, 2), 421, dtype=BF16)
    run = backend.four_verbs(*inputs, config, isa=isa)
    check_prefill(
        run.out, run.lse, *inputs, run.bits, run.k_perm, config, q_perm=run.q_perm, what=permute
    )


def packed_call(backend, inputs, on, q_perm=None, own="segment", geometry=None, **options):
    """(out, lse, k_perm, blocks) over keys permuted at random in the heads that are on."""
    q, k, v = inputs
    batch = (geometry or Geometry()).num_sequences(q.size(0))
    g = torch.Generator().manual_seed(153)
    score = torch.rand(batch, q.size(1), k.size(2), generator=g)
    cut = {"geometry": geometry or Geometry(), "segment_size": 128}
    k_perm, _, _, _, packed = backend.ops.permute(
        q, k, v, score, permute_heads=torch.tensor(on, dtype=torch.int32), block_size=64, **cut
    )
    blocks = blocks_of(q.size(1), q.size(2), k.size(2))
    bits = pack(blocks)[None].expand(batch, -1, -1, -1).contiguous()
    out, lse = backend.ops.attend(
        q, k, v, bits, packed=packed, q_perm=q_perm, own=own, return_lse=True,
        block_q=64, block_k=64, **cut, **options,
    )  # fmt: skip
    return out, lse, k_perm, blocks


@pytest.mark.parametrize("own", ["segment", "none"])
@pytest.mark.parametrize("on", [(1, 0, 0, 1), (0, 0, 0, 0), (1, 1, 1, 1)])
def test_heads_that_are_permuted_beside_others(backend, own, on):
    """A head that is not permuted reads the caller's K and V, and any order of rows is one."""
    inputs = cases.make_inputs(154, (4, 2), 421, dtype=BF16)
    shuffled = [torch.randperm(n, generator=torch.Generator().manual_seed(n)) + at
                for at, n in ((0, 128), (128, 128), (256, 128), (384, 37))]  # fmt: skip
    q_perm = torch.cat(shuffled).int().expand(1, 4, -1).contiguous()
    for rows in (None, q_perm):
        out, lse, k_perm, blocks = packed_call(backend, inputs, on, rows, own)
        for seq in sequences_of(*inputs):
            test_attend.check_attention(
                out[0], lse[0], seq, blocks, k_perm=k_perm[0], own=own,
                q_perm=None if rows is None else rows[0], what=f"{on} {own}", **SMALL,
            )  # fmt: skip


@pytest.mark.parametrize("case", GEOMETRIES[:3] + GEOMETRIES[10:], ids=lambda case: case.name)
def test_packed_rows_of_many_sequences(backend, case):
    inputs = cases.make_inputs(155, (4, 2), case=case, dtype=BF16, nan_padding=True)
    geometry = geometry_of(case)
    out, lse, k_perm, blocks = packed_call(backend, inputs, (1, 1, 0, 1), geometry=geometry)
    for seq in sequences_of(*inputs, case):
        rows, keys = seq.q.shape[1], seq.k.shape[1]
        test_attend.check_attention(
            out[seq.row, :, seq.rows], lse[seq.row, :, seq.rows], seq,
            blocks[:, : -(-rows // 64), : -(-keys // 64)],
            k_perm=k_perm[seq.index, :, :keys], what=f"{case.name} {seq.index}", **SMALL,
        )  # fmt: skip


def test_packed_rows_of_another_call_give_nan(backend):
    """The host cannot read what lies on a device, so the kernel must not trust it."""
    q, k, v = cases.make_inputs(156, (2, 1), 300, dtype=BF16)
    score = torch.rand(1, 2, 300, generator=torch.Generator().manual_seed(156))
    packed = backend.ops.permute(q, k, v, score, block_size=64, segment_size=64)[4]
    bits = pack(blocks_of(2, 300, 300))[None]
    wrong = [(packed, "segment", SMALL), (torch.zeros_like(packed), "segment", SMALL)]
    wrong.append((packed, "block", {**SMALL, "segment_size": 64}))
    for buffer, own, cut in wrong:
        out, lse = backend.ops.attend(q, k, v, bits, packed=buffer, own=own, return_lse=True, **cut)
        assert out.isnan().all() and lse.isnan().all()
    natural = backend.ops.attend(q, k, v, bits, own="mask", return_lse=True, **SMALL)
    given = backend.ops.attend(q, k, v, bits, packed=packed, own="mask", return_lse=True, **SMALL)
    assert all(map(torch.equal, natural, given)), "a mask speaks of natural order"


@pytest.mark.parametrize("own", ["segment", "mask"])
def test_agrees_with_the_cpu(backend, own):
    """The CPU's kernels in fp32 are the truth. out may be as far off as torch's arithmetic in bf16;
    lse is fp32 all along, but for what a tensor core cuts off its sums."""
    inputs = cases.make_inputs(157, (4, 2), 421, dtype=BF16)
    wide = [x.float() for x in inputs]
    blocks = blocks_of(4, 421, 421)
    here = backend.ops.attend(*inputs, pack(blocks)[None], own=own, return_lse=True, **SMALL)
    there = ops.attend(*wide, pack(blocks)[None], own=own, return_lse=True, **SMALL)
    low = low_precision_attend(*(x[0] for x in inputs), blocks, own=own, **SMALL)[0]
    lse = low_precision_attend(*(x[0] for x in wide), blocks, own=own, **SMALL)[1]
    assert_close(here[0][0], there[0][0], low, what=f"{own} out")
    assert_close(here[1][0], there[1][0], lse, what=f"{own} lse", noise=2.0**-17)


def test_lse_is_optional_and_changes_nothing(backend):
    inputs = cases.make_inputs(158, (2, 1), 200, dtype=BF16)
    with_lse = backend.ops.attend(*inputs, own="all", return_lse=True)
    without = backend.ops.attend(*inputs, own="all")
    assert torch.equal(with_lse[0], without[0]) and without[1].shape == (0,)


@pytest.mark.parametrize("name", ["left_padding", "packed_chunks"])
def test_out_variant_leaves_other_rows_alone(backend, name):
    case = next(case for case in GEOMETRIES if case.name == name)
    q, k, v = cases.make_inputs(159, (2, 1), case=case, dtype=BF16, nan_padding=True)
    geometry = geometry_of(case)
    batch, heads, seqlen, _ = q.shape
    out = torch.full((batch, seqlen, heads, 96), 7.0, dtype=BF16)[..., :64]  # gaps between rows
    lse = torch.full((batch, heads, seqlen), 7.0)
    backend.ops.attend_out(q, k, v, None, out, lse, geometry=geometry, own="all")
    want = backend.ops.attend(q, k, v, geometry=geometry, own="all", return_lse=True)
    inside = torch.zeros(batch, seqlen, dtype=torch.bool)
    for seq in sequences_of(q, k, v, case):
        inside[seq.row, seq.rows] = True
    assert torch.equal(out[inside], want[0].transpose(1, 2)[inside])
    assert (out[~inside] == 7).all() and (out.as_strided((1,), (1,), 64) == 7).all()
    assert torch.equal(lse.transpose(1, 2)[inside], want[1].transpose(1, 2)[inside])
    assert (lse.transpose(1, 2)[~inside] == 7).all()


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_same_bits_whatever_the_schedule(backend, isa, block, head_dim):
    """Threads in another order, copies early or late: nothing may show."""
    inputs = cases.make_inputs(160, (2, 1), 200, head_dim=head_dim, dtype=BF16)
    bits = pack(random_blocks(2, 200, 200, block, block))[None]
    cut = {"block_q": block, "block_k": block, "segment_size": block, "return_lse": True}
    cut["isa"] = isa
    first = backend.ops.attend(*inputs, bits, **cut)
    for seed, delivery in itertools.product((1, 2, 3), ("lazy", "random")):
        backend.schedule(seed, delivery)
        again = backend.ops.attend(*inputs, bits, **cut)
        assert all(map(torch.equal, first, again)), f"seed {seed}, copies {delivery}"


def test_same_bits_at_any_place_of_a_batch(backend):
    q, k, v = cases.make_inputs(161, (2, 1), 300, batch=3, dtype=BF16)
    bits = torch.stack([pack(blocks_of(2, 300, 300, seed)) for seed in range(3)])
    whole = backend.ops.attend(q, k, v, bits, return_lse=True, **SMALL)
    for b in range(3):
        one = slice(b, b + 1)
        alone = backend.ops.attend(q[one], k[one], v[one], bits[one], return_lse=True, **SMALL)
        assert all(map(torch.equal, alone, (x[one] for x in whole)))


def test_many_items_are_all_done_once(backend):
    """More query blocks than a group of the counting sort has: 3 x 8 heads x 13 blocks."""
    inputs = cases.make_inputs(162, (8, 4), 13 * 64, batch=3, head_dim=8, dtype=BF16)
    blocks = blocks_of(8, 13 * 64, 13 * 64, density=0.1)
    check(backend, inputs, blocks, own="block")


def test_rows_off_their_alignment_are_refused(backend):
    q, k, v = cases.make_inputs(163, (2, 1), 100, dtype=BF16)
    wide = torch.zeros(1, 2, 100, 68, dtype=BF16)
    for name, args in (("q", (wide[..., :64], k, v)), ("v", (q, k, wide[:, :1, :, :64]))):
        with pytest.raises(RuntimeError, match=rf"{name}: .*16 bytes"):
            backend.ops.attend(*args, own="all")
    with pytest.raises(RuntimeError, match="fp16 .* bf16"):
        backend.ops.attend(q.float(), k.float(), v.float(), own="all")
