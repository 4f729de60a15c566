# SPDX-License-Identifier: Apache-2.0
"""The processes of one start under torchrun: each a shard of the rows, or all one model (--tp).

Without --tp ranks share nothing but the run folder, and meet at the end: torchrun stops
everybody as soon as one rank leaves with a status that is not 0.
"""

import atexit
import datetime
import os
import signal
import threading

from ..cli import CommandError

FOREVER = datetime.timedelta(days=30)


def _number(name, default):
    text = os.environ.get(name, "") or str(default)
    try:
        return int(text)
    except ValueError:
        raise CommandError(f"the environment has {name}={text!r}; allowed: an integer") from None


def _end():
    """At the exit of the process: torch cannot form a group again after it was taken apart."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


class Ranks:
    """rank, world, local: this process among those of torchrun; tp: ranks that hold one model."""

    def __init__(self, tp=None):
        self.rank, self.world = _number("RANK", 0), _number("WORLD_SIZE", 1)
        self.local = _number("LOCAL_RANK", self.rank)
        self.tp = tp
        if not 0 <= self.rank < self.world:
            raise CommandError(f"the environment has RANK={self.rank}, WORLD_SIZE={self.world}; "
                               "allowed: 0 <= RANK < WORLD_SIZE")  # fmt: skip
        if tp is not None and tp != self.world:
            raise CommandError(
                f"--tp is {tp}, but {self.world} process(es) run; start it with "
                f"torchrun --nproc-per-node {tp} -m pbs_attn eval ..."
            )

    @property
    def first(self):
        """True where lines are printed, and under --tp records written."""
        return self.rank == 0

    def shard(self, shard):
        """(i, n) of this process: its rank within `shard` (i, n) of the command line."""
        i, n = shard
        return (i, n) if self.tp else (i * self.world + self.rank, n * self.world)

    def device(self, name):
        """The device of this rank: its own GPU where `name` is "cuda"."""
        return f"cuda:{self.local}" if name == "cuda" and self.world > 1 else name

    def start(self, device):
        """Under --tp, form the process group before anything is shared or loaded."""
        if self.tp and self.world > 1:
            import torch
            import torch.distributed as dist

            if device.startswith("cuda"):
                torch.cuda.set_device(self.local)
            if not dist.is_initialized():
                backend = "nccl" if device.startswith("cuda") else "gloo"
                dist.init_process_group(backend)
                atexit.register(_end)

    def share(self, value):
        """Rank 0's `value` on every rank under --tp; elsewhere one's own."""
        if not self.tp or self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def meet(self):
        """Wait for every rank of torchrun; nothing where there is one process."""
        if self.world == 1 or "MASTER_ADDR" not in os.environ:
            return
        import torch.distributed as dist

        # The wait is deaf to Python's handlers, and all rows are kept: SIGTERM may simply end it.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=FOREVER)
            atexit.register(_end)
        dist.barrier()
