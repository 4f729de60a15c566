# SPDX-License-Identifier: Apache-2.0
"""attend's kernel for 9.0 (isa sm90), emulated or real: what it alone does differently from the
portable one, against fp64. Blocks of 128, which is what it takes; LAZY and RANDOM copies."""

import cases
import pytest
import test_attend
import torch
from harness import check_prefill, config_of, geometry_of, sequences_of
from numerics import pack
from test_attend import random_blocks

BF16, FP16 = torch.bfloat16, torch.float16
OWNS = test_attend.OWNS
CUT = {"block_q": 128, "block_k": 128, "segment_size": 256}
GEOMETRIES = cases.geometries(128, 256)
SEEDS = [(seed, delivery) for seed in range(4) for delivery in ("lazy", "random")]


@pytest.fixture(autouse=True)
def hopper(backend):
    backend.require("sm90")


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


# ---- means, packed rows --------------------------------------------------------------------------


@pytest.mark.parametrize("own", OWNS[:4])
@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda case: case.name)
def test_means_of_geometries(backend, own, case):
    inputs = cases.make_inputs(421, (2, 1), case=case, dtype=BF16, nan_padding=True)
    blocks = random_blocks(2, case.seqlen_q, case.seqlen_k, density=0.3)
    check(backend, inputs, blocks, case, own=own, correction="mean")


@pytest.mark.parametrize("head_dim", [64, 96, 128, 200, 256])
def test_several_tiles_of_means(backend, head_dim):
    """130 blocks: two or three tiles, some of which have nothing to add; or no keys at all."""
    inputs = cases.make_inputs(422, (2, 1), 20, 130 * 128, head_dim=head_dim, dtype=FP16)
    cut = {"correction": "mean", "segment_size": 128}
    blocks = random_blocks(2, 20, 130 * 128, density=0.05)
    check(backend, inputs, blocks, **cut)
    blocks[:, :, :128] = True
    check(backend, inputs, blocks, **cut)
    blocks[1] = True
    blocks[1, :, 31] = blocks[1, :, 127] = False
    blocks[0] = False
    check(backend, inputs, blocks, own="none", **cut)


@pytest.mark.parametrize("own", OWNS[:4])
def test_nothing_left_out_changes_no_bit(backend, own):
    inputs = cases.make_inputs(423, (2, 1), 700, dtype=BF16)
    blocks = random_blocks(2, 700, 700, density=1.0)
    with_means = check(backend, inputs, blocks, own=own, correction="mean")
    assert all(map(torch.equal, with_means, check(backend, inputs, blocks, own=own)))


@pytest.mark.parametrize("gqa", ["per_head", "group"])
@pytest.mark.parametrize("permute", cases.PERMUTES)
@pytest.mark.parametrize("correction", cases.CORRECTIONS)
def test_four_verbs(backend, gqa, permute, correction):
    """Permuted history, original own span, queries by index."""
    config = config_of(
        permute=permute, gqa=gqa, tau=0.6, block_size=128, segment_size=256, correction=correction
    )
    inputs = cases.make_inputs(424, (4, 2), 821, dtype=BF16)
    run = backend.four_verbs(*inputs, config, isa="sm90")
    check_prefill(
        run.out, run.lse, *inputs, run.bits, run.k_perm, config, q_perm=run.q_perm, what=permute
    )


