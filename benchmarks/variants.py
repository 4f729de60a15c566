# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.variants: the kernels of attend for 9.0 that a GPU is to decide between.

All lines of csrc/cuda/attend_instances_sm90.inc for a head_dim, round by round in one run:
"default" is what users get, the others are named as in that file, "portable" is the kernel of every
GPU. Dense causal attention at --lengths, beside torch's and what else is installed; then, where a
row has 32 blocks or more, random history blocks at a forced density (--forced, --share), as the
walk of a sparse call reads them: own span from K and V as they are, history from the permuted copy.

Needs a CUDA library with variants: build/variants/_C_cuda.abi3.so, made by `make variants`, is
taken in place of the package's own. Without one "default", "portable" and the dense kernels are
measured alone. Results are saved after every shape.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks import harness, machine, options, table
from benchmarks.harness import Row
from benchmarks.inputs import Shape

VARIABLE = "PBS_ATTEND_VARIANT"  # read by the library at every call
TABLE = machine.ROOT / "csrc" / "cuda" / "attend_instances_sm90.inc"
LIBRARY = machine.ROOT / "build" / "variants" / "_C_cuda.abi3.so"
DEFAULT, PORTABLE = "default", "portable"
LONG_ROW = 32  # blocks: below, what a row costs once shows in the rate
WORTH = 0.01  # a variant that gains less than this is not better
BF16 = "PBS_DTYPE_BF16"


# ---- names ------------------------------------------------------------------------------------
def widths(path: Path = TABLE) -> list[int]:
    """Of the tiles there are, ascending: a call runs on the first that holds its head_dim."""
    return sorted(
        {int(d) for d in re.findall(rf"^INSTANCE\({BF16}, \w+, (\d+),", path.read_text(), re.M)}
    )


def names(head_dim: int, path: Path = TABLE) -> list[str]:
    """Of the variants that a head_dim has, in the order of the table."""
    width = next((d for d in widths(path) if head_dim <= d), 0)
    found = re.findall(rf'^VARIANT\("([\w-]+)", {BF16}, \w+, (\d+),', path.read_text(), re.M)
    return [name for name, d in found if int(d) == width]


def chosen(args, head_dim: int) -> list[str]:
    """Those of --names, or all; none where the library has none."""
    wanted = args.names.split(",") if args.names else None
    return [name for name in names(head_dim) if wanted is None or name in wanted]


def check_names(args) -> None:
    every = dict.fromkeys(name for d in args.head_dim_list for name in names(d))
    for name in args.names.split(",") if args.names else ():
        if name not in every:
            allowed = ", ".join(every) or "none"
            dims = ",".join(map(str, args.head_dim_list))
            raise SystemExit(f"--names {name}: no such variant of head_dim {dims}; of {allowed}")


