# SPDX-License-Identifier: Apache-2.0
"""score on CUDA's kernels, emulated or real: fp64 over every length, geometry, dtype and order; the
CPU's numbers; the same bits wherever and whenever."""

import cases
import pytest
import test_score
import torch
from harness import geometry_of

from pbs_attn import ops, reference

BF16, FP16 = torch.bfloat16, torch.float16
SMALL = {"block_size": 64, "segment_size": 128}
GEOMETRIES = cases.geometries(64, 128)
# Tensor cores cut where they should round, and their 2^x has 22 bits; the emulation does neither.
NOISE = {"emu": 0.0, "cuda": 2.0**-17}


def check(backend, q, k, case=None, **options):
    noise = NOISE[backend.name]
    return test_score.check(q, k, case, ops=backend.ops, noise=noise, **options)


@pytest.mark.parametrize("seqlen", cases.lengths(64, 128))
@pytest.mark.parametrize("gqa", ["per_head", "group"])
def test_lengths(backend, seqlen, gqa):
    q, k, _ = cases.make_inputs(101, (4, 2), seqlen, dtype=BF16)
    check(backend, q, k, gqa=gqa, **SMALL)


@pytest.mark.parametrize("seqlen", [512, 640, 4736, 16384, 16512])
def test_many_chunks_of_keys(backend, seqlen):
    """Edges of a chunk, and of the length from which on chunks are longer."""
    q, k, _ = cases.make_inputs(102, (1, 1), 64, seqlen, head_dim=16, dtype=BF16)
    check(backend, q, k, **SMALL)


@pytest.mark.parametrize("heads", cases.HEAD_RATIOS)
@pytest.mark.parametrize("gqa", ["per_head", "group"])
def test_head_ratios(backend, heads, gqa):
    q, k, _ = cases.make_inputs(103, heads, 70, 300, dtype=BF16)
    check(backend, q, k, gqa=gqa, **SMALL)


