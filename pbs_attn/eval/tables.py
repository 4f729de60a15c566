# SPDX-License-Identifier: Apache-2.0
"""Tables that a bench prints at its end: means over the rows that are ok, failures said."""

import math


def number(value, form):
    """`value` in a format, "-" for None; what rounds to zero has no minus."""
    if value is None:
        return "-"
    text = format(value, form)
    return text.replace("-", "+" if form.startswith("+") else "") if _is_zero(text) else text


def _is_zero(text):
    return not any(digit in text for digit in "123456789")


def with_error(value, error, digits=4):
    """'+0.0123 ± 0.0011'; "-" for None."""
    text = number(value, f"+.{digits}f")
    return text if value is None or error is None else f"{text} ± {error:.{digits}f}"


def average(rows, name, weight=None):
    """Mean of a field over the rows that have it, weighted by the field `weight`; None if none."""
    found = [(r[name], r[weight] if weight else 1) for r in rows if r.get(name) is not None]
    total = sum(w for _, w in found)
    return sum(x * w for x, w in found) / total if total else None


def pooled(rows, name, weight):
    """(mean, standard error) of a field over independent rows, each with its own `NAME_se`.

    Rows weigh by the field `weight`; the error is None where a row has none.
    """
    found = [(r[name], r.get(name + "_se"), r[weight]) for r in rows if r.get(name) is not None]
    total = sum(w for _, _, w in found)
    if not total:
        return None, None
    mean = sum(x * w for x, _, w in found) / total
    if any(se is None for _, se, _ in found):
        return mean, None
    return mean, math.sqrt(sum((se * w) ** 2 for _, se, w in found)) / total


def by_length(records, labels, heads, line, title=lambda rows: ""):
    """A table for every nominal length: one line per method label, `line(rows ok) -> cells`.

    title(rows of all methods) is added to the heading. A method with failed rows, or with fewer
    rows than another, is INCOMPLETE: its means are of other rows than its neighbours'.
    """
    from tabulate import tabulate

    parts = []
    for length in sorted({r["length"] for r in records}):
        here = [r for r in records if r["length"] == length]
        most = max(sum(r["method"] == label for r in here) for label in labels)
        body, gaps = [], []
        for label in labels:
            rows = [r for r in here if r["method"] == label]
            good = [r for r in rows if r["status"] == "ok"]
            body.append([label, *line(good)] if good else [label])
            if len(good) < most:
                bad = sorted({r["status"] for r in rows if r["status"] != "ok"})
                why = f" ({', '.join(bad)})" if bad else ""
                gaps.append(f"INCOMPLETE: {label} has {len(good)} of {most} rows{why}")
        name = f"{length:,} tokens, " if length else ""
        rows_text = f"{most} row{'s' if most != 1 else ''}"
        text = tabulate(body, headers=heads, disable_numparse=True)
        parts.append("\n".join([f"{name}{rows_text}{title(here)}", text, *gaps]))
    return "\n\n".join(parts)
