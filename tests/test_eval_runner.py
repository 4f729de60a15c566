# SPDX-License-Identifier: Apache-2.0
"""Rows: their order and shards, failures that end a row, a method, or the run; progress."""

import io
import random
import types
import weakref

import pytest
import torch

from pbs_attn.cli import CommandError
from pbs_attn.eval import progress as progresses
from pbs_attn.eval import runner
from pbs_attn.eval.jobs import BadRow, Job, prompt_cost, row_score
from pbs_attn.eval.progress import Progress, clock


def job(name, cost=1.0, task="a", length=0):
    return Job("dummy", task, name, length, cost)


JOBS = [job(f"{task}{i}", random.Random(i).uniform(1, 9), task, length)
        for task in "abc" for length in (0, 64) for i in range(7)]  # fmt: skip


def methods(*labels):
    return [types.SimpleNamespace(label=label) for label in labels]


class Bench:
    """work(session, method, job, args) from a function of (job id, label)."""

    def __init__(self, act):
        self.act, self.calls = act, []

    def work(self, session, method, job, args):
        self.calls.append((job.id, method.label))
        return self.act(job.id, method.label)


class Together(Bench):
    """work_all: an iterator of (method, result) from a function of (job id, labels)."""

    def work(self, *args):
        raise AssertionError("work is not asked where there is work_all")

    def work_all(self, session, methods, job, args):
        labels = [method.label for method in methods]
        self.calls.append((job.id, labels))
        by_label = {method.label: method for method in methods}
        for label, result in self.act(job.id, labels):
            yield by_label.get(label, types.SimpleNamespace(label=label)), result


def run(bench, work, labels=("full", "pbs")):
    """(records, what was said, runner)."""
    kept, session, out = [], types.SimpleNamespace(seed=3), io.StringIO()
    with Progress(99, 99.0, stream=out) as progress:
        one = runner.Runner(bench, session, methods(*labels), None, kept.append, progress)
        one.run(work)
    return kept, out.getvalue(), one


def states(records):
    return [(r["id"], r["method"], r["status"]) for r in records]


ONE = [(job("x"), ["full", "pbs"])]


# ---- which rows ------------------------------------------------------------------------------


def test_limit_counts_by_task_and_length_in_plan_order():
    kept = runner.limited(JOBS, 2)
    assert [(j.task, j.length, j.id[1:]) for j in kept] == [
        (task, length, i) for task in "abc" for length in (0, 64) for i in "01"
    ]
    assert runner.limited(JOBS, None) == JOBS


@pytest.mark.parametrize("shards", [1, 2, 3, 8, 60])
def test_shards_hold_every_row_once_with_equal_cost_longest_first(shards):
    parts = runner.deal(JOBS, shards)
    assert sorted((j.task, j.length, j.id) for part in parts for j in part) == sorted(
        (j.task, j.length, j.id) for j in JOBS
    )
    for part in parts:
        assert [j.cost for j in part] == sorted((j.cost for j in part), reverse=True)
    loads = [sum(j.cost for j in part) for part in parts]
    assert max(loads) - min(loads) <= max(j.cost for j in JOBS)
    assert parts == runner.deal(list(JOBS), shards)


def test_a_row_as_long_as_all_others_has_a_shard_for_itself():
    parts = runner.deal([*(job(str(i), 1.0) for i in range(10)), job("long", 10.0)], 2)
    assert [len(part) for part in parts] == [1, 10]


def test_rows_without_a_cost_are_dealt_evenly():
    parts = runner.deal([job(str(i), 0.0) for i in range(9)], 3)
    assert [len(part) for part in parts] == [3, 3, 3]


def test_what_is_to_do():
    found = {job("x").key("full"): {"status": "ok"}, job("x").key("pbs"): {"status": "oom"}}
    jobs, labels = [job("x"), job("y")], ["full", "pbs"]
    assert runner.to_do(jobs, labels, found) == [(job("y"), labels)]
    assert runner.to_do(jobs, labels, found, retry=True) == [
        (job("x"), ["pbs"]), (job("y"), labels)]  # fmt: skip


