# SPDX-License-Identifier: Apache-2.0
"""How a first token is timed: order of runs, warm-up, samples, and what else a run shows.

Nothing here knows a method. Times are of the host's clock, from ids on the device to the first
token id on the host, which is what a user waits for.
"""

import contextlib
import statistics
import subprocess
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..cli import CommandError

SETTLED = 0.02  # two successive warm-ups within 2% end it
LONG = 256 * 1024  # from here on one warm-up, five samples
CLOCK_DROP = 0.03  # a clock that fell by more is flagged
RESAMPLES = 9999


def rotations(items, rounds):
    """[[items in the order of a round]]: A B C, B C A, C A B, A B C, ...: none is always first."""
    return [[items[(i + r) % len(items)] for i in range(len(items))] for r in range(rounds)]


def settled(times):
    """True if the last two times differ by at most 2% of the shorter."""
    return len(times) > 1 and abs(times[-1] - times[-2]) <= SETTLED * min(times[-2:])


def warm_up(run, most):
    """Call run() -> seconds until two successive ones agree, at most `most` times; the times."""
    times = []
    while len(times) < most and not settled(times):
        times.append(run())
    return times


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def statistics_of(samples):
    """{median, p20, p80, min, mean, std} of seconds; std of the sample, None of a single one."""
    import numpy

    p20, p80 = (float(x) for x in numpy.percentile(samples, [20, 80]))
    return {
        "median": statistics.median(samples),
        "p20": p20,
        "p80": p80,
        "min": min(samples),
        "mean": statistics.mean(samples),
        "std": statistics.stdev(samples) if len(samples) > 1 else None,
    }


def speedup(base, samples, mean=False, seed=0):
    """(ratio of medians base / samples, low, high): 95% percentile bootstrap; None without one.

    mean: ratio of means, as the paper has it. Samples of the two are drawn independently.
    """
    import numpy
    from scipy.stats import bootstrap

    middle = numpy.mean if mean else numpy.median
    ratio = float(middle(base) / middle(samples))
    if min(len(base), len(samples)) < 2:
        return ratio, None, None
    found = bootstrap(
        (base, samples),
        lambda a, b, axis=-1: middle(a, axis=axis) / middle(b, axis=axis),
        n_resamples=RESAMPLES,
        method="percentile",
        rng=numpy.random.default_rng(seed),
    )
    return ratio, *(float(x) for x in found.confidence_interval)


class Memory:
    """Peaks of the CUDA allocator around single runs; on a CPU there are none."""

    def __init__(self, device):
        self.device, self.peak, self.reserved, self.beyond = device, 0, 0, 0

    @contextlib.contextmanager
    def watch(self):
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        yield
        peak = torch.cuda.max_memory_allocated(self.device)
        self.peak = max(self.peak, peak)
        self.beyond = max(self.beyond, peak - before)
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved(self.device))

    def fields(self, cache_bytes):
        """1e9 bytes; extra_gb: beyond what lay there before (the weights) and the KV cache."""
        if self.device.type != "cuda":
            return {"peak_gb": None}
        return {"peak_gb": self.peak / 1e9, "reserved_gb": self.reserved / 1e9,
                "extra_gb": (self.beyond - cache_bytes) / 1e9}  # fmt: skip


def cache_bytes(cache):
    """Bytes of keys and values that a cache of transformers holds; 0 if it shows none."""
    layers = getattr(cache, "layers", None) or []
    held = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(x.numel() * x.element_size() for x in held if isinstance(x, torch.Tensor))


def clock_mhz(device):
    """Clock now: of the GPU's SMs under load (nvidia-smi), of the fastest CPU; None unknown."""
    if device.type == "cuda":
        return _gpu_clock(device)
    with contextlib.suppress(OSError, ValueError), open("/proc/cpuinfo", encoding="utf-8") as file:
        found = [float(line.partition(":")[2]) for line in file if line.startswith("cpu MHz")]
        return max(found) if found else None
    return None


