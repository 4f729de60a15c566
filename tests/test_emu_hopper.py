# SPDX-License-Identifier: Apache-2.0
"""attend's kernel for 9.0 (isa sm90), emulated or real: what it alone does differently from the
portable one, against fp64. Blocks of 128, which is what it takes; LAZY and RANDOM copies."""

import cases
import pytest
import test_attend
import torch
from test_attend import random_blocks

BF16, FP16 = torch.bfloat16, torch.float16
OWNS = test_attend.OWNS
CUT = {"block_q": 128, "block_k": 128, "segment_size": 256}
GEOMETRIES = cases.geometries(128, 256)
SEEDS = [(seed, delivery) for seed in range(4) for delivery in ("lazy", "random")]


def check(backend, inputs, blocks, case=None, isa="sm90", **options):
    return test_attend.check(*inputs, blocks, case, isa=isa, ops=backend.ops, **{**CUT, **options})


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_dense(backend, head_dim, dtype):
    """More row blocks than blocks of threads; whole tiles alone."""
    inputs = cases.make_inputs(401, (2, 1), 512, head_dim=head_dim, dtype=dtype)
    check(backend, inputs, random_blocks(2, 512, 512), own="all")


@pytest.mark.parametrize("head_dim", [8, 40, 72, 80, 112, 136, 248])
def test_head_dims_between_tiles(backend, head_dim):
    """Zeros beyond head_dim, which the copy engine puts there and leaves out again."""
    inputs = cases.make_inputs(402, (2, 1), 300, head_dim=head_dim, dtype=BF16)
    check(backend, inputs, random_blocks(2, 300, 300))


@pytest.mark.parametrize("own", OWNS)
@pytest.mark.parametrize("seqlen", cases.lengths(128, 256))
def test_lengths(backend, own, seqlen):
    inputs = cases.make_inputs(403, (2, 1), seqlen, dtype=BF16)
    check(backend, inputs, random_blocks(2, seqlen, seqlen), own=own)


@pytest.mark.parametrize("own", OWNS)
@pytest.mark.parametrize("seqlen_q", [1, 2, 63, 64, 65, 127, 128, 129, 200])
def test_few_rows_against_many_keys(backend, own, seqlen_q):
    """Chunks whose first row stands anywhere in a tile."""
    inputs = cases.make_inputs(404, (2, 1), seqlen_q, 897, dtype=FP16)
    check(backend, inputs, random_blocks(2, seqlen_q, 897), own=own)


@pytest.mark.parametrize("own", OWNS)
@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda case: case.name)
def test_geometries_and_nan_padding(backend, own, case):
    """Keys and rows of others, and NaN, share tiles with a sequence's own."""
    inputs = cases.make_inputs(405, (2, 1), case=case, dtype=BF16, nan_padding=True)
    check(backend, inputs, random_blocks(2, case.seqlen_q, case.seqlen_k), case, own=own)


@pytest.mark.parametrize("head_dim", [64, 96, 256])
@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda case: case.name)
def test_geometries_of_every_tile(backend, head_dim, case):
    inputs = cases.make_inputs(
        406, (2, 1), case=case, head_dim=head_dim, dtype=BF16, nan_padding=True
    )
    check(backend, inputs, random_blocks(2, case.seqlen_q, case.seqlen_k), case)


@pytest.mark.parametrize("heads", cases.HEAD_RATIOS)
@pytest.mark.parametrize("own", ["segment", "mask"])
def test_head_ratios(backend, heads, own):
    inputs = cases.make_inputs(407, heads, 400, dtype=BF16)
    check(backend, inputs, random_blocks(heads[0], 400, 400), own=own)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(backend, layout):
    laid = cases.make_inputs(408, (4, 2), 400, batch=2, dtype=BF16, layout=layout)
    plain = cases.make_inputs(408, (4, 2), 400, batch=2, dtype=BF16)
    blocks = random_blocks(4, 400, 400)
    assert all(map(torch.equal, check(backend, laid, blocks), check(backend, plain, blocks)))


@pytest.mark.parametrize("block_q", [128, 256])
@pytest.mark.parametrize("block_k", cases.BLOCK_SIZES)
@pytest.mark.parametrize("head_dim", [128, 256])
def test_block_sizes_of_a_mask(backend, block_q, block_k, head_dim):
    """Key blocks of 64 are tiles at head_dim 256 alone."""
    inputs = cases.make_inputs(409, (1, 1), 300, 570, head_dim=head_dim, dtype=BF16)
    blocks = random_blocks(1, 300, 570, block_q, block_k)
    check(backend, inputs, blocks, own="mask", block_q=block_q, block_k=block_k)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("own", OWNS[:4])
def test_empty_and_full_selection(backend, density, own):
    inputs = cases.make_inputs(410, (2, 1), 700, dtype=BF16)
    out, lse = check(backend, inputs, random_blocks(2, 700, 700, density=density), own=own)
    if density == 0.0 and own in ("mask", "none"):
        assert (out == 0).all() and torch.isneginf(lse).all()


def test_lists_longer_than_a_word(backend):
    inputs = cases.make_inputs(411, (2, 1), 20, 35 * 128, head_dim=16, dtype=FP16)
    blocks = random_blocks(2, 20, 35 * 128, density=0.3)
    check(backend, inputs, blocks)
    blocks[1] = False
    blocks[1, :, 0] = True
    check(backend, inputs, blocks)


def test_softmax_scale_and_large_logits(backend):
    q, k, v = cases.make_inputs(412, (2, 1), 400, dtype=FP16)
    check(backend, (q, k, v), random_blocks(2, 400, 400), scale=0.37)
    check(backend, (40 * q, 4 * k, v), random_blocks(2, 400, 400))
    check(backend, (-40 * q, 4 * k, v), random_blocks(2, 400, 400), own="none")


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("own", ["segment", "mask"])
def test_same_bits_in_every_schedule(backend, head_dim, own):
    inputs = cases.make_inputs(413, (2, 1), 333, 461, head_dim=head_dim, dtype=BF16)
    blocks = random_blocks(2, 333, 461)
    first = check(backend, inputs, blocks, own=own)
    for seed, delivery in SEEDS:
        backend.schedule(seed, delivery)
        assert all(map(torch.equal, check(backend, inputs, blocks, own=own), first)), (
            seed,
            delivery,
        )
