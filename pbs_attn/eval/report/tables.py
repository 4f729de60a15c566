# SPDX-License-Identifier: Apache-2.0
"""Tables that every bench has: what ran, the differences; and which bench has which tables.

Methods stand in the order they were run in, never sorted by score: an order is a claim.
"""

from . import stats, task_tables, token_tables
from .table import Column, Table

NOTE_STARS = (
    "Score minus that of {base}, in points; brackets: 95% bootstrap interval over the rows, "
    "paired, drawn task by task. \\*: the interval is without 0; where rows are right or wrong, or "
    "fewer than 10 differ, the exact test must agree. Of 20 lines in which nothing happens one may "
    "get its star by chance."
)


def tables(view):
    """(tables in reading order, scopes) of a section; scopes as the makers return them."""
    makers = {
        "longbench": task_tables.longbench,
        "longbench2": task_tables.longbench2,
        "ruler": task_tables.ruler,
        "ppl": token_tables.ppl,
        "agreement": token_tables.agreement,
        "ttft": token_tables.ttft,
    }
    bench = view.section.bench
    if bench not in makers:
        return [runs(view)], {}
    scopes, found = makers[bench](view)
    if scopes and view.others:
        found += differences(view, scopes)
    return [runs(view), *found], scopes


def runs(view):
    """What ran: rows, density, time, by method."""
    section = view.section
    columns = [
        Column("method"), Column("rows ok", "d"), Column("rows", "d"), Column("density", ".3f"),
        Column("computed", ".3f"), Column("prompt tokens, mean", ",.0f"), Column("cut", "d"),
        Column("prefill s, mean", ".3f"), Column("total s, mean", ".3f"), Column("failed"),
    ]  # fmt: skip
    rows = []
    for label in section.labels:
        ok, planned = section.counts(label)
        tokens = view.average(label, "prompt_tokens")
        cut = view.field(label, "cut_tokens")
        rows.append([
            label, ok, planned, view.average(label, "density"), view.average(label, "computed"),
            view.average(label, "tokens") if tokens is None else tokens,
            int((cut > 0).sum()) if cut.size else None, view.average(label, "prefill_s"),
            view.average(label, "total_s"), failures(section, label),
        ])  # fmt: skip
    notes = [view.caption()] + ["INCOMPLETE: see `failed`."] * (not section.complete())
    return Table("runs", "What ran", columns, rows, notes)


def failures(section, label):
    """ "oom 2, not run 3": why rows are not ok; "" where all are."""
    found = {}
    for key in section.asked(label):
        status = section.rows[label].get(key, {"status": "not run"}).get("status", "no status")
        if status != "ok":
            found[status] = found.get(status, 0) + 1
    return ", ".join(f"{status} {count}" for status, count in found.items())


def differences(view, scopes):
    """Every scope x method against the base: in short, and with everything that is known of it.

    scopes: {name: [(weight, keys)]}, as the makers return them.
    """
    compared = {
        (scope, label): stats.compare([(w, view.differences(label, part)) for w, part in strata])
        for scope, strata in scopes.items()
        for label in view.others
    }
    test = "McNemar's exact test" if view.section.bench == "longbench2" else "exact sign test"
    notes = [view.caption(), NOTE_STARS.format(base=view.base)]
    columns = [Column("scope"), Column("rows", "d"), *(Column(x, "+.2f") for x in view.others)]
    rows = [
        [scope, len(task_tables.keys_of(strata)), *(compared[scope, x] for x in view.others)]
        for scope, strata in scopes.items()
    ]
    title = f"Difference to {view.base}, row by row"
    short = Table("differences", title, columns, rows, notes)
    columns = [
        Column("scope"), Column("method"), Column("rows", "d"), Column(view.base, ".2f"),
        Column("score", ".2f"), Column("difference", "+.2f"), Column("better", "d"),
        Column("worse", "d"), Column(f"p, {test}", ".2g"), Column("verdict"),
        Column("identical output", ".0%"), Column("same first token", ".0%"),
    ]  # fmt: skip
    rows = [
        _comparison(view, scope, strata, label, compared[scope, label])
        for scope, strata in scopes.items()
        for label in view.others
    ]
    main = task_tables.main_scopes(scopes)
    files = "Of these scopes; the CSV file has all."
    whole = Table("tests", f"Tests against {view.base}", columns, rows, [view.caption(), files],
                  [row for row in rows if row[0] in main])  # fmt: skip
    return [short, whole]


def _comparison(view, scope, strata, label, found):
    keys = task_tables.keys_of(strata)
    means = [task_tables.weighted(view, x, strata) for x in (view.base, label)]
    tests = [None] * 5
    if found is not None:
        tests = [found.change, found.better, found.worse, found.p, found.verdict]
    rows = None if found is None else found.change.n
    return [scope, label, rows, *means, *tests, view.identical(label, keys),
            view.first_token(label, keys)]  # fmt: skip
