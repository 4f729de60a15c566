# SPDX-License-Identifier: Apache-2.0
"""pbs_prefill of csrc/include/pbs/pbs.h through ctypes, for what the torch ops do not offer: the
cap on a wave's workspace. `struct_size` makes the C core refuse the call if these structs drift."""

import ctypes
import math
from ctypes import c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p

import torch

from pbs_attn.selection import enum_id, num_words

DTYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


class View(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p), ("dtype", c_int), ("size", c_int32 * 4), ("stride", c_int64 * 4),
    ]  # fmt: skip


class KV(ctypes.Structure):
    _fields_ = [
        ("view", View), ("block_table", c_void_p), ("block_table_stride", c_int64),
        ("page_size", c_int32),
    ]  # fmt: skip


class Geometry(ctypes.Structure):
    _fields_ = [
        ("q_start", c_void_p), ("q_len", c_void_p), ("kv_start", c_void_p), ("kv_len", c_void_p),
        ("max_seqlen_q", c_int32), ("max_seqlen_k", c_int32),
    ]  # fmt: skip


class Exec(ctypes.Structure):
    _fields_ = [
        ("parallel_for", c_void_p), ("pool", c_void_p), ("num_threads", c_int32), ("isa", c_int),
        ("stream", c_void_p), ("device", c_int32),
    ]  # fmt: skip


class Prefill(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t), ("q", View), ("k", KV), ("v", KV), ("k_perm_in", c_void_p),
        ("permute_heads", c_void_p), ("tau_heads", c_void_p), ("geometry", Geometry),
        ("softmax_scale", c_float), ("block_size", c_int32), ("segment_size", c_int32),
        ("gqa", c_int), ("mode", c_int), ("order", c_int), ("seed", c_uint64), ("method", c_int),
        ("stride", c_int32), ("reduce", c_int), ("rule", c_int), ("tau", c_float), ("out", View),
        ("lse", View), ("count", c_void_p), ("bits", c_void_p), ("k_perm", c_void_p),
        ("q_perm", c_void_p), ("workspace_cap", c_size_t), ("workspace", c_void_p),
        ("workspace_bytes", c_size_t), ("exec", Exec), ("counters", c_void_p),
        ("normalize", c_int), ("correction", c_int),
    ]  # fmt: skip


def view(x):
    return View(x.data_ptr(), DTYPES[x.dtype], (c_int32 * 4)(*x.shape), (c_int64 * 4)(*x.stride()))


class Library:
    def __init__(self, path):
        self._c = ctypes.CDLL(path)
        self._c.pbs_last_error.restype = c_char_p

    def _call(self, name, *args):
        status = getattr(self._c, name)(*args)
        assert status == 0, f"{name}: status {status}: {self._c.pbs_last_error().decode()}"

    def prefill(self, q, k, v, config, workspace_cap=0, geometry=(None,) * 4, **heads):
        """(out (B, H, N, D), lse, count, bits, k_perm, bytes of workspace).

        heads: k_perm_in, permute_heads, tau_heads as for pbs_attn.ops.prefill."""
        batch, num_heads, seqlen_q, _ = q.shape
        heads_p = k.shape[1] if config.gqa == "group" else num_heads
        tq, tk = -(-seqlen_q // config.block_size), -(-k.shape[2] // config.block_size)
        integers = {"dtype": torch.int32, "device": q.device}
        rows = (batch, seqlen_q, num_heads, q.shape[3])
        out = torch.zeros(rows, dtype=q.dtype, device=q.device).transpose(1, 2)
        lse = torch.full((batch, num_heads, seqlen_q, 1), -math.inf, device=q.device)
        count = torch.empty(batch, num_heads, tq, **integers)
        bits = torch.empty(batch, num_heads, tq, num_words(tk), **integers)
        k_perm = torch.empty(batch, heads_p, k.shape[2], **integers)
        stream = torch.cuda.current_stream().cuda_stream if q.is_cuda else None
        p = Prefill(
            struct_size=ctypes.sizeof(Prefill), q=view(q), k=KV(view(k)), v=KV(view(v)),
            **{name: x.data_ptr() for name, x in heads.items()},
            geometry=Geometry(*(x if x is None else x.data_ptr() for x in geometry)),
            block_size=config.block_size, segment_size=config.segment_size,
            gqa=enum_id("gqa", config.gqa), mode=enum_id("permute", config.permute),
            order=enum_id("order", config.order), seed=config.seed,
            method=enum_id("select", config.select), stride=config.stride,
            reduce=enum_id("reduce", config.reduce), rule=enum_id("rule", config.rule),
            tau=config.tau, out=view(out), lse=view(lse), count=count.data_ptr(),
            bits=bits.data_ptr(), k_perm=k_perm.data_ptr(), workspace_cap=workspace_cap,
            exec=Exec(None, None, 1, 0, stream, q.device.index or 0),
            normalize=enum_id("normalize", config.normalize),
            correction=enum_id("correction", config.correction),
        )  # fmt: skip
        size = c_size_t()
        self._call("pbs_prefill_workspace_size", ctypes.byref(p), ctypes.byref(size))
        workspace = torch.empty(size.value, dtype=torch.uint8, device=q.device)
        p.workspace, p.workspace_bytes = workspace.data_ptr(), size.value
        self._call("pbs_prefill", ctypes.byref(p))
        return out, lse.squeeze(-1), count, bits, k_perm, size.value
