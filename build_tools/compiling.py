# SPDX-License-Identifier: Apache-2.0
"""Compile many files at once, only the stale ones, and say what is happening."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path


class BuildError(Exception):
    pass


@dataclass(frozen=True)
class Job:
    """One object file: the compiler and its flags, without input, output and dependency options."""

    source: Path
    object: Path
    command: tuple[str, ...]
    compiler_id: str  # first line of --version: another compiler means another object
    speed: tuple[str, ...] = ()  # options that make the same object in another time
    log: Path | None = None  # keeps what the compiler says; only its warnings are shown

    @property
    def argv(self) -> list[str]:
        return [*self.command, *self.speed, *self._files]

    @property
    def _files(self) -> list[str]:
        depend = ["-MMD", "-MF", str(self.object.with_suffix(".d"))]
        return [*depend, "-c", str(self.source), "-o", str(self.object)]

    @property
    def record(self) -> str:
        return f"{self.compiler_id}\n{shlex.join([*self.command, *self._files])}\n"

    def is_fresh(self) -> bool:
        """Same command as last time, and no file that went into the object is newer than it."""
        try:
            built = self.object.stat().st_mtime_ns
            if self.object.with_suffix(".cmd").read_text() != self.record:
                return False
            if self.log and not self.log.is_file():
                return False
            return all(os.stat(p).st_mtime_ns <= built for p in self._dependencies())
        except OSError:
            return False

    def _dependencies(self) -> list[str]:
        text = self.object.with_suffix(".d").read_text().replace("\\\n", " ")
        _, _, files = text.partition(": ")
        return [p.replace("\\ ", " ") for p in re.split(r"(?<!\\)\s+", files.strip()) if p]


def max_jobs() -> int:
    given = os.environ.get("MAX_JOBS")
    if given is None:
        return len(os.sched_getaffinity(0))
    if not given.isdigit() or int(given) < 1:
        raise BuildError(f"MAX_JOBS is {given!r}: a number from 1 up is allowed")
    return int(given)


def compiler_id(command: str) -> str:
    """First line of `command --version`, or an error that names the cure."""
    try:
        out = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True)
    except OSError as error:
        raise BuildError(
            f"cannot run the compiler {command!r} ({error.strerror}): install gcc and g++ or clang "
            "(Debian and Ubuntu: apt install build-essential), or set CC and CXX"
        ) from error
    return (out.stdout or out.stderr).partition("\n")[0]


# What ptxas -v says of every kernel is for the log; numbered remarks (C7510) are for the eye, too.
CHATTER = re.compile(r"ptxas info +: (?!\(C)|\s*\d+ bytes stack frame|\s*$")


def run(argv: list[str], what: str, log: Path | None = None) -> None:
    done = subprocess.run(argv, capture_output=True, text=True)
    said = done.stderr
    if log:
        log.write_text(f"{shlex.join(argv)}\n{done.stdout}{done.stderr}")
        lines = (done.stdout + done.stderr).splitlines(keepends=True)
        said = "".join(line for line in lines if not CHATTER.match(line))
    if said:
        sys.stderr.write(said)  # warnings of a command that succeeded, too
    if done.returncode:
        raise BuildError(f"{what} failed ({done.returncode}):\n  {shlex.join(argv)}")


def _compile(job: Job) -> float:
    start = time.monotonic()
    job.object.parent.mkdir(parents=True, exist_ok=True)
    record = job.object.with_suffix(".cmd")
    record.unlink(missing_ok=True)  # a compile that is cut short leaves no fresh-looking object
    run(job.argv, f"compiling {job.source}", job.log)
    record.write_text(job.record)
    return time.monotonic() - start


def compile_all(jobs: list[Job]) -> bool:
    """Compile what is stale, one progress line a file; True if anything was compiled."""
    stale = [job for job in jobs if not job.is_fresh()]
    if not stale:
        print(f"  all {len(jobs)} object files are up to date", flush=True)
        return False
    workers = min(max_jobs(), len(stale))
    kept = len(jobs) - len(stale)
    print(
        f"  compiling {len(stale)} files, {workers} at a time"
        + (f" ({kept} up to date)" if kept else ""),
        flush=True,
    )
    start = time.monotonic()
    width = len(str(len(stale)))
    with ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(_compile, job): job for job in stale}
        try:
            for n, future in enumerate(as_completed(running), 1):
                seconds = future.result()
                source = running[future].source
                print(f"  [{n:{width}}/{len(stale)}] {source}  {seconds:.1f} s", flush=True)
        except BuildError:
            pool.shutdown(cancel_futures=True)
            raise
    print(f"  compiled in {time.monotonic() - start:.1f} s", flush=True)
    return True
