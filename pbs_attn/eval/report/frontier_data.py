# SPDX-License-Identifier: Apache-2.0
"""Run folders of `eval ppl` and `eval frontier` -> what every setting of every method loses, keeps
and takes, window by window, so that settings can be compared on the same tokens.

A setting is a method with all its parameters; settings that differ in their threshold alone are
one family, a line of the picture. A place is what may be compared: (length, prefix).
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ... import methods
from ...cli import CommandError
from .. import store
from . import load, stats
from .token_tables import block_sizes

THRESHOLDS = {
    "flashprefill": "alpha", "flexprefill": "gamma", "streaming": "window", "bsfa": "k",
    "minference": "vertical",
}  # fmt: skip
DENSE = ("full", "sdpa")
PLAIN = {"min_q": (0,), "min_kv": (0,), "strict": (False,)}  # routing that `eval` gives everything


class Setting(NamedTuple):
    family: str  # name and parameters that are no default, without the threshold
    threshold: float | None  # None where the method has none
    parameter: str  # its name, "" without one

    @property
    def text(self):
        """As a method is written on the command line."""
        if self.threshold is None:
            return self.family
        return f"{self.family}{',' if ':' in self.family else ':'}{self.short}"

    @property
    def short(self):
        return "" if self.threshold is None else f"{self.parameter}={self.threshold:g}"

    @property
    def method(self):
        return self.family.partition(":")[0]


class Sample(NamedTuple):
    """One window by one setting, beside dense on the same tokens."""

    differences: np.ndarray  # float64 [blocks]: mean loss of a block minus that of dense
    sizes: np.ndarray  # [blocks]: its tokens
    copied: tuple  # (change, its standard error, tokens), as recorded
    density: float
    computed: float
    seconds: float | None  # in attention calls
    dense_seconds: float | None  # of dense in the same folder


@dataclass
class Place:
    """All that was measured at one length behind one prefix.

    windows: [(text, id)] that any setting has; settings: {Setting: {window: Sample}}."""

    length: int
    prefix: int
    windows: list = field(default_factory=list)
    settings: dict = field(default_factory=dict)

    @property
    def name(self):
        """ "8K tokens" or "4K tokens behind a dense prefix of 4K"."""
        if not self.prefix:
            return f"{size(self.length)} tokens"
        return f"{size(self.length - self.prefix)} tokens behind a dense prefix of " + size(
            self.prefix
        )

    @property
    def slug(self):
        """For file names: "8k", "8k-prefix-4k"."""
        words = size(self.length), *(["prefix", size(self.prefix)] if self.prefix else [])
        return "-".join(words).lower().replace(",", "")

    def families(self):
        """{family: [Setting] by rising threshold}, in the order in which they ran."""
        found = {}
        for setting in self.settings:
            found.setdefault(setting.family, []).append(setting)
        for settings in found.values():
            settings.sort(key=lambda each: (each.threshold is not None, each.threshold))
        return found

    def point(self, setting, texts=None):
        """The Point of a setting over all windows, or over those of `texts`."""
        windows = [w for w in self.windows if texts is None or w[0] in texts]
        samples = self.settings[setting]
        return Point(setting, {w: samples[w] for w in windows if w in samples}, len(windows))

    def curves(self, texts=None):
        """{family: [Point]} of the settings that ran any of the windows."""
        found = {
            family: [p for p in (self.point(s, texts) for s in settings) if p.samples]
            for family, settings in self.families().items()
        }
        return {family: points for family, points in found.items() if points}


@dataclass(frozen=True)
class Point:
    """A setting over some windows; `of` is how many there are."""

    setting: Setting
    samples: dict
    of: int

    @property
    def complete(self):
        return len(self.samples) == self.of

    @property
    def blocks(self):
        """{window: (differences, sizes)}"""
        return {w: (sample.differences, sample.sizes) for w, sample in self.samples.items()}

    @property
    def change(self):
        """Delta of the loss, over all blocks of all windows."""
        return delta(self.blocks)

    @property
    def copied(self):
        rows = [sample.copied for sample in self.samples.values()]
        return stats.pooled_delta(*zip(*rows, strict=True)) if rows else None

    @property
    def density(self):
        return float(np.mean([sample.density for sample in self.samples.values()]))

    @property
    def computed(self):
        return float(np.mean([sample.computed for sample in self.samples.values()]))

    @property
    def time(self):
        """Delta of the time of attention over that of dense, over the windows that have both; None
        if none has."""
        pairs = [(s.seconds, s.dense_seconds) for s in self.samples.values()]
        pairs = [pair for pair in pairs if all(pair)]
        return ratio(pairs) if pairs else None


def size(number):
    """ "8K" for 8192, "8,000" for 8000."""
    return f"{number // 1024}K" if number % 1024 == 0 else f"{number:,}"


# ---- sums over blocks; `blocks` is {window: (differences, sizes)} --------------------------------


def delta(blocks):
    """stats.Delta of the mean difference: every block of every text is one draw."""
    if not blocks:
        return None
    differences, sizes = zip(*blocks.values(), strict=True)
    return stats.block_delta(np.concatenate(differences), np.concatenate(sizes))


def mix(first, second, share):
    """Blocks of the straight line between two settings, `share` of the way to the second."""
    return {
        window: ((1 - share) * first[window][0] + share * second[window][0], first[window][1])
        for window in first
        if window in second
    }


def minus(first, second):
    """Blocks of the difference of two settings on the windows that both have."""
    return {
        window: (first[window][0] - second[window][0], first[window][1])
        for window in first
        if window in second
    }


def ratio(pairs):
    """Delta of sum(a) / sum(b) over pairs (a, b), one draw each: the linearised variance of a
    ratio, as in scores.difference. No error with one pair."""
    a, b = np.asarray(pairs, np.float64).T
    value, n = float(a.sum() / b.sum()), len(pairs)
    if n == 1:
        return stats.Delta(value, None, 1)
    squares = np.square(a - value * b).sum()
    return stats.Delta(value, float(math.sqrt(n / (n - 1) * squares) / b.sum()), n)


def density_of(point):
    return point.density


def time_of(point):
    return None if point.time is None else point.time.value


def interpolate(points, at, axis=density_of):
    """Blocks of a family at `at` of an axis: the straight line between the two measured points next
    to it. None where it is not measured on both sides: nothing is extrapolated.

    Only complete points count, so that both ends are of the same windows."""
    placed = sorted(
        ((axis(point), point) for point in points if point.complete and axis(point) is not None),
        key=lambda each: each[0],
    )
    for (low, first), (high, second) in zip(placed, placed[1:], strict=False):
        if low <= at <= high and low < high:
            return mix(first.blocks, second.blocks, (at - low) / (high - low))
    exact = [point for x, point in placed if x == at]
    return exact[0].blocks if exact else None


def choose(points, budget):
    """The Point of least density whose loss is at most `budget` nats above dense; None if none is.

    Incomplete points are not chosen."""
    within = [p for p in points if p.complete and p.change.value <= budget]
    return min(within, key=lambda point: point.density, default=None)


# ---- run folders ---------------------------------------------------------------------------------


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
