# SPDX-License-Identifier: Apache-2.0
"""CPU: whole calls verb by verb, in torch's own threads and in the memory of one K/V head.

"prefill 20%" and so on: score, permute and select really run, then attend reads random history
blocks at that density from the permuted, packed K/V. So what a sparse call costs at a density can
be compared with dense attention, whatever the method would have chosen of these inputs.
"""

from __future__ import annotations

import functools

import torch

from benchmarks import attend, kernel
from benchmarks.harness import Row


def open_steps(work) -> kernel.Steps | None:
    """None, and why in work.failures, where the library cannot be built."""
    try:
        return kernel.Steps(work.q, work.k, work.v, work.config, work.isa, torch.get_num_threads())
    except (OSError, RuntimeError) as error:
        work.failures["steps"] = str(error)
        return None


def forced(work, steps: kernel.Steps | None) -> list[Row]:
    made = []
    for share in attend.SHARES if steps else ():
        bits, blocks, density = work.forced(share)
        run = kernel.Run(steps, bits)
        row = Row(f"prefill {share:.0%}", run, blocks, density, diagonal=work.diagonal)
        row.extra = functools.partial(run.summary, skip=1)  # the warm-up
        made.append(row)
    return made


def of_method(steps: kernel.Steps | None, calls: int) -> dict:
    """The same of the method's own selection, after a call that warms up."""
    if not steps:
        return {}
    run = kernel.Run(steps)
    for _ in range(1 + calls):
        run()
    return run.summary(skip=1)


def fewer_threads(work) -> list[Row]:
    """attend again, on each other number of --threads."""
    made = []
    for threads in work.args.thread_list:
        if threads != work.args.threads:
            name = f"attend, {threads} thread" + "s" * (threads > 1)
            call = functools.partial(_on_threads, threads, work.attend)
            row = Row(name, call, work.computed, work.density, work.diagonal, threads=threads)
            made.append(row)
    return made


def _on_threads(threads: int, call):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return call()
    finally:
        torch.set_num_threads(before)
