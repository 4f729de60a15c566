# SPDX-License-Identifier: Apache-2.0
"""What the CPU kernels are meant to reach, and whether a run did.

Fractions are of the machine's own peak in the same run, multiples are of torch's SDPA on the same
threads and dtype. `must` is the line between done and not done, `good` what a prototype reached.
The whole-call rows are about head_dim 128 and the method `pbs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

K = 1024

# isa: {head_dim, or 0 for any: (must, good)}. One 128 x 128 block with softmax, panels in L2.
BLOCK = {
    "amx": {64: (0.24, 0.32), 96: (0.33, 0.42), 128: (0.38, 0.48), 256: (0.40, 0.50)},
    "avx512bf16": {64: (0.75, 0.85), 96: (0.80, 0.89), 128: (0.82, 0.91), 256: (0.85, 0.94)},
    "avx512": {0: (0.80, 0.91)},
    "avx2": {0: (0.80, 0.91)},
}
# isa: {length: (must, good)}. Dense attention of the whole call, of peak.
DENSE_OF_PEAK = {"avx512bf16": {8 * K: (0.80, 0.88), 32 * K: (0.72, 0.84)}}
DENSE = {"avx512bf16": {2 * K: (4.0, 5.2), 8 * K: (4.3, 5.0), 32 * K: (3.8, 4.7)}}  # over SDPA
# isa: {length: {density in percent: (must, good)}}. The whole sparse call over SDPA.
SPARSE = {
    "amx": {32 * K: {20: (6, 9), 30: (4, 6), 40: (3, 4.7)}},
    "avx512bf16": {
        2 * K: {20: (6, 10), 30: (5.5, 9), 40: (5, 8.4)},
        8 * K: {20: (13, 18), 30: (10, 13.5), 40: (8, 10.8)},
        32 * K: {20: (16, 21), 30: (11, 15), 40: (8, 11)},
    },
    "avx512": {32 * K: {20: (9, 11.5), 30: (6.5, 8), 40: (5, 6)}},
    "avx2": {32 * K: {20: (4.5, 5.8), 30: (3.2, 4), 40: (2.5, 3.1)}},
}
OVERHEAD = {(32 * K, 40): (0.08, 0.05)}  # at most: everything but attend, of the whole call
PERMUTE_OVER_COPY = (1.3, 1.1)  # at most: pack + permute + pool over a copy of as many bytes
# At most: time of choosing by antidiagonals, and with the correction, over dense attention, as a
# multiple of its share of the FLOPs. {length: {stride: (must, good)}}
OVER_FLOPS = {8 * K: {16: (1.5, None)}}
THREADS = (0.95, None)  # speed-up of attend over the probe's own
GROWTH = (0.15, None)  # at most: of attend's time per block over the probe, 4K to 64K


@dataclass(frozen=True)
class Check:
    what: str
    value: float
    must: float
    good: float | None = None
    at_most: bool = False
    noisy: bool = False  # of samples whose probes differ: not a result, measure again

    def _reaches(self, bound: float) -> bool:
        return self.value <= bound if self.at_most else self.value >= bound

    @property
    def verdict(self) -> str:
        if not self._reaches(self.must):
            return "not met"
        return "met" if self.good is None or not self._reaches(self.good) else "met, good"

    def record(self) -> dict:
        return asdict(self) | {"verdict": self.verdict}

    def __str__(self) -> str:
        good = f", good {self.good:g}" if self.good is not None else ""
        at = "at most " if self.at_most else ""
        noisy = " (noisy)" if self.noisy else ""
        bounds = f"must {at}{self.must:g}{good}"
        return f"target: {self.what} {self.value:.3g}; {bounds}: {self.verdict}{noisy}"


def block(isa: str, head_dim: int) -> tuple[float, float] | None:
    """(must, good), None where nothing was set."""
    of_isa = BLOCK.get(isa, {})
    return of_isa.get(head_dim, of_isa.get(0))


def of_shape(shape: dict) -> list[Check]:
    """A shape of benchmarks.prefill on a CPU, as its report has it."""
    if shape["head_dim"] != 128 or shape.get("method", "pbs") != "pbs":
        return [*over_flops(shape), *_threads(shape)]
    isa, length = shape["isa"], shape["length"]
    rows = {row["row"]: row for row in shape["rows"]}
    made = []

    def add(what, row, key, goal, at_most=False):
        found = rows.get(row, {})
        if goal and found.get(key) is not None:
            made.append(Check(what, found[key], *goal, at_most, found["flagged_used"]))

    add("dense, of peak", "dense", "of_peak", DENSE_OF_PEAK.get(isa, {}).get(length))
    add("dense over sdpa", "dense", "vs_sdpa", DENSE.get(isa, {}).get(length))
    for share, goal in SPARSE.get(isa, {}).get(length, {}).items():
        add(f"sparse {share}% over sdpa", f"prefill {share}%", "vs_sdpa", goal)
    for (at, share), goal in OVERHEAD.items():
        if at == length:
            add(f"overhead at {share}%", f"prefill {share}%", "overhead", goal, True)
    return [*made, *_threads(shape)]


def over_flops(shape: dict) -> Iterator[Check]:
    """Of a shape of any device: benchmarks/overhead.py has the rows."""
    timed = {row["row"]: row for row in shape["rows"] if row.get("over_flops") is not None}
    means = [row for name, row in timed.items() if name.endswith(" means")]
    for stride, goal in OVER_FLOPS.get(shape["length"], {}).items():
        row = timed.get(f"antidiagonal {stride}")
        for what, parts in (("", []), (" and the means", means)):
            if row and (parts or not what):
                of = [row, *parts]
                value = sum(r["of_dense"] for r in of) / sum(r["flop_share"] for r in of)
                noisy = any(r["flops_flagged_used"] for r in of)
                what = f"antidiagonal {stride}{what} over its share of FLOPs"
                yield Check(what, value, *goal, at_most=True, noisy=noisy)


def _threads(shape: dict) -> Iterator[Check]:
    for row in shape["rows"]:
        for name, value in row.get("vs_threads", {}).items():
            if name.endswith(" of probe"):
                what = f"{row['row']} over {name.split()[0]} thread, of the probe's"
                yield Check(what, value, *THREADS, noisy=row["flagged_used"])


def growth(shapes: list[dict]) -> list[Check]:
    """Per dtype, head_dim and forced density: how much longer a block takes in long calls."""
    found: dict[tuple, list[tuple[int, float]]] = {}
    for shape in shapes:
        for row in shape.get("rows", ()):
            forced = row["row"].startswith("prefill ")  # at one density whatever the length
            if forced and row.get("attend_of_peak") and 4 * K <= shape["length"] <= 64 * K:
                about = (shape["dtype"], shape["head_dim"], row["row"])
                found.setdefault(about, []).append((shape["length"], row["attend_of_peak"]))
    made = []
    for (dtype, head_dim, row), of_peak in found.items():
        of_peak.sort()
        if len(of_peak) > 1:
            first, span = of_peak[0][1], f"{of_peak[0][0] // K}k to {of_peak[-1][0] // K}k"
            worst = max(first / share for _, share in of_peak[1:]) - 1
            what = f"{dtype} D={head_dim} {row}: time per block over the probe, {span}, grows by"
            made.append(Check(what, worst, *GROWTH, at_most=True))
    return made


def growth_lines(shapes: list[dict]) -> list[str]:
    return [str(check) for check in growth(shapes)]
