# SPDX-License-Identifier: Apache-2.0
"""What every setting of every method loses, keeps and takes, window by window, so that settings can
be compared on the same tokens.

A setting is a method with all its parameters; settings that differ in their threshold alone are
one family, a line of the picture. A place is what may be compared: (length, prefix).
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from . import stats


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
