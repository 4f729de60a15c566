# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.prefill --break-even: from which length on is the sparse call faster?

Whole prompts first, then the last rows of prompts of 4 and 16 times the length found. Each time
sizes are tried upwards until the sparse call has won twice running; between the last loss and the
first win the search goes on until they are a quarter apart. "Dense" is the fastest dense kernel
that runs at that size. Prints the line for MIN_LENGTHS of pbs_attn/routing.py.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import baselines, harness, options, table
from benchmarks.inputs import Shape

CONFIRM = 2  # wins running, so that one lucky sample decides nothing
CLOSE = 4  # loss and win are a CLOSE-th of the win apart at the end
CONTEXTS = (4, 16)  # chunks: prompt over the whole prompt's break-even


def search(ladder, ratio: Callable[[int], float], step: int) -> tuple[int | None, dict[int, float]]:
    """(smallest size from which on the sparse call wins, {size tried: dense / sparse time}).

    None: it lost at the end of the ladder. ratio(n) > 1 means that the sparse call wins."""
    seen: dict[int, float] = {}
    wins = 0
    for n in ladder:
        seen[n] = ratio(n)
        wins = wins + 1 if seen[n] > 1 else 0
        if wins == CONFIRM:
            break
    if not wins:
        return None, seen
    tried = sorted(seen)
    win, below = tried[-wins], tried[:-wins]
    while below and (win - below[-1]) * CLOSE > win:
        middle = (below[-1] + win) // 2 // step * step
        if middle in seen:
            break
        seen[middle] = ratio(middle)
        if seen[middle] > 1:
            win = middle
        else:
            below.append(middle)
    return win, seen


def measure(args, device, dtype: str, rows: int, keys: int) -> dict:
    """One size: the sparse call beside every dense kernel that runs."""
    from benchmarks import prefill
    from benchmarks.work import Work

    shape = Shape(keys, args.heads, args.heads_k, args.head_dim, options.DTYPES[dtype])
    work = Work(shape, args, device, rows)
    todo = [prefill.call(work), *baselines.rows(work)]
    taken, stopped = harness.measure(todo, device, work.isa, args, lambda: None)
    if stopped:
        raise KeyboardInterrupt
    block = work.config.block_size
    threads = device.threads
    results = [table.summarise(row, taken[row.name], work.shape, block, threads) for row in todo]
    best = table.best_dense(todo, results)
    if best is None:
        raise SystemExit(f"no dense kernel runs at {rows} rows, {keys} keys: {work.failures}")
    table.compare(results, best, "best")
    ms = {r["row"]: r["ms"] for r in results}
    found = {
        "rows": rows,
        "keys": keys,
        "density": work.density,
        "sparse_ms": ms["prefill"],
        "dense": best,
        "dense_ms": ms[best],
        "ratio": results[0]["vs_best"],
        "not_run": work.failures,
        "measured": results,
    }
    print(
        f"  {rows:>7} rows of {keys:>7}: density {work.density:.2f}, "
        f"sparse {ms['prefill']:.3f} ms, {best} {ms[best]:.3f} ms, x {found['ratio']:.2f}",
        flush=True,
    )
    return found


def find(args, dtype: str, at: Callable[[int, int], float]) -> tuple[int | None, int | None]:
    """(min_q, min_kv); at(rows, keys): dense over sparse time. None: no size tried wins."""
    ladder = sorted(map(options.length, args.lengths.split(",")))
    step = args.segment_size
    print(f"{dtype}: whole prompts")
    min_kv, _ = search(ladder, lambda n: at(n, n), step)
    if min_kv is None:
        return None, None
    min_q = 0
    for keys in sorted({min(min_kv * times, ladder[-1]) for times in CONTEXTS}):
        print(f"{dtype}: the last rows of {keys}")
        rows = [args.block_size << i for i in range(20) if args.block_size << i < keys]
        won, _ = search([*rows, keys], lambda n, keys=keys: at(n, keys), args.block_size)
        min_q = max(min_q, won or keys)
    return min_q, min_kv


def run(args, device, report: dict) -> int:
    """The slowest dtype decides; report goes to --json as the other benchmarks' does."""
    report["sizes"], found = [], {}
    out = harness.where(args, report["banner"], "break-even")
    try:
        for dtype in args.dtypes.split(","):

            def at(rows: int, keys: int, dtype=dtype) -> float:
                report["sizes"].append({"dtype": dtype} | measure(args, device, dtype, rows, keys))
                return report["sizes"][-1]["ratio"]

            found[dtype] = find(args, dtype, at)
        report["complete"] = True
    except KeyboardInterrupt:
        print("stopped: what was measured so far is kept")
    report["break_even"] = {dtype: list(pair) for dtype, pair in found.items()}
    print(line(device, found) if report["complete"] else "no line for MIN_LENGTHS")
    if out:
        harness.save(out, report)
        print(f"saved {out}")
    return 0 if report["complete"] else 130


def line(device, found: dict[str, tuple[int | None, int | None]]) -> str:
    """What goes into MIN_LENGTHS."""
    if any(None in pair for pair in found.values()):
        losers = ", ".join(dtype for dtype, pair in found.items() if None in pair)
        return f"no length tried breaks even for {losers}: try longer --lengths"
    min_q, min_kv = (max(values) for values in zip(*found.values(), strict=True))
    return (
        f'MIN_LENGTHS of pbs_attn/routing.py:\n    "{device.family}": Lengths({min_q}, {min_kv}),'
    )
