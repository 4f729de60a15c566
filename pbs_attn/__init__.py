# SPDX-License-Identifier: Apache-2.0
"""Permuted block-sparse attention (PBS-Attn, arXiv 2510.21270) for PyTorch.

    import torch, pbs_attn
    out = pbs_attn.pbs_attention(q, k, v)         # (B, H, N, D), causal

    pbs_attn.register()                           # then attn_implementation="pbs_attn"
    with pbs_attn.record() as calls: ...          # what ran sparse, what did not and why

Importing this package imports torch and loads the C library; transformers is imported only when
one of `register`, `patch_model` and `unpatch_model` is asked for.
"""

from .config import PBSConfig
from .env import build_info
from .interface import attend, keep_workspace, pbs_attention, workspace_size
from .routing import supports
from .stats import record

__version__ = "0.1.0"
__all__ = [
    "PBSConfig",
    "attend",
    "build_info",
    "keep_workspace",
    "patch_model",
    "pbs_attention",
    "record",
    "register",
    "supports",
    "unpatch_model",
    "workspace_size",
]

_FROM_TRANSFORMERS = ("register", "patch_model", "unpatch_model")


def __getattr__(name):
    if name in _FROM_TRANSFORMERS:
        from .integrations import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
