# SPDX-License-Identifier: Apache-2.0
"""Scratch memory of a call: how much it is, and what is kept of it for the next one."""

import contextlib
import math
from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
import torch
from harness import config_of

import pbs_attn
from pbs_attn import ops


@pytest.mark.parametrize("options", [
    {}, {"permute": "both"}, {"select": "antidiagonal"}, {"permute": "none"}, {"gqa": "group"},
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_extra_memory_is_workspace_size(options, dtype):
    """All that a call takes beyond its outputs is one workspace of the size that was told."""
    config = config_of(**options)
    inputs = cases.make_inputs(110, (4, 2), 2000, dtype=dtype)
    told = pbs_attn.workspace_size(inputs.q.shape, inputs.k.shape, dtype, config)
    with nothing_kept():
        allocated, (out, lse, count, _, _) = peak_of(lambda: ops.prefill(*inputs, config))
    outputs = sum(x.numel() * x.element_size() for x in (out, lse, count))
    slack = 64 + 64 * 8  # alignment, and the allocator's own rounding of small tensors
    assert told <= allocated - outputs <= told + slack


def peak_of(call):
    """(peak of live bytes that torch's allocator gave to the call, its result)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak, result


@contextlib.contextmanager
def nothing_kept():
    pbs_attn.keep_workspace(0)
    try:
        yield
    finally:
        pbs_attn.keep_workspace(256 << 20)


def test_the_next_call_takes_the_workspace_that_was_kept():
    """No new memory but the outputs, whatever lies in the old one, and the same bits."""
    inputs = cases.make_inputs(111, (4, 2), 1500)
    with nothing_kept():
        want, *_ = ops.prefill(*inputs, config_of())
        told = pbs_attn.workspace_size(inputs.q.shape, inputs.k.shape, torch.float32, config_of())
        pbs_attn.keep_workspace(told)
        nan = [torch.full_like(x, math.nan) for x in inputs]
        ops.prefill(*nan, config_of())  # leaves NaN everywhere
        allocated, (out, lse, count, _, _) = peak_of(lambda: ops.prefill(*inputs, config_of()))
        assert torch.equal(out, want)
        assert allocated < sum(x.numel() * x.element_size() for x in (out, lse, count)) + 1024
        assert pbs_attn.keep_workspace(told - 1) == told
        ops.prefill(*inputs, config_of())
        assert pbs_attn.keep_workspace(0) == 0, "larger than the limit, and kept"


def test_calls_at_once_have_a_workspace_each():
    inputs = [cases.make_inputs(seed, (4, 2), 900 + 100 * seed) for seed in range(6)]
    want = [ops.prefill(*x, config_of())[0] for x in inputs]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            got = pool.map(lambda x: ops.prefill(*x, config_of())[0], inputs)
            assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("wrong", [-1, 1.5, None])
def test_keep_workspace_says_what_it_takes(wrong):
    with pytest.raises(ValueError, match=f"nbytes is {wrong}.*at least 0"):
        pbs_attn.keep_workspace(wrong)


def test_workspace_size_depends_on_the_call():
    shape, shape_k = (1, 8, 8192, 64), (1, 2, 8192, 64)
    size = pbs_attn.workspace_size(shape, shape_k, torch.bfloat16)
    assert 0 < size < 2**31
    assert pbs_attn.workspace_size(shape, shape_k, torch.bfloat16, num_threads=8) >= (
        pbs_attn.workspace_size(shape, shape_k, torch.bfloat16, num_threads=1)
    )