def _gpu_clock(device):
    """Idle GPUs clock down at once, so half a second of products is queued before the question."""
    x = torch.zeros(4096, 4096, device=device, dtype=torch.float16)
    for _ in range(2000):
        torch.mm(x, x, out=torch.empty_like(x))
    uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    command = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=clocks.sm",
               "--format=csv,noheader,nounits"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return float(done.stdout.strip())
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    finally:
        synchronize(device)


def fell(before, after):
    """True if a clock fell by more than 3%."""
    return bool(before and after and after < (1 - CLOCK_DROP) * before)


class AttentionKernels(TorchDispatchMode):
    """Counts the attention operators that run inside it, by what torch calls them.

    Under torch.no_grad(): in inference mode SDPA is seen whole, not which of its kernels it took.
    """

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name if hasattr(func, "_schema") else str(func)
        if any(part in name for part in ("attention", "flash_attn", "pbs_attn", "_softmax")):
            self.seen[name] = self.seen.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


_SDPA = {
    "_scaled_dot_product_flash_attention": "SDPA flash",
    "_scaled_dot_product_flash_attention_for_cpu": "SDPA flash for CPUs",
    "_scaled_dot_product_cudnn_attention": "SDPA cuDNN",
    "_scaled_dot_product_efficient_attention": "SDPA efficient",
    "_scaled_dot_product_fused_attention_overrideable": "SDPA of the device",
}
_VERBS = ("attend", "prefill")  # of pbs_attn; others select


def kernel_names(seen, where):
    """'SDPA cuDNN x32' of what AttentionKernels saw; where: what our own kernels run as ("avx2").

    Softmaxes on their own are attention that no fused kernel did.
    """
    names, plain = [], 0
    for operator, count in seen.items():
        space, _, name = operator.partition("::")
        if space == "pbs_attn":
            names += [f"pbs_attn {name} ({where}) x{count}"] if name in _VERBS else []
        elif "_softmax" in name and "attention" not in name:
            plain += count
        else:
            names.append(f"{_SDPA.get(name, operator)} x{count}")
    if not names and plain:
        names = [f"unfused (SDPA math or eager) x{plain}"]
    return ", ".join(names)


@contextlib.contextmanager
def mlp_chunks(model, rows):
    """Run every MLP `rows` tokens at a time inside the block; 0 leaves the model as it is.

    Position-wise, so only memory and time change. Raises CommandError where no layer has an `mlp`
    that maps [B, N, hidden] to the same.
    """
    found = [m.mlp for m in model.modules() if isinstance(getattr(m, "mlp", None), torch.nn.Module)]
    if rows and (rows < 1 or not found):
        raise CommandError(f"--mlp-chunk is {rows}; allowed: 0, or tokens >= 1 for a model whose "
                           "layers have an mlp")  # fmt: skip
    # A forward of the module's own was set by hooks of accelerate; mostly there is none.
    wrapped = [(module, module.__dict__.get("forward")) for module in found if rows]
    for module, _ in wrapped:
        module.forward = _in_chunks(module.forward, rows)
    try:
        yield
    finally:
        for module, own in wrapped:
            del module.forward
            if own is not None:
                module.forward = own


def _in_chunks(forward, rows):
    def chunked(hidden):
        if hidden.shape[1] <= rows:
            return forward(hidden)
        out = torch.empty_like(hidden)
        for part, into in zip(hidden.split(rows, 1), out.split(rows, 1), strict=True):
            result = forward(part)
            if not isinstance(result, torch.Tensor):
                raise CommandError("--mlp-chunk: this model's MLP returns more than a tensor; "
                                   "allowed: 0")  # fmt: skip
            into.copy_(result)
        return out

    return chunked


def timed(call, device):
    """(seconds, result) of call() on a device that is idle before; the call ends on the host."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - start, result
