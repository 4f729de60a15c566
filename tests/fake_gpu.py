# SPDX-License-Identifier: Apache-2.0
"""A GPU for the benchmarks' tests: what they need of torch.cuda, on CPU tensors and clocks."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if not (ROOT / "benchmarks").is_dir():  # a source distribution has tests, but no benchmarks
    pytest.skip("no benchmarks here", allow_module_level=True)

from benchmarks import devices, flex, machine, options  # noqa: E402
from benchmarks.inputs import Shape  # noqa: E402
from benchmarks.peak import mma  # noqa: E402
from benchmarks.peak.cuda import CudaPeak  # noqa: E402
from benchmarks.work import Work  # noqa: E402

TINY = ["--lengths", "600", "--dtypes", "bf16", "--heads", "4", "--heads-k", "2"]
TINY += ["--head-dim", "32", "--samples", "2", "--probe-ms", "0.1", "--warmup-ms", "0"]
TINY += ["--threads", "1"]
PROPERTIES = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=1 << 37,
    L2_cache_size=4 << 20,
    uuid="12345678",
)


class FakeCuda:
    """What devices.py needs of torch.cuda, on the CPU's clock; `log` is what was queued."""

    def __init__(self):
        self.log, self.made = [], 0

    def Event(self, enable_timing=False):  # noqa: N802
        assert enable_timing
        event = SimpleNamespace(at=None)

        def record():
            self.log.append("record")
            event.at = time.perf_counter()

        event.record, event.synchronize = record, lambda: self.log.append("wait")
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event

    def get_device_properties(self, device):
        return PROPERTIES

    def set_device(self, device):
        pass

    def synchronize(self):
        pass

    def current_stream(self):
        return SimpleNamespace(cuda_stream=0)

    def _sleep(self, cycles):
        self.log.append("hold")

    def reset_peak_memory_stats(self, device):
        pass

    def memory_stats(self, device):
        self.made += 1 << 30
        return {"requested_bytes.all.current": 0, "requested_bytes.all.peak": self.made}


class FakeGpu(devices.Cuda):
    def __init__(self, args):
        self.log = FakeCuda()
        cpu = torch.device("cpu")
        super().__init__(args, self.log, cpu, lambda *a: CudaPeak(*a, size=32, copy_bytes=1 << 16))

    def flush(self):
        super().flush()
        self.log.log.append("flush")


@pytest.fixture(autouse=True)
def no_tools(monkeypatch):
    """No nvcc, no nvidia-smi, no compiler for FlexAttention; threads stay as they are."""
    monkeypatch.setattr(mma, "load", lambda *a: (None, "no nvcc"))
    monkeypatch.setattr(devices, "LOAD_MS", 1.0)
    monkeypatch.setattr(machine, "nvidia_smi", lambda p: {"clocks.sm": "1980"})

    def refuse(function):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(flex, "_compiled", refuse)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def arguments(*more, verb="prefill"):
    return options.parse(verb, [*TINY, *more])


def work_of(*more, seqlen_q=None, fake=False):
    args = arguments(*more)
    device = (
        FakeGpu(args) if fake else SimpleNamespace(kind="cpu", torch_device=torch.device("cpu"))
    )
    shape = Shape(600, args.heads, args.heads_k, args.head_dim)
    return Work(shape, args, device, seqlen_q)