@contextlib.contextmanager
def variant(name: str):
    """Calls inside run this line of the table."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "" if name == DEFAULT else name
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def under(name: str, call):
    def run():
        with variant(name):
            return call()

    return run


def lacks(work) -> str | None:
    """Why the library that is loaded has no variants; it must refuse a name that nobody has."""
    if work.isa == "sm80":
        return "variants are of compute capability 9.0"
    try:
        with variant("?"):
            work.dense()
    except ValueError as refusal:
        said = str(refusal).rpartition(": ")[2]
        expected = ", ".join(names(work.shape.head_dim)) or "none"
        if said == expected:
            return None
        return f"the library has others than {TABLE.name}: {said}; make variants"
    return "the library has none; make variants"


# ---- rows -------------------------------------------------------------------------------------
def dense(work, variants: list[str]) -> list[Row]:
    from benchmarks import baselines

    def row(name, call):
        return Row(name, call, work.causal, 1.0, diagonal=work.diagonal)

    others = [row for row in baselines.rows(work) if row.name != "dense"]
    calls = {DEFAULT: work.dense} | {name: work.dense for name in variants}
    calls = {name: under(name, call) for name, call in calls.items()}
    calls[PORTABLE] = functools.partial(work.dense, isa="sm80")
    error = baselines.error_of_last_rows
    return [*(row(n, c) for n, c in right(work, calls, error).items()), *others]


def forced(work, variants: list[str], share: float) -> list[Row]:
    """Random history blocks from the permuted K and V; nothing where rows are short."""
    bits, blocks, density = work.forced(share)
    rows = work.diagonal
    if blocks < LONG_ROW * rows:
        work.failures["forced"] = f"{blocks / rows:.1f} blocks a row; {LONG_ROW} or more are wanted"
        return []
    call = functools.partial(work.attend, bits)
    calls = {name: under(name, call) for name in (DEFAULT, *variants)}
    calls[PORTABLE] = functools.partial(work.attend, bits, isa="sm80")
    truth = calls[PORTABLE]()[0].float()
    right_calls = right(work, calls, functools.partial(off, truth))
    return [Row(n, c, blocks, density, diagonal=work.diagonal) for n, c in right_calls.items()]


def right(work, calls: dict, error) -> dict:
    """Those that run and are right; the others go to work.failures."""
    from benchmarks import baselines

    def checked(name, call):
        return baselines.attempt(work, name, lambda work: call, error)

    return {name: call for name, call in calls.items() if checked(name, call)}


def off(truth, work, out) -> float:
    """Largest difference to the portable kernel over the same blocks, over the largest value."""
    return float((out[0].float() - truth).abs().max() / truth.abs().max())


# ---- a run ------------------------------------------------------------------------------------
def parse(arguments=None):
    args = options.parse("variants", arguments)
    dims = [int(d) if d.isdigit() else 0 for d in args.head_dims.split(",")]
    if any(d % 8 or not 8 <= d <= 256 for d in dims):
        raise SystemExit(f"--head-dims {args.head_dims}: multiples of 8 from 8 to 256 are allowed")
    if not 0 < args.share <= 1:
        raise SystemExit(f"--share {args.share}: above 0, at most 1")
    args.head_dim_list = dims
    del args.head_dim  # one file for all
    check_names(args)
    return args


def shapes(args) -> list[tuple[int, int, str]]:
    """(head_dim, length, "dense" or "forced")"""
    lengths = [(options.length(n), "dense") for n in args.lengths.split(",")]
    lengths += [(options.length(n), "forced") for n in args.forced.split(",") if n]
    return [(d, n, kind) for d in args.head_dim_list for n, kind in lengths]


def main(arguments=None, open_device=None) -> int:
    args = parse(arguments)
    if LIBRARY.is_file():
        os.environ.setdefault("PBS_ATTN_CUDA_LIBRARY", str(LIBRARY))
    from benchmarks import devices

    device = (open_device or devices.open_device)(args)
    report = harness.begin(args, device) | {"best": []}
    out = harness.where(args, report["banner"], "variants")
    todo, began, complete = shapes(args), time.perf_counter(), True
    for i, (head_dim, length, kind) in enumerate(todo):
        until = math.inf
        if args.seconds:
            now = time.perf_counter()
            until = now + max(args.seconds - (now - began), 0.0) / (len(todo) - i)
        entry, stopped = measure(args, device, head_dim, length, kind, until)
        if entry:
            report["shapes"].append(entry)
            report["best"] = best(report["shapes"])
        report["complete"] = complete = not stopped and i == len(todo) - 1
        if out:
            harness.save(out, report)
        if stopped:
            print("stopped: what was measured so far is kept")
            break
    for line in report["best"]:
        print(said(line))
    if out:
        print(f"saved {out}")
    return 0 if complete else 130


def measure(args, device, head_dim: int, length: int, kind: str, until: float):
    """(one shape's part of the report or None, whether Ctrl-C ended it)"""
    from benchmarks import targets_gpu
    from benchmarks.work import Work

    shape = Shape(length, args.heads, args.heads_k, head_dim, options.DTYPES[args.dtypes])
    work = Work(shape, args, device)
    why = lacks(work)
    if why:
        work.failures["variants"] = why
    variants = [] if why else chosen(args, head_dim)
    rows = dense(work, variants) if kind == "dense" else forced(work, variants, args.share)
    taken, stopped = harness.measure(rows, device, work.isa, args, lambda: None, until)
    rows = [row for row in rows if taken[row.name]]
    about = asdict(work.shape) | {"dtype": args.dtypes, "kind": kind, "not_run": work.failures}
    block = work.config.block_size
    results = [table.summarise(row, taken[row.name], work.shape, block) for row in rows]
    table.compare(results, DEFAULT, DEFAULT)
    foreign = table.best_dense(rows, results)
    if foreign:
        table.compare(results, foreign, "best")
    made = about | {"rows_blocks": rows[0].blocks / work.diagonal if rows else None}
    made |= {"best_dense": foreign, "probes": probes(results), "rows": results}
    made["targets"] = [c.record() for c in targets_gpu.of_variants(made, device.family)]
    print(text(made), flush=True)
    for check in targets_gpu.of_variants(made, device.family):
        print(f"  {check}", flush=True)
    return made, stopped


def probes(results: list[dict]) -> dict[str, float]:
    seen: dict[str, list[float]] = {}
    for sample in (s for r in results for s in r["samples"]):
        for unit, pair in sample["probes"].items():
            seen.setdefault(unit, []).extend(pair)
    return {unit: statistics.median(rates) for unit, rates in seen.items()}


def text(made: dict) -> str:
    """One shape's table."""
    share = f", {made['rows_blocks']:.1f} blocks a row" if made["rows_blocks"] else ""
    rates = ", ".join(f"{u} {r / 1e3:.3g}" for u, r in made["probes"].items())
    lines = [f"D={made['head_dim']} N={made['length']} {made['kind']}{share}; probes, T/s: {rates}"]
    head = (
        f"{'ms':>9}{'p10':>9}{'p90':>9}{'TFLOP/s':>9}{'of gemm':>9}{'x default':>11}{'x best':>8}"
    )
    lines.append(f"  {'row':<{table.NAME}}{head}  flagged")
    for r in made["rows"]:
        lines.append(
            f"  {r['row']:<{table.NAME}}"
            + "".join(f"{r[key]:>9.3f}" for key in ("ms", "ms_p10", "ms_p90"))
            + table._cell(r["gflops"], 9, ".1f", 1e-3)
            + table._cell(r["of_peak"], 9, ".2f")
            + table._cell(r.get("vs_default"), 11, ".3f")
            + table._cell(r.get("vs_best"), 8, ".2f")
            + f"  {table._flagged(r)}"
        )
    return "\n".join([*lines, *table.failure_lines(made["not_run"])])


# ---- who won ----------------------------------------------------------------------------------
def best(made: list[dict]) -> list[dict]:
    """Per head_dim: the variant with the largest mean gain over all its shapes, and all the others.
    "default" unless one gains more than WORTH; one that failed in any shape is out."""
    found = []
    for head_dim in dict.fromkeys(shape["head_dim"] for shape in made):
        of_dim = [shape for shape in made if shape["head_dim"] == head_dim and shape["rows"]]
        gains: dict[str, dict[str, float]] = {}
        for shape in of_dim:
            for row in shape["rows"]:
                if "vs_default" in row and row["row"] in (DEFAULT, PORTABLE, *names(head_dim)):
                    where = f"{shape['kind']} {shape['length']}"
                    gains.setdefault(row["row"], {})[where] = row["vs_default"]
        means = {
            name: statistics.geometric_mean(by_shape.values())
            for name, by_shape in gains.items()
            if len(by_shape) == len(of_dim)
        }
        winner = max(means, key=means.get, default=None)
        if winner and DEFAULT in means and means[winner] <= 1 + WORTH:
            winner = DEFAULT
        found.append({"head_dim": head_dim, "best": winner, "gains": gains, "means": means})
    return found


def said(line: dict) -> str:
    others = sorted(line["means"].items(), key=lambda pair: -pair[1])
    means = ", ".join(f"{name} x{gain:.3f}" for name, gain in others)
    out = [name for name in line["gains"] if name not in line["means"]]
    lost = f"; not in every shape: {', '.join(out)}" if out else ""
    return f"D={line['head_dim']}: best {line['best'] or 'none'} ({means}){lost}"


if __name__ == "__main__":
    sys.exit(main())
