# SPDX-License-Identifier: Apache-2.0
"""The table that `eval ttft` ends with, and its words for single records."""

from . import tables, timing

HEADS = ("method", "TTFT", "20% to 80%", "min", "n", "speed-up", "95%", "density", "computed",
         "same first", "KL", "peak", "attention by")  # fmt: skip


def describe(job, record):
    """For --show."""
    times = " ".join(f"{x:.3f}" for x in record["samples"])
    return f"{job.task} {job.length:,} {record['protocol']}: {times} s; {record['backend']}"


def running(records):
    """For the progress bar: the newest median."""
    done = [r for r in records if r["status"] == "ok"]
    return f"{done[-1]['method']} {done[-1]['median']:.2f} s" if done else ""


def summary(records, labels):
    """A table per length, text and protocol; speed-ups are over `full`, else over `sdpa`."""
    from tabulate import tabulate

    parts = []
    for length, task, protocol in sorted({(r["length"], r["task"], r["id"]) for r in records}):
        here = [r for r in records if (r["length"], r["task"], r["id"]) == (length, task, protocol)]
        good = {r["method"]: r for r in here if r["status"] == "ok"}
        first = next((name for name in ("full", "sdpa") if name in good), None)
        lines = [_line(label, good.get(label), good.get(first)) for label in labels]
        paper = protocol == "paper"
        heads = ["mean" if paper and head == "TTFT" else head for head in HEADS]
        text = tabulate(lines, headers=heads, disable_numparse=True)
        title = f"{length:,} tokens of {task}, {protocol}"
        parts.append("\n".join([title, text, *_remarks(here, good, labels)]))
    return "\n\n".join(parts)


def _line(label, record, base):
    if record is None:
        return [label, "-"]
    ratio = low = high = None
    if base is not None and base is not record:
        mean = record["protocol"] == "paper"
        ratio, low, high = timing.speedup(base["samples"], record["samples"], mean)
    return [
        label,
        f"{record['mean' if record['protocol'] == 'paper' else 'median']:.3f} s",
        f"{record['p20']:.3f} to {record['p80']:.3f}",
        f"{record['min']:.3f}",
        str(len(record["samples"])),
        "-" if ratio is None else f"{ratio:.2f}x",
        "-" if low is None else f"{low:.2f} to {high:.2f}",
        f"{record['density']:.1%}",
        f"{record['computed']:.1%}",
        {True: "yes", False: "NO", None: "-"}[record["same_first"]],
        tables.number(record["kl"], ".4f"),
        "-" if record["peak_gb"] is None else f"{record['peak_gb']:.2f} GB",
        record["backend"],
    ]


def _remarks(here, good, labels):
    """What a reader of the table must know."""
    found = []
    times = max((r["tiled"] for r in good.values()), default=1)
    if times > 1:
        found.append(f"WARNING: the text is repeated {times} times; real text is harder to cover")
    if any(r["beyond_window"] for r in good.values()):
        found.append("WARNING: beyond the model's window; the answers mean nothing")
    slow = [label for label, r in good.items() if r["clock_fell"]]
    if slow:
        found.append(f"WARNING: the clock fell by more than 3% during {', '.join(slow)}")
    if len({tuple(sorted(r["with"])) for r in good.values()}) > 1:
        found.append("WARNING: not all methods took turns; some ran on another occasion")
    ranks = max((r["ranks"] for r in good.values()), default=1)
    if ranks > 1:
        comm = ", ".join(f"{label} {r['comm_s']:.3f} s" for label, r in good.items())
        found.append(f"{ranks} ranks, slowest counts; all_reduce in a run of its own: {comm}")
    for record in here:
        if record["status"] != "ok":
            found.append(f"INCOMPLETE: {record['method']}: {record['status']}")
    missing = [label for label in labels if label not in {r["method"] for r in here}]
    if missing:
        found.append(f"INCOMPLETE: not run: {', '.join(missing)}")
    return found
