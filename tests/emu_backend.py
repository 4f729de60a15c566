# SPDX-License-Identifier: Apache-2.0
"""The backends that run csrc/cuda, behind one interface, so that one test function serves both:

    emu   the emulated GPU: torch.ops.pbs_attn_emu on CPU tensors, from build/emu/_C_emu.so
    cuda  a real one: torch.ops.pbs_attn on CUDA tensors, where torch finds one

Tests give CPU tensors and get CPU tensors back; `Backend` moves them, strides included. The
library is built by `make emu` when the first test asks for it, or named by PBS_EMU_LIBRARY.
"""

import ctypes
import fcntl
import functools
import os
import pathlib
import subprocess
import types

import harness
import pytest
import torch
import verbs

import pbs_attn.ops
from pbs_attn import _load

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "build/emu/_C_emu.so"
DELIVERIES = ("lazy", "random", "eager")  # when asynchronous copies arrive; numbers of tests/emu
ISAS = ("sm80", "sm90")
VERBS = ("score", "permute", "select", "attend", "attend_out", "prefill", "prefill_out")


def names():
    """What to run tests on here."""
    return ("emu", "cuda") if torch.cuda.is_available() else ("emu",)


def params():
    marks = {"cuda": (pytest.mark.gpu,)}
    return [pytest.param(name, marks=marks.get(name, ())) for name in names()]


class Backend(verbs.Ops):
    """The verbs on one sequence as in verbs.Ops, those on a batch as `ops`, and all four at once.

    name    "emu" or "cuda"
    device  where the tensors of the ops live
    path    the library, for abi.Library
    ops     like the module pbs_attn.ops, for CPU tensors
    """

    def __init__(self, name, namespace, device, path):
        super().__init__(None, namespace, device)
        self.name = name
        self.path = path
        self.namespace = namespace
        functions = {x: _rebound(getattr(pbs_attn.ops, x), namespace, device) for x in VERBS}
        self.ops = types.SimpleNamespace(**functions)

    def __repr__(self):
        return self.name

    def four_verbs(self, q, k, v, config, geometry=None, **options):
        return harness.four_verbs(q, k, v, config, geometry, ops=self.ops, **options)

    def require(self, isa):
        """Skips where the device has other instructions; the emulated one has all."""
        if isa == "sm90" and self.name == "cuda" and torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs a GPU of compute capability 9.0")

    def schedule(self, seed=0, delivery="lazy"):
        """How the next launches order threads and deliver copies; a real GPU does as it likes."""

    def launches(self):
        pytest.skip("only the emulated GPU counts launches")


class Emulated(Backend):
    def __init__(self):
        path = library()
        torch.ops.load_library(path)
        super().__init__("emu", torch.ops.pbs_attn_emu, torch.device("cpu"), path)
        self._set = ctypes.CDLL(path).pbs_emu_set
        self._set.argtypes, self._set.restype = (ctypes.c_uint64, ctypes.c_int), None
        self._launches = ctypes.CDLL(path).pbs_emu_launches
        self._launches.restype = ctypes.c_int64

    def schedule(self, seed=0, delivery="lazy"):
        self._set(seed, DELIVERIES.index(delivery))

    def launches(self):
        """Launches so far."""
        return self._launches()


@functools.cache
def get(name):
    if name == "emu":
        return Emulated()
    return Backend("cuda", torch.ops.pbs_attn, torch.device("cuda"), cuda_library())


def cuda_library():
    """Path of pbs_attn/_C_cuda; fails with the reason where it is not loaded."""
    state = _load.libraries()["cuda"]
    if state["file"] is None:
        pytest.fail(f"there is a GPU, but pbs_attn has no CUDA library: {state['reason']}")
    return state["file"]


def library():
    """Path of the emulated backend; skips, or in CI fails, with the reason where there is none."""
    path, why = _made()
    if why is None:
        return path
    if os.environ.get("CI", "0") not in ("", "0"):
        pytest.fail(why)
    pytest.skip(why)


@functools.cache
def _made():
    """(path, None) or (None, why not)."""
    given = os.environ.get("PBS_EMU_LIBRARY")
    if given:
        return given, None
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    with open(LIBRARY.parent / "lock", "w") as lock:  # several test processes, one build
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = subprocess.run(
            ["make", "--no-print-directory", "-s", "emu"], cwd=ROOT, capture_output=True, text=True
        )
    if made.returncode == 0 and LIBRARY.is_file():
        return str(LIBRARY), None
    said = "\n".join((made.stdout + made.stderr).strip().splitlines()[-20:])
    return None, f"the emulated GPU is not there (`make emu`, status {made.returncode}): {said}"


def to_device(x, device):
    """x on device with the same strides and the same memory between its rows."""
    if not isinstance(x, torch.Tensor) or x.device.type == device.type:
        return x
    memory = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    return memory.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def _moved(value, device):
    if isinstance(value, tuple):  # a Geometry, or what an op gives back
        moved = [_moved(each, device) for each in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return to_device(value, device)


def _rebound(function, namespace, device):
    """A function of pbs_attn.ops that calls the ops of another namespace, on another device."""
    around = {**function.__globals__, "_ops": namespace}
    copy = types.FunctionType(
        function.__code__, around, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    if device.type == "cpu":
        return copy

    @functools.wraps(function)
    def call(*args, **options):
        there = [_moved(x, device) for x in args]
        there_by_name = {name: _moved(x, device) for name, x in options.items()}
        result = copy(*there, **there_by_name)
        if function.__name__.endswith("_out"):  # what the op wrote, back where the test sees it
            pairs = zip((*args, *options.values()), (*there, *there_by_name.values()), strict=True)
            for here, far in pairs:
                if isinstance(here, torch.Tensor) and here is not far:
                    here.copy_(far)
        return _moved(result, torch.device("cpu"))

    return call
