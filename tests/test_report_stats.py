# SPDX-License-Identifier: Apache-2.0
"""Intervals and tests of the report: against formulas written out here and against chance."""

import math

import numpy as np
import pytest

from pbs_attn.eval.report import stats


@pytest.fixture
def quick(monkeypatch):
    """Fewer resamples, for hundreds of intervals."""
    monkeypatch.setattr(stats, "RESAMPLES", 2000)
    stats._resampled_means.cache_clear()
    yield
    stats._resampled_means.cache_clear()


def two_sided(better, worse):
    """The exact sign test by counting: all outcomes at most as likely as the one seen."""
    n = better + worse
    chances = [math.comb(n, k) / 2**n for k in range(n + 1)]
    return sum(chance for chance in chances if chance <= chances[better] * (1 + 1e-9))


@pytest.mark.parametrize("better, worse", [(0, 0), (1, 0), (0, 6), (5, 5), (3, 11), (150, 145)])
def test_sign_test_counts_outcomes(better, worse):
    rows = [0.25] * better + [-1.0] * worse + [0.0] * 7
    found = stats.sign_test(np.random.default_rng(0).permutation(rows))
    assert found[:2] == (better, worse)
    assert found[2] == pytest.approx(two_sided(better, worse) if better + worse else 1.0)


def test_interval_holds_the_truth_as_often_as_it_says(quick):
    """Skewed rows of which most are 0, as paired differences of scores are."""
    rng, held, mean = np.random.default_rng(7), 0, -0.6 * 0.4 / 2
    for _ in range(200):
        rows = rng.exponential(-mean / 0.4, 60) * (rng.random(60) < 0.4) * -1
        found = stats.mean_interval(rows)
        assert found.low <= found.value <= found.high and found.value == pytest.approx(rows.mean())
        held += found.low <= mean <= found.high
    assert 0.90 <= held / 200 <= 0.98, f"a 95% interval held the truth in {held} of 200 draws"


def test_interval_of_tasks_with_three_rows_each(quick):
    """Resampling three rows has two thirds of their variance; with that and normal tails the truth
    would be held in 85 of 100 draws."""
    rng, held = np.random.default_rng(8), 0
    for _ in range(100):
        found = stats.weighted_interval([(1 / 7, rng.normal(0, 1, 3)) for _ in range(7)])
        held += found.low <= 0 <= found.high
    assert held >= 90


def test_interval_is_the_same_every_time_and_in_every_company():
    rows = np.random.default_rng(1).normal(size=30)
    first = stats.mean_interval(rows)
    stats._resampled_means.cache_clear()
    stats.mean_interval(rows[:20])
    assert stats.mean_interval(rows) == first
    assert stats.mean_interval(list(rows)) == first


def test_interval_narrows_with_the_root_of_the_rows():
    rows = np.random.default_rng(2).normal(size=100)
    one, nine = stats.mean_interval(rows), stats.mean_interval(np.tile(rows, 9))
    assert (nine.high - nine.low) / (one.high - one.low) == pytest.approx(1 / 3, rel=0.05)
    sigma = rows.std() / math.sqrt(100)
    assert (one.high - one.low) / (2 * 1.96 * sigma) == pytest.approx(1, rel=0.05)


def test_rows_are_paired():
    """A difference of .01 shows below a spread of rows of 30 points, which resampling each side
    by itself would drown it in."""
    rng = np.random.default_rng(3)
    base = rng.uniform(0, 100, 50)
    found = stats.compare([(1.0, base + 0.01 + rng.normal(0, 0.01, 50) - base)])
    assert found.change.low > 0 and found.verdict == "higher *"
    assert found.change.high - found.change.low < 0.02


def test_weighted_interval_draws_inside_each_task():
    """Weights are those of the average, and equal tasks are drawn apart: the variance of their sum
    is the sum of variances, not four times one."""
    rows = np.random.default_rng(4).normal(3, 1, 80)
    one = stats.mean_interval(rows)
    both = stats.weighted_interval([(0.5, rows), (0.5, rows.copy()), (0.0, [99.0])])
    assert both.value == pytest.approx(one.value) and both.n == 160
    assert (both.high - both.low) / (one.high - one.low) == pytest.approx(0.5**0.5, rel=0.05)
    skewed = stats.weighted_interval([(0.75, [1.0, 1.0, 4.0]), (0.25, [10.0, 30.0])])
    assert skewed.value == pytest.approx(0.75 * 2 + 0.25 * 20)