@pytest.mark.parametrize("head_dim", cases.HEAD_DIMS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("gqa", ["per_head", "group"])
def test_head_dims_and_dtypes(backend, head_dim, dtype, gqa):
    q, k, _ = cases.make_inputs(104, (2, 1), 70, 260, head_dim=head_dim, dtype=dtype)
    check(backend, q, k, gqa=gqa, **SMALL)


@pytest.mark.parametrize("order", cases.ORDERS)
@pytest.mark.parametrize("gqa", ["per_head", "group"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_orders(backend, order, gqa, dtype):
    q, k, _ = cases.make_inputs(105, (4, 2), 100, 400, dtype=dtype)
    check(backend, q, k, order=order, gqa=gqa, seed=7, **SMALL)


def test_the_mean_of_many_rows(backend):
    q, k, _ = cases.make_inputs(106, (2, 1), 2500, 256, head_dim=16, dtype=BF16)
    check(backend, q, k, order="mean_query", **SMALL)


@pytest.mark.parametrize("order", ["random", "random_query"])
def test_random_orders_are_the_cpus(backend, order):
    q, k, _ = cases.make_inputs(107, (4, 2), 100, 400, dtype=BF16)
    same = {"order": order, "gqa": "group", "seed": 11, **SMALL}
    got, cpu = backend.ops.score(q, k, **same), ops.score(q, k, **same)
    assert torch.equal(got, cpu) if order == "random" else torch.allclose(got, cpu, rtol=1e-4)
    assert not torch.equal(got, backend.ops.score(q, k, **same | {"seed": 12}))


@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda case: case.name)
@pytest.mark.parametrize("order", ["last_block", "mean_query"])
@pytest.mark.parametrize("gqa", ["per_head", "group"])
def test_geometries_and_nan_padding(backend, case, order, gqa):
    q, k, _ = cases.make_inputs(108, (4, 2), case=case, dtype=BF16, nan_padding=True)
    check(backend, q, k, case, order=order, gqa=gqa, **SMALL)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(backend, layout):
    q, k, _ = cases.make_inputs(109, (4, 2), 270, batch=2, dtype=BF16, layout=layout)
    plain = cases.make_inputs(109, (4, 2), 270, batch=2, dtype=BF16)
    assert torch.equal(check(backend, q, k, **SMALL), backend.ops.score(plain.q, plain.k, **SMALL))


@pytest.mark.parametrize(
    "block_size, segment_size", [(64, 64), (64, 192), (128, 256), (256, 512), (128, 2048)]
)
@pytest.mark.parametrize("gqa", ["per_head", "group"])
def test_sizes(backend, block_size, segment_size, gqa):
    q, k, _ = cases.make_inputs(110, (2, 1), 300, 2 * segment_size + 77, head_dim=40, dtype=BF16)
    check(backend, q, k, block_size=block_size, segment_size=segment_size, gqa=gqa)


def test_softmax_scale(backend):
    q, k, _ = cases.make_inputs(111, (2, 1), 270, dtype=BF16)
    check(backend, q, k, softmax_scale=0.31, **SMALL)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("small", [1.0, 2.0**-8, 2.0**-14])
def test_means_of_any_size_are_fp32(backend, dtype, small):
    """Their low parts would underflow in fp16 if they were stored as they are."""
    q, k, _ = cases.make_inputs(112, (2, 1), 70, 260, dtype=torch.float32)
    q, k = (q * small).to(dtype), k.to(dtype)
    check(backend, q, k, gqa="group", softmax_scale=0.125 / small, **SMALL)


def test_same_bits_at_any_place(backend):
    """A sequence alone, among others, padded and in a packed row gives the same bits."""
    q, k, _ = cases.make_inputs(113, (4, 2), 300, batch=3, dtype=BF16)
    together = backend.ops.score(q, k, **SMALL)
    for b in range(3):
        alone = backend.ops.score(q[b : b + 1], k[b : b + 1], **SMALL)
        assert torch.equal(alone[0], together[b])
    row = [x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k)]
    starts = (0, 300, 600)
    case = cases.Case("row", 900, 900, starts, (300,) * 3, starts, (300,) * 3, 3, True)
    packed = backend.ops.score(*row, geometry=geometry_of(case), **SMALL)
    assert torch.equal(packed[:, :, :300], together) and (packed[:, :, 300:] == 0).all()


def test_same_bits_beside_a_longer_sequence(backend):
    """How keys are cut into chunks depends on the sequence, not on the longest of the call."""
    q, k, _ = cases.make_inputs(118, (1, 1), 64, 16512, head_dim=16, dtype=BF16)
    alone = backend.ops.score(q, k[:, :, :1200], **SMALL)
    case = cases.Case("two", 64, 16512, (0, 0), (64, 64), (0, 0), (16512, 1200))
    both = [x.expand(2, -1, -1, -1) for x in (q, k)]
    together = backend.ops.score(*both, geometry=geometry_of(case), **SMALL)
    assert torch.equal(together[1:, :, :1200], alone)


@pytest.mark.parametrize("gqa", ["per_head", "group"])
@pytest.mark.parametrize("order", ["last_block", "mean_query"])
def test_same_bits_at_any_time(backend, gqa, order):
    q, k, _ = cases.make_inputs(114, (2, 1), 200, 700, dtype=BF16)
    first = backend.ops.score(q, k, gqa=gqa, order=order, **SMALL)
    for seed, delivery in [(1, "lazy"), (2, "random"), (3, "random"), (4, "eager")]:
        backend.schedule(seed, delivery)
        again = backend.ops.score(q, k, gqa=gqa, order=order, **SMALL)
        assert torch.equal(first, again), (seed, delivery)


def test_the_cpus_numbers(backend):
    q, k, _ = cases.make_inputs(115, (4, 2), 300, 700, dtype=BF16)
    for gqa in ("per_head", "group"):
        got, cpu = backend.ops.score(q, k, gqa=gqa), ops.score(q, k, gqa=gqa)
        assert torch.allclose(got, cpu, rtol=3e-5, atol=0)
        exact = reference.score(q[0].double(), k[0].double(), gqa=gqa)
        assert (got[0] - exact).abs().max() < 1e-5 * exact.max()


@pytest.mark.parametrize("which", ["q", "k"])
def test_rows_off_16_bytes_are_refused(backend, which):
    q, k, _ = cases.make_inputs(116, (2, 1), 270, dtype=BF16)
    wide = torch.zeros(1, 2, 270, 68, dtype=BF16)  # rows of 136 bytes
    inputs = {"q": q, "k": k} | {which: wide[:, : 2 if which == "q" else 1, :, :64]}
    with pytest.raises((RuntimeError, ValueError), match=f"{which}: .*16 bytes"):
        backend.ops.score(inputs["q"], inputs["k"], **SMALL)
