# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.report [--write]: tables of README.md and docs/{cpu-kernel,cuda,peak}.md.

Made from benchmarks/results/*/{prefill,block}*.json, so that no number stands there without its
machine, command and commit; a --quick file counts only where there is no full one. --write replaces
what lies between the marks `<!-- numbers -->` and `<!-- end of numbers -->`. A page about which
there is no file is left as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import targets
from benchmarks.machine import ROOT

BEGIN, END = "<!-- numbers -->", "<!-- end of numbers -->"
NOISY = " (noisy)"


def reports(root: Path = ROOT, pattern: str = "prefill-*.json") -> list[dict]:
    found = (root / "benchmarks" / "results").glob(f"*/{pattern}")
    files = sorted(found, key=lambda file: (file.parent, file.stem))  # d128 before d128-32k
    full = {file for file in files if not file.stem.endswith("-quick")}
    files = [
        f for f in files if f in full or f.with_stem(f.stem.removesuffix("-quick")) not in full
    ]
    return [json.loads(file.read_text()) | {"file": str(file.relative_to(root))} for file in files]


def on_gpu(report: dict) -> bool:
    return "gpu" in report["banner"]


def method_of(report: dict) -> str:
    return report["options"].get("method", "pbs").partition(":")[0]


def machine_of(report: dict) -> str:
    b, o = report["banner"], report["options"]
    if on_gpu(report):
        gpu = b["gpu"]
        driver = gpu["state"].get("driver_version")
        versions = f"CUDA {gpu['cuda']}" + (f", driver {driver}" if driver else "")
        limit = gpu["state"].get("power.limit")
        return f"{gpu['name']}{f' ({limit} W)' if limit else ''}, {versions}"
    threads = f"{b['threads']} thread" + ("s" if b["threads"] > 1 else "")
    threads += ", CPU time" if o["clock"] == "cpu" else ""
    return f"{b['cpu']} family {b['family']} model {b['model']}, {threads}"


def origin(report: dict) -> str:
    b, o = report["banner"], report["options"]
    state = " with uncommitted changes" if b["uncommitted"] else ""
    what = ""
    if "heads" in o:
        heads = f"{o['heads']} query and {o['heads_k']} key heads"
        heads = "heads of a captured model" if o["capture"] != "None" else heads
        what = f", {heads}, D = {report['shapes'][0]['head_dim']}"
    return (
        f"{machine_of(report)}{what}, "
        f"torch {b['torch']}, commit {b['commit']}{state}, {b['date'][:10]}: "
        f"`{b['command']}` ([all samples]({{up}}{report['file']}))"
    )


def number(row: dict | None, key: str, form: str, scale: float = 1.0) -> str:
    if row is None or row.get(key) is None:
        return "-"
    return format(row[key] * scale, form) + (NOISY if row["flagged_used"] else "")


def rows_of(shape: dict) -> dict[str, dict]:
    return {row["row"]: row for row in shape["rows"]}


def short(report: dict) -> list[str]:
    """What a newcomer asks: how much is read, how long does it take, what does it need?"""
    if on_gpu(report):
        return short_gpu(report)
    head = ["dtype", "tokens", "density", "sparse, ms", "torch, ms", "x torch"]
    head += ["our dense, x torch", "memory"]
    cells = []
    for shape in report["shapes"]:
        r = rows_of(shape)
        made = [
            number(r["prefill"], "density", ".2f").removesuffix(NOISY),
            number(r["prefill"], "ms", ".1f"),
            number(r.get("sdpa"), "ms", ".1f"),
            number(r["prefill"], "vs_sdpa", ".2f"),
            number(r.get("dense"), "vs_sdpa", ".2f"),
            f"{r['prefill']['peak_extra_bytes'] / 2**20:.1f} MiB",
        ]
        cells.append([shape["dtype"], str(shape["length"]), *made])
    return markdown(head, cells)


