# SPDX-License-Identifier: Apache-2.0
"""The whole report: Markdown of every section, CSV of every table, a picture where there is one."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from ...cli import CommandError
from . import load, paper, plots, tables, task_tables, titles
from .titles import SCORED
from .view import View

INTRO = """\
Failed and missing rows are said and, where rows have scores, count as 0. Densities are
computed causal 128 x 128 block pairs over all of them, the same unit for every method. Differences
are paired row by row; what lies inside its interval is noise, whatever its sign, and methods are
listed in the order they ran, not by rank."""


@dataclass
class Part:
    """A section with its tables; pictures: [(file name, caption)] once they are drawn."""

    view: View
    slug: str
    tables: list
    scopes: dict
    pictures: list = field(default_factory=list)


def views(paths, against=None, allow_missing=False, beside=None):
    """A View per section. CommandError where no section has the label `against`.

    against: a label, None for full, else sdpa, where it ran; beside: None, or a model of the paper
    ("" for the one that fits).
    """
    sections = load.sections(paths)
    labels = list(dict.fromkeys(label for section in sections for label in section.labels))
    if against is not None and against not in labels:
        raise CommandError(f"--against is {against!r}; allowed: {', '.join(labels)}")
    found = []
    for section in sections:
        base = against or next((x for x in ("full", "sdpa") if x in section.labels), None)
        shown = [] if beside is None else paper.choose(
            section.bench, load.model_name(section.info), beside
        )  # fmt: skip
        found.append(View(section, base if base in section.labels else None, allow_missing, shown))
    return found


def parts(found):
    """A Part per view; slugs are the benches, numbered from the second of a bench on."""
    seen, result = {}, []
    for view in found:
        bench = view.section.bench
        seen[bench] = seen.get(bench, 0) + 1
        slug = bench if seen[bench] == 1 else f"{bench}-{seen[bench]}"
        result.append(Part(view, slug, *tables.tables(view)))
    return result


def draw(found, folder):
    """Draw every picture into `folder` and note them in the parts; -> [(file, caption)] of all."""
    equal = []
    for part in found:
        view, bench = part.view, part.view.section.bench
        wanted = []
        if bench in SCORED:
            scope = task_tables.main_scope(part.scopes)
            if scope is not None:
                wanted.append(("score-density", lambda path, v=view, p=part, s=scope:
                               plots.score_density(v, s, p.scopes[s], path)))  # fmt: skip
        if bench == "ppl":
            wanted.append(("loss-density", lambda path, v=view: plots.loss_density(v, path)))
        if bench == "ttft":
            wanted.append(("time-length", lambda path, v=view: plots.time_length(v, path)))
        for name, make in wanted:
            path = Path(folder) / f"{part.slug}-{name}.png"
            caption = make(path)
            if caption:
                part.pictures.append((path.name, caption))
        equal += equality(part)
    path = Path(folder) / "equal-outputs.png"
    caption = plots.equal_outputs(equal, path)
    return [(path.name, caption)] if caption else []


def equality(part):
    """[(title, label, identical, first token the same)] of one part, for the picture."""
    view, section = part.view, part.view.section
    scored = " rows" if section.bench in SCORED else ""
    title = f"{titles.name(section)}{scored}, {load.model_name(section.info)}"
    if section.bench == "agreement":
        table = next(table for table in part.tables if table.slug == "agreement")
        rows = [row for row in table.rows if row[3] is not None]
        return [
            (f"{title}, {plots.tokens(row[0])} tokens" if row[0] else title, row[1], row[4], row[3])
            for row in rows if row[1] != view.base
        ]  # fmt: skip
    return [
        (title, label, view.identical(label, section.keys), view.first_token(label, section.keys))
        for label in view.others
        if section.bench in SCORED
    ]


def markdown(found, shared=()):
    """The report's text. shared: pictures [(file, caption)] of several sections together."""
    lines = ["# Evaluation report", INTRO, *_incomplete(found)]
    for part in found:
        view, section = part.view, part.view.section
        lines.append(f"## {titles.heading(section)}")
        lines += _facts(view)
        for table in part.tables:
            lines.append(table.markdown().rstrip())
        lines += [f"![{caption}]({name})\n\n{caption}." for name, caption in part.pictures]
    if shared:
        lines.append("## Outputs that equal those of the base")
        lines += [f"![{caption}]({name})\n\n{caption}." for name, caption in shared]
    return "\n\n".join(lines) + "\n"


def _incomplete(found):
    """One line per method with failed or missing rows; none where everything ran."""
    lines = []
    for part in found:
        for label in part.view.labels:
            ok, planned = part.view.section.counts(label)
            if ok < planned:
                why = tables.failures(part.view.section, label)
                lines.append(f"- {part.slug}, {label}: {ok} of {planned} rows ok ({why})")
    return ["**INCOMPLETE**\n\n" + "\n".join(lines)] if lines else []


def _facts(view):
    """What a reader must know before the tables: folders, what was kept apart, base, machine."""
    section = view.section
    lines = [f"Run folders: {', '.join(f'`{path}`' for path in section.folders)}"]
    if section.why:
        lines.append(f"Kept apart: {section.why}")
    if view.base is None:
        lines.append("No baseline: no method of this section is the one to compare with, so "
                     "there are no differences")  # fmt: skip
    lines += machine(section.info)
    lines += section.notes
    return ["\n".join(f"- {line}" for line in lines)]


def machine(info):
    """What ran it, as far as run.json says."""
    found = []
    for name in ("machine", "versions", "git_commit"):
        value = info.get(name)
        if isinstance(value, dict):
            value = ", ".join(f"{key} {_flat(each)}" for key, each in value.items() if each)
        if value:
            found.append(f"{name.replace('_', ' ').capitalize()}: {value}")
    return found


def _flat(value):
    """Each value of a dictionary once: {"float32": "avx2", "bfloat16": "avx2"} is avx2."""
    if isinstance(value, dict):
        return "/".join(dict.fromkeys(str(each) for each in value.values()))
    return value


def write(found, folder):
    """Write pictures, CSV files and report.md into `folder`, each atomically; -> the Markdown."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shared = draw(found, folder)
        for part in found:
            for table in part.tables:
                replace(folder / f"{part.slug}-{table.slug}.csv", table.csv())
        text = markdown(found, shared)
        replace(folder / "report.md", text)
    except OSError as error:
        raise CommandError(f"--out {folder}: {error}") from error
    return text


def replace(path, text):
    """Write a file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
