# SPDX-License-Identifier: Apache-2.0
"""Whether this build has a CUDA library, and if not, why (`pbs-attn doctor` repeats it)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

MODES = ("auto", "0", "1")


def find_nvcc() -> tuple[Path | None, str]:
    """nvcc, or None and where it was looked for."""
    for name in ("PBS_CUDA_HOME", "CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(name)
        if home:
            nvcc = Path(home) / "bin" / "nvcc"
            if not nvcc.is_file():
                raise SystemExit(f"pbs_attn: {name} is {home!r}, but there is no {nvcc}")
            return nvcc, name
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path), "PATH"
    default = Path("/usr/local/cuda/bin/nvcc")
    if default.is_file():
        return default, "the default folder"
    return None, "no nvcc in PBS_CUDA_HOME, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"


def reason_for_cpu_only(root: Path) -> str:
    """One line: why this build makes the CPU library alone. PBS_BUILD_CUDA=1 makes it an error."""
    mode = os.environ.get("PBS_BUILD_CUDA", "auto")
    if mode not in MODES:
        raise SystemExit(f"pbs_attn: PBS_BUILD_CUDA is {mode!r}: one of {', '.join(MODES)}")
    if mode == "0":
        return "PBS_BUILD_CUDA=0"
    nvcc, where = find_nvcc()
    if nvcc is None:
        reason = where
    elif not any((root / "csrc" / "cuda").glob("*.cu")):
        reason = "this version has no CUDA kernels yet"
    else:
        raise SystemExit("pbs_attn: csrc/cuda has kernels, but setup.py does not build them")
    if mode == "1":
        raise SystemExit(f"pbs_attn: PBS_BUILD_CUDA=1, but {reason}")
    return reason