def short_gpu(report: dict) -> list[str]:
    head = ["dtype", "tokens", "density", "sparse, ms", "best dense, ms", "x best dense"]
    head += ["our dense, x best dense", "memory"]
    cells = []
    for shape in report["shapes"]:
        r = rows_of(shape)
        best = shape["best_dense"]
        made = [
            number(r["prefill"], "density", ".2f").removesuffix(NOISY),
            number(r["prefill"], "ms", ".2f"),
            f"{number(r[best], 'ms', '.2f')} ({best})" if best else "-",
            number(r["prefill"], "vs_best", ".2f"),
            number(r.get("dense"), "vs_best", ".2f"),
            f"{r['prefill']['peak_extra_bytes'] / 2**20:.0f} MiB",
        ]
        cells.append([shape["dtype"], str(shape["length"]), *made])
    return markdown(head, cells)


def long_gpu(report: dict) -> list[str]:
    """Verb by verb; TFLOP/s over computed blocks, and of the same run's GEMM; bandwidth."""
    head = ["dtype", "tokens", "row", "ms", "density", "TFLOP/s", "of gemm", "of mma.sync"]
    head += ["GB/s", "of copy", "x best dense"]
    cells = []
    for shape in report["shapes"]:
        for row in shape["rows"]:
            made = [
                number(row, "ms", ".3f"),
                number(row, "density", ".2f").removesuffix(NOISY),
                number(row, "gflops", ".0f", 1e-3),
                number(row, "of_peak", ".2f"),
                number(row, "of_mma", ".2f"),
                number(row, "gbytes_per_s", ".0f"),
                number(row, "of_copy", ".2f"),
                number(row, "vs_best", ".2f"),
            ]
            cells.append([shape["dtype"], str(shape["length"]), row["row"], *made])
    return markdown(head, cells)


def long(report: dict) -> list[str]:
    """Where the time of a call goes, and how much of the machine is used."""
    if not any("shares" in row for shape in report["shapes"] for row in shape["rows"]):
        return verbs(report)
    head = ["dtype", "tokens", "row", "density", "ms", *kernel_steps(report), "overhead", "of peak"]
    head += ["attend, of peak", "cycles per block", "x torch", "rescales", "busy max/mean"]
    cells = []
    for shape in report["shapes"]:
        for row in shape["rows"]:
            if "shares" in row or row["row"] in ("dense", "sdpa"):
                about = [shape["dtype"], str(shape["length"]), row["row"]]
                cells.append(about + step_cells(row, kernel_steps(report)))
    return [*markdown(head, cells), "", *judged(report)]


def costs(report: dict) -> list[str]:
    """What choosing and correcting cost beside their FLOPs; then where the time of a call goes."""
    head = ["dtype", "tokens", "step", "ms", "of dense attention", "of its FLOPs", "time / FLOPs"]
    cells = []
    for shape in report["shapes"]:
        for row in (row for row in shape["rows"] if "over_flops" in row):
            noisy = NOISY if row["flops_flagged_used"] else ""
            made = [row["row"], number(row, "ms", ".1f"), f"{row['of_dense']:.2%}{noisy}"]
            made += [f"{row['flop_share']:.2%}", f"{row['over_flops']:.2f}{noisy}"]
            cells.append([shape["dtype"], str(shape["length"]), *made])
    return [*markdown(head, cells), "", *(long_gpu if on_gpu(report) else long)(report)]


def kernel_steps(report: dict) -> list[str]:
    rows = (row for shape in report["shapes"] for row in shape["rows"])
    return list(next(row["shares"] for row in rows if "shares" in row))


def step_cells(row: dict, steps: list[str]) -> list[str]:
    shares = row.get("shares", {})
    return [
        number(row, "density", ".2f").removesuffix(NOISY),
        number(row, "ms", ".1f"),
        *(f"{shares[name]:.1%}" if shares else "-" for name in steps),
        number(row, "overhead", ".1%").removesuffix(NOISY),
        number(row, "of_peak", ".2f").removesuffix(NOISY),
        number(row, "attend_of_peak", ".2f").removesuffix(NOISY),
        number(row, "cycles_per_block", ",.0f").removesuffix(NOISY),
        number(row, "vs_sdpa", ".2f").removesuffix(NOISY),
        number(row, "rescales_per_row_panel", ".4f").removesuffix(NOISY),
        number(row, "busy_spread", ".3f").removesuffix(NOISY),
    ]


