# SPDX-License-Identifier: Apache-2.0
"""From samples to numbers, and to the table on the screen."""

from __future__ import annotations

import statistics
from dataclasses import asdict

from benchmarks.inputs import Shape


def flop(shape: Shape, block: int, blocks: float) -> float:
    return 4.0 * block * block * shape.head_dim * blocks  # two products of B x B x D


def summarise(row, samples: list, shape: Shape, block: int, threads: int = 1) -> dict:
    """Medians over unflagged samples (over all, and said so, when fewer than three are)."""
    clean = [s for s in samples if not s.flagged]
    enough = len(clean) >= min(3, len(samples))
    used = clean if enough else samples
    work = flop(shape, block, row.blocks)
    times = sorted(s.ms for s in used)
    ms = statistics.median(times)

    def of(unit_of, amount: float):
        """Median over the samples of amount / time / the probes around it."""
        rates = [(amount / (s.ms * 1e6), unit_of(s)) for s in used]
        shares = [rate / (sum(pair) / 2) for rate, pair in rates if pair]
        return statistics.median(shares) if shares else None

    result = {
        "row": row.name,
        "ms": ms,
        "ms_p10": times[int(0.1 * (len(times) - 1))],
        "ms_p90": times[-1 - int(0.1 * (len(times) - 1))],
        "density": row.density,
        "blocks": row.blocks or None,
        "gflops": work / (ms * 1e6) if row.blocks else None,
        "of_peak": of(lambda s: s.probe, work) if row.blocks else None,
        "used": len(used),
        "flagged": len(samples) - len(clean),
        "flagged_used": not enough,
    }
    if row.blocks and samples[0].ghz:  # core cycles, all threads together
        cycles = statistics.median(s.ms * s.ghz for s in used) * 1e6 * threads
        result["cycles_per_block"] = cycles / row.blocks
    if samples[0].probes:  # a GPU
        useful = flop(shape, block, row.blocks - row.diagonal / 2)
        result |= {
            "useful_gflops": useful / (ms * 1e6) if row.blocks else None,
            "of_mma": of(lambda s: s.probes.get("mma"), work) if row.blocks else None,
            "bytes": row.bytes or None,
            "gbytes_per_s": row.bytes / (ms * 1e6) if row.bytes else None,
            "of_copy": of(lambda s: s.probes["copy"], row.bytes) if row.bytes else None,
            # launching takes longer than running: what was timed is the CPU's doing
            "launch_bound": statistics.median(s.host_ms for s in used) > ms,
        }
    result["samples"] = [
        {name: value for name, value in asdict(s).items() if value is not None} for s in samples
    ]
    result |= row.extra() if callable(row.extra) else row.extra
    if "steps_ms" in result:
        result["attend_of_peak"] = result["of_peak"] * ms / result["steps_ms"]["attend"]
    return result


def compare(results: list[dict], baseline: str, label: str = "") -> None:
    """Adds `vs_<label or baseline>`: median of the per-round ratios, so drift cancels."""
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
            result[f"vs_{label or baseline}"] = statistics.median(ratios)


def compare_flops(rows: list, results: list[dict]) -> None:
    """To rows with FLOPs beside dense attention's: `of_dense`, time over dense's, the median of
    per-round ratios; `flop_share`; `over_flops`, the first over the second."""
    by_name = {r["row"]: r for r in results}
    for row in (row for row in rows if row.flops and {"dense", row.name} <= by_name.keys()):
        names = [row.name, "dense", *filter(None, [row.beyond])]
        if row.beyond and row.beyond not in by_name:
            continue
        rounds = list(zip(*(by_name[name]["samples"] for name in names), strict=False))
        clean = [taken for taken in rounds if not any(s["flagged"] for s in taken)]
        used = clean if len(clean) >= min(3, len(rounds)) else rounds
        # the time of `beyond`, if there is one, taken off
        of_dense = [(s["ms"] - sum(x["ms"] for x in off)) / d["ms"] for s, d, *off in used]
        if of_dense:
            share = statistics.median(of_dense)
            by_name[row.name] |= {
                "of_dense": share,
                "flop_share": row.flops,
                "over_flops": share / row.flops,
                "flops_flagged_used": used is not clean,
            }


def compare_threads(rows: list, results: list[dict]) -> None:
    """`vs_threads`: {"1": speed-up over that row's number of threads, "1 of probe": that over the
    probe's own}, by the names "attend" and "attend, 1 thread". A share of the probe is taken of a
    probe on as many threads, so the shares' ratio is the speed-up over the probe's."""
    by_name = {r["row"]: r for r in results}
    for row in rows:
        whole = by_name.get(row.name.partition(",")[0])
        if not row.threads or not whole or whole["row"] == row.name:
            continue
        found = whole.setdefault("vs_threads", {})
        found[str(row.threads)] = by_name[row.name]["ms"] / whole["ms"]
        found[f"{row.threads} of probe"] = whole["of_peak"] / by_name[row.name]["of_peak"]


def best_dense(rows: list, results: list[dict]) -> str | None:
    """Name of the fastest dense row."""
    names = {row.name for row in rows if row.dense}
    dense = [r for r in results if r["row"] in names]
    return min(dense, key=lambda r: r["ms"])["row"] if dense else None


NAME = 18  # width of a row's name


def _cell(value, width: int, form: str, scale: float = 1.0) -> str:
    return f"{'-':>{width}}" if value is None else f"{value * scale:>{width}{form}}"


