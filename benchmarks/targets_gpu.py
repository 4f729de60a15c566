# SPDX-License-Identifier: Apache-2.0
"""What attention on an H100 or H200 is meant to reach, and whether a run did.

For 32 query and 8 K/V heads, bf16. Rates are TFLOP/s over the blocks computed, a diagonal block
whole; times are ms of a GPU that does nothing else. `must` and `good` as in targets.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.targets import Check, K

FAMILY = "cuda:9.0"
HEADS = (32, 8)
LONG_ROW = 32  # blocks of a row, own span included

DENSE = {(128, 16 * K): (600, 650)}  # (head_dim, length): TFLOP/s
OVER_DENSE = (0.95, 1.0)  # there: our dense kernel over the best one that is not ours
SPARSE = {64: (400, 440), 96: (500, 540), 128: (580, 620), 256: (520, 570)}  # TFLOP/s

# At head_dim 128 and 128K, ms at most.
PHASES = {"permutation": (1.2, 1.0), "permutation shared": (0.5, 0.4), "select": (0.5, 0.35)}
# Length: ms at most of a whole call that computes as many blocks as the paper's.
WHOLE = {8 * K: (0.75, 0.70), 32 * K: (6.5, 6.3), 128 * K: (55.0, 52.0)}
OVER_BEST = (1.0, None)  # whole call over the best dense kernel, where a sparse call is taken
TTFT = (1.0, None)  # time to first token, dense over sparse

# Length: blocks of 128 keys that a query block of the paper's model computes at tau 0.9.
PAPER_BLOCKS = {8 * K: 18.8, 16 * K: 31.3, 32 * K: 52.1, 64 * K: 73.5, 128 * K: 112.3}


def of_variants(shape: dict, family: str) -> list[Check]:
    """A shape of benchmarks.variants: what users get, not the best variant."""
    if family != FAMILY or (shape["heads"], shape["heads_k"]) != HEADS:
        return []
    rows = {row["row"]: row for row in shape["rows"]}
    ours = rows.get("default")
    if not ours:
        return []
    if shape["kind"] == "dense":
        return list(
            _dense(shape, ours, [r for r in rows.values() if r["row"] == shape["best_dense"]])
        )
    return list(_sparse(shape["head_dim"], ours, shape["rows_blocks"], f"{shape['length'] // K}k"))


def of_prefill(shape: dict, family: str) -> list[Check]:
    """A shape of benchmarks.prefill on a GPU."""
    about = (shape["heads"], shape["heads_k"])
    if family != FAMILY or about != HEADS or shape.get("method", "pbs") != "pbs":
        return []
    rows, length, dim = {r["row"]: r for r in shape["rows"]}, shape["length"], shape["head_dim"]
    made = []
    if "dense" in rows:
        foreign = [r for r in shape["rows"] if r.get("dense_kernel") and r["row"] != "dense"]
        made += _dense(shape, rows["dense"], foreign)
    query_blocks = shape["heads"] * -(-length // 128)
    for name, row in rows.items():
        if name.startswith("attend ") and name.endswith("%"):
            made += _sparse(dim, row, row["blocks"] / query_blocks, name.removeprefix("attend "))
    if dim != 128:
        return made
    whole = rows.get("prefill paper")
    if whole and length in WHOLE:
        made.append(_check(f"whole call at {length // K}k, ms", whole, "ms", WHOLE[length], True))
    if whole and "vs_best" in whole:
        made.append(_check("whole call over the best dense kernel", whole, "vs_best", OVER_BEST))
    if length == 128 * K:
        for name, goal in PHASES.items():
            if name in rows:
                made.append(_check(f"{name} at 128k, ms", rows[name], "ms", goal, True))
    return made


def _dense(shape: dict, ours: dict, foreign: list[dict]) -> Iterator[Check]:
    goal = DENSE.get((shape["head_dim"], shape["length"]))
    if not goal:
        return
    what = f"dense D={shape['head_dim']} {shape['length'] // K}k"
    yield Check(f"{what}, TFLOP/s", ours["gflops"] / 1e3, *goal, noisy=ours["flagged_used"])
    if foreign:
        best = min(foreign, key=lambda row: row["ms"])
        noisy = ours["flagged_used"] or best["flagged_used"]
        yield Check(f"{what} over {best['row']}", best["ms"] / ours["ms"], *OVER_DENSE, noisy=noisy)


def _sparse(head_dim: int, row: dict, blocks: float, name: str) -> Iterator[Check]:
    goal = SPARSE.get(head_dim)
    if goal and blocks >= LONG_ROW:
        what = f"sparse D={head_dim} {name}, {blocks:.0f} blocks a row, TFLOP/s"
        yield Check(what, row["gflops"] / 1e3, *goal, noisy=row["flagged_used"])


def _check(what: str, row: dict, key: str, goal: tuple, at_most: bool = False) -> Check:
    return Check(what, row[key], *goal, at_most=at_most, noisy=row["flagged_used"])
