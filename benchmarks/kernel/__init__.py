# SPDX-License-Identifier: Apache-2.0
"""The C core with what the torch ops do not show: one block, one panel, the steps of a call.

`library()` builds build/bench/libpbs_bench.so (bench.mk: the product's flags, half a minute the
first time) and loads it. OSError says what is missing.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import shutil
import statistics
import subprocess
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_uint64, c_void_p
from pathlib import Path

import torch

from benchmarks.machine import ROOT
from pbs_attn.selection import PERMUTES_QUERIES, enum_id

DTYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
STEPS = ("score", "permute", "select", "attend")
OPTIONS = ("select", "stride", "reduce", "rule", "normalize", "correction")
COPY, PACK, PACK_PERMUTED, PERMUTE = range(4)  # bench_pack_run's `what`


class Counters(ctypes.Structure):
    _fields_ = [(name, c_uint64) for name in ("items", "blocks", "rescales", "busy_ns")]


class Call(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "out", "parallel_for")),
        *((name, c_int32) for name in ("heads", "heads_k", "seqlen", "head_dim", "dtype", "isa")),
        *((name, c_int32) for name in ("block_size", "segment_size", "threads")),
        *((name, c_int32) for name in ("mode", *OPTIONS)),
        ("tau", c_float),
    ]


SIGNATURES = {  # name: (result, arguments)
    "pbs_isa_from_name": (c_int32, [c_char_p]),
    "pbs_isa_available": (c_int32, [c_int32]),
    "pbs_last_error": (c_char_p, []),
    "bench_takes": (c_int32, [c_int32] * 2),
    "bench_block_new": (c_void_p, [c_int32] * 4),
    "bench_block_count": (c_int32, [c_void_p]),
    **{f"bench_block_{name}": (c_void_p, [c_void_p]) for name in ("q", "kv", "out")},
    "bench_block_run": (None, [c_void_p, c_int32]),
    "bench_block_free": (None, [c_void_p]),
    "bench_pack_new": (c_void_p, [c_int32] * 5),
    "bench_pack_run": (None, [c_void_p, c_int32, c_int32]),
    "bench_pack_free": (None, [c_void_p]),
    "bench_steps_new": (c_void_p, [POINTER(Call)]),
    "bench_steps_run": (c_int32, [c_void_p, c_void_p, POINTER(c_double), POINTER(Counters)]),
    "bench_score_run": (c_double, [c_void_p, c_int32]),
    "bench_sort_run": (c_double, [c_void_p, c_int32]),
    "bench_steps_free": (None, [c_void_p]),
}


@functools.cache
def library() -> ctypes.CDLL:
    make = shutil.which("make")
    if not make:
        raise OSError("no make: the benchmark library is not built")
    if not os.environ.get("CC") and not shutil.which("cc"):
        raise OSError("no C compiler (CC, cc): the benchmark library is not built")
    command = [make, "-s", "-f", "benchmarks/kernel/bench.mk", f"-j{os.cpu_count()}"]
    # make's own CC is cc; the variables of a make that called us are not meant for this one
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    options = {"cwd": ROOT, "env": kept, "capture_output": True, "text": True}
    folder = ROOT / "build/bench"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # several processes, one build
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, check=False, **options)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()[-400:]}")
    loaded = ctypes.CDLL(str(folder / "libpbs_bench.so"))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def isa_id(name: str) -> int:
    return library().pbs_isa_from_name(name.encode())


def available(name: str) -> bool:
    return bool(library().pbs_isa_available(isa_id(name)))


def takes(isa: str, dtype: torch.dtype) -> bool:
    return bool(library().bench_takes(isa_id(isa), DTYPES[dtype]))


def option(name: str, value) -> int:
    return value if isinstance(value, int) else enum_id(name, value)


def _made(pointer) -> int:
    if not pointer:
        raise RuntimeError(library().pbs_last_error().decode() or "no memory")
    return pointer


class Block:
    """A block of 128 queries against at least `blocks` of 128 keys, whose panels stay in L2."""

    def __init__(self, isa: str, dtype: torch.dtype, head_dim: int, blocks: int = 64):
        self._lib = library()
        arguments = (isa_id(isa), DTYPES[dtype], head_dim, blocks)
        self._c = _made(self._lib.bench_block_new(*arguments))
        self.blocks = self._lib.bench_block_count(self._c)
        self._shape = dtype, head_dim

    def tensor(self, name: str, rows: int = 128) -> torch.Tensor:
        """A copy of q, kv (keys, then values: 256 rows) or out."""
        dtype, head_dim = self._shape
        at = getattr(self._lib, f"bench_block_{name}")(self._c)
        memory = ctypes.string_at(at, rows * head_dim * dtype.itemsize)
        return torch.frombuffer(bytearray(memory), dtype=dtype).view(rows, head_dim)

    def run(self, repeat: int = 1) -> None:
        self._lib.bench_block_run(self._c, repeat)

    def __del__(self):
        if getattr(self, "_c", None):
            self._lib.bench_block_free(self._c)


class Pack:
    """Packing of `keys` keys, in segments; what: COPY, PACK, PACK_PERMUTED, PERMUTE."""

    def __init__(self, isa: str, dtype: torch.dtype, head_dim: int, keys: int, segment: int):
        self._lib, self.keys = library(), keys
        arguments = (isa_id(isa), DTYPES[dtype], head_dim, keys, segment)
        self._c = _made(self._lib.bench_pack_new(*arguments))

    def run(self, what: int, repeat: int = 1) -> None:
        self._lib.bench_pack_run(self._c, what, repeat)

    def __del__(self):
        if getattr(self, "_c", None):
            self._lib.bench_pack_free(self._c)


def torch_parallel_for() -> int:
    """Address of torch's own pool for C (torch/csrc/stable/c/shim.h), which the product uses."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    return ctypes.cast(ctypes.CDLL(str(path)).torch_parallel_for, c_void_p).value


