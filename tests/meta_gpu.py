# SPDX-License-Identifier: Apache-2.0
"""A GPU made of meta tensors: they have shapes and strides but no values, so that every read of a
value, which on a GPU would be a synchronisation, raises here. The fixture `gpu` is conftest's."""

import types

import torch
from harness import config_of

from pbs_attn import _load, devices

GPU = torch.device("meta")
BF16 = torch.bfloat16
SPARSE = config_of()


def library(archs="80+PTX;90"):
    """What pbs_attn._C_cuda looks like to Python; sizes are those of the CPU's library."""
    return types.SimpleNamespace(
        __file__="_C_cuda.abi3.so",
        build_info=lambda: {"archs": archs, "nvcc": "13.0"},
        kv_packed_bytes=_load.load().kv_packed_bytes,
        prefill_workspace_size=_load.load().prefill_workspace_size,
        refuses=lambda index: None,
    )


def install(monkeypatch):
    """A function that makes a GPU of the meta device, with a library for it."""

    def put(capability=(9, 0), archs="80+PTX;90"):
        monkeypatch.setattr(_load, "CUDA", library(archs))
        monkeypatch.setattr(_load, "CUDA_ARCHS", archs)
        monkeypatch.setattr(_load, "NO_CUDA", None)
        monkeypatch.setattr(devices, "_capabilities", {0: capability})

    monkeypatch.setattr(devices, "kind", lambda x: "cuda" if x.type == "meta" else x.type)
    put()
    return put


def tensors(seqlen_q=700, seqlen_k=700, head_dim=64, dtype=BF16, heads=(4, 2), batch=1):
    q = torch.empty(batch, heads[0], seqlen_q, head_dim, dtype=dtype, device=GPU)
    k, v = (torch.empty(batch, heads[1], seqlen_k, head_dim, dtype=dtype, device=GPU) for _ in "kv")
    return q, k, v


def int32(*values):
    return torch.empty(len(values), dtype=torch.int32, device=GPU)
