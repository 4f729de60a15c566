# SPDX-License-Identifier: Apache-2.0
"""Paired comparisons with their intervals: bootstrap over rows, McNemar, sign test, block errors.

Everything is deterministic: resampling starts from SEED and the values themselves, so the same
records give the same interval, whatever else is in the report.
"""

import functools
import zlib
from dataclasses import dataclass

import numpy as np
from scipy import stats

SEED = 2510
RESAMPLES = 10_000
LEVEL = 0.95
MIN_ROWS = 10  # with fewer rows (or blocks) that differ, an interval alone is no verdict
BATCH = 1 << 22  # resampled values in memory at a time: 32 MB


@dataclass(frozen=True)
class Interval:
    """A value and its 95% interval; low and high are None where there is none (one row)."""

    value: float
    low: float | None
    high: float | None
    n: int  # rows, blocks or samples behind it
    same: bool = False  # every row equal: the interval has no width because nothing varied

    def beyond(self, neutral=0.0):
        """+1 or -1 where the whole interval lies above or below `neutral`, else 0."""
        if self.low is None or self.low <= neutral <= self.high:
            return 0
        return 1 if self.low > neutral else -1


@dataclass(frozen=True)
class Comparison:
    """Two methods on the same rows: mean difference, rows that went either way, what it amounts to.

    p: exact two-sided sign test; on rows that are right or wrong that is McNemar's exact test.
    decisive: the test must agree before anything is called a difference, because percentile
    intervals are too short there: right-or-wrong rows, or fewer than MIN_ROWS that differ.
    """

    change: Interval
    better: int
    worse: int
    p: float
    decisive: bool

    @property
    def verdict(self):
        """ "higher *" or "lower *" only where the interval is without 0 and the test allows it."""
        if self.change.low is None:
            return "no interval"
        if not self.better + self.worse:
            return "no row differs"
        side = self.change.beyond()
        if self.decisive and self.p >= 1 - LEVEL:
            side = 0
        return {0: "within noise", 1: "higher *", -1: "lower *"}[side]

    @property
    def starred(self):
        return self.verdict.endswith("*")


def compare(strata):
    """Comparison of [(weight, differences of the rows [n])]; None without rows."""
    change = weighted_interval(strata)
    if change is None:
        return None
    rows = np.concatenate([values for weight, values in strata if weight])
    better, worse, p = sign_test(rows)
    steps = np.unique(np.abs(rows[rows != 0]).round(9))
    decisive = better + worse < MIN_ROWS or steps.size == 1
    return Comparison(change, better, worse, p, decisive)


@functools.lru_cache(512)  # 80 KB each: a task is drawn once, then used in every average
def _resampled_means(content, again):
    """Means of RESAMPLES bootstrap samples of the float64 values in `content` (bytes).

    All equal: their mean, RESAMPLES times. again: how many samples with the same content came
    before in one sum; samples that are drawn independently must differ.
    """
    values = np.frombuffer(content)
    if np.all(values == values[0]):
        return np.full(RESAMPLES, values[0])
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, vectorized=True, method="percentile",
        confidence_level=LEVEL, batch=max(1, BATCH // values.size),
        rng=np.random.default_rng([SEED, zlib.crc32(content), again]),
    )  # fmt: skip
    return result.bootstrap_distribution


def _interval(value, means, n, freedom, same):
    """Percentile interval, its tails those of Student's t with `freedom` degrees of freedom."""
    tail = 100 * float(stats.norm.cdf(stats.t.ppf((1 - LEVEL) / 2, freedom)))
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(float(value), float(low), float(high), n, same)


def mean_interval(values):
    """Mean of `values` [n] with its percentile bootstrap interval over the rows; None if empty.

    For a paired comparison pass the differences of the rows.
    """
    return weighted_interval([(1.0, values)])


def weighted_interval(strata):
    """sum of weight x mean over [(weight, values [n])], resampled in each stratum; None if empty.

    An average of task means is such a sum: its rows are drawn task by task, as they were chosen.
    A stratum of one row says nothing of its spread, so a sum over such has no interval.

    Plain percentile intervals are too short: resampling n rows gives (n - 1) / n of the variance,
    and normal tails where Student's are due. Both are put right here, which makes it Hesterberg's
    expanded percentile interval (What Teachers Should Know About the Bootstrap, 2015).
    """
    strata = [(weight, np.asarray(values, np.float64)) for weight, values in strata if weight]
    if not strata or any(values.size == 0 for _, values in strata):
        return None
    value = sum(weight * values.mean() for weight, values in strata)
    n = sum(values.size for _, values in strata)
    if min(values.size for _, values in strata) == 1:
        return Interval(float(value), None, None, n)
    same = all(np.all(values == values[0]) for _, values in strata)
    means, seen = 0, []
    for weight, values in strata:
        content = values.tobytes()
        spread = _resampled_means(content, seen.count(content)) - values.mean()
        means = means + weight * (values.mean() + spread * np.sqrt(values.size / (values.size - 1)))
        seen.append(content)
    return _interval(value, means, n, n - len(strata), same)


