# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.peak.mma [OUT]: build mma.cu, for a machine with a GPU but no nvcc.

The benchmarks look for build/peak/mma.so (or what PBS_PEAK_MMA names) and build it themselves where
nvcc is found. Without either the mma.sync peak is left out and the JSON says why.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("mma.cu")
LIBRARY = SOURCE.parents[2] / "build" / "peak" / "mma.so"
ROUNDS = 4096  # 283 GFLOP on 132 SMs: half a millisecond
BLOCKS_PER_SM = 2
TARGETS = ("arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90")
PTX = "arch=compute_80,code=compute_80"  # what every newer GPU can take


def build(out: Path = LIBRARY) -> str | None:
    """Why it could not be built, or None. The file appears whole or not at all."""
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if not nvcc:
        return "no nvcc"
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(f".{os.getpid()}.part")
    codes = [option for code in (*TARGETS, PTX) for option in ("-gencode", code)]
    command = [nvcc, "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", *codes]
    command += [str(SOURCE), "-o", str(part)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    if done.returncode:
        return f"{' '.join(command)}: {done.stderr.strip()[-400:]}"
    part.replace(out)
    return None


def load(device, cuda=torch.cuda):
    """(Loop or None, why not)."""
    named = os.environ.get("PBS_PEAK_MMA")
    path = Path(named) if named else LIBRARY
    stale = not path.exists() or path.stat().st_mtime < SOURCE.stat().st_mtime
    if stale and not named:
        why = build(path)
        if why and not path.exists():
            return None, why
    try:
        loop = Loop(path, device, cuda)
        loop.run()
        cuda.synchronize()
    except (OSError, RuntimeError) as error:
        return None, str(error)
    return loop, None


class Loop:
    def __init__(self, path: Path, device, cuda=torch.cuda):
        library = ctypes.CDLL(str(path))
        self._launch, self._error = library.peak_mma_launch, library.peak_mma_error
        self._launch.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        self._error.argtypes, self._error.restype = [ctypes.c_int], ctypes.c_char_p
        per_block = library.peak_mma_flop_per_block
        per_block.argtypes, per_block.restype = [ctypes.c_int], ctypes.c_double
        self.cuda, self.index = cuda, device.index or 0
        self.blocks = BLOCKS_PER_SM * cuda.get_device_properties(device).multi_processor_count
        self.flop = self.blocks * per_block(ROUNDS)

    def run(self) -> None:
        """Queued on torch's current stream."""
        stream = self.cuda.current_stream().cuda_stream
        status = self._launch(self.index, stream, self.blocks, ROUNDS)
        if status:
            raise RuntimeError(f"mma.cu: {self._error(status).decode()}")


def main() -> int:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else LIBRARY
    if out.name in ("-h", "--help"):
        print(__doc__)
        return 0
    why = build(out)
    print(why or f"built {out}")
    return 1 if why else 0


if __name__ == "__main__":
    sys.exit(main())
