# SPDX-License-Identifier: Apache-2.0
"""One section as the tables and plots see it: scores, paired differences, captions."""

from dataclasses import dataclass, field

import numpy as np

from . import load, paper, stats
from .titles import SCORED

# What of the identity a caption shows, where a bench recorded it.
SHOWN = ("recipe", "mode", "temperature", "prompt_limit", "prefix")


@dataclass
class View:
    """base: label of the method the others are compared with, None if this section lacks it;
    allow_missing: means over ok rows only, said in every caption; paper: tables to print beside."""

    section: load.Section
    base: str | None = None
    allow_missing: bool = False
    paper: list = field(default_factory=list)

    @property
    def labels(self):
        return self.section.labels

    @property
    def others(self):
        """Labels to compare with the base: none where there is no base."""
        return [] if self.base is None else [label for label in self.labels if label != self.base]

    def usable(self, label, keys):
        """The keys whose row counts for a method: all planned, or under allow_missing all ok."""
        if not self.allow_missing:
            return self.section.asked(label, keys)
        return [key for key in keys if self.section.record(label, key) is not None]

    def score(self, label, key):
        """0..100; a failed or missing row is 0."""
        record = self.section.record(label, key)
        return 100.0 * float(record.get("score") or 0.0) if record is not None else 0.0

    def scores(self, label, keys):
        return np.array([self.score(label, key) for key in self.usable(label, keys)])

    def mean(self, label, keys):
        """Mean score of rows, or None without any."""
        scores = self.scores(label, keys)
        return float(scores.mean()) if scores.size else None

    def differences(self, label, keys):
        """float64 [n]: score minus that of the base, row by row."""
        keys = self.usable(self.base, self.usable(label, keys))
        return np.array([self.score(label, key) - self.score(self.base, key) for key in keys])

    def pairs(self, label, keys):
        """[(record, record of the base)] of the rows that are ok in both."""
        both = ((self.section.record(label, k), self.section.record(self.base, k)) for k in keys)
        return [(ours, theirs) for ours, theirs in both if ours is not None and theirs is not None]

    def field(self, label, name, keys=None):
        """float64 [n]: a numeric field of the ok rows that have it."""
        keys = self.section.keys if keys is None else keys
        records = (self.section.record(label, key) for key in keys)
        values = [record[name] for record in records if record is not None and name in record]
        return np.array([float(value) for value in values if value is not None])

    def average(self, label, name, keys=None):
        values = self.field(label, name, keys)
        return float(values.mean()) if values.size else None

    def rows(self, label, keys=None):
        """As "50/50 rows" or "48/50 rows INCOMPLETE"."""
        ok, planned = self.section.counts(label, keys)
        return f"{ok}/{planned} rows" + ("" if ok == planned else " INCOMPLETE")

    def harness(self):
        """What the numbers were made by, from the identity."""
        identity = self.section.identity
        parts = [f"{name} {identity[name]}" for name in SHOWN if identity.get(name)]
        if identity.get("tp", 1) > 1:
            parts.append(f"tp {identity['tp']}")
        parts += ["no chat template"] * (identity.get("chat") is False)
        return ", ".join(["pbs_attn eval", *parts])

    def caption(self, keys=None):
        """The line below a title: harness, model, and of every method rows and density."""
        dtype = self.section.identity.get("dtype")
        model = load.model_name(self.section.info) + (f" {dtype}" if dtype else "")
        parts = [self.harness(), model]
        counts = {label: self.rows(label, keys) for label in self.labels}
        if len(set(counts.values())) == 1:
            parts.append(f"every method {counts[self.labels[0]]}")
        else:
            parts += [f"{label} {rows}" for label, rows in counts.items()]
        density = {label: self.average(label, "density", keys) for label in self.labels}
        shown = [f"{label} {x:.3f}" for label, x in density.items() if x is not None]
        parts += [f"density {', '.join(shown)}"] * bool(shown)
        if self.section.uneven(keys):
            parts.append("methods were asked for different rows: compare differences, not means")
        if not self.section.complete():
            left_out = self.allow_missing or self.section.bench not in SCORED
            parts.append(
                "failed and missing rows are left out"
                if left_out
                else "a failed or missing row counts as 0"
            )
        return " · ".join(parts)

    def beside(self, table):
        """The table with the paper's columns appended, where they are asked for."""
        return paper.add_columns(self, table) if self.paper else table

    def identical(self, label, keys):
        """Share (stats.Interval) of rows whose output is byte for byte the base's, or None."""
        pairs = [(a["pred"], b["pred"]) for a, b in self.pairs(label, keys) if "pred" in a]
        return stats.share(sum(a == b for a, b in pairs), len(pairs))

    def first_token(self, label, keys):
        """Share of rows whose first new token is that of the base, where runs recorded it."""
        pairs = [(_first(a), _first(b)) for a, b in self.pairs(label, keys)]
        pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
        return stats.share(sum(a == b for a, b in pairs), len(pairs))


def _first(record):
    tokens = record.get("tokens")
    if isinstance(tokens, list):
        return tokens[0] if tokens else None
    return record.get("first_token")
