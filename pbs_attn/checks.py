# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the public functions: every error names the argument, its value and what is
allowed, and comes before any work. Checks that read tensor values run on CPU tensors only and not
while torch.compile traces: on a GPU they would be a synchronisation."""

import math
from itertools import pairwise

import torch

from .geometry import Geometry

LAYOUTS = ("bhnd", "bnhd")
INT32_MAX = 2**31 - 1
_NAMES = ("q_start", "q_len", "kv_start", "kv_len")


def fail(name, value, allowed, error=ValueError):
    raise error(f"{name} is {value}; allowed: {allowed}")


def readable(tensor):
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def to_bhnd(q, k, v, layout, packed):
    """q, k, v as (B, H, N, D) views with unit last stride, checked against each other."""
    if layout not in LAYOUTS:
        fail("layout", repr(layout), ", ".join(LAYOUTS))
    rank, shape = (3, "(total, H, D)") if packed else (4, "(B, H, N, D) or (B, N, H, D)")
    views = []
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            fail(name, type(x).__name__, "a torch.Tensor", TypeError)
        if x.ndim != rank:
            fail(name, f"{x.ndim}-dimensional {tuple(x.shape)}", f"{rank} dimensions {shape}")
        if not x.dtype.is_floating_point:
            fail(name, x.dtype, "a floating point dtype", TypeError)
        if x.dtype != q.dtype:
            fail(name, x.dtype, f"the dtype of q, {q.dtype}", TypeError)
        if x.device != q.device:
            fail(name, f"on {x.device}", f"the device of q, {q.device}")
        view = x.unsqueeze(0).transpose(1, 2) if packed else x
        view = view.transpose(1, 2) if layout == "bnhd" and not packed else view
        # The kernels take any stride but the last: one copy of what a caller sliced along D.
        views.append(view if view.stride(-1) == 1 or view.shape[-1] <= 1 else view.contiguous())
    q, k, v = views
    for name, x in (("k", k), ("v", v)):
        if x.shape[0] != q.shape[0]:
            fail(f"{name} batch", x.shape[0], f"that of q, {q.shape[0]}")
    if v.shape[:3] != k.shape[:3]:
        fail("v", tuple(v.shape[:3]), f"batch, heads and length of k, {tuple(k.shape[:3])}")
    if k.shape[3] != q.shape[3]:
        fail("k head_dim", k.shape[3], f"that of q, {q.shape[3]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        fail("q heads", q.shape[1], f"a multiple of the {k.shape[1]} heads of k and v")
    return q, k, v


def make_geometry(q, k, vectors, max_seqlen_q, max_seqlen_k):
    """A Geometry of int32 tensors from the caller's; q and k are (B, H, N, D)."""
    for name, value, size in (
        ("max_seqlen_q", max_seqlen_q, q.shape[2]),
        ("max_seqlen_k", max_seqlen_k, k.shape[2]),
    ):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            fail(name, repr(value), "an integer or None", TypeError)
        if not 0 <= value <= size:
            fail(name, value, f"0 to {size}")
    given = {name: x for name, x in zip(_NAMES, vectors, strict=True) if x is not None}
    size = None
    for name, x in given.items():
        if not isinstance(x, torch.Tensor) or x.dtype not in (torch.int32, torch.int64):
            kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            fail(name, kind, "an int32 or int64 tensor", TypeError)
        if x.ndim != 1 or x.device != q.device:
            fail(name, f"{tuple(x.shape)} on {x.device}", f"one dimension on {q.device}")
        size = x.shape[0] if size is None else size
        if x.shape[0] != size or (q.shape[0] != 1 and size != q.shape[0]):
            fail(name, f"of length {x.shape[0]}", f"one entry per sequence, {q.shape[0]}")
    if all(readable(x) for x in given.values()):
        max_q = q.shape[2] if max_seqlen_q is None else max_seqlen_q or q.shape[2]
        max_k = k.shape[2] if max_seqlen_k is None else max_seqlen_k or k.shape[2]
        _check_span("q", given, q.shape[2], max_q)
        _check_span("kv", given, k.shape[2], max_k)
    tensors = [x if x is None else x.to(torch.int32).contiguous() for x in vectors]
    return Geometry(*tensors, max_seqlen_q or 0, max_seqlen_k or 0)


