# SPDX-License-Identifier: Apache-2.0
"""permute on CUDA's kernels, emulated or real: the exact stable order, pools, packed rows, rows by
centroid, given orders; the CPU's results; the same bits wherever and whenever."""

import cases
import pytest
import test_permute
import torch
from harness import geometry_of
from numerics import assert_k_perm

from pbs_attn import ops

BF16, FP16 = torch.bfloat16, torch.float16
SMALL = {"block_size": 64, "segment_size": 128}
GEOMETRIES = cases.geometries(64, 128)


def check(backend, *inputs, **options):
    return test_permute.check(*inputs, ops=backend.ops, **options)


def random_score(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", cases.PERMUTES)
@pytest.mark.parametrize("seqlen", cases.lengths(64, 128))
def test_lengths(backend, mode, seqlen):
    check(backend, *cases.make_inputs(121, (4, 2), seqlen, dtype=BF16), mode=mode, **SMALL)


@pytest.mark.parametrize("mode", ["keys", "queries", "both"])
@pytest.mark.parametrize("heads", cases.HEAD_RATIOS)
@pytest.mark.parametrize("gqa", ["per_head", "group"])
def test_head_ratios(backend, mode, heads, gqa):
    inputs = cases.make_inputs(122, heads, 270, dtype=BF16)
    check(backend, *inputs, mode=mode, gqa=gqa, **SMALL)


@pytest.mark.parametrize("head_dim", cases.HEAD_DIMS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_head_dims_and_dtypes(backend, head_dim, dtype):
    inputs = cases.make_inputs(123, (2, 1), 270, head_dim=head_dim, dtype=dtype)
    check(backend, *inputs, mode="both", **SMALL)


@pytest.mark.parametrize("mode", ["keys", "queries", "both"])
@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda case: case.name)
def test_geometries_and_nan_padding(backend, mode, case):
    inputs = cases.make_inputs(124, (4, 2), case=case, dtype=BF16, nan_padding=True)
    check(backend, *inputs, case, mode=mode, **SMALL)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(backend, layout):
    inputs = cases.make_inputs(125, (4, 2), 270, batch=2, dtype=BF16, layout=layout)
    plain = cases.make_inputs(125, (4, 2), 270, batch=2, dtype=BF16)
    laid = check(backend, *inputs, mode="both", **SMALL)
    assert all(map(torch.equal, laid, check(backend, *plain, mode="both", **SMALL)))


@pytest.mark.parametrize(
    "block_size, segment_size", [(64, 64), (64, 192), (128, 256), (256, 512), (128, 2048)]
)
@pytest.mark.parametrize("mode", ["keys", "queries", "both"])
def test_sizes(backend, block_size, segment_size, mode):
    inputs = cases.make_inputs(126, (2, 1), 2 * segment_size + 77, head_dim=16, dtype=BF16)
    check(backend, *inputs, mode=mode, block_size=block_size, segment_size=segment_size)


@pytest.mark.parametrize("kinds", [2, 5, 1000])
@pytest.mark.parametrize("segment_size", [128, 1024])
def test_any_score_is_ordered_as_on_the_cpu(backend, kinds, segment_size):
    """Ties, both zeros, infinities and NaN: the very same order."""
    q, k, v = cases.make_inputs(127, (2, 1), 2 * segment_size + 100, head_dim=8, dtype=BF16)
    score = (random_score(127, 1, 2, k.size(2)) * kinds).floor() - kinds // 2
    score[:, :, 3::11] *= -1.0
    score[:, :, 5::13] = -0.0
    score[:, :, 1::17] = float("nan")
    score[:, :, 2::29] = float("inf")
    score[:, :, 7::31] = -float("inf")
    same = {"block_size": 64, "segment_size": segment_size, "pack": False}
    got = backend.ops.permute(q, k, v, score, **same)[0]
    assert torch.equal(got, ops.permute(q, k, v, score, **same)[0])
    if kinds == 5:
        clean = score.nan_to_num(0.0, 9.0, -9.0)
        perm = backend.ops.permute(q, k, v, clean, **same)[0]
        assert_k_perm(perm[0], clean[0], segment_size=segment_size, what="ties")


def packed_parts(packed, k, heads, segment_size):
    """(heads that move, K rows, V rows [B, heads, Nc, D]) of csrc/cuda/packed.cuh."""
    batch, _, seqlen, head_dim = k.shape
    rows = batch * heads * (seqlen // segment_size * segment_size) * head_dim * 2
    data = packed.view(torch.uint8)[..., :].flatten()
    first = -(-(64 + 4 * heads) // 1024) * 1024
    second = first + -(-rows // 1024) * 1024
    parts = (data[at : at + rows].view(k.dtype) for at in (first, second))
    shape = (batch, heads, -1, head_dim)
    return data[64 : 64 + 4 * heads].view(torch.int32), *(x.view(shape) for x in parts)


@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize("gqa", ["per_head", "group"])
def test_packed_rows_are_the_gathered_ones(backend, heads, gqa):
    q, k, v = cases.make_inputs(128, heads, 300, batch=2, head_dim=40, dtype=FP16)
    owners = heads[1] if gqa == "group" else heads[0]
    score = random_score(128, 2, owners, 300)
    on = torch.ones(owners, dtype=torch.int32)
    on[1] = 0
    k_perm, _, _, _, packed = backend.ops.permute(
        q, k, v, score, gqa=gqa, permute_heads=on, **SMALL
    )
    moved, k_rows, v_rows = packed_parts(packed, k, owners, 128)
    assert torch.equal(moved, on)
    for x, rows in ((k, k_rows), (v, v_rows)):
        each = x.repeat_interleave(owners // heads[1], 1)
        place = k_perm[:, :, :256].long()[..., None].expand(-1, -1, -1, 40)
        expected = each.gather(2, place)
        assert torch.equal(rows[:, on.bool()], expected[:, on.bool()])


@pytest.mark.parametrize("mode", ["keys", "both"])
def test_heads_in_natural_order(backend, mode):
    q, k, v = cases.make_inputs(129, (4, 2), 300, dtype=BF16)
    score = random_score(129, 1, 4, 300)
    on = torch.tensor([1, 0, 0, 1], dtype=torch.int32)
    every = backend.ops.permute(q, k, v, score, mode=mode, **SMALL)
    some = backend.ops.permute(q, k, v, score, mode=mode, permute_heads=on, **SMALL)
    natural = torch.arange(300, dtype=torch.int32)
    for h, moves in enumerate(on.tolist()):
        assert torch.equal(some[0][0, h], every[0][0, h] if moves else natural)
        if mode == "both":
            assert torch.equal(some[1][0, h], every[1][0, h] if moves else natural)


def test_a_given_order_is_taken(backend):
    q, k, v = cases.make_inputs(130, (2, 1), 300, dtype=BF16)
    direct = backend.ops.permute(q, k, v, random_score(130, 1, 2, 300), **SMALL)
    again = backend.ops.permute(q, k, v, None, k_perm_in=direct[0], **SMALL)
    assert all(map(torch.equal, direct[:4], again[:4]))
    for one, other in zip(*(packed_parts(x[4], k, 2, 128) for x in (direct, again)), strict=True):
        assert torch.equal(one, other)


def test_a_wrong_order_reads_nothing_else(backend):
    """Nobody can check a device's memory before the launch: the result is garbage, no more."""
    q, k, v = cases.make_inputs(131, (2, 1), 300, dtype=BF16)
    wrong = torch.randint(-(2**31), 2**31 - 1, (1, 2, 300), dtype=torch.int32)
    try:
        k_pool = backend.ops.permute(q, k, v, None, k_perm_in=wrong, **SMALL)[2]
    except (RuntimeError, ValueError):
        return  # a backend that can read the order may refuse it
    assert torch.isfinite(k_pool).all()


@pytest.mark.parametrize("seqlen", [1, 64, 100, 128])
def test_one_segment_or_less_is_not_permuted(backend, seqlen):
    q, k, v = cases.make_inputs(132, (2, 1), seqlen, dtype=BF16)
    k_perm = backend.ops.permute(q, k, v, random_score(132, 1, 2, seqlen), **SMALL)[0]
    assert torch.equal(k_perm, torch.arange(seqlen, dtype=torch.int32).expand(1, 2, -1))


def test_equal_and_zero_rows_keep_their_order(backend):
    """Queries without a direction or with the same one tie, and ties go by row."""
    q, k, v = cases.make_inputs(133, (2, 1), 300, dtype=BF16)
    q[:, :, ::3] = 0.0
    q[:, :, 1::3] = q[:, :, 1:2]
    same = {"mode": "queries", **SMALL}
    got, cpu = backend.ops.permute(q, k, v, None, **same), ops.permute(q, k, v, None, **same)
    assert torch.equal(got[1], cpu[1])


def test_same_bits_at_any_place(backend):
    q, k, v = cases.make_inputs(134, (4, 2), 300, batch=3, dtype=BF16)
    score = random_score(134, 3, 4, 300)
    together = backend.ops.permute(q, k, v, score, mode="both", **SMALL)[:4]
    for b in range(3):
        one = (x[b : b + 1] for x in (q, k, v, score))
        alone = backend.ops.permute(*one, mode="both", **SMALL)[:4]
        assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, together, strict=True))
    row = [x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v)]
    starts = (0, 300, 600)
    case = cases.Case("row", 900, 900, starts, (300,) * 3, starts, (300,) * 3, 3, True)
    wide = torch.nn.functional.pad(score, (0, 600))
    packed = backend.ops.permute(*row, wide, geometry=geometry_of(case), mode="both", **SMALL)
    ends = (300, 300, 5, 5)  # keys, rows, blocks, blocks
    for x, y, end in zip(packed, together, ends, strict=False):
        assert torch.equal(x[:, :, :end], y)


@pytest.mark.parametrize("mode", ["keys", "both"])
def test_same_bits_at_any_time(backend, mode):
    q, k, v = cases.make_inputs(135, (2, 1), 400, dtype=BF16)
    score = random_score(135, 1, 2, 400)
    first = backend.ops.permute(q, k, v, score, mode=mode, **SMALL)[:4]
    for seed, delivery in [(1, "lazy"), (2, "random"), (3, "random"), (4, "eager")]:
        backend.schedule(seed, delivery)
        again = backend.ops.permute(q, k, v, score, mode=mode, **SMALL)[:4]
        assert all(map(torch.equal, first, again)), (seed, delivery)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_rows_off_16_bytes_are_refused(backend, which):
    tensors = dict(zip("qkv", cases.make_inputs(136, (2, 1), 270, dtype=BF16), strict=True))
    shape = tensors[which].shape
    tensors[which] = torch.zeros(*shape[:3], 68, dtype=BF16)[..., :64]  # rows of 136 bytes
    with pytest.raises((RuntimeError, ValueError), match=f"{which}: .*16 bytes"):
        backend.ops.permute(*tensors.values(), random_score(136, 1, 2, 270), mode="both", **SMALL)
