# SPDX-License-Identifier: Apache-2.0
"""The paper's own numbers (eval/data/paper.json), in columns of their own beside ours.

They come from another harness, mostly from another model: they stand beside ours to show the size
of things, under a heading that names harness and model, and a note says what differs.
"""

import functools
import json
from importlib import resources

from ...cli import CommandError
from . import load, titles
from .table import Column

SCOPES = {
    "average: opencompass": "average",
    "Avg": "average",
}  # our scope: the paper's column, where names differ


@functools.cache
def data():
    """eval/data/paper.json: title, arxiv, settings and tables with source, harness and model."""
    file = resources.files("pbs_attn.eval") / "data" / "paper.json"
    return json.loads(file.read_text(encoding="utf-8"))


def models():
    return list(dict.fromkeys(table["model"] for table in data()["tables"]))


def choose(bench, model, wanted=""):
    """The paper's tables of a bench to print beside runs of `model`; [] where it has none.

    wanted: a model of the paper (part of its name), else the one that `model` is, else the first.
    Raises CommandError for a wanted model that the paper does not have.
    """
    if wanted and not any(wanted.lower() in name.lower() for name in models()):
        raise CommandError(f"--paper is {wanted!r}; allowed: {', '.join(models())}")
    tables = [table for table in data()["tables"] if table["bench"] == bench]
    fitting = [table for table in tables if fits(table, model)]
    if wanted:
        fitting = [table for table in tables if wanted.lower() in table["model"].lower()]
    chosen = fitting or tables
    return [table for table in chosen if table["model"] == chosen[0]["model"]]


def fits(table, model):
    """Is `model`, a name or path, the model of a table of the paper?"""
    return all(part in model.lower() for part in table["match"])


def rows_of(table, labels):
    """{method of the paper: values} of the methods that ran here too, in our order."""
    found = {}
    for label in labels:
        for name in (label, label.partition(":")[0]):
            if name in table["rows"]:
                found[name] = table["rows"][name]
    return found


def add_columns(view, table):
    """Append the paper's columns and their notes to one of our tables; -> the table."""
    theirs = [(source, rows_of(source, view.labels)) for source in view.paper]
    theirs = [(source, rows) for source, rows in theirs if rows]
    if not theirs:
        if view.paper:
            table.notes.append("The paper has no row of these methods.")
        return table
    lengths = [str(length) for length in view.section.lengths()]
    for source, rows in theirs:
        block = f"{source['harness']}, {source['model']}"
        table.columns.append(Column(f"paper: {block}"))
        for row in table.rows:
            row.append("")
        timed = source["bench"] == "ttft"
        for method in ["mean s"] if timed else rows:
            table.columns.append(Column(f"paper {method}", ".3f" if timed else ".2f"))
            for row in table.rows:
                row.append(
                    _time(source, rows, row) if timed
                    else _score(source, rows[method], row, lengths)
                )  # fmt: skip
        table.notes.append(note(view, source))
    return table


def _score(source, values, row, lengths):
    column = SCOPES.get(row[0], row[0])
    if row[0] == "Avg" and lengths != source["columns"][:-1]:
        return None  # a mean over other lengths
    return values[source["columns"].index(column)] if column in source["columns"] else None


def _time(source, rows, row):
    """Seconds of the paper for a row (length, method, ...); its lengths are powers of two."""
    length, method = str(row[0]), row[1].partition(":")[0]
    if method not in rows or length not in source["columns"]:
        return None
    return rows[method][source["columns"].index(length)] / 1000


def note(view, source):
    """Citation of a block and what keeps it from being compared with ours."""
    paper, info = data(), view.section.info
    ours = load.model_name(info)
    apart = []
    if not fits(source, ours):
        apart.append(f"another model (ours {ours}, the paper's {source['model']})")
    apart += [f"ours: {'; '.join(short)}" for short in [titles.shortcomings(view.section)] if short]
    recipe = view.section.identity.get("recipe")
    if recipe == "opencompass":
        apart.append("our own rebuilding of OpenCompass's recipe, not OpenCompass")
    else:
        apart.append(f"another harness (ours {view.harness()}; the paper's {source['harness']})")
    changed = [label for label in view.labels if ":" in label and label not in source["rows"]]
    if changed:
        apart.append(f"parameters of our own in {', '.join(changed)}")
    settings = {label.partition(":")[0] for label in view.labels} & paper["settings"].keys()
    unit = source["unit"].replace("milliseconds", "seconds (the paper: milliseconds)")
    used = "; ".join(f"{name}: {paper['settings'][name]}" for name in sorted(settings))
    return (
        f"Columns from `paper: ...` on: {paper['title']}, arXiv {paper['arxiv']}, "
        f"{source['where']} ({source['source']}); {unit}; {source['note']}. "
        f"Not comparable with the other columns: {'; '.join(apart)}. The paper's settings: {used}."
    )