@pytest.mark.parametrize("correction", cases.CORRECTIONS)
@pytest.mark.parametrize("case", GEOMETRIES[:3] + GEOMETRIES[10:], ids=lambda case: case.name)
def test_packed_rows_of_many_sequences(backend, case, correction):
    """Heads that are permuted beside one that is not, by sequence."""
    inputs = q, k, v = cases.make_inputs(425, (4, 2), case=case, dtype=BF16, nan_padding=True)
    geometry = geometry_of(case)
    batch = geometry.num_sequences(q.size(0))
    score = torch.rand(batch, 4, k.size(2), generator=torch.Generator().manual_seed(425))
    heads = torch.tensor((1, 1, 0, 1), dtype=torch.int32)
    k_perm, _, _, _, packed = backend.ops.permute(
        q, k, v, score, permute_heads=heads, block_size=128, segment_size=256,
        geometry=geometry, correction=correction,
    )  # fmt: skip
    blocks = random_blocks(4, q.size(2), k.size(2))
    bits = pack(blocks)[None].expand(batch, -1, -1, -1).contiguous()
    out, lse = backend.ops.attend(
        q, k, v, bits, packed=packed, return_lse=True, geometry=geometry, isa="sm90",
        correction=correction, **CUT,
    )  # fmt: skip
    for seq in sequences_of(*inputs, case):
        rows, keys = seq.q.shape[1], seq.k.shape[1]
        test_attend.check_attention(
            out[seq.row, :, seq.rows], lse[seq.row, :, seq.rows], seq,
            blocks[:, : -(-rows // 128), : -(-keys // 128)], k_perm=k_perm[seq.index, :, :keys],
            correction=correction, what=f"{case.name} {seq.index}", **CUT,
        )  # fmt: skip


def test_packed_rows_of_another_call_give_nan(backend):
    q, k, v = cases.make_inputs(426, (2, 1), 600, dtype=BF16)
    packed = backend.ops.permute(q, k, v, torch.rand(1, 2, 600), block_size=128, segment_size=256)[
        4
    ]
    bits = pack(random_blocks(2, 600, 600))[None]
    fine = backend.ops.attend(q, k, v, bits, packed=packed, isa="sm90", **CUT)
    assert fine.isfinite().all() if isinstance(fine, torch.Tensor) else fine[0].isfinite().all()
    packed.view(torch.uint8).flatten()[8] ^= 1
    wrong = backend.ops.attend(q, k, v, bits, packed=packed, return_lse=True, isa="sm90", **CUT)
    assert wrong[0].isnan().all() and wrong[1].isnan().all()


# ---- variants ------------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", cases.CORRECTIONS)
@pytest.mark.parametrize(
    "name, head_dim",
    [("three-stages", 128), ("no-turns", 64), ("no-turns", 128), ("turns", 256), ("static", 128),
     ("slack", 64), ("slack", 128), ("slack", 256), ("rescale-first", 256)],
)  # fmt: skip
def test_variants(backend, monkeypatch, name, head_dim, correction):
    """Lines of attend_instances_sm90.inc that a build for users does not have."""
    if backend.name != "emu":
        pytest.skip("built with PBS_ATTEND_VARIANTS alone")
    monkeypatch.setenv("PBS_ATTEND_VARIANT", name)
    inputs = cases.make_inputs(431, (4, 2), 333, 589, head_dim=head_dim, dtype=BF16)
    q, k, v = inputs
    blocks = random_blocks(4, 333, 589)
    first = check(backend, inputs, blocks, correction=correction)
    check(backend, (12 * q, 4 * k, v), blocks, correction=correction)
    for seed, delivery in SEEDS[:4]:
        backend.schedule(seed, delivery)
        again = check(backend, inputs, blocks, correction=correction)
        assert all(map(torch.equal, again, first)), (seed, delivery)


def test_unknown_variant(backend, monkeypatch):
    if backend.name != "emu":
        pytest.skip("built with PBS_ATTEND_VARIANTS alone")
    monkeypatch.setenv("PBS_ATTEND_VARIANT", "static")
    inputs = cases.make_inputs(432, (1, 1), 128, head_dim=256, dtype=BF16)
    with pytest.raises(
        ValueError, match='VARIANT: "static"; for head_dim 256: turns, slack, rescale-first$'
    ):
        check(backend, inputs, random_blocks(1, 128, 128))


def test_variants_are_of_the_width_that_a_call_has(backend, monkeypatch):
    """A line of wider tiles would run, too, and be slower for another reason than its own."""
    if backend.name != "emu":
        pytest.skip("built with PBS_ATTEND_VARIANTS alone")
    monkeypatch.setenv("PBS_ATTEND_VARIANT", "three-stages")
    inputs = cases.make_inputs(433, (1, 1), 128, head_dim=64, dtype=BF16)
    with pytest.raises(ValueError, match='"three-stages"; for head_dim 64: no-turns, slack$'):
        check(backend, inputs, random_blocks(1, 128, 128))