def test_cost_grows_with_prompt_and_new_tokens():
    assert prompt_cost(100) < prompt_cost(100, 1) < prompt_cost(1000) < prompt_cost(8000) / 8
    assert row_score({"status": "ok", "score": 0.5}) == 0.5
    assert row_score({"status": "oom", "score": 0.5}) == row_score({"status": "ok"}) == 0.0


# ---- rows that fail --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "oom"),
        (MemoryError(), "oom"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "oom"),
        (RuntimeError("The size of tensor a must match"), "error"),
        (ValueError("not enough memory of the past"), "error"),
        (BadRow("f.jsonl line 3: no 'answers'"), "bad_row"),
    ],
)
def test_a_failure_is_a_record_and_the_next_row_runs(error, status):
    def act(name, label):
        if (name, label) == ("x", "full"):
            raise error
        return {"score": 1.0}

    bench = Bench(act)
    records, _, one = run(bench, [*ONE, (job("y"), ["full"])])
    again = [("x", "full")] * (status == "oom")
    assert bench.calls == [("x", "full"), ("x", "pbs"), *again, ("y", "full")]
    assert sorted(states(records)) == [
        ("x", "full", status), ("x", "pbs", "ok"), ("y", "full", "ok")]  # fmt: skip
    failed = next(r for r in records if r["status"] != "ok")
    assert failed["error"] and "score" not in failed and failed["seed"] == 3
    assert one.stopped is None


def test_out_of_memory_is_tried_again_once_and_alone():
    tries = []

    def act(name, label):
        tries.append(label)
        if label == "full" and tries.count("full") == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"score": 1.0}

    records, said, _ = run(Bench(act), ONE)
    assert tries == ["full", "pbs", "full"] and "once more" in said
    assert states(records) == [("x", "pbs", "ok"), ("x", "full", "ok")]


def test_memory_of_the_failed_row_is_free_before_the_second_try():
    class Big:
        pass

    held, alive = [], []

    def act(name, label):
        alive.append([x() is not None for x in held])
        big = Big()
        big.itself = big  # a cycle: only the collector finds it
        held.append(weakref.ref(big))
        raise torch.OutOfMemoryError("CUDA out of memory")

    records, _, _ = run(Bench(act), [(job("x"), ["full"])])
    assert alive == [[], [False]] and states(records) == [("x", "full", "oom")]
    assert held[1]() is None


@pytest.mark.parametrize(
    "error", [CommandError("for all rows"), ModuleNotFoundError("no jieba", name="jieba"),
              KeyboardInterrupt()]
)  # fmt: skip
@pytest.mark.parametrize("kind", [Bench, Together])
def test_what_fails_every_row_ends_the_run(error, kind):
    def act(*args):
        raise error

    with pytest.raises(type(error)):
        run(kind(act), ONE)


@pytest.mark.parametrize("kind", [Bench, Together])
def test_a_lost_gpu_ends_the_run_after_its_row(kind):
    def act(name, label):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    records, _, one = run(kind(act), [*ONE, (job("y"), ["full"])])
    assert states(records) == [("x", "full", "error")]
    assert one.stopped == "CUDA error: an illegal memory access was encountered"


def test_fields_of_the_frame_cannot_be_overwritten():
    bench = Bench(lambda name, label: {"method": "other", "status": "fine", "time": 0, "extra": 1})
    records, _, _ = run(bench, [(job("x"), ["full"])])
    assert states(records) == [("x", "full", "ok")] and records[0]["extra"] == 1
    assert records[0]["time"] > 1e9


def test_what_json_cannot_hold_is_an_error_of_its_row():
    records, _, _ = run(Bench(lambda name, label: {"pred": object()}), [(job("x"), ["full"])])
    assert records[0]["status"] == "error" and "object" in records[0]["error"]


def test_a_row_starts_from_the_seed():
    draws = {}

    def act(name, label):
        draws[name, label] = float(torch.rand(()))
        torch.rand(len(draws))
        return {}

    run(Bench(act), [*ONE, (job("y"), ["pbs", "full"])])
    assert len(draws) == 4 and len({*draws.values()}) == 1


# ---- methods of a row together ---------------------------------------------------------------


