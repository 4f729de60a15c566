# SPDX-License-Identifier: Apache-2.0
"""Tensor parallel runs under torchrun: transformers' own plan, and what ranks tell each other.

Every rank holds some heads of every layer and runs the same jobs in the same order. Selection is
per head, so a split changes nothing of it.
"""

import contextlib
import os
import time

import torch

from ..cli import CommandError


def world():
    """(rank, size) of torchrun's environment; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def check(tp):
    """Raises CommandError unless torchrun started `tp` processes; 0 and 1 need none."""
    size = world()[1]
    if tp > 1 and size != tp:
        raise CommandError(
            f"--tp is {tp}, and {size} process{'es' if size > 1 else ''} run; allowed: "
            f"torchrun --nproc-per-node {tp} -m pbs_attn eval ... --tp {tp}"
        )


def load_options(tp):
    """Keywords for from_pretrained that split the model over the ranks of torchrun.

    transformers starts the process group (nccl or gloo) and puts each rank on its own device.
    """
    if tp <= 1:
        return {}
    check(tp)
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=tp, tp_plan="auto")}
    except (ImportError, TypeError):  # transformers 4.57
        return {"tp_plan": "auto"}


class Ranks:
    """The processes of a tensor parallel run, or the one there is."""

    def __init__(self, tp=1, device="cpu"):
        self.size = tp if tp > 1 else 1
        self.rank = world()[0] if self.size > 1 else 0
        self.device = device

    def _reduced(self, value, operator):
        if self.size == 1:
            return value
        there = torch.tensor(float(value), device=self.device, dtype=torch.float64)
        torch.distributed.all_reduce(there, op=operator)
        return float(there)

    def barrier(self):
        """Wait until every rank is here."""
        self._reduced(0, torch.distributed.ReduceOp.SUM if self.size > 1 else None)

    def largest(self, value):
        """The largest of the ranks' values."""
        return self._reduced(value, torch.distributed.ReduceOp.MAX if self.size > 1 else None)

    def mean(self, value):
        """The mean of the ranks' values, such as a density over the heads of each."""
        sum_of = torch.distributed.ReduceOp.SUM if self.size > 1 else None
        return self._reduced(value, sum_of) / self.size


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
