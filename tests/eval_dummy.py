# SPDX-License-Identifier: Apache-2.0
"""A bench for the frame's tests: rows that work, fail as asked, or take their time.

Imported, it is a module as cli/eval.py wants them. As a script,

    python eval_dummy.py MODEL FOLDER BYTES...

it starts the command line in forked children (one import of torch for all) and kills them for
real: with SIGKILL whenever the records of FOLDER/killed reach one of the sizes, with SIGINT and
SIGTERM after three records, and with a second start beside the first. Prints what came of it.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from pbs_attn import cli
from pbs_attn.cli import CommandError, models
from pbs_attn.cli import eval as cli_eval
from pbs_attn.eval import jobs as eval_jobs
from pbs_attn.eval import store

NAME = "dummy"
HELP = "rows for tests"
EXAMPLES = "  python -m pbs_attn eval dummy"
DEFAULT_METHODS = "full,pbs"
tries = {}  # (id, method) -> how often its work was called in this process
seen = []  # (id, method) in the order of work


def add_arguments(parser):
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tasks", default="a,b")
    parser.add_argument("--recipe", default="official")
    parser.add_argument("--sleep", type=float, default=0.0)
    parser.add_argument("--fail", default="", help="a1=oom,b0=bad: see _fail")


def prepare(args, tokens):
    tasks = args.tasks.split(",")
    found = [
        eval_jobs.Job(NAME, task, f"{task}{i}", 0, eval_jobs.prompt_cost(20 + 10 * i, 3), {"n": i})
        for task in tasks
        for i in range(args.rows)
    ]
    data = {task: store.digest([task]) for task in tasks}
    return eval_jobs.Plan(found, {"recipe": args.recipe, "data": data}, [f"recipe {args.recipe}"])


def prompt(tokens, job, args):
    text = f"Row {job.id}. " + "word " * (20 + 10 * job.payload["n"])
    return tokens.chat([{"role": "user", "content": text}]), {"cut_tokens": 0, "new_tokens": 3}


def _fail(job, method, args):
    how = dict(pair.split("=") for pair in args.fail.split(",") if pair).get(job.id)
    count = tries[job.id, method.label] = tries.get((job.id, method.label), 0) + 1
    if how == "oom" or (how == "oom-once" and count == 1):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    if how == "cpu-oom":
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    if how == "memory":
        raise MemoryError
    if how == "bad":
        raise eval_jobs.BadRow(f"data.jsonl line 7: {job.id} has no field 'answers'")
    if how == "error":
        raise KeyError("answers")
    if how == "stop":
        raise CommandError("this cannot work for any row")
    if how == "lost":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if how == "tensor":
        return {"score": object()}
    return None


def work(session, method, job, args):
    seen.append((job.id, method.label))
    found = _fail(job, method, args)
    if found is not None:
        return found
    time.sleep(args.sleep)
    ids, info = prompt(session.tokens, job, args)
    out = session.generate(ids, method, max_new_tokens=3)
    return {"score": (out.tokens[0] % 7) / 7, "pred": out.text, "draw": random.random(),
            "prompt_tokens": len(ids), "density": out.density} | info  # fmt: skip


def describe(job, record):
    return f"SHOWN {record['pred']!r}"


def running(records):
    return f"score {100 * sum(map(eval_jobs.row_score, records)) / len(records):.1f}"


def summary(records, labels):
    lines = []
    for label in labels:
        rows = [record for record in records if record["method"] == label]
        mean = sum(map(eval_jobs.row_score, rows)) / max(len(rows), 1)
        lines.append(f"{label} {100 * mean:.3f} of {len(rows)}")
    return "\n".join(lines)


def install():
    """Make `eval dummy` known to the command line of this process."""
    cli_eval.BENCHES[NAME] = HELP
    sys.modules["pbs_attn.eval.dummy"] = sys.modules[__name__]


def records(folder):
    """{key: the fields that do not depend on the hour} of a run folder."""
    changing = ("time", "shard")
    _, found = store.read(folder)
    return {
        key: {name: value for name, value in record.items() if name not in changing}
        for key, record in found.items()
    }


# ---- as a script -----------------------------------------------------------------------------


def _start(folder, *words):
    """The command in a forked child, which says what it says into FOLDER.log."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            log = os.open(f"{folder}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            status = cli.main(["eval", NAME, "--model", MODEL, "--out", str(folder), *words])
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return child


def _wait(child, folder, size=float("inf"), lines=float("inf")):
    """Until the records have a size or number, or the child's end: its status, None if it runs."""
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        data = b"".join(path.read_bytes() for path in folder.glob("records-*.jsonl"))
        if len(data) >= size or data.count(b"\n") >= lines:
            return None
        time.sleep(0.002)


def _end(child, number):
    os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _killed(folder, sizes):
    """Statuses of starts that are killed at these sizes, then of one that is not."""
    found, delay = [], random.Random(len(sizes))
    for size in sizes:
        child = _start(folder)
        status = _wait(child, folder, size=size)
        if status is None:
            time.sleep(delay.uniform(0, 0.02))
            status = _end(child, signal.SIGKILL)
        found.append(status)
    return [*found, _wait(_start(folder), folder)]


def _stopped(folder, number):
    child = _start(folder, "--sleep", "0.02")
    status = _wait(child, folder, lines=3)
    status = _end(child, number) if status is None else status
    return {"status": status, "said": Path(f"{folder}.log").read_text()}


def _together(folder):
    first = _start(folder, "--sleep", "0.3")
    _wait(first, folder, lines=1)
    second = _wait(_start(folder), folder)
    _end(first, signal.SIGKILL)
    return {"status": second, "said": Path(f"{folder}.log").read_text()}


def _script(folder, sizes):
    install()
    torch.set_num_threads(1)
    # Loaded here, so that every child begins with its rows.
    loaded = models.load(MODEL), models.load_tokenizer(MODEL)
    models.load, models.load_tokenizer = lambda *a, **b: loaded[0], lambda *a, **b: loaded[1]
    warm = ["eval", NAME, "--model", MODEL, "--out", str(folder / "warm"), "--limit", "1"]
    assert cli.main(warm) == 0
    found = {
        "killed": _killed(folder / "killed", sizes),
        "SIGINT": _stopped(folder / "SIGINT", signal.SIGINT),
        "SIGTERM": _stopped(folder / "SIGTERM", signal.SIGTERM),
        "together": _together(folder / "together"),
    }
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    MODEL = sys.argv[1]
    _script(Path(sys.argv[2]), [int(size) for size in sys.argv[3:]])
