# SPDX-License-Identifier: Apache-2.0
"""One way to measure: rows interleaved round by round, the machine's peak before and after each.

A verb module gives `rows(work) -> list[Row]`; `main` does the rest: arguments, inputs, samples,
table, JSON. A round runs every row once (A B C A B C ...), so a machine that changes speed while we
measure changes it for all rows alike. Between two rows stands a probe of the machine's peak: a
sample whose two probes differ by more than 10% is flagged and left out of the medians, but stays in
the JSON. How a call is timed and what is probed is the device's matter (devices.py).
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks import inputs, machine, options, table, targets, targets_gpu
from benchmarks.inputs import Shape

DRIFT = 0.10  # probes further apart than this flag the sample between them


@dataclass
class Row:
    """One thing to time. `blocks`: block pairs computed, over all heads; 0 = no GFLOP/s."""

    name: str
    call: Callable[[], object]
    blocks: int = 0
    density: float | None = None
    diagonal: int = 0  # of the blocks, half masked
    bytes: int = 0  # that cannot be avoided; 0 = no GB/s
    dense: bool = False  # a dense kernel, so one of those that the best is chosen of
    threads: int = 0  # CPU: other than all; `call` sets them itself
    flops: float = 0.0  # over those of dense attention, for what is no attention itself
    beyond: str = ""  # the row whose time is taken off first
    extra: dict | Callable[[], dict] = field(default_factory=dict)  # called after the last sample


@dataclass
class Sample:
    ms: float
    probe: tuple[float, float]  # before and after, of the row's unit
    flagged: bool
    host_ms: float | None = None  # GPU: until the call returned
    probes: dict[str, tuple[float, float]] | None = None  # GPU: of every unit
    ghz: float | None = None  # CPU: clock of the calling thread's core


def measure(rows, device, isa: str, args, tick, until: float = math.inf):
    """name -> samples, and whether Ctrl-C ended it early; what was taken by then is kept.

    until: of time.perf_counter; no round but the first is begun later."""
    taken: dict[str, list[Sample]] = {row.name: [] for row in rows}
    units = {row.name: device.unit(row, isa) for row in rows}
    probed = sorted(set(units.values()))
    lasts = []  # ms, of the warm-up at first
    try:
        for row in rows:
            began = time.perf_counter()
            device.warm_up(row.call)
            lasts.append(1e3 * (time.perf_counter() - began))
        before = device.probe(probed, lasts[0] if lasts else 0.0)
        for done in range(args.samples):
            if done and time.perf_counter() > until:
                break
            for i, row in enumerate(rows):
                timing = device.time(row.call)
                lasts[i] = timing.ms
                after = device.probe(probed, max(timing.ms, lasts[(i + 1) % len(rows)]))
                pairs = {unit: (before[unit], after[unit]) for unit in after}
                pair = pairs[units[row.name]]
                drift = abs(pair[0] - pair[1]) / max(pair)
                every = pairs if device.kind == "cuda" else None
                flagged = drift > DRIFT
                sample = Sample(timing.ms, pair, flagged, timing.host_ms, every, timing.ghz)
                taken[row.name].append(sample)
                before = after
                tick()
    except KeyboardInterrupt:
        return taken, True
    return taken, False


class Progress:
    """A bar on a terminal, nothing in a log."""

    def __init__(self, total: int):
        self.done, self.total, self.label = 0, total, ""
        self.shown = sys.stderr.isatty()

    def tick(self, steps: int = 1) -> None:
        self.done += steps
        if self.shown:
            filled = min(30 * self.done // self.total, 30)
            bar = "#" * filled + "." * (30 - filled)
            sys.stderr.write(f"\r[{bar}] {self.done}/{self.total} {self.label:<40}")
            sys.stderr.flush()

    def clear(self) -> None:
        if self.shown:
            sys.stderr.write("\r" + " " * 90 + "\r")


def save(path: Path, report: dict) -> None:
    """Whole file or none: written beside it, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as f:
        json.dump(report, f, indent=1)
        f.write("\n")
    os.chmod(f.name, 0o644)
    os.replace(f.name, path)


def begin(args, device) -> dict:
    """Prints the banner; the report with all that stands over the numbers."""
    about = device.banner()
    peaks = device.peaks()
    print(machine.describe(about))
    print("peak, GFLOP/s (copy: GB/s): " if "copy" in peaks else "peak, GFLOP/s: ", end="")
    print(", ".join(f"{u} {g:.0f}" for u, g in peaks.items()))
    if about.get("no_mma_peak"):
        print(f"no mma.sync peak: {about['no_mma_peak']}")
    return {
        "banner": about,
        "options": {name: str(value) for name, value in vars(args).items()},
        "peak_gflops": peaks,
        "inputs": getattr(args, "capture", None) or inputs.__doc__.strip(),
        "complete": False,
        "shapes": [],
    }


