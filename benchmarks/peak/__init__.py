# SPDX-License-Identifier: Apache-2.0
"""The machine's own peak: register-only loops in peak.c, compiled here with the machine's compiler.

`Peak(threads).run(unit)` gives GFLOP/s summed over the threads, all running at the same time;
`ghz()` the clock of the core that the caller runs on.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Which unit a path of ours computes on, so which peak its fraction is taken of.
UNIT_OF_ISA = {
    "c": "fma-c",
    "avx2": "fma-avx2",
    "avx512": "fma-avx512",
    "avx512bf16": "bf16-dot",
    "amx": "bf16-amx",
}


def _compile(folder: str) -> ctypes.CDLL:
    source = Path(__file__).with_name("peak.c")
    compiler = (
        shlex.split(os.environ.get("CC", ""))
        or [found for found in map(shutil.which, ("cc", "gcc", "clang")) if found][:1]
    )
    if not compiler:
        raise OSError("no C compiler (CC, cc, gcc or clang): the machine's peak is not measured")
    library = os.path.join(folder, "peak.so")
    command = [*compiler, "-O3", "-std=gnu11", "-shared", "-fPIC", str(source), "-o", library]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()[-400:]}")
    return ctypes.CDLL(library)


class Peak:
    """`units`: the names this machine has, widest last."""

    def __init__(self, threads: int, cpu_time: bool = False):
        with tempfile.TemporaryDirectory() as folder:
            self._lib = _compile(folder)
        self._lib.peak_name.restype = ctypes.c_char_p
        self._lib.peak_name.argtypes = [ctypes.c_int]
        self._lib.peak_run.restype = ctypes.c_double
        self._lib.peak_run.argtypes = [ctypes.c_int, ctypes.c_double, ctypes.c_int]
        self._lib.peak_clock.restype = ctypes.c_double
        self._lib.peak_clock.argtypes = []
        self._lib.peak_init()
        names = []
        while (name := self._lib.peak_name(len(names))) is not None:
            names.append(name.decode())
        self._unit = {n: i for i, n in enumerate(names) if self._lib.peak_has(i)}
        self.units = list(self._unit)
        self.threads, self.cpu_time = threads, int(cpu_time)
        self._pool = ThreadPoolExecutor(threads)

    def run(self, unit: str, ms: float = 10.0, threads: int = 0) -> float:
        """GFLOP/s of all threads (or of so many) together over about `ms` milliseconds."""
        index = self._unit[unit]
        arguments = (self._lib.peak_run, index, ms, self.cpu_time)
        runs = [self._pool.submit(*arguments) for _ in range(threads or self.threads)]
        return sum(run.result() for run in runs)

    def ghz(self) -> float | None:
        """About 10 us of a chain of multiplications; None where their latency is not known."""
        return self._lib.peak_clock() or None