def judged(report: dict) -> list[str]:
    """Every target that the run says something about; growth is over all of its shapes."""
    cells = []
    for shape in report["shapes"]:
        about = f"{shape['dtype']}, {shape['length']}: " if "length" in shape else ""
        cells += [_judged(about, target) for target in shape.get("targets", ())]
    cells += [_judged("", check.record()) for check in targets.growth(report["shapes"])]
    return markdown(["target", "reached", "must", "good", ""], cells) if cells else []


def _judged(about: str, target: dict) -> list[str]:
    at = "at most " if target["at_most"] else ""
    good = "-" if target["good"] is None else f"{target['good']:g}"
    noisy = NOISY if target["noisy"] else ""
    bounds = [f"{target['value']:.3g}{noisy}", f"{at}{target['must']:g}", good]
    return [about + target["what"], *bounds, target["verdict"]]


def blocks(report: dict) -> list[str]:
    """One block: fraction of peak and cycles by head_dim; then what is done to 128 keys."""
    rows = [row | {"isa": shape["isa"]} for shape in report["shapes"] for row in shape["rows"]]
    dims = sorted({row["head_dim"] for row in rows})
    by = {(row["isa"], row["dtype"], row["head_dim"]): row for row in rows}
    cells = []
    for isa, dtype in dict.fromkeys((isa, dtype) for isa, dtype, _ in by):
        made = []
        for row in (by.get((isa, dtype, dim)) for dim in dims):
            cycles = number(row, "cycles_per_block", ",.0f").removesuffix(NOISY)
            made.append(f"{number(row, 'of_peak', '.3f')}, {cycles}" if row else "-")
        cells.append([isa, dtype, *made])
    head = ["kernels", "dtype", *(f"D = {dim}: of peak, cycles" for dim in dims)]
    parts = [(shape["isa"], part) for shape in report["shapes"] for part in shape["parts"]]
    made = [
        [isa, p["row"], number(p, "us", ".3f"), number(p, "cycles", ",.0f").removesuffix(NOISY)]
        + [number(p, "over_copy", ".2f").removesuffix(NOISY)]
        for isa, p in parts
    ]
    table = markdown(["kernels", "128 keys", "us", "cycles", "over a copy"], made) if parts else []
    return [*markdown(head, cells), "", *table, "", *judged(report)]


def verbs(report: dict) -> list[str]:
    """The verbs as four calls: all that files of older commits have."""
    names = ("score", "permute", "select", "attend")
    peaks = ("attend", "attend 20%", "attend 30%", "attend 40%", "dense", "sdpa")
    head = ["dtype", "tokens", *(f"{v}, ms" for v in names), *(f"{p}, of peak" for p in peaks)]
    cells = []
    for shape in report["shapes"]:
        r = rows_of(shape)
        times = [number(r.get(verb), "ms", ".2f") for verb in names]
        shares = [number(r.get(name), "of_peak", ".2f") for name in peaks]
        cells.append([shape["dtype"], str(shape["length"]), *times, *shares])
    return markdown(head, cells)


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def section(found: list[dict], table, up: str) -> str:
    parts = []
    for report in found:
        parts += [origin(report).format(up=up), "", *table(report), ""]
    return "\n".join(parts).rstrip()


def pages(root: Path = ROOT) -> dict[str, str]:
    """What stands between the marks of each page that has numbers; "" where nothing was saved."""
    every = reports(root)
    found = [report for report in every if method_of(report) == "pbs"]
    peak = [report for report in every if method_of(report) == "peak"]
    gpu = [report for report in found if on_gpu(report)]
    cpu = [report for report in found if not on_gpu(report)]
    single = section(reports(root, "block*.json"), blocks, "../")
    return {
        "README.md": section(found, short, ""),
        "docs/cpu-kernel.md": "\n\n".join(filter(None, [single, section(cpu, long, "../")])),
        "docs/cuda.md": section(gpu, long_gpu, "../"),
        "docs/peak.md": section(peak, costs, "../"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--write", action="store_true", help="into README.md and docs")
    args = parser.parse_args()
    for name, text in pages().items():
        if not text:
            continue
        if not args.write:
            print(f"{name}\n\n{text}\n")
            continue
        page = ROOT / name
        before, begin, rest = page.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise SystemExit(f"{name} has no {BEGIN} ... {END}")
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
