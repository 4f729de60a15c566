# SPDX-License-Identifier: Apache-2.0
"""One way to measure: rows interleaved round by round, a register peak before and after each.

A verb module gives `rows(work) -> list[Row]`; `main` does the rest: arguments, inputs, samples,
table, JSON. A round runs every row once (A B C A B C ...), so a machine that changes speed while we
measure changes it for all rows alike. Between two rows stands a probe of the machine's peak: a
sample whose two probes differ by more than 10% is flagged and left out of the medians, but stays in
the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks import inputs, machine
from benchmarks.inputs import Shape
from benchmarks.peak import UNIT_OF_ISA, Peak

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DRIFT = 0.10  # probes further apart than this flag the sample between them


@dataclass
class Row:
    """One thing to time. `blocks`: block pairs computed, over all heads; 0 = no GFLOP/s."""

    name: str
    call: Callable[[], object]
    blocks: int = 0
    density: float | None = None
    extra: dict = field(default_factory=dict)


@dataclass
class Sample:
    ms: float
    probe: tuple[float, float]  # GFLOP/s before and after
    flagged: bool


def measure(rows, peak: Peak, unit: str, args, tick):
    """name -> samples, and whether Ctrl-C ended it early; what was taken by then is kept."""
    clock = CLOCKS[args.clock]
    taken: dict[str, list[Sample]] = {row.name: [] for row in rows}
    try:
        for row in rows:
            row.call()  # warm: pages mapped, kernels chosen
        before = peak.run(unit, args.probe_ms)
        for _ in range(args.samples):
            for row in rows:
                begin = clock()
                row.call()
                ms = 1e3 * (clock() - begin)
                after = peak.run(unit, args.probe_ms)
                drift = abs(before - after) / max(before, after)
                taken[row.name].append(Sample(ms, (before, after), drift > DRIFT))
                before = after
                tick()
    except KeyboardInterrupt:
        return taken, True
    return taken, False


def summarise(row: Row, samples: list[Sample], shape: Shape, block: int) -> dict:
    """Medians over unflagged samples (over all, and said so, when fewer than three are)."""
    clean = [s for s in samples if not s.flagged]
    enough = len(clean) >= min(3, len(samples))
    used = clean if enough else samples
    flop = 4.0 * block * block * shape.head_dim * row.blocks  # two products of B x B x D

    def fraction(s: Sample) -> float:
        return flop / (s.ms * 1e6) / (sum(s.probe) / 2)

    times = sorted(s.ms for s in used)
    result = {
        "row": row.name,
        "ms": statistics.median(times),
        "ms_p10": times[int(0.1 * (len(times) - 1))],
        "ms_p90": times[-1 - int(0.1 * (len(times) - 1))],
        "density": row.density,
        "blocks": row.blocks or None,
        "gflops": flop / (statistics.median(times) * 1e6) if row.blocks else None,
        "of_peak": statistics.median(map(fraction, used)) if row.blocks else None,
        "used": len(used),
        "flagged": len(samples) - len(clean),
        "flagged_used": not enough,
        "samples": [asdict(s) for s in samples],
    }
    return {**result, **row.extra}


def compare(results: list[dict], baseline: str) -> None:
    """Adds `vs_<baseline>`: median of the per-round ratios, so drift cancels."""
    base = next((r for r in results if r["row"] == baseline), None)
    if base is None:
        return
    for result in results:
        if not result["blocks"]:  # part of a call: nothing to compare a whole one with
            continue
        pairs = list(zip(base["samples"], result["samples"], strict=False))
        # probes of a flagged sample moved while it ran: such a round compares nothing
        clean = [(b, r) for b, r in pairs if not (b["flagged"] or r["flagged"])]
        ratios = [b["ms"] / r["ms"] for b, r in (clean if len(clean) >= 3 else pairs)]
        if ratios:
            result[f"vs_{baseline}"] = statistics.median(ratios)


def table(shape: Shape, unit: str, probes: list[float], results: list[dict]) -> str:
    lines = [f"{shape}   {unit} {statistics.median(probes):.0f} GFLOP/s"]
    head = f"  {'row':<13}{'ms':>9}{'p10':>9}{'p90':>9}{'density':>9}{'blocks':>9}"
    lines.append(head + f"{'GFLOP/s':>9}{'of peak':>9}{'x sdpa':>8}{'x dense':>8}  flagged")

    def cell(value, width: int, form: str) -> str:
        return f"{'-':>{width}}" if value is None else f"{value:>{width}{form}}"

    for r in results:
        flagged = f"{r['flagged']}/{len(r['samples'])}" + (" used" if r["flagged_used"] else "")
        lines.append(
            f"  {r['row']:<13}{r['ms']:>9.2f}{r['ms_p10']:>9.2f}{r['ms_p90']:>9.2f}"
            + cell(r["density"], 9, ".3f")
            + cell(r["blocks"], 9, "d")
            + cell(r["gflops"], 9, ".0f")
            + cell(r["of_peak"], 9, ".2f")
            + cell(r.get("vs_sdpa"), 8, ".2f")
            + cell(r.get("vs_dense"), 8, ".2f")
            + f"  {flagged}"
        )
    for r in results:
        if "workspace_size" in r:
            measured, said = r["peak_extra_bytes"], r["workspace_size"]
            lines.append(
                f"  {r['row']}: peak extra memory {measured / 2**20:.2f} MiB measured, "
                f"workspace_size {said / 2**20:.2f} MiB"
            )
    return "\n".join(lines)


class Progress:
    """A bar on a terminal, nothing in a log."""

    def __init__(self, total: int):
        self.done, self.total, self.label = 0, total, ""
        self.shown = sys.stderr.isatty()

    def tick(self, steps: int = 1) -> None:
        self.done += steps
        if self.shown:
            filled = 30 * self.done // self.total
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


def length(text: str) -> int:
    number = text.lower().removesuffix("k")
    value = int(number) * (1024 if number != text.lower() else 1)
    if value < 1:
        raise argparse.ArgumentTypeError(f"length must be at least 1, got {text}")
    return value


def parser(verb: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{verb}",
        description=f"Measure {verb}: see benchmarks/README.md for how to read the table.",
    )
    p.add_argument("--lengths", default="1k,2k,4k,8k,16k", help="comma separated (%(default)s)")
    p.add_argument("--dtypes", default="bf16,fp32", help="of bf16, fp16, fp32 (%(default)s)")
    p.add_argument("--head-dim", type=int, default=128)
    p.add_argument("--heads", type=int, default=8)
    p.add_argument("--heads-k", type=int, default=2)
    p.add_argument("--tau", type=float, default=0.9)
    p.add_argument("--block-size", type=int, default=128)
    p.add_argument("--segment-size", type=int, default=256)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    clocks = "wall, or this process's CPU time: one thread, for a machine that does other work"
    p.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help=clocks)
    p.add_argument("--samples", type=int, default=9, help="rounds per shape (%(default)s)")
    p.add_argument("--probe-ms", type=float, default=10.0, help="length of a peak probe")
    p.add_argument("--json", type=Path, metavar="OUT", help="'results' = benchmarks/results/<cpu>/")
    p.add_argument("--capture", metavar="MODEL", help="real q, k, v of a model instead: smollm2")
    p.add_argument("--quick", action="store_true", help="1k, bf16, three rounds: does it run?")
    return p


def main(verb: str, rows: Callable) -> int:
    args = parser(verb).parse_args()
    if args.quick:
        args.lengths, args.dtypes, args.samples = "1k", "bf16", 3
    if args.threads < 1 or args.samples < 1:
        raise SystemExit(f"--threads {args.threads} --samples {args.samples}: at least 1 each")
    unknown = set(args.dtypes.split(",")) - set(DTYPES)
    if unknown:
        raise SystemExit(f"--dtypes: unknown {', '.join(sorted(unknown))}; of {', '.join(DTYPES)}")
    if args.clock == "cpu" and args.threads != 1:
        raise SystemExit(f"--clock cpu --threads {args.threads}: only --threads 1 is allowed")
    torch.set_num_threads(args.threads)
    peak = Peak(args.threads, args.clock == "cpu")
    about = machine.banner(args.threads)
    peaks = {u: statistics.median(peak.run(u, 50) for _ in range(5)) for u in peak.units}
    print(machine.describe(about))
    print("peak, GFLOP/s: " + ", ".join(f"{u} {g:.0f}" for u, g in peaks.items()))
    report = {
        "banner": about,
        "options": {name: str(value) for name, value in vars(args).items()},
        "peak_gflops": peaks,
        "inputs": args.capture or inputs.__doc__.strip(),
        "complete": False,
        "shapes": [],
    }
    out = args.json
    if out and str(out) == "results":
        folder = machine.ROOT / "benchmarks" / "results" / machine.slug(about)
        out = folder / f"{verb}-d{args.head_dim}.json"
    try:
        for entry in _entries(args, rows, peak):
            report["shapes"].append(entry)
            if out:
                save(out, report)
        report["complete"] = True
    except KeyboardInterrupt:
        print("stopped: what was measured so far is kept")
    if out:
        save(out, report)
        print(f"saved {out}")
    return 0 if report["complete"] else 130


def _entries(args, rows: Callable, peak: Peak):
    """Measures shape by shape; prints each table, yields what goes into the report."""
    from benchmarks.work import Work  # needs the built extension; --help does not

    lengths = [length(text) for text in args.lengths.split(",")]
    progress = None
    for name in args.dtypes.split(","):
        for n in lengths:
            work = Work(Shape(n, args.heads, args.heads_k, args.head_dim, DTYPES[name]), args)
            shape, todo = work.shape, rows(work)
            if progress is None:
                total = len(lengths) * len(args.dtypes.split(","))
                progress = Progress(total * len(todo) * args.samples)
            progress.label = str(shape)
            unit = UNIT_OF_ISA.get(work.isa, "fma-c")
            taken, stopped = measure(todo, peak, unit, args, progress.tick)
            progress.clear()
            done = [row for row in todo if taken[row.name]]
            results = [summarise(row, taken[row.name], shape, args.block_size) for row in done]
            if results:
                compare(results, "sdpa")
                compare(results, "dense")
                probes = [p for r in results for s in r["samples"] for p in s["probe"]]
                print(table(shape, f"{work.isa}, {unit}", probes, results), flush=True)
                about = asdict(shape) | {"dtype": name, "isa": work.isa, "unit": unit}
                yield about | {"rows": results}
            if stopped:
                raise KeyboardInterrupt
