# SPDX-License-Identifier: Apache-2.0
"""Run folders of `eval ppl` and `eval frontier` -> the places, settings and samples of
frontier_data.py."""

from dataclasses import dataclass

import numpy as np

from ... import methods
from ...cli import CommandError
from .. import store
from . import load
from .frontier_data import Place, Sample, Setting
from .token_tables import block_sizes

THRESHOLDS = {
    "flashprefill": "alpha", "flexprefill": "gamma", "streaming": "window", "bsfa": "k",
    "minference": "vertical",
}  # fmt: skip
DENSE = ("full", "sdpa")
PLAIN = {"min_q": (0,), "min_kv": (0,), "strict": (False,)}  # routing that `eval` gives everything


def setting(description, label=""):
    """Setting of {"method": name, parameter: value}, as run.json has it. Parameters that the method
    has by itself are left out, so `peak` and `peak:stride=16` agree, and so do older folders."""
    name = description["method"]
    recipe = next((word[7:] for word in label.replace(":", ",").split(",")
                   if word.startswith("recipe=")), "spec")  # fmt: skip
    try:
        defaults = methods.find(name, recipe).parameters()
    except ValueError:  # a method of another version
        defaults = {}
    parameter = THRESHOLDS.get(name, "tau")
    words = [f"recipe={recipe}"] if recipe != "spec" else []
    for key, value in description.items():
        allowed = PLAIN.get(key, (defaults[key],) if key in defaults else ())
        if key not in ("method", parameter) and value not in allowed:
            words.append(f"{key}={value}")
    threshold = description.get(parameter)
    return Setting(
        f"{name}:{','.join(words)}" if words else name, threshold,
        "" if threshold is None else "eps" if _is_share(description) else parameter,
    )  # fmt: skip


def _is_share(description):
    """Is tau an absolute share, which docs/peak.md calls eps?"""
    return description.get("rule") == "absolute"


@dataclass
class Runs:
    """What the folders hold. texts: {name: sha256}; places: [Place], by length and prefix; missing:
    rows that are planned but not ok; total: rows that are planned; infos: run.json of each."""

    infos: list
    texts: dict
    places: list
    missing: int
    total: int
    notes: list


def read(paths, times=None):
    """Runs of the run folders `paths`, or of the folders below them.

    times: those of them whose times count, such as the ones that ran on an idle machine; None: all.
    CommandError where one is of another bench, of another model or of another text by the name of
    one that is there, and where no window has a record of dense and of another method.
    """
    folders = [(path, *store.read(path)) for path in load.expand(paths)]
    first = folders[0][1]
    texts = {}
    for path, run, _ in folders:
        if run["bench"] != "ppl":
            raise CommandError(f"{path} is a run of {run['bench']}; allowed: ppl, frontier")
        different = [
            each for each in store.differences(_identity(first), _identity(run))
            if not each[0].startswith("texts.")
        ]  # fmt: skip
        if different:
            name, a, b = different[0]
            raise CommandError(f"{path} differs from {folders[0][0]} in {name}: {a!r} there, {b!r} "
                               "here; allowed: runs of one model and dtype")  # fmt: skip
        for name, digest in run["identity"]["texts"].items():
            if texts.setdefault(name, digest) != digest:
                raise CommandError(f"{path} has another text by the name {name}")
    timed = {path for path, _, _ in folders} if times is None else set(load.expand(times))
    unknown = timed - {path for path, _, _ in folders}
    if unknown:
        raise CommandError(f"--times {min(unknown)} is not one of the run folders that are drawn")
    dense = _dense(folders)
    found, notes = {}, []
    for path, run, records in folders:
        _add(found, run, records, dense, notes, path in timed)
    if times is not None:
        names = ", ".join(path.name for path, _, _ in folders if path in timed)
        notes.append(f"Times are those of the windows of {names} alone")
    planned = [(run["expected"], records) for _, run, records in folders]
    total = sum(_rows(expected) for expected, _ in planned)
    ok = sum(r["status"] == "ok" for _, records in planned for r in records.values())
    places = [found[key] for key in sorted(found)]
    if not places:
        raise CommandError("nothing to draw yet: no window has dense and another method")
    for place in places:
        notes += _drop_rare(place)
        place.windows.sort(key=lambda window: list(texts).index(window[0]))
    return Runs([run for _, run, _ in folders], texts, places, max(total - ok, 0), total,
                list(dict.fromkeys(notes)))  # fmt: skip


def _identity(run):
    """What runs must have in common; a prefix makes a place of its own."""
    known = {"prefix", "texts", "method_files"}
    return {name: value for name, value in run["identity"].items() if name not in known}


def _rows(expected):
    return sum(n for tasks in expected.values() for lengths in tasks.values()
               for n in lengths.values())  # fmt: skip


def _window(record):
    return record["length"], record["prefix"], record["task"], record["id"]


def _dense(folders):
    """{window: block losses of dense}: any folder's, they are the same bits."""
    found = {}
    for name in reversed(DENSE):  # full wins
        for _, _, records in folders:
            found |= {
                _window(record): record["block_losses"]
                for record in records.values()
                if record["status"] == "ok" and record["method"] == name
            }
    return found


def _add(found, run, records, dense, notes, timed):
    """Put one folder's records into {(length, prefix): Place}; of two the later counts, and the
    later one that is timed for the time."""
    seconds = {
        _window(r): r.get("attention_s")
        for name in reversed(DENSE) for r in records.values()
        if r["status"] == "ok" and r["method"] == name
    }  # fmt: skip
    for record in records.values():
        label = record["method"]
        described = run["methods"].get(label, {"method": label})
        if record["status"] != "ok" or described["method"] in DENSE:
            continue
        window = _window(record)
        if window not in dense:
            notes.append(f"{window[2]} @{window[3]} has no record of full: left out")
            continue
        place = found.setdefault(window[:2], Place(*window[:2]))
        if window[2:] not in place.windows:
            place.windows.append(window[2:])
        samples = place.settings.setdefault(setting(described, label), {})
        sample = _sample(record, dense[window], seconds.get(window))
        before = samples.get(window[2:], sample._replace(seconds=None))
        if not timed:
            sample = sample._replace(seconds=before.seconds, dense_seconds=before.dense_seconds)
        samples[window[2:]] = sample


def _drop_rare(place):
    """Leaves out the windows that less than half of the settings have, such as the one at which a
    run was stopped: they would make every other setting incomplete. Notes that say so."""
    notes = []
    for window in list(place.windows):
        count = sum(window in samples for samples in place.settings.values())
        if 2 * count < len(place.settings):
            place.windows.remove(window)
            for samples in place.settings.values():
                samples.pop(window, None)
            notes.append(f"{window[0]} @{window[1]} at {place.name} is left out: {count} of "
                         f"{len(place.settings)} settings ran it")  # fmt: skip
    return notes


def _sample(record, dense, dense_seconds):
    return Sample(
        np.asarray(record["block_losses"], np.float64) - np.asarray(dense, np.float64),
        np.asarray(block_sizes(record), np.float64),
        (record.get("copied_delta"), record.get("copied_delta_se"), record.get("copied_tokens", 0)),
        record["density"], record["computed"], record.get("attention_s"), dense_seconds,
    )  # fmt: skip