def _check_span(side, given, seqlen, longest):
    """start >= 0, 0 <= len <= longest, start + len <= seqlen; None means 0 and the rest."""
    start, length = given.get(f"{side}_start"), given.get(f"{side}_len")
    starts = start.tolist() if start is not None else None
    lengths = length.tolist() if length is not None else None
    if starts is None and lengths is None:
        return
    for b in range(len(starts if starts is not None else lengths)):
        begin = starts[b] if starts is not None else 0
        if not 0 <= begin <= seqlen:
            fail(f"{side}_start[{b}]", begin, f"0 to {seqlen}")
        count = lengths[b] if lengths is not None else seqlen - begin
        if not 0 <= count <= min(longest, seqlen - begin):
            fail(f"{side}_len[{b}]", count, f"0 to {min(longest, seqlen - begin)}")


def packed_geometry(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """Geometry of packed sequences from their cumulative lengths [B + 1]; q, k (1, H, total, D)."""
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    parts, longest = [], [max_seqlen_q, max_seqlen_k]
    for i, (name, cu, total) in enumerate(
        (("cu_seqlens_q", cu_seqlens_q, q.shape[2]), ("cu_seqlens_k", cu_seqlens_k, k.shape[2]))
    ):
        if not isinstance(cu, torch.Tensor) or cu.dtype not in (torch.int32, torch.int64):
            kind = cu.dtype if isinstance(cu, torch.Tensor) else type(cu).__name__
            fail(name, kind, "an int32 or int64 tensor", TypeError)
        if cu.ndim != 1 or cu.shape[0] < 2 or cu.shape != cu_seqlens_q.shape:
            fail(name, tuple(cu.shape), "[B + 1] with B >= 1, the same for queries and keys")
        if cu.device != q.device:
            fail(name, f"on {cu.device}", f"the device of q, {q.device}")
        if readable(cu):
            values = cu.tolist()
            lengths = [b - a for a, b in pairwise(values)]
            if values[0] != 0 or values[-1] != total or min(lengths) < 0:
                fail(name, values, f"ascending from 0 to the total length, {total}")
            if longest[i] is None:
                longest[i] = max(lengths)
        parts += [cu[:-1], cu[1:] - cu[:-1]]
    return make_geometry(q, k, parts, *longest)


def head_vector(name, value, size, device, dtype):
    """A per-head option as a contiguous tensor [size] of dtype on device."""
    if not isinstance(value, torch.Tensor):
        fail(name, type(value).__name__, f"a tensor [{size}]", TypeError)
    if value.shape != (size,):
        fail(name, f"of shape {tuple(value.shape)}", f"[{size}], one entry per head")
    if value.device != device:
        fail(name, f"on {value.device}", f"the device of q, {device}")
    return value.to(dtype).contiguous()


def tau_heads(tau, num_heads, device):
    if isinstance(tau, torch.Tensor) and not tau.dtype.is_floating_point:
        fail("tau", tau.dtype, "a floating point tensor", TypeError)
    vector = head_vector("tau", tau, num_heads, device, torch.float32)
    if readable(vector):
        for head, value in enumerate(vector.tolist()):
            if not math.isfinite(value) or value < 0:
                fail(f"tau[{head}]", value, "a finite number >= 0")
    return vector


def softmax_scale(value):
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail("softmax_scale", repr(value), "a number or None (head_dim ** -0.5)", TypeError)
    if not math.isfinite(value) or value <= 0:
        fail("softmax_scale", value, "a finite number > 0 or None (head_dim ** -0.5)")
    return float(value)


def out_view(out, q, v, packed, layout):
    """The caller's out as (B, Nq, Hq, D) for the ops."""
    if not isinstance(out, torch.Tensor):
        fail("out", type(out).__name__, "a torch.Tensor", TypeError)
    if out.ndim != 4 - packed:
        fail("out", f"{out.ndim}-dimensional", f"{4 - packed} dimensions, as q")
    view = out.unsqueeze(0) if packed else out.transpose(1, 2) if layout == "bhnd" else out
    shape = (q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    if view.shape != shape:
        fail("out", tuple(out.shape), f"the shape of q with the head_dim of v, in layout {layout}")
    if out.dtype != q.dtype or out.device != q.device:
        fail("out", f"{out.dtype} on {out.device}", f"{q.dtype} on {q.device}")
    if out.stride(-1) != 1 and out.shape[-1] > 1:
        fail("out", f"with strides {out.stride()}", "a unit stride in the last dimension")
    return view
