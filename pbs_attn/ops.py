# SPDX-License-Identifier: Apache-2.0
"""The four verbs and their fusion as functions over `torch.ops.pbs_attn`.

Tensors are (B, H, N, D) with any strides (last 1); `geometry` is a `geometry.Geometry`, options go
by name. Shapes of results are those of csrc/include/pbs/pbs.h. No checks here beyond the names: the
C core checks every argument before it writes anything.
"""

import torch

from . import _load, fakes
from .geometry import Geometry
from .selection import enum_id

_load.load()
_library = fakes.register()
_ops = torch.ops.pbs_attn
_WHOLE = Geometry()


def score(
    q,
    k,
    *,
    geometry=_WHOLE,
    softmax_scale=None,
    block_size=128,
    segment_size=256,
    gqa="per_head",
    order="last_block",
    seed=0,
    isa="auto",
):
    """Importance of every key: fp32 [B, Hp, Nk]."""
    return _ops.score(
        q,
        k,
        *geometry,
        softmax_scale or 0.0,
        block_size,
        segment_size,
        enum_id("gqa", gqa),
        enum_id("order", order),
        seed,
        enum_id("isa", isa),
    )


def permute(
    q,
    k,
    v,
    score=None,
    *,
    k_perm_in=None,
    permute_heads=None,
    geometry=_WHOLE,
    block_size=128,
    segment_size=256,
    gqa="per_head",
    mode="keys",
    correction="none",
    pack=True,
    isa="auto",
):
    """(k_perm, q_perm, k_pool, v_pool, packed); `pbs.h` has their shapes.

    correction: that of the attend which packed is for."""
    return _ops.permute(
        q,
        k,
        v,
        score,
        k_perm_in,
        permute_heads,
        *geometry,
        block_size,
        segment_size,
        enum_id("gqa", gqa),
        enum_id("permute", mode),
        pack,
        enum_id("isa", isa),
        enum_id("correction", correction),
    )


def select(
    q,
    k,
    k_pool=None,
    *,
    k_perm=None,
    q_perm=None,
    tau_heads=None,
    geometry=_WHOLE,
    softmax_scale=None,
    block_size=128,
    segment_size=256,
    gqa="per_head",
    mode="keys",
    method="mean_pool",
    stride=8,
    reduce="sum",
    rule="prefix",
    normalize="history",
    tau=0.9,
    return_mass=False,
    isa="auto",
):
    """(bits int32 [B, Hq, Tq, W], count int32 [B, Hq, Tq], mass fp32 [B, Hq, Tq, Tk])."""
    return _ops.select(
        q,
        k,
        k_pool,
        k_perm,
        q_perm,
        tau_heads,
        *geometry,
        softmax_scale or 0.0,
        block_size,
        segment_size,
        enum_id("gqa", gqa),
        enum_id("permute", mode),
        enum_id("select", method),
        stride,
        enum_id("reduce", reduce),
        enum_id("rule", rule),
        tau,
        return_mass,
        enum_id("isa", isa),
        enum_id("normalize", normalize),
    )


def attend(
    q,
    k,
    v,
    bits=None,
    *,
    packed=None,
    q_perm=None,
    geometry=_WHOLE,
    softmax_scale=None,
    block_q=128,
    block_k=128,
    segment_size=256,
    gqa="per_head",
    own="segment",
    correction="none",
    return_lse=False,
    isa="auto",
):
    """(out [B, Hq, Nq, D] over (B, Nq, Hq, D) memory, lse fp32 [B, Hq, Nq] or empty)."""
    out, lse = _ops.attend(
        q,
        k,
        v,
        packed,
        bits,
        q_perm,
        *geometry,
        softmax_scale or 0.0,
        block_q,
        block_k,
        segment_size,
        enum_id("gqa", gqa),
        enum_id("own", own),
        return_lse,
        enum_id("isa", isa),
        enum_id("correction", correction),
    )
    return out.transpose(1, 2), lse


def attend_out(
    q,
    k,
    v,
    bits,
    out,
    lse=None,
    *,
    packed=None,
    q_perm=None,
    geometry=_WHOLE,
    softmax_scale=None,
    block_q=128,
    block_k=128,
    segment_size=256,
    gqa="per_head",
    own="segment",
    correction="none",
    isa="auto",
):
    """`attend` into out (B, Nq, Hq, D), any strides, and lse [B, Hq, Nq] if given."""
    _ops.attend_out(
        q,
        k,
        v,
        packed,
        bits,
        q_perm,
        *geometry,
        softmax_scale or 0.0,
        block_q,
        block_k,
        segment_size,
        enum_id("gqa", gqa),
        enum_id("own", own),
        out=out,
        lse=lse,
        isa=enum_id("isa", isa),
        correction=enum_id("correction", correction),
    )


def _prefill_options(config, geometry, softmax_scale):
    return (
        *geometry,
        softmax_scale or 0.0,
        config.block_size,
        config.segment_size,
        enum_id("gqa", config.gqa),
        enum_id("permute", config.permute),
        enum_id("order", config.order),
        config.seed,
        enum_id("select", config.select),
        config.stride,
        enum_id("reduce", config.reduce),
        enum_id("rule", config.rule),
        config.tau,
    )


def _prefill_words(config):
    """What stands behind isa in the schemas, where calls made before it was there do not miss it"""
    return {
        "normalize": enum_id("normalize", config.normalize),
        "correction": enum_id("correction", config.correction),
    }


def prefill(
    q,
    k,
    v,
    config,
    *,
    k_perm_in=None,
    permute_heads=None,
    tau_heads=None,
    geometry=_WHOLE,
    softmax_scale=None,
    return_lse=False,
    return_plan=False,
    isa="auto",
):
    """All four verbs: (out, lse, count, bits, k_perm); the last two empty unless return_plan."""
    out, *rest = _ops.prefill(
        q,
        k,
        v,
        k_perm_in,
        permute_heads,
        tau_heads,
        *_prefill_options(config, geometry, softmax_scale),
        return_lse,
        return_plan,
        enum_id("isa", isa),
        **_prefill_words(config),
    )
    return out.transpose(1, 2), *rest


def prefill_out(
    q,
    k,
    v,
    config,
    out,
    lse=None,
    *,
    k_perm_in=None,
    permute_heads=None,
    tau_heads=None,
    geometry=_WHOLE,
    softmax_scale=None,
    isa="auto",
):
    """`prefill` into out (B, Nq, Hq, D), any strides, and lse [B, Hq, Nq] if given."""
    _ops.prefill_out(
        q,
        k,
        v,
        k_perm_in,
        permute_heads,
        tau_heads,
        *_prefill_options(config, geometry, softmax_scale),
        out=out,
        lse=lse,
        isa=enum_id("isa", isa),
        **_prefill_words(config),
    )
