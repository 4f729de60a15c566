# SPDX-License-Identifier: Apache-2.0
"""The mean correction on CUDA's kernels, emulated or real: permute's means of blocks, and attend
over blocks that are not listed, one pseudo-token each, against fp64 and against the CPU."""

import itertools

import cases
import pytest
import test_attend
import torch
from harness import check_prefill, config_of, geometry_of, sequences_of
from numerics import assert_close, low_precision_attend, pack
from test_attend import random_blocks
from test_emu_attend import SMALL, blocks_of
from test_emu_permute import packed_parts

from pbs_attn import ops, reference
from pbs_attn.geometry import Geometry

BF16, FP16 = torch.bfloat16, torch.float16
OWNS = ("segment", "block", "mask", "none")
GEOMETRIES = cases.geometries(64, 128)
MEAN = {"correction": "mean", **SMALL}
KERNELS = [*itertools.product((64, 96, 128, 256), (64, 128))]  # head_dim, block_q: one each


def check(backend, inputs, blocks, case=None, **options):
    return test_attend.check(*inputs, blocks, case, ops=backend.ops, **{**MEAN, **options})


# ---- attend, means made by the call --------------------------------------------------------------


@pytest.mark.parametrize("own", OWNS)
@pytest.mark.parametrize("seqlen", cases.lengths(64, 128))
def test_lengths(backend, own, seqlen):
    inputs = cases.make_inputs(301, (2, 1), seqlen, dtype=BF16)
    check(backend, inputs, blocks_of(2, seqlen, seqlen), own=own)


@pytest.mark.parametrize("own", OWNS)
@pytest.mark.parametrize("seqlen_q", [1, 2, 31, 63, 64, 65, 127, 128, 129])
def test_few_rows_against_six_segments(backend, own, seqlen_q):
    """Chunks whose first row stands anywhere in a block: what all rows see ends with it."""
    inputs = cases.make_inputs(302, (2, 1), seqlen_q, 769, dtype=FP16)
    check(backend, inputs, blocks_of(2, seqlen_q, 769), own=own)


@pytest.mark.parametrize("own", OWNS)
@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda case: case.name)
def test_geometries_and_nan_padding(backend, own, case):
    inputs = cases.make_inputs(303, (2, 1), case=case, dtype=BF16, nan_padding=True)
    check(backend, inputs, blocks_of(2, case.seqlen_q, case.seqlen_k), case, own=own)


@pytest.mark.parametrize("heads", cases.HEAD_RATIOS)
@pytest.mark.parametrize("per_kv_head", [False, True])
@pytest.mark.parametrize("own", ["segment", "mask"])
def test_head_ratios(backend, heads, per_kv_head, own):
    inputs = cases.make_inputs(304, heads, 300, dtype=BF16)
    check(backend, inputs, blocks_of(heads[per_kv_head], 300, 300), own=own)


@pytest.mark.parametrize("head_dim, block", [*KERNELS, (8, 64), (40, 128), (200, 64)])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_head_dims_and_dtypes(backend, isa, head_dim, dtype, block):
    """Every kernel that is built."""
    inputs = cases.make_inputs(305, (2, 1), 130, 5 * 128 + 53, head_dim=head_dim, dtype=dtype)
    blocks = random_blocks(2, 130, 693, block, block, density=0.3)
    check(backend, inputs, blocks, block_q=block, block_k=block, segment_size=block, isa=isa)


@pytest.mark.parametrize("block_q", cases.BLOCK_SIZES)
@pytest.mark.parametrize("block_k", cases.BLOCK_SIZES)
def test_block_sizes_of_a_mask(backend, block_q, block_k):
    inputs = cases.make_inputs(306, (1, 1), 300, 870, dtype=BF16)
    blocks = random_blocks(1, 300, 870, block_q, block_k, density=0.3)
    check(backend, inputs, blocks, own="mask", block_q=block_q, block_k=block_k)


@pytest.mark.parametrize("block, segment", [(64, 64), (64, 192), (128, 256), (256, 512)])
@pytest.mark.parametrize("own", ["segment", "none"])
def test_sizes_of_segments(backend, block, segment, own):
    inputs = cases.make_inputs(307, (1, 1), 90, 3 * segment + 41, dtype=BF16)
    blocks = random_blocks(1, 90, 3 * segment + 41, block, block)
    check(backend, inputs, blocks, own=own, block_q=block, block_k=block, segment_size=segment)


