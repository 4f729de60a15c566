# SPDX-License-Identifier: Apache-2.0
"""Threads: whoever runs the work, in whatever state, changes no bit; and torch gets its threads
back as they were."""

import contextlib
import ctypes
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cases
import pytest
import torch
from harness import ISAS, config_of, four_verbs

from pbs_attn import ops

REPEATS = 20


@contextlib.contextmanager
def num_threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def call(inputs, permute="both", **options):
    options = {"return_lse": True, "return_plan": True} | options
    return ops.prefill(*inputs, config_of(permute=permute, tau=0.7), **options)


def same(first, again):
    return all(a is b or torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("isa", ISAS)
def test_every_verb_gives_the_same_bits_for_any_number_of_threads(isa):
    emulated = isa.startswith("emu")
    heads, seqlen = ((2, 1), 300) if emulated or isa == "c" else ((6, 2), 600)
    inputs = cases.make_inputs(1, heads, seqlen, head_dim=24, dtype=torch.bfloat16)
    config = config_of(permute="both", tau=0.7)
    with num_threads(1):
        first = four_verbs(*inputs, config, isa=isa)
        whole = call(inputs, isa=isa)
    for repeat in range(REPEATS // 10 if emulated else REPEATS):
        for number in (1, 2, 3, 8) if repeat == 0 else (2, 3, 8):
            with num_threads(number):
                again = four_verbs(*inputs, config, isa=isa)
                assert same(whole, call(inputs, isa=isa)), f"prefill, {number} threads"
            for name, a, b in zip(first._fields, first, again, strict=True):
                assert torch.equal(a, b), f"{name}, {number} threads, repeat {repeat}"


def denormals():
    """Of every thread: large enough for torch to share the work."""
    return torch.full((1 << 20,), 1e-40) * 0.5


def test_torch_computes_after_us_what_it_did_before():
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(2)).bfloat16()
    inputs = cases.make_inputs(3, (4, 2), 700, dtype=torch.bfloat16)
    with num_threads(2):
        product, small = a @ b, denormals()
        for isa in ISAS:
            call([x[:, :, :300] for x in inputs] if isa.startswith("emu") else inputs, isa=isa)
            assert torch.equal(a @ b, product), isa
            assert torch.equal(denormals(), small) and (small != 0).all(), isa


def test_flushed_denormals_of_the_caller_change_nothing_and_stay():
    inputs = cases.make_inputs(4, (4, 2), 700)
    inputs = inputs._replace(v=inputs.v * 1e-38)  # sums near the smallest normal number
    first = call(inputs)
    assert torch.set_flush_denormal(True)
    try:
        assert same(first, call(inputs))
        with num_threads(1):
            assert same(first, call(inputs))
        assert (torch.full((4,), 1e-40) * 0.5 == 0).all()
    finally:
        torch.set_flush_denormal(False)
    assert (torch.full((4,), 1e-40) * 0.5 != 0).all()
    assert same(first, call(inputs))


@pytest.mark.skipif(sys.platform != "linux", reason="fesetround of glibc")
@pytest.mark.parametrize("mode", [0x400, 0x800, 0xC00], ids=["down", "up", "to zero"])
def test_rounding_of_the_caller_changes_nothing_and_stays(mode):
    """head_dim 72: the default scale, 72^-0.5, is rounded as well."""
    libm = ctypes.CDLL("libm.so.6")
    inputs = cases.make_inputs(5, (4, 2), 600, head_dim=72)
    with num_threads(2):
        first = call(inputs)
        before = libm.fegetround()
        libm.fesetround(mode)
        try:
            again, after = call(inputs), libm.fegetround()
        finally:
            libm.fesetround(before)
    assert same(first, again) and after == mode


def test_more_threads_than_cores_and_calls_at_once():
    inputs = cases.make_inputs(6, (4, 2), 700)
    first = call(inputs)
    with num_threads(16):
        assert same(first, call(inputs))
    with num_threads(2), ThreadPoolExecutor(5) as pool:
        for again in pool.map(lambda _: call(inputs), range(15)):
            assert same(first, again)


def test_inside_a_parallel_region_of_torch():
    inputs = cases.make_inputs(7, (4, 2), 700)
    first = call(inputs)
    results = []

    @ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    def task(begin, end, _):
        results.extend(call(inputs) for _ in range(begin, end))

    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    parallel_for = ctypes.CDLL(str(library)).torch_parallel_for
    parallel_for.argtypes = [ctypes.c_int64] * 3 + [type(task), ctypes.c_void_p]
    with num_threads(3):
        assert parallel_for(0, 6, 1, task, None) == 0
    assert len(results) == 6 and all(same(first, again) for again in results)


def test_in_a_backward_hook():
    inputs = cases.make_inputs(8, (4, 2), 700)
    first, results = call(inputs), []
    with num_threads(2):
        x = torch.ones(1 << 16, requires_grad=True)
        y = (x * 2).exp()
        y.register_hook(lambda grad: results.append(call(inputs)))
        y.sum().backward()
        gradient = x.grad.clone()
    assert len(results) == 1 and same(first, results[0])
    torch.testing.assert_close(gradient, torch.full_like(gradient, 2 * math.e**2))


FORKS = """
import multiprocessing, os, signal, sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
from harness import geometry_of
from test_threads import call, cases, same

padded = next(case for case in cases.geometries() if case.name == "right_padding")
inputs = cases.make_inputs(9, (4, 2), case=padded, dtype=torch.bfloat16)

def run():
    return call(inputs, geometry=geometry_of(padded))

def agrees():
    signal.alarm(60)  # a child that hangs is killed, and so noticed
    again = run()
    torch.set_num_threads(1)  # for torch, to compare
    return same(first, again)

def child(task):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if task() else 1)
    return os.waitpid(pid, 0)[1]

def tasks():
    return len(os.listdir("/proc/self/task"))

def in_worker(answers):
    answers.put(agrees())

torch.set_num_threads(3)
if tasks() == 1:  # nobody had threads: the child may make its own
    assert child(lambda: len(run()) and tasks() == 3) == 0, "threads in the child"
first = run()
assert tasks() > 1
assert child(agrees) == 0, "os.fork"
assert child(lambda: child(agrees) == 0) == 0, "a child's child"
context = multiprocessing.get_context("fork")
answers = context.Queue()
workers = [context.Process(target=in_worker, args=(answers,)) for _ in range(2)]
for worker in workers:
    worker.start()
assert [answers.get(timeout=90) for _ in workers] == [True, True], "multiprocessing"
for worker in workers:
    worker.join(60)
    assert worker.exitcode == 0, worker.exitcode
assert same(first, run()) and tasks() > 1, "the parent keeps its threads"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_forked_child_computes_the_same_on_the_thread_it_has():
    """torch's own operators hang there, if the parent had used its threads."""
    here = Path(__file__).parent
    program = FORKS.format(tests=str(here), root=str(here.parent))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