class Steps:
    """Memory and arguments of a whole call that goes K/V head by K/V head, as Run runs it.

    q (1, Hq, N, D), k and v (1, Hk, N, D), contiguous."""

    def __init__(self, q, k, v, config, isa: str, threads: int):
        if config.permute in PERMUTES_QUERIES:
            raise ValueError(f"permute is {config.permute}; queries in their order are needed")
        if not all(x.is_contiguous() for x in (q, k, v)) or q.shape[2] != k.shape[2]:
            raise ValueError("q, k, v must be contiguous and equally long")
        self._lib, self.threads = library(), threads
        self.out = torch.empty_like(q)
        self._held = (q, k, v)
        self.block_size = config.block_size
        call = Call(
            *(x.data_ptr() for x in (q, k, v, self.out)),
            parallel_for=torch_parallel_for() if threads > 1 else None,
            heads=q.shape[1], heads_k=k.shape[1], seqlen=q.shape[2], head_dim=q.shape[3],
            dtype=DTYPES[q.dtype], isa=isa_id(isa), block_size=config.block_size,
            segment_size=config.segment_size, threads=threads, tau=config.tau,
            mode=enum_id("permute", config.permute),
            **{name: option(name, getattr(config, name)) for name in OPTIONS},
        )  # fmt: skip
        self._c = _made(self._lib.bench_steps_new(ctypes.byref(call)))

    def run(self, bits, seconds, counters) -> None:
        at = bits.data_ptr() if bits is not None else None
        if self._lib.bench_steps_run(self._c, at, seconds, counters):
            raise RuntimeError(self._lib.pbs_last_error().decode())

    def score(self, repeat: int = 1) -> None:
        if self._lib.bench_score_run(self._c, repeat) < 0:
            raise RuntimeError(self._lib.pbs_last_error().decode())

    def sort(self, repeat: int = 1) -> None:
        if self._lib.bench_sort_run(self._c, repeat) < 0:
            raise RuntimeError(self._lib.pbs_last_error().decode())

    def __del__(self):
        if getattr(self, "_c", None):
            self._lib.bench_steps_free(self._c)


class Run:
    """A call of Steps, whose every call is kept: seconds per verb, attend's counters per thread.

    bits [1, Hq, Tq, W]: attended to instead of what select chooses; the verbs before run alike."""

    def __init__(self, steps: Steps, bits=None):
        self.steps, self.bits = steps, bits
        self.runs: list[tuple[list[float], list[Counters]]] = []

    def __call__(self):
        seconds, counters = (c_double * len(STEPS))(), (Counters * self.steps.threads)()
        self.steps.run(self.bits, seconds, counters)
        self.runs.append((list(seconds), list(counters)))
        return self.steps.out

    def summary(self, skip: int = 0) -> dict:
        """Medians over all calls but the first `skip`: a warm-up maps pages."""
        runs = self.runs[skip:] or self.runs
        ms = {
            name: 1e3 * statistics.median(seconds[i] for seconds, _ in runs)
            for i, name in enumerate(STEPS)
        }
        total = sum(ms.values())
        busy = [[c.busy_ns for c in counters] for _, counters in runs]
        blocks, rescales, items = (
            sum(getattr(c, name) for c in runs[-1][1]) for name in ("blocks", "rescales", "items")
        )
        # rows of a block once per panel of 128 keys
        panels = blocks * self.steps.block_size * max(self.steps.block_size // 128, 1)
        return {
            "steps_ms": ms,
            "shares": {name: value / total for name, value in ms.items()},
            "overhead": 1 - ms["attend"] / total,
            "items": items,
            "counted_blocks": blocks,
            "rescales": rescales,
            "rescales_per_row_panel": rescales / panels,
            "busy_spread": statistics.median(max(t) * len(t) / sum(t) for t in busy),
        }