@pytest.mark.parametrize("head_dim, block", [(64, 64), (128, 128)])
def test_several_tiles_of_means(backend, isa, head_dim, block):
    """70 key blocks in tiles of 64 and of 32 means: with and without a block that is left out, one
    of them the last of a word, and no keys at all."""
    inputs = cases.make_inputs(308, (2, 1), 20, 70 * block, head_dim=head_dim, dtype=FP16)
    cut = {"block_q": block, "block_k": block, "segment_size": block, "isa": isa}
    blocks = random_blocks(2, 20, 70 * block, block, block, density=0.1)
    check(backend, inputs, blocks, **cut)
    blocks[:, :, :64] = True
    check(backend, inputs, blocks, **cut)
    blocks[1] = True
    blocks[1, :, 31] = blocks[1, :, 63] = False
    blocks[0] = False
    check(backend, inputs, blocks, own="none", **cut)


def test_softmax_scale_and_large_logits(backend):
    """What a mean counts for is added in log2 units, whatever the scale of the logits."""
    q, k, v = cases.make_inputs(309, (2, 1), 300, dtype=FP16)
    for own in ("segment", "none"):
        check(backend, (q, k, v), blocks_of(2, 300, 300), scale=0.37, own=own)
        check(backend, (q, k, v), blocks_of(2, 300, 300), scale=1e-6, own=own)
        check(backend, (40 * q, 4 * k, v), blocks_of(2, 300, 300), own=own)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(backend, layout):
    laid = cases.make_inputs(310, (4, 2), 300, batch=2, dtype=BF16, layout=layout)
    plain = cases.make_inputs(310, (4, 2), 300, batch=2, dtype=BF16)
    blocks = blocks_of(4, 300, 300)
    assert all(map(torch.equal, check(backend, laid, blocks), check(backend, plain, blocks)))


