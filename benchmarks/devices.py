# SPDX-License-Identifier: Apache-2.0
"""Where rows run and how they are timed: on CPUs by a clock, on a GPU by events on its stream.

A device gives: torch_device, threads, banner(), peaks(), unit(row, isa), warm_up(call), time(call),
probe(units, beside_ms), peak_extra_bytes(call), state(). harness.py knows nothing else about it.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

import pbs_attn
import pbs_attn.devices
from benchmarks import machine
from benchmarks.peak import UNIT_OF_ISA, Peak
from benchmarks.peak.cuda import CudaPeak

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# A GPU is kept busy this long before the first event, so that a call's launches are queued by the
# time it starts: in a model the layers before it do that. About 0.6 ms at 1.7 GHz.
HOLD_CYCLES = 1_000_000
PROBE_AT_MOST_MS = 200.0
KEPT = 256 << 20  # bytes of workspace that calls on a CPU keep unless told otherwise
LOAD_MS = 1000.0  # GEMMs behind which clocks and power are read


@dataclass
class Timing:
    ms: float
    host_ms: float | None = None  # GPU: until the call returned; above ms, launching is the limit
    ghz: float | None = None  # CPU: of the calling thread's core, mean of before and after


def open_device(args):
    """The device that --device names; SystemExit with the reason where it cannot be used."""
    if args.device == "cpu":
        return Cpu(args)
    if not torch.cuda.is_available():
        raise SystemExit(f"--device {args.device}: torch {torch.__version__} sees no CUDA device")
    why = pbs_attn.devices.refusal(torch.device(args.device))
    if why:
        raise SystemExit(f"--device {args.device}: {why}; --device cpu runs")
    return Cuda(args)


class Cpu:
    kind = family = "cpu"

    def __init__(self, args):
        torch.set_num_threads(args.threads)
        self.torch_device = torch.device("cpu")
        self.threads, self.probe_ms = args.threads, args.probe_ms
        self.probe_share = args.probe_share
        self.clock = CLOCKS[args.clock]
        self.peak = Peak(args.threads, args.clock == "cpu")

    def banner(self) -> dict:
        return machine.banner(self.threads)

    def peaks(self) -> dict[str, float]:
        units = self.peak.units
        return {u: statistics.median(self.peak.run(u, 50) for _ in range(5)) for u in units}

    def unit(self, row, isa: str) -> str:
        """Of the row's kernels; "fma-avx2 x1" where the row has its own number of threads."""
        unit = UNIT_OF_ISA.get(isa, "fma-c")
        return f"{unit} x{row.threads}" if row.threads else unit

    def warm_up(self, call) -> None:
        call()  # pages mapped, kernels chosen

    def time(self, call) -> Timing:
        before, begin = self.peak.ghz(), self.clock()
        call()
        ms, after = 1e3 * (self.clock() - begin), self.peak.ghz()
        return Timing(ms, ghz=(before + after) / 2 if before and after else None)

    def probe(self, units, beside_ms: float = 0.0) -> dict[str, float]:
        """beside_ms: the longer of the samples at both sides. A core may run above the clock that
        it can hold for some milliseconds, so a probe lasts its share of a long sample."""
        ms = max(self.probe_ms, min(self.probe_share * beside_ms, PROBE_AT_MOST_MS))
        rates = {}
        for unit in units:
            name, _, threads = unit.partition(" x")
            rates[unit] = self.peak.run(name, ms, int(threads or 0))
        return rates

    def state(self) -> dict:
        return {}

    def peak_extra_bytes(self, call) -> int:
        """From torch's own record of its allocator: every allocation and release of the call, which
        finds no workspace that an earlier one has left."""
        pbs_attn.keep_workspace(0)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as p:
            result = call()
        pbs_attn.keep_workspace(KEPT)
        events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        return peak - _held(result)


class Cuda:
    """`cuda`: torch.cuda, or what stands for it in a test. All runs on the current stream."""

    kind = "cuda"

    def __init__(self, args, cuda=torch.cuda, torch_device=None, peak=CudaPeak):
        self.cuda, self.threads = cuda, args.threads
        self.torch_device = torch_device or torch.device(args.device)
        cuda.set_device(self.torch_device)
        self.properties = cuda.get_device_properties(self.torch_device)
        self.family = pbs_attn.devices.family(self.torch_device)
        self.warmup_ms, self.probe_ms = args.warmup_ms, args.probe_ms
        self.peak = peak(self.torch_device, cuda)
        # Twice L2 each: whatever the cache keeps of it, no line of an input is left.
        count = max(2 * self.properties.L2_cache_size, 1 << 20) // 4
        self._written = torch.empty(count, device=self.torch_device)
        self._read = torch.zeros(count, device=self.torch_device)
        self._total = torch.empty((), device=self.torch_device)

    def banner(self) -> dict:
        gpu = machine.gpu_banner(self.properties, self.state())
        return machine.banner(self.threads) | {"gpu": gpu, "no_mma_peak": self.peak.no_mma}

    def state(self) -> dict:
        """Clocks and power with the GPU at work."""
        self.peak.queue("gemm", LOAD_MS)
        seen = machine.nvidia_smi(self.properties)
        self.cuda.synchronize()
        return seen

    def peaks(self) -> dict[str, float]:
        units = self.peak.units
        return {u: statistics.median(self.peak.run(u, 50) for _ in range(5)) for u in units}

    def unit(self, row, isa: str) -> str:
        return "gemm" if row.blocks else "copy"

    def warm_up(self, call) -> None:
        until = time.perf_counter() + 1e-3 * self.warmup_ms
        while True:
            call()
            self.cuda.synchronize()
            if time.perf_counter() >= until:
                return

    def flush(self) -> None:
        """Cold L2. Written, then other memory read: no sample pays for writing dirty lines back."""
        self._written.zero_()
        torch.sum(self._read, dim=0, out=self._total)

    def time(self, call) -> Timing:
        begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        hold = getattr(self.cuda, "_sleep", None)
        if hold:
            hold(HOLD_CYCLES)
        begin.record()
        began = time.perf_counter()
        result = call()
        host_ms = 1e3 * (time.perf_counter() - began)
        end.record()
        end.synchronize()
        del result
        return Timing(begin.elapsed_time(end), host_ms)

    def probe(self, units, beside_ms: float = 0.0) -> dict[str, float]:
        """Every unit, whatever the row: the GPU is as warm before a copy as before a GEMM."""
        return {unit: self.peak.run(unit, self.probe_ms) for unit in self.peak.units}

    def peak_extra_bytes(self, call) -> int:
        """Requested bytes, so without the allocator's rounding."""
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats(self.torch_device)
        before = self._requested("current")
        result = call()
        self.cuda.synchronize()
        return self._requested("peak") - before - _held(result)

    def _requested(self, when: str) -> int:
        return self.cuda.memory_stats(self.torch_device).get(f"requested_bytes.all.{when}", 0)


def _held(result) -> int:
    tensors = result if isinstance(result, (tuple, list)) else (result,)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(held.values())
