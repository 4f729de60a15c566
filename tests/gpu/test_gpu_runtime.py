# SPDX-License-Identifier: Apache-2.0
"""What only a real device has: streams, graphs, an allocator, other devices, and time to rerun."""

import gpu_checks
import pytest
import test_ops
import torch
from emu_backend import to_device
from gpu_checks import GPU, Inputs
from harness import config_of

from pbs_attn import ops, pbs_attention, record, workspace_size

pytestmark = gpu_checks.needs_gpu
CONFIG = config_of()


def test_300_runs_give_the_same_bits():
    inputs = gpu_checks.make(GPU, (8, 2), 4096)
    gpu_checks.check_reruns(GPU, inputs, CONFIG, 300)


@pytest.mark.parametrize("permute", ["none", "keys", "both"])
def test_poisoned_padding(permute):
    gpu_checks.check_poisoned_padding(GPU, config_of(permute=permute))


def test_two_streams_at_once():
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    inputs = [gpu_checks.make(GPU, (8, 2), 4096, seed=seed) for seed in (1, 2)]
    want = [gpu_checks.prefill(x, CONFIG) for x in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                got.append(gpu_checks.prefill(x, CONFIG))
        torch.cuda.synchronize()
        assert all(gpu_checks.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_call_waits_for_its_own_stream():
    """Inputs that are still being made on the stream of the call are complete when it reads."""
    inputs = gpu_checks.make(GPU, (8, 2), 2048)
    want = gpu_checks.prefill(inputs, CONFIG)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        late = Inputs(*(torch.full_like(x, float("nan")) for x in inputs))
        torch.cuda._sleep(50_000_000)
        for x, full in zip(late, inputs, strict=True):
            x.copy_(full, non_blocking=True)
        got = gpu_checks.prefill(late, CONFIG)
    torch.cuda.synchronize()
    assert gpu_checks.equal(got, want)


@pytest.mark.parametrize("permute", ["keys", "none", "both"])
def test_launches_that_overtake_change_no_bit(permute, monkeypatch):
    """On 9.0 each launch of a call, and the first of the next one, may begin before the one before
    it has ended. Short calls back to back, in memory that they share."""
    config = config_of(permute=permute)
    inputs = [gpu_checks.make(GPU, (8, 2), n, seed=n) for n in (640, 1100, 2048)]
    monkeypatch.setenv("PBS_ATTN_OVERLAP", "0")
    want = [gpu_checks.prefill(x, config) for x in inputs]
    torch.cuda.synchronize()
    monkeypatch.delenv("PBS_ATTN_OVERLAP")
    for _ in range(100):
        got = [gpu_checks.prefill(x, config) for x in inputs]
        torch.cuda.synchronize()
        assert all(gpu_checks.equal(a, b) for a, b in zip(got, want, strict=True))


def test_captured_into_a_graph_and_replayed():
    first, second = (gpu_checks.make(GPU, (8, 2), 2048, seed=seed) for seed in (3, 4))
    want = [gpu_checks.prefill(x, CONFIG) for x in (first, second)]
    held = Inputs(*(x.clone() for x in first))
    with torch.cuda.stream(torch.cuda.Stream()):  # warm up off the default stream
        gpu_checks.prefill(held, CONFIG)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gpu_checks.prefill(held, CONFIG)
    for inputs, expected in ((second, want[1]), (first, want[0]), (second, want[1])):
        for x, new in zip(held, inputs, strict=True):
            x.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert gpu_checks.equal(got, expected)


@pytest.mark.parametrize("permute", ["keys", "none"])
def test_memory_is_what_workspace_size_says(permute):
    config = config_of(permute=permute)
    q, k, v = gpu_checks.make(GPU, (8, 2), 8192)
    out = torch.empty_like(q).transpose(1, 2)
    ops.prefill_out(q, k, v, config, out)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    ops.prefill_out(q, k, v, config, out)
    taken = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    assert taken == workspace_size(q.shape, k.shape, q.dtype, config, device=GPU)


def test_no_call_waits_for_the_gpu():
    q, k, v = gpu_checks.make(GPU, (8, 2), 2048)
    lengths = torch.tensor([2000], dtype=torch.int32, device=GPU)
    bounds = torch.tensor([0, 900, 2048], dtype=torch.int32, device=GPU)
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    tau = torch.rand(8, device=GPU)
    dense = CONFIG.replace(min_q=10**6)

    def calls():
        for config in (CONFIG, dense):
            pbs_attention(q, k, v, config=config, tau=tau)
            pbs_attention(q, k, v, config=config, q_len=lengths, kv_len=lengths)
            pbs_attention(q[:, :, -300:], k, v, config=config)
            pbs_attention(q[:, :, -300:], k, v, config=config, return_lse=True, return_plan=True)
            pbs_attention(*rows, config=config, cu_seqlens_q=bounds, max_seqlen_q=1200)

    calls()  # loads kernels, which may wait
    with record() as counted:
        with gpu_checks.no_synchronisation():
            calls()
    assert counted.calls == {"pbs": 5, "dense": 5} and 0 < counted.density <= 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    inputs = gpu_checks.make(GPU, (4, 2), 1500)
    want = gpu_checks.prefill(inputs, CONFIG)
    other = torch.device("cuda", 1)
    got = gpu_checks.prefill(Inputs(*(x.to(other) for x in inputs)), CONFIG)
    assert torch.cuda.current_device() == 0 and got[0].device == other
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_compiled_graph(backend):
    gpu_checks.check_compiled(GPU, CONFIG, backend)


def test_opcheck():
    """The calls of test_ops.py, on the device."""
    done = set()
    for op, args, options in test_ops.samples(torch.bfloat16):
        name = op.name()
        if "attend" in name and args[3] is not None:
            continue  # packed by the CPU's kernels: of no use to a GPU's
        there = tuple(to_device(x, GPU) for x in args)
        options = {key: to_device(x, GPU) for key, x in options.items()}
        torch.library.opcheck(op, there, options, test_utils=test_ops.OPCHECKS)
        done.add(name)
    assert len(done) >= 6, done
