# SPDX-License-Identifier: Apache-2.0
"""Ops on a batch, the reference on each of its sequences, and the comparison of the two."""

from typing import NamedTuple

import torch
from numerics import assert_close, low_precision_attend, unpack

from pbs_attn import PBSConfig, _load, ops, reference
from pbs_attn.geometry import Geometry
from pbs_attn.selection import PERMUTES_QUERIES, own_of

ISAS = tuple(name for name, runs in _load.load().cpu_capabilities().items() if runs)


def takes(isa, dtype):
    """bf16 dot products and tiles serve bf16 alone; asked for another dtype, a call runs their
    kin."""
    return dtype == torch.bfloat16 or not isa.endswith(("bf16", "amx"))


def config_of(**changes):
    return PBSConfig(min_q=0, min_kv=0, strict=True, **changes)


def geometry_of(case):
    return Geometry() if case is None else Geometry(**case.geometry())


class Verbs(NamedTuple):
    score: torch.Tensor | None
    k_perm: torch.Tensor
    q_perm: torch.Tensor | None
    k_pool: torch.Tensor
    v_pool: torch.Tensor
    packed: torch.Tensor
    bits: torch.Tensor
    count: torch.Tensor
    mass: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


def four_verbs(
    q,
    k,
    v,
    config,
    geometry=None,
    *,
    tau_heads=None,
    permute_heads=None,
    k_perm_in=None,
    isa="auto",
    ops=ops,
):
    """score, permute, select and attend one after another through the ops, or those of a backend"""
    cut = {
        "geometry": geometry or Geometry(),
        "block_size": config.block_size,
        "segment_size": config.segment_size,
        "gqa": config.gqa,
        "isa": isa,
    }
    score = None
    if config.permute in ("keys", "both") and k_perm_in is None:
        score = ops.score(q, k, order=config.order, seed=config.seed, **cut)
    k_perm, q_perm, k_pool, v_pool, packed = ops.permute(
        q,
        k,
        v,
        score,
        k_perm_in=k_perm_in,
        permute_heads=permute_heads,
        mode=config.permute,
        correction=config.correction,
        **cut,
    )
    q_perm = q_perm if config.permute in PERMUTES_QUERIES else None
    bits, count, mass = ops.select(
        q,
        k,
        k_pool,
        k_perm=k_perm,
        q_perm=q_perm,
        tau_heads=tau_heads,
        mode=config.permute,
        method=config.select,
        stride=config.stride,
        reduce=config.reduce,
        rule=config.rule,
        normalize=config.normalize,
        tau=config.tau,
        return_mass=True,
        **cut,
    )
    out, lse = ops.attend(
        q,
        k,
        v,
        bits,
        packed=packed,
        q_perm=q_perm,
        geometry=cut["geometry"],
        block_q=config.block_size,
        block_k=config.block_size,
        segment_size=config.segment_size,
        gqa=config.gqa,
        own=own_of(config.permute),
        correction=config.correction,
        return_lse=True,
        isa=isa,
    )
    return Verbs(score, k_perm, q_perm, k_pool, v_pool, packed, bits, count, mass, out, lse)


class Sequence(NamedTuple):
    """One sequence: its place in the plan, and its own q, k, v [H, N, D]."""

    index: int  # in plans
    row: int  # in tensors
    rows: slice
    keys: slice
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def sequences_of(q, k, v, case=None):
    vectors = {} if case is None else case.geometry()
    parts = reference.sequences(q, k, **vectors)
    for index, (row, rows, row_kv, keys) in enumerate(parts):
        yield Sequence(
            index, row, rows, keys, q[row, :, rows], k[row_kv, :, keys], v[row_kv, :, keys]
        )


def cut_of(config):
    return {"block_size": config.block_size, "segment_size": config.segment_size}


def bits_of(bits, seq, config):
    """bool [H, Tq, Tk] of one sequence, from int32 words of the whole call."""
    tq = -(-seq.q.shape[1] // config.block_size)
    tk = -(-seq.k.shape[1] // config.block_size)
    wide = unpack(bits[seq.index], bits.shape[-1] * 32)
    assert not wide[:, tq:].any(), "bits of query blocks that do not exist"
    assert not wide[:, :, tk:].any(), "bits of key blocks that do not exist"
    return wide[:, :tq, :tk]


def check_attention(out, lse, seq, bits, *, what, **options):
    """out [H, N, D] and lse of one sequence against attention over exactly these blocks."""
    wide = [x.double() for x in (seq.q, seq.k, seq.v)]
    exact_out, exact_lse = reference.attend(*wide, bits, **options)
    low_out, low_lse = low_precision_attend(seq.q, seq.k, seq.v, bits, **options)
    # Adding Nk products one after another, as the portable kernel does, walks sqrt(Nk) half units.
    largest = exact_out.abs().max().item() if exact_out.numel() else 0.0
    noise = seq.k.shape[1] ** 0.5 * 2.0**-24 * largest
    assert_close(out, exact_out, low_out, what=f"{what} out", noise=noise)
    if lse is not None:
        assert_close(lse, exact_lse, low_lse, what=f"{what} lse")


def check_prefill(out, lse, q, k, v, bits, k_perm, config, case=None, q_perm=None, what=""):
    """Every sequence of a prefill against attention over the blocks that it says it chose."""
    live = torch.zeros(out.shape[0], out.shape[2], dtype=torch.bool)
    for seq in sequences_of(q, k, v, case):
        live[seq.row, seq.rows] = True
        check_attention(
            out[seq.row, :, seq.rows],
            lse[seq.row, :, seq.rows] if lse is not None else None,
            seq,
            bits_of(bits, seq, config),
            k_perm=k_perm[seq.index, :, : seq.k.shape[1]],
            q_perm=q_perm[seq.index, :, : seq.q.shape[1]] if q_perm is not None else None,
            own=own_of(config.permute),
            block_q=config.block_size,
            block_k=config.block_size,
            segment_size=config.segment_size,
            correction=config.correction,
            what=f"{what} sequence {seq.index}",
        )
    rows = ~live[:, None, :].expand(out.shape[:3])
    assert (out[rows] == 0).all(), f"{what}: rows outside the sequences are not 0"
    assert lse is None or torch.isneginf(lse[rows]).all(), f"{what}: lse outside is not -inf"
