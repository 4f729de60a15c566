# SPDX-License-Identifier: Apache-2.0
"""A table once, as Markdown for people and as CSV for programs: same cells, other rounding."""

import csv
import io
import math
import re
from dataclasses import dataclass, field

from .stats import Comparison, Delta, Interval

ZERO = re.compile(r"-0(\.0*)?%?")
NOTHING = "-"  # in Markdown; in CSV an absent value is an empty field


@dataclass(frozen=True)
class Column:
    """name: the heading; spec: a format for numbers (".2f", "+.4f", ".0%", "d"), "" for text."""

    name: str
    spec: str = ""


@dataclass
class Table:
    """slug: stem of the CSV file; notes: lines below the title, among them what the rows cover;
    brief: the rows that the Markdown shows, None for all (the CSV always has all)."""

    slug: str
    title: str
    columns: list
    rows: list
    notes: list = field(default_factory=list)
    brief: list | None = None

    def markdown(self):
        from tabulate import tabulate

        cells = [
            [shown(value, column.spec) for value, column in zip(row, self.columns, strict=True)]
            for row in (self.rows if self.brief is None else self.brief)
        ]
        align = ["left" if not column.spec else "right" for column in self.columns]
        names = [column.name for column in self.columns]
        grid = tabulate(cells, names, tablefmt="pipe", colalign=align, disable_numparse=True)
        return "\n\n".join([f"### {self.title}", *self.notes, grid]) + "\n"

    def csv(self):
        """RFC 4180 text; an interval takes three fields, a delta with its error two."""
        kinds = [self._kind(index) for index in range(len(self.columns))]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        head = zip(self.columns, kinds, strict=True)
        writer.writerow(column.name + end for column, (ends, _) in head for end in ends)
        for row in self.rows:
            fields = zip(row, kinds, strict=True)
            writer.writerow(raw(field) for cell, (_, split) in fields for field in split(cell))
        return out.getvalue()

    def _kind(self, index):
        """(endings of the headings, how a cell is split) of one column."""
        cells = [row[index] for row in self.rows]
        if any(isinstance(cell, (Interval, Comparison)) for cell in cells):
            return ("", " low", " high"), _split_interval
        if any(isinstance(cell, Delta) for cell in cells):
            return ("", " se"), _split_delta
        return ("",), lambda cell: (cell,)


def _split_interval(cell):
    cell = cell.change if isinstance(cell, Comparison) else cell
    return (cell.value, cell.low, cell.high) if isinstance(cell, Interval) else (cell, None, None)


def _split_delta(cell):
    return (cell.value, cell.se) if isinstance(cell, Delta) else (cell, None)


def is_nothing(value):
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def raw(value):
    """A CSV field: numbers in full, never NaN or infinity."""
    return "" if is_nothing(value) else value


def shown(value, spec=""):
    """A Markdown cell: rounded, with its interval or error; text must not break the table."""
    if is_nothing(value):
        return NOTHING
    if isinstance(value, Comparison):
        return shown(value.change, spec) + " \\*" * value.starred
    if isinstance(value, Interval):
        if value.low is None:
            return f"{shown(value.value, spec)} (no interval)"
        ends = shown(value.low, spec), shown(value.high, spec)
        return f"{shown(value.value, spec)} [{ends[0]}, {ends[1]}]"
    if isinstance(value, Delta):
        error = "(no error)" if value.se is None else f"± {value.se:{spec.lstrip('+')}}"
        return f"{shown(value.value, spec)} {error}"
    if isinstance(value, str) or not spec:
        return str(value).replace("|", "\\|").replace("\n", " ")
    text = f"{value:{spec}}"
    if ZERO.fullmatch(text):  # -0.0004 at three digits is no negative number
        return ("+" if "+" in spec else "") + text[1:]
    return text
