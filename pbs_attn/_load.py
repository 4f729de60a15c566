# SPDX-License-Identifier: Apache-2.0
"""Load the compiled libraries: `load()` returns `pbs_attn._C`, which registers the torch ops, and
gives them their CUDA kernels from `pbs_attn._C_cuda` where torch is built with CUDA. No GPU is
asked for anything."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

import torch  # before _C, whose ops register themselves with the loaded LibTorch

ABI_VERSION = 1  # PBS_ABI_VERSION of csrc/include/pbs/pbs.h

C = None  # pbs_attn._C, once load() has succeeded
CUDA = None  # pbs_attn._C_cuda, if that is loaded
CUDA_ARCHS = ""  # what that was compiled for, as PBS_CUDA_ARCHS
NO_CUDA = "load() was not called"  # else why not, a sentence

_HERE = Path(__file__).parent


def load():
    """pbs_attn._C; ImportError with the cure if it is missing, broken or of another version."""
    global C, CUDA, CUDA_ARCHS, NO_CUDA
    if C is None:
        C = _import()
        CUDA, NO_CUDA = _import_cuda()
        CUDA_ARCHS = CUDA.build_info()["archs"] if CUDA else ""
    return C


def _import():
    try:
        module = importlib.import_module("pbs_attn._C")
    except ImportError as error:
        raise ImportError(_cure(error)) from error
    if module.abi_version() != ABI_VERSION:
        raise ImportError(_version(module))
    return module


def _version(module):
    return (
        f"{module.__file__} has C ABI version {module.abi_version()}, this pbs_attn needs "
        f"{ABI_VERSION}: an older build is in the way; build again (`pip install .` or "
        "`make build`)"
    )


def _import_cuda():
    """(module, None) or (None, why not). A missing or broken one never breaks the CPU's."""
    named = os.environ.get("PBS_ATTN_CUDA_LIBRARY")
    found = [Path(named)] if named else sorted(_HERE.glob("_C_cuda*.so"))
    if not found:
        return None, C.build_info()["no_cuda"] or f"there is no _C_cuda.abi3.so in {_HERE}"
    if not torch.version.cuda:
        return None, f"torch {torch.__version__} is built without CUDA"
    try:
        module = _from_file(named) if named else importlib.import_module("pbs_attn._C_cuda")
    except ImportError as error:
        return None, f"cannot load {found[0]} under torch {torch.__version__}: {error}"
    if module.abi_version() != ABI_VERSION:
        return None, _version(module)
    return module, None


def _from_file(path):
    """pbs_attn._C_cuda from elsewhere. Once: the ops of a second one would not register."""
    name = "pbs_attn._C_cuda"
    if name not in sys.modules:
        module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
        module.__spec__.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def _cure(error):
    found = sorted(path.name for path in _HERE.glob("_C.*.so"))
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
        "cuda": {"file": CUDA.__file__ if CUDA else None, "reason": NO_CUDA},
    }


def of(device):
    """The library for calls on the device; NotImplementedError if that is not loaded."""
    module = load()
    if device.type != "cuda":
        return module
    if CUDA is None:
        raise NotImplementedError(f"pbs_attn's CUDA library is not loaded: {NO_CUDA}")
    return CUDA


def kv_packed_bytes(
    device, batch, num_heads, num_heads_k, seqlen_q, seqlen_k, head_dim, dtype, *options
):
    """Bytes of `packed`; dtype is torch's, options are block_size, ..., isa as in `_C`."""
    sizes = (batch, num_heads, num_heads_k, seqlen_q, seqlen_k, head_dim)
    return of(device).kv_packed_bytes(*sizes, str(dtype).removeprefix("torch."), *options)