def where(args, about: dict, verb: str) -> Path | None:
    """--json's file; 'results' picks one by machine, verb and head_dim, --quick's apart."""
    if not args.json or str(args.json) != "results":
        return args.json
    of = f"-d{args.head_dim}" if hasattr(args, "head_dim") else ""
    if getattr(args, "capture", None):
        of = "-" + Path(args.capture.partition(",")[0]).stem
    how = getattr(args, "method", "pbs")
    of += "" if how == "pbs" else "-" + "".join(c if c.isalnum() else "-" for c in how)
    name = f"{verb}{of}" + ("-quick" if args.quick else "")
    return machine.ROOT / "benchmarks" / "results" / machine.slug(about) / f"{name}.json"


def main(verb: str, rows: Callable, arguments=None, open_device: Callable | None = None) -> int:
    args = options.parse(verb, arguments)
    from benchmarks import baselines, devices  # what they import needs the built extension

    for spec in args.baseline:
        baselines.load(spec)  # a wrong flag is said now, not after minutes
    if args.save_capture:
        return _save_capture(args)
    device = (open_device or devices.open_device)(args)
    report = begin(args, device)
    if getattr(args, "break_even", False):
        from benchmarks import break_even

        return break_even.run(args, device, report)
    out = where(args, report["banner"], verb)
    try:
        for entry in _entries(args, rows, device):
            report["shapes"].append(entry)
            if out:
                save(out, report)
        report["complete"] = True
        for line in targets.growth_lines(report["shapes"]):
            print(line)
    except KeyboardInterrupt:
        print("stopped: what was measured so far is kept")
    if device.kind == "cuda":
        report["banner"]["gpu"]["state_at_end"] = device.state()
        print(f"at the end: {machine.describe_state(report['banner']['gpu']['state_at_end'])}")
    if out:
        save(out, report)
        print(f"saved {out}")
    return 0 if report["complete"] else 130


def _save_capture(args) -> int:
    import torch

    from benchmarks import capture

    longest = max(map(options.length, args.lengths.split(",")))
    print(capture.save(args.capture, longest, args.save_capture, torch.device(args.device)))
    return 0


def _entries(args, rows: Callable, device):
    """Measures shape by shape; prints each table, yields what goes into the report."""
    from benchmarks.work import Work

    lengths = [options.length(text) for text in args.lengths.split(",")]
    shapes = [(name, n) for name in args.dtypes.split(",") for n in lengths]
    began, progress, work, todo = time.perf_counter(), None, None, []
    for i, (name, n) in enumerate(shapes):
        work = todo = None  # freed before the next is made
        shape = Shape(n, args.heads, args.heads_k, args.head_dim, options.DTYPES[name])
        work = Work(shape, args, device)
        todo = rows(work)
        progress = progress or Progress(len(shapes) * len(todo) * args.samples)
        progress.label = str(work.shape)
        until = math.inf
        if args.seconds:
            now = time.perf_counter()
            until = now + max(args.seconds - (now - began), 0.0) / (len(shapes) - i)
        taken, stopped = measure(todo, device, work.isa, args, progress.tick, until)
        progress.clear()
        done = [row for row in todo if taken[row.name]]
        if done:
            yield entry(work, name, done, taken)
        if stopped:
            raise KeyboardInterrupt


def entry(work, dtype: str, rows: list[Row], taken: dict) -> dict:
    """One shape's part of the report, and its table."""
    block = work.config.block_size
    threads = {row.name: row.threads or work.device.threads for row in rows}
    results = [
        table.summarise(row, taken[row.name], work.shape, block, threads[row.name]) for row in rows
    ]
    about = asdict(work.shape) | {"dtype": dtype, "isa": work.isa, "method": work.args.method}
    title = f"{work.shape}   {work.isa}"
    table.compare(results, "dense")
    table.compare_flops(rows, results)
    if work.device.kind == "cpu":
        table.compare(results, "sdpa")
        table.compare_threads(rows, results)
        unit = work.device.unit(Row("", None), work.isa)
        of_all = [r for row, r in zip(rows, results, strict=True) if not row.threads]
        probes = [p for r in of_all for s in r["samples"] for p in s["probe"]]
        rate = {unit: statistics.median(probes)}
        made = about | {"unit": unit, "rows": results} | _failed(work)
        made["targets"] = [check.record() for check in targets.of_shape(made)]
        print(table.cpu_table(title, rate, results, work.failures), flush=True)
        for check in targets.of_shape(made):
            print(f"  {check}")
        return made
    best = table.best_dense(rows, results)
    if best:
        table.compare(results, best, "best")
    seen: dict[str, list[float]] = {}
    for sample in (s for r in results for s in r["samples"]):
        for unit, pair in sample["probes"].items():
            seen.setdefault(unit, []).extend(pair)
    probes = {unit: statistics.median(rates) for unit, rates in seen.items()}
    for row, result in zip(rows, results, strict=True):
        result |= {"dense_kernel": True} if row.dense else {}
    made = about | {"probes": probes, "best_dense": best, "rows": results} | _failed(work)
    checks = targets_gpu.of_prefill(made, work.device.family)
    made["targets"] = [check.record() for check in checks]
    print(table.gpu_table(title, probes, results, best, work.failures), flush=True)
    for check in checks:
        print(f"  {check}", flush=True)
    return made


def _failed(work) -> dict:
    return {"not_run": work.failures} if work.failures else {}
