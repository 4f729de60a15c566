# SPDX-License-Identifier: Apache-2.0
"""The peaks of a GPU, measured between samples: a GEMM, a copy, and mma.sync from registers.

gemm  GFLOP/s of torch.matmul, 8192^3, bf16: what the best library makes of the tensor cores.
      Random normal data: constants draw less power and clock higher
copy  GB/s, read and written, of a copy inside the device
mma   GFLOP/s of mma.sync m16n8k16 (mma.cu): the most that kernels for sm_80 can reach, on Hopper
      well below gemm. Needs nvcc or a library made before: see mma.py
"""

from __future__ import annotations

import torch

from benchmarks.peak import mma

GEMM_SIZE = 8192
COPY_BYTES = 512 << 20


class CudaPeak:
    """`units`: what can be run here; `no_mma`: why "mma" is not among them."""

    def __init__(self, device, cuda=torch.cuda, size=GEMM_SIZE, copy_bytes=COPY_BYTES):
        self.cuda, self._ms = cuda, {}
        g = torch.Generator(device).manual_seed(0)
        make = {"generator": g, "device": device, "dtype": torch.bfloat16}
        a, b = torch.randn(size, size, **make), torch.randn(size, size, **make)
        c = torch.empty_like(a)
        source = torch.randn(copy_bytes // 2, **make)
        target = torch.empty_like(source)
        # unit -> what to run, FLOP or bytes of it
        self._units = {
            "gemm": (lambda: torch.matmul(a, b, out=c), 2.0 * size**3),
            "copy": (lambda: target.copy_(source), 2.0 * copy_bytes),
        }
        loop, self.no_mma = mma.load(device, cuda)
        if loop:
            self._units["mma"] = (loop.run, loop.flop)
        self.units = list(self._units)
        for unit in self.units:
            self.run(unit)  # chooses kernels, learns how long one takes

    def queue(self, unit: str, ms: float) -> int:
        """Start about `ms` milliseconds of it and do not wait; how many were started."""
        call = self._units[unit][0]
        count = max(1, round(ms / self._ms.get(unit, ms)))
        for _ in range(count):
            call()
        return count

    def run(self, unit: str, ms: float = 10.0) -> float:
        """GFLOP/s or GB/s over about `ms` milliseconds, by events on the current stream."""
        begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        count = self.queue(unit, ms)
        end.record()
        end.synchronize()
        took = begin.elapsed_time(end) / count
        self._ms[unit] = took
        return self._units[unit][1] / (took * 1e6)
