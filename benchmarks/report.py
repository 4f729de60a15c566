# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.report [--write]: the tables of README.md and docs/cpu-kernel.md.

Made from benchmarks/results/*/prefill-*.json, so that no number stands there without its machine,
command and commit. --write replaces what lies between the marks `<!-- numbers -->` and
`<!-- end of numbers -->`.
"""

from __future__ import annotations

import argparse
import json
import sys

from benchmarks.machine import ROOT

BEGIN, END = "<!-- numbers -->", "<!-- end of numbers -->"
NOISY = " (noisy)"


def reports() -> list[dict]:
    files = sorted((ROOT / "benchmarks" / "results").glob("*/prefill-*.json"))
    return [json.loads(file.read_text()) | {"file": str(file.relative_to(ROOT))} for file in files]


def origin(report: dict) -> str:
    b, o = report["banner"], report["options"]
    kind = f"{b['cpu']} family {b['family']} model {b['model']}"
    threads = f"{b['threads']} thread" + ("s" if b["threads"] > 1 else "")
    threads += ", CPU time" if o["clock"] == "cpu" else ""
    state = " with uncommitted changes" if b["uncommitted"] else ""
    heads = "heads of a captured model" if o["capture"] != "None" else ""
    heads = heads or f"{o['heads']} query and {o['heads_k']} key heads"
    return (
        f"{kind}, {threads}, {heads}, D = {report['shapes'][0]['head_dim']}, "
        f"torch {b['torch']}, commit {b['commit']}{state}, {b['date'][:10]}: "
        f"`{b['command']}` ([all samples]({{up}}{report['file']}))"
    )


def number(row: dict | None, key: str, form: str) -> str:
    if row is None or row.get(key) is None:
        return "-"
    return format(row[key], form) + (NOISY if row["flagged_used"] else "")


def rows_of(shape: dict) -> dict[str, dict]:
    return {row["row"]: row for row in shape["rows"]}


def short(report: dict) -> list[str]:
    """What a newcomer asks: how much is read, how long does it take, what does it need?"""
    head = ["dtype", "tokens", "density", "sparse, ms", "torch, ms", "x torch"]
    head += ["our dense, x torch", "memory"]
    cells = []
    for shape in report["shapes"]:
        r = rows_of(shape)
        made = [
            number(r["prefill"], "density", ".2f").removesuffix(NOISY),
            number(r["prefill"], "ms", ".1f"),
            number(r["sdpa"], "ms", ".1f"),
            number(r["prefill"], "vs_sdpa", ".2f"),
            number(r["dense"], "vs_sdpa", ".2f"),
            f"{r['prefill']['peak_extra_bytes'] / 2**20:.1f} MiB",
        ]
        cells.append([shape["dtype"], str(shape["length"]), *made])
    return markdown(head, cells)


def long(report: dict) -> list[str]:
    """Verb by verb, and how much of the machine is used."""
    verbs = ("score", "permute", "select", "attend")
    peaks = ("attend", "attend 20%", "attend 30%", "attend 40%", "dense", "sdpa")
    head = ["dtype", "tokens", *(f"{v}, ms" for v in verbs), *(f"{p}, of peak" for p in peaks)]
    cells = []
    for shape in report["shapes"]:
        r = rows_of(shape)
        times = [number(r.get(verb), "ms", ".2f") for verb in verbs]
        shares = [number(r.get(name), "of_peak", ".2f") for name in peaks]
        cells.append([shape["dtype"], str(shape["length"]), *times, *shares])
    return markdown(head, cells)


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def section(table, up: str) -> str:
    parts = []
    for report in reports():
        parts += [origin(report).format(up=up), "", *table(report), ""]
    return "\n".join(parts).rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--write", action="store_true", help="into README.md and docs")
    args = parser.parse_args()
    pages = {"README.md": section(short, ""), "docs/cpu-kernel.md": section(long, "../")}
    for name, text in pages.items():
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
