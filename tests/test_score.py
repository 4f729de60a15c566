# SPDX-License-Identifier: Apache-2.0
"""score through the op against the fp64 reference: every length, ratio, order, dtype, ISA."""

import cases
import pytest
import torch
from harness import ISAS, geometry_of, sequences_of, takes
from numerics import assert_close, low_precision_score

from pbs_attn import ops, reference


def check(
    q, k, case=None, isa="auto", block_size=128, segment_size=256, *, ops=ops, noise=0.0, **options
):
    """noise: relative to the largest score of a sequence."""
    got = ops.score(
        q,
        k,
        geometry=geometry_of(case),
        block_size=block_size,
        segment_size=segment_size,
        isa=isa,
        **options,
    )
    assert got.dtype == torch.float32 and torch.isfinite(got).all()
    options |= {"block_size": block_size, "segment_size": segment_size}
    for seq in sequences_of(q, k, k, case):
        seqlen_k = seq.k.shape[1]
        exact = reference.score(seq.q.double(), seq.k.double(), **options)
        low = low_precision_score(seq.q, seq.k, **options)
        what = f"score {case and case.name} {isa} {options} sequence {seq.index}"
        largest = exact.max().item() if exact.numel() else 0.0
        assert_close(got[seq.index, :, :seqlen_k], exact, low, what=what, noise=noise * largest)
        complete = seqlen_k // segment_size * segment_size
        assert (got[seq.index, :, complete:] == 0).all(), f"{what}: score beyond the segments"
    return got


@pytest.mark.parametrize("seqlen", cases.lengths())
@pytest.mark.parametrize("gqa", ["per_head", "group"])
def test_lengths(seqlen, gqa):
    q, k, _ = cases.make_inputs(1, (4, 2), seqlen, head_dim=64)
    check(q, k, gqa=gqa)


@pytest.mark.parametrize("heads", cases.HEAD_RATIOS)
@pytest.mark.parametrize("gqa", ["per_head", "group"])
def test_head_ratios(heads, gqa):
    q, k, _ = cases.make_inputs(2, heads, 300, 700)
    check(q, k, gqa=gqa)


@pytest.mark.parametrize("head_dim", cases.HEAD_DIMS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_head_dims_and_dtypes(head_dim, dtype):
    q, k, _ = cases.make_inputs(3, (2, 1), 530, head_dim=head_dim, dtype=dtype)
    check(q, k)


@pytest.mark.parametrize("order", cases.ORDERS)
@pytest.mark.parametrize("gqa", ["per_head", "group"])
def test_orders(order, gqa):
    q, k, _ = cases.make_inputs(4, (4, 2), 300, 900)
    check(q, k, order=order, gqa=gqa, seed=7)


@pytest.mark.parametrize("order", ["random", "random_query"])
def test_seeds_differ(order):
    q, k, _ = cases.make_inputs(4, (2, 1), 900)
    first, second = (ops.score(q, k, order=order, seed=seed) for seed in (1, 2))
    assert not torch.equal(first, second)
    assert torch.equal(first, ops.score(q, k, order=order, seed=1))


@pytest.mark.parametrize("case", cases.geometries(), ids=lambda case: case.name)
@pytest.mark.parametrize("order", ["last_block", "mean_query"])
def test_geometries_and_nan_padding(case, order):
    q, k, _ = cases.make_inputs(5, (4, 2), case=case, nan_padding=True)
    check(q, k, case, order=order)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(layout):
    q, k, _ = cases.make_inputs(6, (4, 2), 530, batch=2, layout=layout)
    plain = cases.make_inputs(6, (4, 2), 530, batch=2)
    assert torch.equal(check(q, k), ops.score(plain.q, plain.k))


@pytest.mark.parametrize("block_size, segment_size", [(64, 64), (64, 192), (256, 512), (128, 2048)])
def test_sizes(block_size, segment_size):
    q, k, _ = cases.make_inputs(7, (2, 1), 2 * segment_size + 77)
    check(q, k, block_size=block_size, segment_size=segment_size)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("head_dim", [40, 128])
def test_every_isa(isa, dtype, head_dim):
    q, k, _ = cases.make_inputs(8, (2, 1), 530, head_dim=head_dim, dtype=dtype)
    if takes(isa, dtype):
        check(q, k, isa=isa)


def test_softmax_scale():
    q, k, _ = cases.make_inputs(9, (2, 1), 530)
    check(q, k, softmax_scale=0.31)
