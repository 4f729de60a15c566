# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.block: one block of 128 x 128, and what is done to 128 keys before.

A block is the kernel table's own attend_block on one thread: 128 queries against 64 listed panels
of 128 keys that lie in L2, softmax included. Per instruction set, dtype and head_dim: cycles a
block, and the fraction of the register-only peak taken before and after every sample. The parts are
pack, permute and pool beside a copy of as many bytes, score and sort. benchmarks/README.md says
how to read the tables.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
import time

import torch

from benchmarks import harness, kernel, options, table, targets
from benchmarks.harness import Row
from benchmarks.inputs import Shape
from benchmarks.targets import Check

NATIVE = ("amx", "avx512bf16", "avx512", "avx2", "c")  # "c" runs only where asked for, or alone
KEYS = 128
PARTS_DIMS = (64, 128)


def isas(wanted: str | None) -> tuple[list[str], list[str]]:
    """(to run, not on this machine)."""
    if wanted:
        names = wanted.split(",")
        for name in names:
            if not kernel.available(name):
                raise SystemExit(f"--isa {name}: unknown, or not on this CPU")
        return names, []
    here = [name for name in NATIVE[:-1] if kernel.available(name)]
    return here or ["c"], [name for name in NATIVE[:-1] if name not in here]


def repeated(call, ms: float):
    """call(repeat), as often as makes about `ms`; and that number."""
    call(1)
    began = time.perf_counter()
    call(1)
    repeat = max(math.ceil(1e-3 * ms / (time.perf_counter() - began)), 1)
    return functools.partial(call, repeat), repeat


def block_rows(isa: str, args) -> dict[str, tuple[Row, Shape, str]]:
    """name: (row, its shape, dtype)."""
    made = {}
    for name in args.dtypes.split(","):
        dtype = options.DTYPES[name]
        if not kernel.takes(isa, dtype):
            continue
        for head_dim in args.head_dims:
            block = kernel.Block(isa, dtype, head_dim, args.blocks)
            call, repeat = repeated(block.run, args.sample_ms)
            row = Row(f"{name} D={head_dim}", call, block.blocks * repeat)
            made[row.name] = row, Shape(KEYS, 1, 1, head_dim, dtype), name
    return made