def median_ratio(base, other):
    """median(base) / median(other) with its bootstrap interval: how many times faster `other` is.

    Samples [n] and [m] in seconds, resampled independently. None where one is empty or has no
    positive median; no interval where one has a single sample.
    """
    base, other = np.asarray(base, np.float64), np.asarray(other, np.float64)
    if not base.size or not other.size or np.median(other) <= 0:
        return None
    value, n = np.median(base) / np.median(other), min(base.size, other.size)
    if n == 1:
        return Interval(float(value), None, None, 1)
    if np.ptp(base) == 0 and np.ptp(other) == 0:
        return Interval(float(value), float(value), float(value), n, same=True)
    result = stats.bootstrap(
        (base, other), lambda x, y, axis: np.median(x, axis) / np.median(y, axis),
        n_resamples=RESAMPLES, vectorized=True, method="percentile", confidence_level=LEVEL,
        rng=np.random.default_rng([SEED, 0]),
    )  # fmt: skip
    return _interval(value, result.bootstrap_distribution, n, n - 1, same=False)


def sign_test(differences):
    """(better, worse, p): exact two-sided sign test over the rows that differ; p = 1 without any.

    On right-or-wrong rows this is McNemar's exact test: better and worse are its discordant pairs.
    """
    differences = np.asarray(differences, np.float64)
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    if better + worse == 0:
        return better, worse, 1.0
    return better, worse, float(stats.binomtest(better, better + worse, 0.5).pvalue)


def share(hits, n):
    """hits / n with its Wilson interval; None where n is 0."""
    if not n:
        return None
    low, high = stats.binomtest(int(hits), int(n)).proportion_ci(LEVEL, method="wilson")
    return Interval(hits / n, float(low), float(high), int(n))


@dataclass(frozen=True)
class Delta:
    """A mean difference and its standard error (None where one block is all there is)."""

    value: float
    se: float | None
    n: int

    def reach(self):
        """Half the width of the 95% interval, Student's t with n - 1 degrees of freedom."""
        if self.se is None or self.n < 2:
            return None
        return float(stats.t.ppf((1 + LEVEL) / 2, self.n - 1)) * self.se

    def verdict(self):
        """As Interval.verdict, by the interval value +- reach()."""
        if self.se is None:
            return ""
        if self.se == 0 and self.value == 0:
            return "no block differs"
        if self.n < MIN_ROWS:
            return "too few blocks"
        if abs(self.value) <= self.reach():
            return "within noise"
        return "higher *" if self.value > 0 else "lower *"


def block_delta(differences, weights):
    """Paired mean of per-block differences [n], weighted by the tokens of each block [n]; or None.

    The standard error treats blocks as independent draws, pooled over the texts.
    """
    differences, weights = np.asarray(differences, np.float64), np.asarray(weights, np.float64)
    if not differences.size:
        return None
    value = float(np.average(differences, weights=weights))
    n = differences.size
    if n == 1:
        return Delta(value, None, 1)
    spread = np.sqrt(((weights * (differences - value)) ** 2).sum()) / weights.sum()
    return Delta(value, float(spread * np.sqrt(n / (n - 1))), n)


def pooled_delta(values, errors, weights):
    """Weighted mean of differences that come with standard errors of their own -> Delta; or None.

    Rows without a value are left out; the error is None if one of the rest has none.
    """
    rows = [
        row for row in zip(values, errors, weights, strict=True) if row[0] is not None and row[2]
    ]
    if not rows:
        return None
    total = sum(weight for *_, weight in rows)
    value = sum(value * weight for value, _, weight in rows) / total
    if any(error is None for _, error, _ in rows):
        return Delta(value, None, len(rows))
    squares = sum((weight * error) ** 2 for _, error, weight in rows)
    return Delta(value, float(np.sqrt(squares)) / total, len(rows))