def test_no_rows_one_row_equal_rows():
    assert stats.mean_interval([]) is None and stats.compare([(1.0, [])]) is None
    assert stats.weighted_interval([(1.0, [1.0, 2.0]), (1.0, [])]) is None
    one = stats.compare([(1.0, [5.0])])
    assert (one.change.value, one.change.low, one.verdict) == (5.0, None, "no interval")
    mixed = stats.compare([(0.5, [1.0, 2.0]), (0.5, [1.0])])
    assert mixed.change.low is None and not mixed.starred
    zero = stats.compare([(1.0, [0.0] * 40)])
    assert (zero.change.low, zero.change.high, zero.verdict) == (0.0, 0.0, "no row differs")
    equal = stats.compare([(1.0, [2.0] * 40)])
    assert (equal.change.low, equal.change.high, equal.change.same) == (2.0, 2.0, True)
    assert equal.verdict == "higher *"


def test_no_star_where_rows_are_few_or_the_exact_test_disagrees():
    four = stats.compare([(1.0, [-3.0, -4.0, -5.0, -3.5])])
    assert four.change.high < 0 and four.p == 0.125 and four.verdict == "within noise"
    seven = stats.compare([(1.0, [-3.0, -4, -5, -6, -7, -8, -9] + [0.0] * 9)])
    assert seven.p < 0.05 and seven.verdict == "lower *"
    right_or_wrong = stats.compare([(1.0, [1.0] * 20 + [-1.0] * 9 + [0.0] * 474)])  # p = 0.061
    assert right_or_wrong.change.low > 0 and not right_or_wrong.starred
    graded = np.linspace(1, 2, 12).tolist() + [-1.0, -1.1, -1.2, -1.3]
    assert stats.compare([(1.0, graded + [0.0] * 44)]).starred


def test_share_is_wilsons():
    found, z = stats.share(37, 40), 1.959963984540054
    p, n = 37 / 40, 40
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half))
    assert stats.share(0, 0) is None
    assert stats.share(40, 40).high == 1


def test_block_delta_is_the_mean_of_tokens_with_the_error_of_blocks():
    rows, sizes = np.array([0.1, -0.2, 0.4, 0.0]), np.array([128, 128, 128, 60])
    found = stats.block_delta(rows, sizes)
    mean = (rows * sizes).sum() / 444
    error = math.sqrt(4 / 3 * ((sizes * (rows - mean)) ** 2).sum()) / 444
    assert (found.value, found.se, found.n) == (pytest.approx(mean), pytest.approx(error), 4)
    assert found.verdict() == "too few blocks"
    equal = stats.block_delta(rows, [128] * 4)
    assert equal.se == pytest.approx(rows.std(ddof=1) / 2)
    assert stats.block_delta([], []) is None
    assert stats.block_delta([0.3], [77]) == stats.Delta(pytest.approx(0.3), None, 1)


@pytest.mark.parametrize(
    "mean, verdict", [(0.02, "higher *"), (-0.02, "lower *"), (0.0006, "within noise")]
)
def test_verdict_of_a_loss(mean, verdict):
    rows = np.random.default_rng(5).normal(size=30)
    rows = 0.01 * (rows - rows.mean()) / rows.std(ddof=1) + mean
    found = stats.block_delta(rows, [128] * 30)
    assert found.reach() == pytest.approx(2.0452 * 0.01 / math.sqrt(30), rel=1e-4)  # t of 29
    assert found.verdict() == verdict


def test_pooled_delta():
    found = stats.pooled_delta([0.1, 0.3, None], [0.01, 0.02, 0.5], [100, 300, 50])
    assert found.value == pytest.approx(0.25)
    assert found.se == pytest.approx(math.hypot(0.01 * 100, 0.02 * 300) / 400)
    assert stats.pooled_delta([0.1], [None], [5]).se is None
    assert stats.pooled_delta([None, 0.1], [None, 0.1], [5, 0]) is None


def test_median_ratio():
    rng = np.random.default_rng(6)
    slow, fast = 2 + 0.1 * rng.random(10), 1 + 0.05 * rng.random(10)
    found = stats.median_ratio(slow, fast)
    assert found.value == pytest.approx(np.median(slow) / np.median(fast))
    assert 1.85 < found.low < found.value < found.high < 2.15
    assert stats.median_ratio([2.0], [1.0]).low is None
    assert stats.median_ratio([2.0, 2.0], [1.0, 1.0]) == stats.Interval(2.0, 2.0, 2.0, 2, True)
    assert stats.median_ratio([], [1.0]) is None
