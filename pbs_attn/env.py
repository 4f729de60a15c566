# SPDX-License-Identifier: Apache-2.0
"""Environment variables, read once at import, and what this build is.

| variable | values | meaning |
| --- | --- | --- |
| PBS_ATTN_CONFIG | JSON text or path, or a method | the default `PBSConfig`, or `Method` |
| PBS_ATTN_BACKEND | auto, cpu, cuda, ref | whose kernels may run; ref runs `reference.py` |
| PBS_ATTN_STRICT | 0, 1 | raise instead of taking the dense route for want of support |
| PBS_ATTN_DISABLE | 0, 1 | always take the dense route |
| PBS_ATTN_LOG | debug, info, warning, error | level of the logger `pbs_attn` |
| PBS_ATTN_ISA | c, avx2, ... | read by the C core: which kernels run |
| PBS_ATTN_CUDA_LIBRARY | path | the CUDA library to load: docs/hopper-kernel.md |
| PBS_ATTN_OVERLAP | 0 | read by the CUDA library: no launch overtakes another on 9.0 |
"""

import json
import logging
import os
import subprocess
from dataclasses import dataclass

import torch

from . import methods
from .config import PBSConfig
from .methods import Method

BACKENDS = ("auto", "cpu", "cuda", "ref")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
_LEVELS = ("debug", "info", "warning", "error")

logger = logging.getLogger("pbs_attn")


@dataclass(frozen=True)
class Environment:
    disable: bool = False
    strict: bool = False
    backend: str = "auto"
    config: PBSConfig | Method | None = None


def _flag(name, values):
    text = values.get(name, "").strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError(f"{name} is {values[name]!r}; allowed: 1 or 0")


def read_environment(values=os.environ):
    """The settings in `values`; an invalid one raises ValueError naming the variable."""
    backend = values.get("PBS_ATTN_BACKEND", "").strip().lower() or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"PBS_ATTN_BACKEND is {backend!r}; allowed: {', '.join(BACKENDS)}")
    level = values.get("PBS_ATTN_LOG", "").strip().lower()
    if level:
        if level not in _LEVELS:
            raise ValueError(f"PBS_ATTN_LOG is {level!r}; allowed: {', '.join(_LEVELS)}")
        logger.setLevel(level.upper())
        if not logger.handlers and not logging.getLogger().handlers:
            logger.addHandler(logging.StreamHandler())
    text = values.get("PBS_ATTN_CONFIG", "").strip()
    try:
        config = _policy(text) if text else None
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"PBS_ATTN_CONFIG: {error}") from error
    return Environment(
        disable=_flag("PBS_ATTN_DISABLE", values),
        strict=_flag("PBS_ATTN_STRICT", values),
        backend=backend,
        config=config,
    )


def _policy(text):
    """A PBSConfig from JSON text or a file, or a Method from its text ("flexprefill:gamma=0.9")."""
    if methods.is_method(text):
        return methods.policy("the method", text)
    return PBSConfig.from_json(text)


current = read_environment()


def default_config():
    """The config of a call that names none: PBS_ATTN_CONFIG if set, else `PBSConfig()`."""
    return current.config if current.config is not None else _DEFAULT


_DEFAULT = PBSConfig()


def build_info(gpus=False):
    """What was built and what runs here, as one dictionary that JSON can hold.

    `core` is what the C core says of itself (compiler, flags, instruction sets), `isa` what a
    call would run per dtype on the CPU now, `cpu` which instruction sets run here, `cpu_missing`
    why the others do not, `libraries` whether each library is loaded and, if not, why, `cuda` what
    the CUDA library holds (None if it is not loaded). No GPU is asked for anything unless
    gpus=True, which starts CUDA and adds `driver` and `gpus`: name, compute capability, memory,
    and why no kernels run there (None if they do).
    """
    from . import __version__ as version
    from . import _load

    core = _load.C.build_info()
    info = {
        "version": version,
        "torch": torch.__version__,
        "core": json.loads(core) if isinstance(core, str) else core,
        "isa": {dtype: _load.C.isa(dtype) for dtype in ("float32", "float16", "bfloat16")},
        "cpu": dict(_load.C.cpu_capabilities()),
        "cpu_missing": dict(_load.C.missing_isas()),
        "backend": current.backend,
        "libraries": _load.libraries(),
        "cuda": _load.CUDA.build_info() if _load.CUDA else None,
    }
    return info | {"driver": _driver(), "gpus": _gpus()} if gpus else info


def _driver():
    """Version of NVIDIA's kernel driver, None where there is none."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            words = file.readline().split()
    except OSError:  # not there in every container that has the GPU
        words = _nvidia_smi("driver_version").split()
    return next((word for word in words if word[:1].isdigit() and "." in word), None)


def _nvidia_smi(field):
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _gpus():
    from . import devices

    if not torch.version.cuda or not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "refusal": devices.refusal(torch.device("cuda", index)),
            }
        )
    return found
