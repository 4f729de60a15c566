# SPDX-License-Identifier: Apache-2.0
"""One step after another: each a process group under a limit, all within a budget of time; what is
known is on disk after every step.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED, RECORDED, SKIPPED = "passed", "failed", "recorded", "skipped"
GRACE = 10.0  # seconds between "stop" (Ctrl-C, so that results are saved) and "die"
TAIL = 6000  # characters of output that stay in the JSON


def by_exit(status: int | None, output: str) -> tuple[str, str]:
    """(PASSED, "") or (FAILED, why): all that an exit status says. None: stopped at the limit."""
    if status is None:
        return FAILED, "not done within its limit"
    if status == 0:
        return PASSED, ""
    last = (output.strip().splitlines() or ["no output"])[-1]
    how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return FAILED, f"{how}: {last[:300]}"


def plain(text: str) -> str:
    """Without the folders of this one machine: results are committed."""
    for folder, word in ((sys.executable, "python"), (f"{ROOT}/", ""), (str(ROOT), ".")):
        text = text.replace(folder, word)
    home = str(Path.home())
    return text.replace(home + "/", "~/") if len(home) > 1 else text


@dataclass
class Step:
    """`judge` turns exit status (None: stopped at the limit) and output into (status, detail).

    required  the check is not ok unless this step passed
    blocks    the check is not ok if this step failed; where it cannot run, that is recorded
    missing   why it cannot run on this machine"""

    name: str
    what: str
    command: list[str]
    limit: float
    least: float = 5.0  # with less time than this it is not begun
    required: bool = False
    blocks: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    judge: Callable[[int | None, str], tuple[str, str]] = by_exit
    missing: str | None = None

    def shown(self) -> str:
        """As a person would type it."""
        assigned = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*assigned, shlex.join(self.command)])

    def result(self, status: str, seconds: float, detail: str, output: str = "") -> dict:
        return {
            "name": self.name,
            "what": plain(self.what),
            "status": status,
            "required": self.required,
            "blocks": self.blocks,
            "seconds": round(seconds, 1),
            "detail": plain(detail),
            "command": plain(self.shown()),
            "tail": plain(output)[-TAIL:],
        }


def allowance(step: Step, later: list[Step], left: float) -> float:
    """Seconds that a step may take: its limit, and no more than leaves later required ones their
    least. 0: it is not begun."""
    kept = sum(each.least for each in later if each.required and not each.missing)
    allowed = min(step.limit, left - kept)
    return allowed if allowed >= step.least else 0.0


def run_group(command, log: Path, limit: float, cwd: Path, environment: dict) -> int | None:
    """Exit status, or None: stopped at the limit. Nothing of its process group outlives the call,
    whatever ends it. Output goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as out, open(os.devnull, "rb") as nothing:
        child = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdin=nothing,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        return child.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(child)


def _end(child: subprocess.Popen) -> None:
    if child.poll() is None:
        _signal(child, signal.SIGINT)
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            pass
    _signal(child, signal.SIGKILL)  # those that the leader left behind too
    child.wait()


def _signal(child: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        pass


class Stopped(BaseException):
    """Ctrl-C or a polite kill."""

    def __init__(self, number: int):
        self.number = number


def stop_on_signals() -> None:
    def stop(number, frame):
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)  # once is enough; what follows is quick
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


def write_whole(path: Path, text: str) -> None:
    """All of it or the old file: written beside it, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(file, "w", encoding="utf-8") as f:
            f.write(text)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


class Check:
    """Runs steps and keeps `report`, the JSON, on disk.

    required: names that must have passed for `ok`, whether or not they are among the steps."""

    def __init__(self, path: Path, about: dict, required: list[str], seconds: float, logs: Path):
        self.path, self.logs, self.required = path, logs, required
        self.until = time.monotonic() + seconds
        self.report = {"ok": False, "complete": False, "not_ok": [], **about, "steps": []}

    def save(self) -> None:
        write_whole(self.path, json.dumps(self.report, indent=1) + "\n")

    def run(self, steps: list[Step], cwd: Path, say=print) -> int:
        """The number of the signal that stopped it, or 0."""
        stopped = 0
        self.save()
        for i, step in enumerate(steps):
            if stopped:
                result = step.result(SKIPPED, 0.0, "stopped before it began")
            else:
                say(f"{step.name:<12} {step.what} ...", flush=True)
                result, stopped = self._one(step, steps[i + 1 :], cwd)
                say(said(result), flush=True)
            self.report["steps"].append(result)
            self.save()
        self.report["complete"] = not stopped
        self.report["not_ok"] = self.reasons()
        self.report["ok"] = not self.report["not_ok"]
        self.save()
        return stopped

    def _one(self, step: Step, later: list[Step], cwd: Path) -> tuple[dict, int]:
        if step.missing:
            return step.result(RECORDED, 0.0, step.missing), 0
        limit = allowance(step, later, self.until - time.monotonic())
        if not limit:
            return step.result(SKIPPED, 0.0, "no time left"), 0
        log = self.logs / f"{step.name}.log"
        began, stopped, why = time.monotonic(), 0, None
        status, output = None, ""
        try:
            status = run_group(step.command, log, limit, cwd, step.environment)
        except Stopped as stop:
            stopped, why = stop.number, f"stopped by {signal.Signals(stop.number).name}"
        except OSError as error:
            return step.result(RECORDED, 0.0, f"cannot be started: {error}"), 0
        if log.is_file():
            output = log.read_text(encoding="utf-8", errors="replace")
        seconds = time.monotonic() - began
        outcome = (FAILED, why) if why else step.judge(status, output)
        if status is None and not why:
            outcome = outcome[0], f"stopped after {limit:.0f} s: {outcome[1]}"
        return step.result(outcome[0], seconds, outcome[1], output), stopped

    def reasons(self) -> list[str]:
        """Why the check is not ok, one line each."""
        by_name = {result["name"]: result for result in self.report["steps"]}
        lines = []
        for name in self.required:
            result = by_name.get(name)
            if result is None:
                lines.append(f"{name}: not run")
            elif result["status"] != PASSED:
                lines.append(f"{name}: {result['status']}, {result['detail']}")
        for name, result in by_name.items():  # a tool need not work, but what it finds counts
            if result["blocks"] and result["status"] == FAILED:
                lines.append(f"{name}: {result['status']}, {result['detail']}")
        return lines


def said(result: dict) -> str:
    """Line of a step that ended; the end of its output where it failed."""
    detail = f"  {result['detail']}" if result["detail"] else ""
    line = f"{'':<12} {result['status']:<8} {result['seconds']:6.1f} s{detail}"
    if result["status"] != FAILED:
        return line
    lines = result["tail"].strip().splitlines()[-25:]
    return "\n".join([line, *("    | " + each for each in lines)])