def test_work_all_gets_what_is_to_do_and_may_run_more():
    def act(name, labels):
        yield "full", {"score": 0.1}  # its own reference, not asked for
        for label in labels:
            yield label, {"score": 0.5}

    bench = Together(act)
    records, _, _ = run(bench, [(job("x"), ["pbs"])])
    assert bench.calls == [("x", ["pbs"])] and states(records) == [("x", "pbs", "ok")]


def test_work_all_may_fail_by_method_or_in_the_middle():
    def act(name, labels):
        yield "full", {"score": 0.1}
        if name == "x":
            yield "pbs", ValueError("no such block")
        if name == "y":
            raise BadRow("line 3")

    labels = ["full", "pbs", "identity"]
    work = [(job(name), labels) for name in "xyz"]
    records, _, _ = run(Together(act), work, labels)
    found = {(r["id"], r["method"]): r["status"] for r in records}
    assert found == {
        ("x", "full"): "ok", ("x", "pbs"): "error", ("x", "identity"): "error",
        ("y", "full"): "ok", ("y", "pbs"): "bad_row", ("y", "identity"): "bad_row",
        ("z", "full"): "ok", ("z", "pbs"): "error", ("z", "identity"): "error",
    }  # fmt: skip
    assert "no result" in records[-1]["error"]


def test_work_all_without_memory_is_tried_again_method_by_method():
    def act(name, labels):
        for label in labels:
            if label != "pbs" and len(labels) > 1:
                yield label, torch.OutOfMemoryError("CUDA out of memory")
            elif label == "identity":
                raise torch.OutOfMemoryError("CUDA out of memory")
            else:
                yield label, {"score": 1.0}

    bench, labels = Together(act), ["full", "identity", "pbs"]
    records, _, _ = run(bench, [(job("x"), labels)], labels)
    assert bench.calls == [("x", labels), ("x", ["full"]), ("x", ["identity"])]
    assert sorted(states(records)) == [
        ("x", "full", "ok"), ("x", "identity", "oom"), ("x", "pbs", "ok")]  # fmt: skip


# ---- progress --------------------------------------------------------------------------------


def test_time_left_follows_the_cost_not_the_rows(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progresses.time, "monotonic", lambda: now[0])
    progress = Progress(3, 100.0, stream=io.StringIO())
    assert progress.left() is None and "left ?" in progress.line()
    now[0] = 60.0
    progress.end(80.0, False, "score 12.0")
    assert progress.left() == pytest.approx(15.0)
    progress.begin("qasper")
    assert progress.line() == "1 of 3 rows  1:00  left 0:15  qasper  score 12.0"
    progress.end(10.0, True)
    assert "1 failed" in progress.line() and "score" not in progress.line()
    assert [clock(x) for x in (0, 59.6, 3599, 3600, 90000)] == [
        "0:00", "1:00", "59:59", "1:00:00", "25:00:00"]  # fmt: skip


def test_a_line_from_time_to_time_where_nobody_watches(monkeypatch):
    monkeypatch.setattr(progresses, "PLAIN_EVERY", 0.01)
    out = io.StringIO()
    with Progress(2, 2.0, stream=out) as progress:
        progress.begin("qasper")
        while out.getvalue().count("qasper") < 3:
            progress._over.wait(0.005)
    lines = out.getvalue().splitlines()
    assert all(line.startswith("0 of 2 rows") for line in lines)
    before = [line for line in lines if "qasper" not in line]  # of a slow machine, before it began
    assert lines[len(before) :] == [line for line in lines if "qasper" in line]
    assert "\r" not in out.getvalue()


def test_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    with Progress(2, 4.0, stream=out) as progress:
        progress.begin("qasper")
        progress.say("a row failed")
        progress.end(4.0, False, "score 50.0")
    assert "\r" in out.getvalue() and "a row failed\n" in out.getvalue()
    assert "100%" in out.getvalue() and "score 50.0" in out.getvalue()


def test_quiet_says_nothing():
    out = io.StringIO()
    with Progress(2, 4.0, quiet=True, stream=out) as progress:
        progress.begin("x")
        progress.say("y")
        progress.end(1.0, True)
    assert out.getvalue() == ""