@pytest.mark.parametrize("own", ["segment", "mask"])
def test_agrees_with_the_cpu(backend, own):
    """As in test_emu_attend.py; the CPU's means are rounded to the inputs' dtype, so bf16 there."""
    inputs = cases.make_inputs(311, (4, 2), 421, dtype=BF16)
    blocks = blocks_of(4, 421, 421)
    options = {"own": own, "return_lse": True, **MEAN}
    here = backend.ops.attend(*inputs, pack(blocks)[None], **options)
    there = ops.attend(*inputs, pack(blocks)[None], isa="c", **options)
    torch.testing.assert_close(here[0].float(), there[0].float(), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(here[1], there[1], atol=4e-3, rtol=1e-3)


# ---- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("own", OWNS)
def test_nothing_left_out_changes_no_bit(backend, own):
    inputs = cases.make_inputs(312, (2, 1), 450, dtype=BF16)
    blocks = blocks_of(2, 450, 450, density=1.0)
    with_means = check(backend, inputs, blocks, own=own)
    assert all(map(torch.equal, with_means, check(backend, inputs, blocks, own=own,
                                                   correction="none")))  # fmt: skip


@pytest.mark.parametrize("own", ["segment", "block", "mask"])
def test_blocks_of_equal_keys_are_exact(backend, own):
    """Values whose means need no rounding: what is left out is dense attention's."""
    q, k, v = cases.make_inputs(313, (2, 1), 450, dtype=BF16)
    k[:] = k[:, :, torch.arange(450) // 64 * 64]
    v[:] = torch.randint(0, 4, v.shape, generator=torch.Generator().manual_seed(313))
    blocks = blocks_of(2, 450, 450)
    if own == "mask":
        blocks |= ~torch.ones(450, 450).tril()[::64, ::64].bool()  # only whole blocks may go
        blocks |= torch.eye(8).bool()
    else:
        blocks[:] = False
    dense = reference.attend(*(x[0].double() for x in (q, k, v)), own="all", block_q=64)
    low = low_precision_attend(q[0], k[0], v[0], None, own="all", block_q=64)
    options = {"own": own, "return_lse": True, **MEAN}
    got = backend.ops.attend(q, k, v, pack(blocks)[None], **options)
    assert_close(got[0][0], dense[0], low[0], what="equal keys out")
    assert_close(got[1][0], dense[1], low[1], what="equal keys lse", noise=2.0**-16)


@pytest.mark.parametrize("packs", [False, True])
def test_keys_that_come_later_do_not_count(backend, packs):
    """NaN in keys and values of own and later blocks, whose means share a tile with history's."""
    inputs = q, k, v = cases.make_inputs(314, (2, 1), 600, dtype=BF16)
    blocks = blocks_of(2, 600, 600, density=0.2)
    k[:, :, 500:] = v[:, :, 500:] = torch.nan
    packed = packed_by(backend, inputs, "identity")[4] if packs else None
    out, lse = backend.ops.attend(
        *inputs, pack(blocks)[None], packed=packed, return_lse=True, **MEAN
    )
    first = [x[:, :, :500] for x in inputs]
    alone, alone_lse = check(backend, first, blocks[:, :8, :8])
    assert torch.equal(out[:, :, :384], alone[:, :, :384])
    assert torch.equal(lse[:, :, :384], alone_lse[:, :, :384])


# ---- means that permute packed -------------------------------------------------------------------


def packed_by(backend, inputs, mode, geometry=None, correction="mean", **options):
    """(k_perm, q_perm, k_pool, v_pool, packed) over keys in a random order."""
    geometry = geometry or Geometry()
    batch = geometry.num_sequences(inputs[0].size(0))
    heads = inputs[0].size(1)
    g = torch.Generator().manual_seed(315)
    score = torch.rand(batch, heads, inputs[1].size(2), generator=g)
    return backend.ops.permute(
        *inputs, score if mode in ("keys", "both") else None, mode=mode, geometry=geometry,
        correction=correction, **{"block_size": 64, "segment_size": 128, **options},
    )  # fmt: skip


@pytest.mark.parametrize("head_dim", [8, 40, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("mode", ["none", "identity", "keys"])
def test_means_are_the_pools_rounded(backend, head_dim, dtype, mode):
    inputs = cases.make_inputs(316, (4, 2), 421, batch=2, head_dim=head_dim, dtype=dtype)
    on = torch.tensor([1, 0, 1, 1], dtype=torch.int32)
    _, _, k_pool, v_pool, packed = packed_by(backend, inputs, mode, permute_heads=on)
    plain = packed_by(backend, inputs, mode, permute_heads=on, correction="none")
    assert torch.equal(k_pool, plain[2]) and torch.equal(v_pool, plain[3])
    parts = packed_parts(packed, inputs[1], 4, 128)[1:] if mode == "keys" else ()
    for x, y in zip(parts, packed_parts(plain[4], inputs[1], 4, 128)[1:] if parts else (),
                    strict=True):  # fmt: skip
        assert torch.equal(x[:, on.bool()], y[:, on.bool()]), "rows where they lie without means"
    data, size = packed.view(torch.uint8).flatten(), k_pool.numel() * 2
    v_at = data.numel() - size
    k_at = v_at - -(-size // 1024) * 1024
    for at, pool in ((k_at, k_pool), (v_at, v_pool)):
        means = data[at : at + size].view(dtype).view(pool.shape)
        assert torch.equal(means, pool.to(dtype))


@pytest.mark.parametrize("gqa", ["per_head", "group"])
@pytest.mark.parametrize("permute", cases.PERMUTES)
def test_packed_rows_of_permute(backend, gqa, permute):
    """Means in the order of history, permuted or not, all four verbs of one backend."""
    config = config_of(permute=permute, gqa=gqa, tau=0.5, correction="mean", **SIZES)
    inputs = cases.make_inputs(317, (4, 2), 421, dtype=BF16)
    run = backend.four_verbs(*inputs, config)
    check_prefill(
        run.out, run.lse, *inputs, run.bits, run.k_perm, config, q_perm=run.q_perm, what=permute
    )


SIZES = {"block_size": 64, "segment_size": 128}


@pytest.mark.parametrize("own", ["segment", "none"])
@pytest.mark.parametrize("on", [(1, 0, 0, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("case", [None, *GEOMETRIES[:3], *GEOMETRIES[10:]],
                         ids=lambda case: case.name if case else "whole")  # fmt: skip
def test_heads_that_are_permuted_beside_others(backend, own, on, case):
    inputs = cases.make_inputs(318, (4, 2), 421, case=case, dtype=BF16, nan_padding=case)
    geometry = geometry_of(case)
    heads = torch.tensor(on, dtype=torch.int32)
    k_perm, *_, packed = packed_by(backend, inputs, "keys", geometry, permute_heads=heads)
    blocks = blocks_of(4, inputs[0].size(2), inputs[1].size(2), density=0.3)
    bits = pack(blocks)[None].expand(k_perm.size(0), -1, -1, -1).contiguous()
    out, lse = backend.ops.attend(
        *inputs, bits, packed=packed, own=own, return_lse=True, geometry=geometry, **MEAN
    )
    for seq in sequences_of(*inputs, case):
        rows, keys = seq.q.shape[1], seq.k.shape[1]
        test_attend.check_attention(
            out[seq.row, :, seq.rows], lse[seq.row, :, seq.rows], seq,
            blocks[:, : -(-rows // 64), : -(-keys // 64)],
            k_perm=k_perm[seq.index, :, :keys], own=own, what=f"{on} {own} {seq.index}", **MEAN,
        )  # fmt: skip


@pytest.mark.parametrize("mode, own", [("identity", "segment"), ("none", "block")])
def test_means_of_the_call_are_those_of_permute(backend, mode, own):
    inputs = cases.make_inputs(319, (4, 2), 421, batch=2, dtype=BF16)
    bits = pack(blocks_of(4, 421, 421))[None].expand(2, -1, -1, -1).contiguous()
    packed = packed_by(backend, inputs, mode)[4]
    options = {"own": own, "return_lse": True, **MEAN}
    given = backend.ops.attend(*inputs, bits, packed=packed, **options)
    assert all(map(torch.equal, given, backend.ops.attend(*inputs, bits, **options)))


def test_packed_rows_of_another_call_give_nan(backend):
    """Among them those that were made without a correction; the other way round nothing is missing
    and no bit changes."""
    inputs = cases.make_inputs(320, (2, 1), 300, dtype=BF16)
    bits = pack(blocks_of(2, 300, 300))[None]
    options = {"return_lse": True, **MEAN}
    for mode, own, cut in [
        ("keys", "segment", {"segment_size": 64}),
        ("keys", "block", {}),
        ("keys", "segment", {"correction": "none"}),
        ("none", "block", {"correction": "none"}),
    ]:
        packed = packed_by(backend, inputs, mode, **cut)[4]
        room = torch.zeros(1 << 20, dtype=packed.dtype)  # whatever the host can tell, it fits
        room[: packed.numel()] = packed
        out, lse = backend.ops.attend(*inputs, bits, packed=room, own=own, **options)
        assert out.isnan().all() and lse.isnan().all(), (mode, own, cut)
    for mode, own in [("keys", "segment"), ("none", "block")]:
        plain, more = (
            backend.ops.attend(*inputs, bits, packed=packed_by(
                backend, inputs, mode, correction=made)[4], own=own, return_lse=True, **SMALL)
            for made in ("none", "mean")
        )  # fmt: skip
        assert torch.isfinite(plain[0]).all() and all(map(torch.equal, plain, more))


def test_packed_rows_that_are_too_few_are_refused(backend):
    inputs = cases.make_inputs(321, (2, 1), 300, dtype=BF16)
    packed = packed_by(backend, inputs, "none", correction="none")[4]
    with pytest.raises((RuntimeError, ValueError), match="packed_bytes: .* at least"):
        backend.ops.attend(*inputs, pack(blocks_of(2, 300, 300))[None], packed=packed, **MEAN)


# ---- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim, block", KERNELS)
def test_same_bits_whatever_the_schedule(backend, head_dim, block):
    """Threads in another order, copies early or late: nothing may show."""
    inputs = cases.make_inputs(322, (2, 1), 70, 5 * block, head_dim=head_dim, dtype=BF16)
    bits = pack(random_blocks(2, 70, 5 * block, block, block, density=0.4))[None]
    cut = {"block_q": block, "block_k": block, "segment_size": block, "correction": "mean"}
    first = backend.ops.attend(*inputs, bits, return_lse=True, **cut)
    for seed, delivery in itertools.product((1, 2, 3), ("lazy", "random")):
        backend.schedule(seed, delivery)
        again = backend.ops.attend(*inputs, bits, return_lse=True, **cut)
        assert all(map(torch.equal, first, again)), f"seed {seed}, copies {delivery}"


def test_same_bits_at_any_place_of_a_batch(backend):
    q, k, v = cases.make_inputs(323, (2, 1), 300, batch=3, dtype=BF16)
    bits = torch.stack([pack(blocks_of(2, 300, 300, seed)) for seed in range(3)])
    whole = backend.ops.attend(q, k, v, bits, return_lse=True, **MEAN)
    for b in range(3):
        one = slice(b, b + 1)
        alone = backend.ops.attend(q[one], k[one], v[one], bits[one], return_lse=True, **MEAN)
        assert all(map(torch.equal, alone, (x[one] for x in whole)))
