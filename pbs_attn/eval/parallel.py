# SPDX-License-Identifier: Apache-2.0
"""Tensor parallel runs under torchrun: transformers' own plan, and what ranks tell each other.

Every rank holds some heads of every layer and runs the same jobs in the same order. Selection is
per head, so a split changes nothing of it.
"""

import contextlib
import time

import torch


def load_options(tp):
    """Keywords for from_pretrained that split the model over the ranks of torchrun.

    transformers starts the process group (nccl or gloo) if there is none yet, and puts each rank
    on its own device.
    """
    if tp <= 1:
        return {}
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=tp, tp_plan="auto")}
    except (ImportError, TypeError):  # transformers 4.57
        return {"tp_plan": "auto"}


class Group:
    """The ranks that hold one model together; without --tp the one process there is."""

    def __init__(self, tp=None, device="cpu"):
        self.size, self.device = tp or 1, device

    def _reduced(self, value, name):
        if self.size == 1:
            return value
        there = torch.tensor(float(value), device=self.device, dtype=torch.float64)
        torch.distributed.all_reduce(there, op=getattr(torch.distributed.ReduceOp, name))
        return float(there)

    def barrier(self):
        """Wait until every rank is here."""
        self._reduced(0, "SUM")

    def largest(self, value):
        """The largest of the ranks' values."""
        return self._reduced(value, "MAX")

    def mean(self, value):
        """The mean of the ranks' values."""
        return self._reduced(value, "SUM") / self.size

    def over_heads(self, counts):
        """Session.counts with densities over all heads: a rank has seen its own only."""
        return counts | {name: self.mean(counts[name]) for name in ("density", "computed")}


class Communication:
    """Seconds in torch.distributed.all_reduce, which ends the rows of attention and MLP.

    Waits for the device around each, so only for runs that are not timed. Waiting for the slowest
    rank is part of it.
    """

    def __init__(self, device):
        self.device, self.seconds, self.calls = device, 0.0, 0

    @contextlib.contextmanager
    def watch(self):
        if not torch.distributed.is_available():
            yield self
            return
        own = torch.distributed.all_reduce

        def measured(*args, **kwargs):
            self._wait()
            start = time.perf_counter()
            result = own(*args, **kwargs)
            self._wait()
            self.seconds += time.perf_counter() - start
            self.calls += 1
            return result

        torch.distributed.all_reduce = measured
        try:
            yield self
        finally:
            torch.distributed.all_reduce = own

    def _wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
