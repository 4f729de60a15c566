# SPDX-License-Identifier: Apache-2.0
"""Load the compiled library: `load()` returns `pbs_attn._C` and registers the torch ops with it."""

import importlib
import sys
from pathlib import Path

import torch  # before _C, whose ops register themselves with the loaded LibTorch

ABI_VERSION = 1  # PBS_ABI_VERSION of csrc/include/pbs/pbs.h

C = None  # pbs_attn._C, once load() has succeeded

_HERE = Path(__file__).parent


def load():
    """pbs_attn._C; ImportError with the cure if it is missing, broken or of another version."""
    global C
    if C is None:
        C = _import()
    return C


def _import():
    try:
        module = importlib.import_module("pbs_attn._C")
    except ImportError as error:
        raise ImportError(_cure(error)) from error
    if module.abi_version() != ABI_VERSION:
        raise ImportError(
            f"{module.__file__} has C ABI version {module.abi_version()}, this pbs_attn needs "
            f"{ABI_VERSION}: an older build is in the way; build again (`pip install .` or "
            "`make build`)"
        )
    return module


def _cure(error):
    found = sorted(path.name for path in _HERE.glob("_C*.so"))
    if not found:
        return (
            f"pbs_attn is not built: there is no _C.abi3.so in {_HERE}. In a checkout run "
            "`make build` or `pip install -e .`; if this is the source folder of an installed "
            "package, start Python somewhere else"
        )
    if "undefined symbol" in str(error) or "version `" in str(error):
        why = f"it does not fit this torch ({torch.__version__}; 2.10 or newer is needed)"
    else:
        why = f"it does not fit this Python {sys.version.split()[0]} on {sys.platform}"
    return f"cannot load {_HERE / found[0]}: {why}; build it again here. The loader said: {error}"


def libraries():
    """Each library: its file if it is loaded, and why not otherwise. None = not so."""
    module = load()
    return {
        "cpu": {"file": module.__file__, "reason": None},
        "cuda": {"file": None, "reason": module.build_info()["no_cuda"]},
    }


def kv_packed_bytes(batch, num_heads, num_heads_k, seqlen_q, seqlen_k, head_dim, dtype, *options):
    """Bytes of `packed`; dtype is torch's, options are block_size, ..., isa as in `_C`."""
    sizes = (batch, num_heads, num_heads_k, seqlen_q, seqlen_k, head_dim)
    return load().kv_packed_bytes(*sizes, str(dtype).removeprefix("torch."), *options)
