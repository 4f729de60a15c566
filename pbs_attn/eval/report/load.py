# SPDX-License-Identifier: Apache-2.0
"""Run folders as the runner leaves them -> sections that may be averaged and compared.

Folders whose benchmark and identity (model, recipe, data, prompt limit, ...) agree are one section,
so methods and shards may lie in several folders. What differs is never averaged: it becomes a
section of its own, and the report says in what.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ...cli import CommandError
from .. import store

NOT_RUN = "row {} not run"  # id of a row that is planned and that no method has a record of


@dataclass
class Section:
    """What may stand in one table: one benchmark with one identity.

    info: run.json of the first folder; rows: {method label: {(task, id, length): record}}; keys:
    every row that any method was to run; planned: {label: those that it was to run}; why: how it
    differs from another section of its benchmark.
    """

    bench: str
    info: dict
    folders: list = field(default_factory=list)
    rows: dict = field(default_factory=dict)
    keys: list = field(default_factory=list)
    planned: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)
    why: str = ""

    @property
    def identity(self):
        return self.info["identity"]

    @property
    def runs(self):
        """What run.json keeps of every start of the first folder: rows, limit, machine, ..."""
        return self.info.get("runs", [])

    @property
    def labels(self):
        return list(self.rows)

    def record(self, label, key):
        """The record of a row if it is ok, else None."""
        record = self.rows[label].get(key)
        return record if record is not None and record["status"] == "ok" else None

    def records(self):
        """Every record, failed ones too."""
        return [record for rows in self.rows.values() for record in rows.values()]

    def tasks(self):
        return list(dict.fromkeys(task for task, _, _ in self.keys))

    def lengths(self):
        return sorted({length for *_, length in self.keys})

    def where(self, task=None, length=None):
        """The keys of a task, of a length, or of both."""
        return [key for key in self.keys if task in (None, key[0]) and length in (None, key[2])]

    def asked(self, label, keys=None):
        """The keys that a method was to run; what it was never asked for is not missing."""
        planned = self.planned[label]
        return [key for key in (self.keys if keys is None else keys) if key in planned]

    def counts(self, label, keys=None):
        """(ok, planned) rows of a method."""
        keys = self.asked(label, keys)
        return sum(self.record(label, key) is not None for key in keys), len(keys)

    def complete(self):
        counts = [self.counts(label) for label in self.labels]
        return all(ok == planned for ok, planned in counts)

    def uneven(self, keys=None):
        """Were methods asked to run different rows of these?"""
        return len({tuple(self.asked(label, keys)) for label in self.labels}) > 1


def expand(paths):
    """The run folders that `paths` name: each one itself, or the run folders right below it."""
    found = []
    for path in map(Path, paths):
        below = sorted(file.parent for file in path.glob("*/run.json"))
        found += [path] if (path / "run.json").exists() or not below else below
    return list(dict.fromkeys(found))


def sections(paths):
    """Read every folder -> [Section] in the order given.

    CommandError where a path is no run folder, and where no folder holds a record.
    """
    groups = []
    for path in expand(paths):
        run, _ = store.read(path)
        for group in groups:
            first = group[0][1]
            if first["bench"] == run["bench"] and not _differs(first, run):
                group.append((path, run))
                break
        else:
            groups.append([(path, run)])
    found = [_section(group) for group in groups]
    if not any(section.rows for section in found):
        raise CommandError(f"no record in {', '.join(map(str, paths))}: nothing to report yet")
    found = [section for section in found if section.rows]
    firsts = {}
    for section in found:
        first = firsts.setdefault(section.bench, section)
        if first is not section:
            section.why = _words(_differs(first.info, section.info))
            if model_name(section.info) != model_name(first.info):
                section.why = f"model {model_name(section.info)}; {section.why}"
            first.why = first.why or "not averaged with the other run of this benchmark below"
    return found


def _differs(first, run):
    """[(field, value there, value here)]; the same label for another method counts too."""
    shared = [label for label in first["methods"] if label in run["methods"]]
    methods = [{label: each["methods"][label] for label in shared} for each in (first, run)]
    return store.differences(first["identity"], run["identity"]) + [
        (f"method {name}", *values) for name, *values in store.differences(*methods, ())
    ]


def _words(differences):
    def shown(value):
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 48 else text[:45] + "..."

    return "; ".join(f"{name} is {shown(b)}, not {shown(a)}" for name, a, b in differences)


def _section(group):
    section = Section(group[0][1]["bench"], group[0][1])
    records = {}
    for path, _ in group:
        section.folders.append(path)
        lines = store.read_records(path, section.notes.append)
        section.notes += [f"{path}: no record yet"] * (not lines)
        found = store.final(lines)
        twice = len(found.keys() & records.keys())
        if twice:
            section.notes.append(
                f"{path}: {twice} rows are in another folder too; of each the latest that is ok "
                "counts"
            )
        records = store.final([*records.values(), *found.values()])
    labels = dict.fromkeys(label for _, run in group for label in run["methods"])
    labels |= dict.fromkeys(record["method"] for record in records.values())
    for label in labels:  # in the order of the command line
        rows = {key[2:]: record for key, record in records.items() if key[0] == label}
        if rows:
            section.rows[label] = rows
    section.keys = list(dict.fromkeys(key for rows in section.rows.values() for key in rows))
    wanted = {label: _wanted(label, group) for label in section.labels}
    section.keys = sorted(section.keys + _not_run(section.keys, wanted), key=_order)
    section.planned = {
        label: _planned(section, section.rows[label], places) for label, places in wanted.items()
    }
    return section


def _wanted(label, group):
    """{(task, length): rows that a method was to run}: the most of any start in any folder."""
    found = {}
    for _, run in group:
        for task, lengths in run.get("expected", {}).get(label, {}).items():
            for length, rows in lengths.items():
                place = (task, int(length))
                found[place] = max(rows, found.get(place, 0))
    return found


def _not_run(keys, wanted):
    """A key for every planned row of which no method has a record yet."""
    there, most = Counter((task, length) for task, _, length in keys), Counter()
    for places in wanted.values():
        most |= Counter(places)
    return [
        (task, NOT_RUN.format(number), length)
        for (task, length), rows in most.items()
        for number in range(there[task, length], rows)
    ]


def _planned(section, rows, places):
    """The keys that a method was to run: those it has, and as many more as it was asked for."""
    found, have = set(rows), Counter((task, length) for task, _, length in rows)
    for key in section.keys:
        task, _, length = key
        if key not in found and have[task, length] < places.get((task, length), 0):
            found.add(key)
            have[task, length] += 1
    return found


def _order(key):
    task, name, length = key
    return length, task, (len(name), name) if name.isdigit() else (99, name)


def meta(record):
    """What the data says of a row: {} where a failed record kept nothing."""
    return record.get("meta") or {}


def model_name(info):
    """The name to print: the last part of the model's path, or the hub's name."""
    model = info.get("model", info["identity"].get("model"))
    if isinstance(model, dict):
        model = model.get("name") or model.get("path")
    return str(model or "unnamed model").rstrip("/").rsplit("/", 1)[-1]


def parameters(info):
    """Parameters of the model, or None where the run did not record them."""
    model = info.get("model")
    return model.get("parameters") if isinstance(model, dict) else None