def part_rows(isa: str, args) -> dict[str, tuple[Row, float]]:
    """name: (row, how often 128 keys (sort: one key) are treated in a call)."""
    made = {}

    def add(name: str, call, amount: float):
        timed, repeat = repeated(call, args.sample_ms)
        made[name] = Row(name, timed), amount * repeat

    for name in args.dtypes.split(","):
        dtype = options.DTYPES[name]
        for head_dim in (d for d in args.head_dims if d in PARTS_DIMS):
            if not kernel.takes(isa, dtype):
                continue
            of, far = f"{name} D={head_dim}", args.keys
            for where, keys in (("L2", KEYS), ("memory", far)):
                pack = kernel.Pack(isa, dtype, head_dim, keys, min(keys, 256))
                for what, index in (("copy", kernel.COPY), ("pack", kernel.PACK_PERMUTED)):
                    add(f"{of} {what}, {where}", functools.partial(pack.run, index), keys / KEYS)
                call = functools.partial(pack.run, kernel.PERMUTE)
                add(f"{of} pack+pool, {where}", call, keys / KEYS)
            steps = _steps(isa, dtype, head_dim, max(far // 4, 256))
            add(f"{of} score", steps.score, max(far // 4, 256) / KEYS)
            add(f"{of} sort, a key", steps.sort, max(far // 4, 256))
    return made


def _steps(isa: str, dtype: torch.dtype, head_dim: int, keys: int) -> kernel.Steps:
    from pbs_attn import PBSConfig

    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, keys, head_dim, generator=g).to(dtype) for _ in range(2))
    return kernel.Steps(q, k, k, PBSConfig(), isa, 1)


def part(row: Row, amount: float, samples: list, base: list | None) -> dict:
    """Microseconds and cycles of 128 keys (or one); over the copy, round by round."""
    clean = [i for i, s in enumerate(samples) if not s.flagged]
    used = clean if len(clean) >= min(3, len(samples)) else range(len(samples))
    ns = [samples[i].ms * 1e6 / amount for i in used]
    made = {"row": row.name, "us": statistics.median(ns) / 1e3, "flagged_used": used is not clean}
    if samples[0].ghz:
        cycles = (samples[i].ghz * t for i, t in zip(used, ns, strict=True))
        made["cycles"] = statistics.median(cycles)
    if base:
        rounds = range(min(len(base), len(samples)))
        ratios = [samples[i].ms / base[i].ms for i in rounds if i in used] or [math.nan]
        made["over_copy"] = statistics.median(ratios)
    made["samples"] = [{"ms": s.ms, "flagged": s.flagged, "ghz": s.ghz} for s in samples]
    return made


def over_copies(rows: dict, taken: dict) -> list[dict]:
    """The parts' results; a pack is compared to the copy of as many bytes at the same place."""
    made = []
    for name, (row, amount) in rows.items():
        if not taken[name]:
            continue
        of, comma, where = name.partition(",")
        copy = f"{of.rpartition(' ')[0]} copy{comma}{where}"
        base, per_copy = rows.get(copy, (None, 0))
        found = part(row, amount, taken[name], taken.get(copy) if copy != name else None)
        if "over_copy" in found:
            found["over_copy"] *= per_copy / amount
        made.append(found)
    return made


def checks(isa: str, results: list[dict], parts: list[dict]) -> list[Check]:
    made = []
    for r in results:
        goal = targets.block(isa, r["head_dim"])
        if goal and r["of_peak"]:
            what, noisy = f"{isa} {r['row']}, of peak", r["flagged_used"]
            made.append(Check(what, r["of_peak"], *goal, noisy=noisy))
    for p in parts:
        if "pack+pool" in p["row"] and "over_copy" in p:
            what, noisy = f"{isa} {p['row']}, over copy", p["flagged_used"]
            goal = targets.PERMUTE_OVER_COPY
            made.append(Check(what, p["over_copy"], *goal, at_most=True, noisy=noisy))
    return made


def without_products(results: list[dict]) -> list[str]:
    """Products take cycles in proportion to head_dim, so twice D=64 less D=128 is the rest."""
    cycles = {r["row"]: r.get("cycles_per_block") for r in results}
    lines = []
    for dtype in dict.fromkeys(r["dtype"] for r in results):
        near, far = (cycles.get(f"{dtype} D={d}") for d in (64, 128))
        if near and far:
            rest = 2 * near - far
            lines.append(f"  {dtype}: softmax and all else but products {rest:.0f} cycles a block")
    return lines


def measure(isa: str, args, device) -> tuple[dict, bool]:
    """One instruction set: its part of the report, and whether Ctrl-C ended it."""
    blocks = block_rows(isa, args)
    parts = part_rows(isa, args) if args.parts else {}
    rows = [entry[0] for entry in (*blocks.values(), *parts.values())]
    progress = harness.Progress(max(len(rows) * args.samples, 1))
    progress.label = isa
    taken, stopped = harness.measure(rows, device, isa, args, progress.tick)
    progress.clear()
    results = []
    for name, (row, shape, dtype) in blocks.items():
        if taken[name]:
            found = table.summarise(row, taken[name], shape, KEYS)
            shares = sorted(_shares(found, row, shape))
            about = {"dtype": dtype, "head_dim": shape.head_dim}
            low, high = shares[len(shares) // 10], shares[-1 - len(shares) // 10]
            results.append(found | about | {"of_peak_p10": low, "of_peak_p90": high})
    found = over_copies(parts, taken)
    made = {"isa": isa, "unit": device.unit(Row("", None), isa), "rows": results, "parts": found}
    judged = checks(isa, results, found)
    made["targets"] = [check.record() for check in judged]
    show(made, judged)
    return made, stopped


def _shares(found: dict, row: Row, shape: Shape) -> list[float]:
    work = table.flop(shape, KEYS, row.blocks)
    samples = found["samples"]
    used = [s for s in samples if not s["flagged"]] if not found["flagged_used"] else samples
    return [work / (s["ms"] * 1e6) / (sum(s["probe"]) / 2) for s in used]


def show(made: dict, judged: list[Check]) -> None:
    probes = [p for r in made["rows"] for s in r["samples"] for p in s["probe"]]
    clocks = [s["ghz"] for r in made["rows"] for s in r["samples"] if "ghz" in s]
    clock = f", {statistics.median(clocks):.2f} GHz" if clocks else ""
    rate = f"{statistics.median(probes):.0f}" if probes else "-"
    print(f"{made['isa']}: {made['unit']} {rate} GFLOP/s{clock}")
    head = f"  {'block':<16}{'cycles':>9}{'GFLOP/s':>9}{'of peak':>9}{'p10':>7}{'p90':>7}"
    print(f"{head}  flagged")
    for r in made["rows"]:
        cells = f"{r.get('cycles_per_block') or math.nan:>9.0f}{r['gflops']:>9.1f}"
        cells += f"{r['of_peak']:>9.3f}{r['of_peak_p10']:>7.3f}{r['of_peak_p90']:>7.3f}"
        used = " used" if r["flagged_used"] else ""
        print(f"  {r['row']:<16}{cells}  {r['flagged']}/{len(r['samples'])}{used}")
    for line in without_products(made["rows"]):
        print(line)
    if made["parts"]:
        print(f"  {'128 keys':<30}{'us':>9}{'cycles':>9}{'over copy':>11}")
    for p in made["parts"]:
        ratio = f"{p['over_copy']:>11.2f}" if "over_copy" in p else ""
        cycles = f"{p['cycles']:>9.0f}" if "cycles" in p else f"{'-':>9}"
        noisy = "  noisy" if p["flagged_used"] else ""
        print(f"  {p['row']:<30}{p['us']:>9.3f}{cycles}{ratio}{noisy}")
    for check in judged:
        print(f"  {check}")
    sys.stdout.flush()


def main(arguments=None) -> int:
    args = options.parse_block(arguments)
    from benchmarks import devices

    try:
        here, absent = isas(args.isa)
    except OSError as error:
        raise SystemExit(str(error)) from None
    device = devices.Cpu(args)
    report = harness.begin(args, device)
    report["inputs"], report["absent"] = "uniform", absent
    out = harness.where(args, report["banner"], "block")
    try:
        for isa in here:
            made, stopped = measure(isa, args, device)
            report["shapes"].append(made)
            if out:
                harness.save(out, report)
            if stopped:
                raise KeyboardInterrupt
        report["complete"] = True
    except KeyboardInterrupt:
        print("stopped: what was measured so far is kept")
    if absent:
        print(f"missing on this CPU, so not judged: {', '.join(absent)}")
    if out:
        harness.save(out, report)
        print(f"saved {out}")
    return 0 if report["complete"] else 130


if __name__ == "__main__":
    sys.exit(main())
