# SPDX-License-Identifier: Apache-2.0
"""Runs the rows of a plan: longest first, all methods of a row before the next row.

A row that fails is a record with its reason, and the run goes on. What would fail every row stops
it: a CommandError, a missing package, a GPU that no longer answers.
"""

import gc
import heapq
import time
import traceback
from pathlib import Path

import torch

from ..cli import CommandError
from .jobs import BadRow
from .session import PromptTooLong, seed_all
from .store import to_line

# What a RuntimeError says where the CPU's allocator or a CUDA library had no memory left.
NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "alloc_failed")


def limited(jobs, limit):
    """The first `limit` jobs of every task and length, in plan order; all for None."""
    if limit is None:
        return list(jobs)
    kept, seen = [], {}
    for job in jobs:
        place = (job.bench, job.task, job.length)
        seen[place] = seen.get(place, 0) + 1
        if seen[place] <= limit:
            kept.append(job)
    return kept


def deal(jobs, shards):
    """[[Job]]: jobs by falling cost, each to the shard that has least so far.

    Depends on the plan alone, never on what is done: shards that start at different times agree.
    Every part has its costliest row first, where lack of memory shows at once.
    """
    parts = [[] for _ in range(shards)]
    loads = [(0.0, i) for i in range(shards)]
    for job in sorted(jobs, key=lambda job: -job.cost):
        load, i = heapq.heappop(loads)
        parts[i].append(job)
        heapq.heappush(loads, (load + max(job.cost, 1e-6), i))
    return parts


def to_do(jobs, labels, found, retry=False):
    """[(job, [labels to run])]: what has no record in `found`; retry: nor an ok one."""
    work = []
    for job in jobs:
        records = {label: found.get(job.key(label)) for label in labels}
        missing = [
            label
            for label, record in records.items()
            if record is None or (retry and record["status"] != "ok")
        ]
        if missing:
            work.append((job, missing))
    return work


def out_of_memory(error):
    """True if the exception says that memory ran out, on the GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in NO_MEMORY)


def device_lost(error):
    """True if the GPU cannot be used again by this process."""
    if out_of_memory(error):
        return False
    kinds = tuple(k for k in (getattr(torch, "AcceleratorError", None),) if k)
    return isinstance(error, kinds) or "CUDA error" in str(error)


def _forget(error):
    """Let go of the frames of a failed row, and of the tensors in them."""
    while error is not None:
        error.__traceback__, error = None, error.__context__


def _free():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def failure(error):
    """{status, error} of an exception."""
    if out_of_memory(error):
        return {"status": "oom", "error": str(error).split("\n")[0] or type(error).__name__}
    if isinstance(error, BadRow):
        return {"status": "bad_row", "error": str(error)}
    if isinstance(error, PromptTooLong):
        return {"status": "error", "error": str(error)}
    where = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(where[-1].filename).name}:{where[-1].lineno})" if where else ""
    return {"status": "error", "error": f"{type(error).__name__}: {error}{place}"}


class Runner:
    """Runs jobs of `bench` (a module, see pbs_attn/cli/eval.py) in a session.

    write(record): keeps a record; shard: "i/n" for the records; show: rows to print as they come.
    """

    def __init__(self, bench, session, methods, args, write, progress, *, shard="0/1", show=0):
        self.bench, self.session, self.args = bench, session, args
        self.methods = {method.label: method for method in methods}
        self.write, self.progress, self.shard, self.show = write, progress, shard, show
        self.records = []  # of this process, for the running score
        self.stopped = None  # why no more rows can run

    def run(self, work):
        """Do [(job, labels)]; stops early only if the device is lost (see `stopped`)."""
        for job, labels in work:
            size = f" {job.length:,}" if job.length else ""
            self.progress.begin(f"{job.task}{size}")
            for method, result in self._results(job, [self.methods[x] for x in labels]):
                self._keep(job, method, result)
                if self.stopped:
                    return

    def _results(self, job, methods):
        """(method, dict | Exception) of each method; one without memory is tried again alone."""
        again = []
        for method, result in self._attempt(job, methods):
            if isinstance(result, Exception) and out_of_memory(result):
                _forget(result)
                again.append(method)
            else:
                yield method, result
        for method in again:
            self.progress.say(f"{job.task} {job.id}: {method.label} ran out of memory, once more")
            _free()
            yield from self._attempt(job, [method])

    def _attempt(self, job, methods):
        together = getattr(self.bench, "work_all", None)
        if together is None:
            for method in methods:
                yield method, self._one(job, method)
            return
        left = {method.label: method for method in methods}
        seed_all(self.session.seed)
        try:
            for method, result in together(self.session, methods, job, self.args):
                if left.pop(method.label, None):  # a bench may run `full` for itself, too
                    yield method, self._stop_if_fatal(result)
            error = RuntimeError("the bench gave no result for this method")
        except Exception as raised:
            error = self._stop_if_fatal(raised)
        for method in left.values():
            yield method, error

    def _one(self, job, method):
        seed_all(self.session.seed)
        try:
            return self.bench.work(self.session, method, job, self.args)
        except Exception as error:
            return self._stop_if_fatal(error)

    def _stop_if_fatal(self, result):
        """What every row would raise again ends the run; other results pass."""
        if isinstance(result, (CommandError, ModuleNotFoundError)):
            raise result
        if isinstance(result, Exception) and device_lost(result):
            self.stopped = str(result).split("\n")[0]
        return result

    def _keep(self, job, method, result):
        head = {"bench": job.bench, "task": job.task, "id": job.id, "length": job.length,
                "method": method.label, "shard": self.shard}  # fmt: skip
        tail = {"seed": self.session.seed, "time": time.time()}
        if isinstance(result, Exception):
            state = failure(result) | {k: job.payload[k] for k in ("meta",) if k in job.payload}
            _forget(result)
            if state["status"] == "oom":
                _free()
        else:
            state = {"status": "ok", "error": None}
        record = head | state | tail
        fields = result if isinstance(result, dict) else {}
        record |= {name: value for name, value in fields.items() if name not in record}
        try:
            to_line(record)
        except (TypeError, ValueError) as error:
            record = head | failure(error) | tail
        self.write(record)
        self.records.append(record)
        self._report(job, method, record)

    def _report(self, job, method, record):
        failed = record["status"] != "ok"
        running = self.bench.running(self.records) if hasattr(self.bench, "running") else ""
        self.progress.end(job.cost, failed, running)
        size = f" {job.length:,}" if job.length else ""
        name = f"{job.task}{size} {job.id} {method.label}"
        if failed:
            self.progress.say(f"{name}: {record['status']}: {record['error']}")
        elif self.show > 0 and hasattr(self.bench, "describe"):
            self.show -= 1
            self.progress.say(f"-- {name}\n{self.bench.describe(job, record)}")