def _flagged(r: dict) -> str:
    text = f"{r['flagged']}/{len(r['samples'])}" + (" used" if r["flagged_used"] else "")
    return text + (" launch" if r.get("launch_bound") else "")


def _times(r: dict) -> str:
    times = "".join(f"{r[key]:>9.2f}" for key in ("ms", "ms_p10", "ms_p90"))
    return (
        f"  {r['row']:<{NAME}}{times}{_cell(r['density'], 9, '.3f')}{_cell(r['blocks'], 9, '.0f')}"
    )


HEAD = f"  {'row':<{NAME}}{'ms':>9}{'p10':>9}{'p90':>9}{'density':>9}{'blocks':>9}"


def cpu_table(title: str, probes: dict[str, float], results: list[dict], failures: dict) -> str:
    ((unit, rate),) = probes.items()
    lines = [f"{title}, {unit} {rate:.0f} GFLOP/s"]
    head = f"{'GFLOP/s':>9}{'of peak':>9}{'cycles/block':>13}{'x sdpa':>8}{'x dense':>8}"
    lines.append(f"{HEAD}{head}  flagged")
    for r in results:
        lines.append(
            _times(r)
            + _cell(r["gflops"], 9, ".0f")
            + _cell(r["of_peak"], 9, ".2f")
            + _cell(r.get("cycles_per_block"), 13, ".0f")
            + _cell(r.get("vs_sdpa"), 8, ".2f")
            + _cell(r.get("vs_dense"), 8, ".2f")
            + f"  {_flagged(r)}"
        )
    notes = [*steps_lines(results), *flops_lines(results), *threads_lines(results)]
    notes += failure_lines(failures)
    return "\n".join([*lines, *notes, *memory_lines(results)])


def steps_lines(results: list[dict]) -> list[str]:
    """Of calls whose verbs were timed one by one: where the time goes, and what attend counted."""
    lines = []
    for r in (r for r in results if "shares" in r):
        shares = r["shares"]
        if not lines:
            head = "".join(f"{name:>9}" for name in shares)
            head += f"{'overhead':>10}{'attend of peak':>16}{'rescales/row-panel':>20}"
            lines.append(f"  {'share of the call':<{NAME}}{head}{'busy max/mean':>15}")
        cells = "".join(f"{value:>9.1%}" for value in shares.values())
        cells += f"{r['overhead']:>10.1%}{_cell(r['attend_of_peak'], 16, '.2f')}"
        cells += f"{r['rescales_per_row_panel']:>20.5f}{r['busy_spread']:>15.3f}"
        lines.append(f"  {r['row']:<{NAME}}{cells}")
    return lines


def flops_lines(results: list[dict]) -> list[str]:
    """Of steps that are no attention: their time beside their share of dense attention's FLOPs."""
    lines = [f"  {'share of dense':<{NAME}}{'time':>9}{'FLOPs':>9}{'time/FLOPs':>12}"]
    for r in (r for r in results if "over_flops" in r):
        noisy = "  (noisy)" if r["flops_flagged_used"] else ""
        shares = f"{r['of_dense']:>9.2%}{r['flop_share']:>9.2%}{r['over_flops']:>12.2f}"
        lines.append(f"  {r['row']:<{NAME}}{shares}{noisy}")
    return lines if len(lines) > 1 else []


def threads_lines(results: list[dict]) -> list[str]:
    return [
        f"  {r['row']}: {r['vs_threads'][n]:.2f} times as fast as on {n} thread"
        f"{'s' * (n != '1')}, {r['vs_threads'][f'{n} of probe']:.3f} of what the probe gains"
        for r in results
        for n in r.get("vs_threads", {})
        if n.isdigit()
    ]


def gpu_table(
    title: str, probes: dict[str, float], results: list[dict], best: str | None, failures: dict
) -> str:
    def peak(unit: str) -> str:
        rate = probes[unit]
        return f"{unit} {rate:.0f} GB/s" if unit == "copy" else f"{unit} {rate / 1e3:.0f} TFLOP/s"

    lines = [f"{title}, {', '.join(map(peak, probes))}; best dense: {best or 'none'}"]
    head = f"{'TFLOP/s':>9}{'useful':>8}{'of gemm':>9}{'of mma':>8}{'GB/s':>8}{'of copy':>9}"
    lines.append(HEAD + head + f"{'x best':>8}{'x dense':>9}  flagged")
    for r in results:
        lines.append(
            _times(r)
            + _cell(r["gflops"], 9, ".1f", 1e-3)
            + _cell(r["useful_gflops"], 8, ".1f", 1e-3)
            + _cell(r["of_peak"] if r["blocks"] else None, 9, ".2f")
            + _cell(r["of_mma"], 8, ".2f")
            + _cell(r["gbytes_per_s"], 8, ".0f")
            + _cell(r["of_copy"], 9, ".2f")
            + _cell(r.get("vs_best"), 8, ".2f")
            + _cell(r.get("vs_dense"), 9, ".2f")
            + f"  {_flagged(r)}"
        )
    notes = [*flops_lines(results), *failure_lines(failures), *memory_lines(results)]
    return "\n".join([*lines, *notes])


def failure_lines(failures: dict) -> list[str]:
    return [f"  not run: {name}: {why}" for name, why in failures.items()]


def memory_lines(results: list[dict]) -> list[str]:
    return [
        f"  {r['row']}: peak extra memory {r['peak_extra_bytes'] / 2**20:.2f} MiB measured, "
        f"workspace_size {r['workspace_size'] / 2**20:.2f} MiB"
        for r in results
        if "workspace_size" in r
    ]
