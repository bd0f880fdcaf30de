"""Intervals over windows: against SciPy, naive loops, and their promise of 95 %."""

import numpy as np
import pytest
from scipy import stats

from probattn.inference.evaluation.intervals import (
    area_under_curve,
    bootstrap,
    ratio,
    spearman,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def windows(count, rng):
    """Clean and noisy losses of windows: what is hard without noise is hard with it."""
    clean = rng.gamma(9, 1, count)
    return clean, clean * rng.normal(1.5, 0.2, count) + rng.gamma(2, 1, count)


def test_ratio_is_that_of_the_sums_with_the_standard_error_of_a_paired_bootstrap(rng):
    clean, noisy = windows(400, rng)
    found = ratio(noisy, clean)
    assert found.value == pytest.approx(noisy.sum() / clean.sum(), rel=1e-14)
    resampled = stats.bootstrap(
        (noisy, clean),
        lambda y, x, axis: y.sum(axis) / x.sum(axis),
        paired=True,
        n_resamples=4000,
        method="percentile",
        rng=1,
    )
    low, high = resampled.confidence_interval
    assert found.low == pytest.approx(low, abs=0.1 * (high - low))
    assert found.high == pytest.approx(high, abs=0.1 * (high - low))


def test_the_interval_of_a_ratio_covers_the_truth_as_often_as_it_says(rng):
    truth, covered, samples = 1.5 + 2 / 9, 0, 2000
    for _ in range(samples):
        clean, noisy = windows(25, rng)
        found = ratio(noisy, clean)
        covered += found.low <= truth <= found.high
    assert covered / samples == pytest.approx(0.95, abs=0.02)


def test_pairing_takes_out_what_windows_differ_in(rng):
    clean, _ = windows(50, rng)
    found = ratio(1.7 * clean, clean)
    assert found.high - found.low < 1e-12


@pytest.mark.parametrize("noisy", [[3.0], [np.inf, 1.0], [np.nan, 1.0]])
def test_where_there_is_no_interval_there_is_nan(noisy):
    found = ratio(np.array(noisy), np.ones(len(noisy)))
    assert np.isnan([found.low, found.high]).all()
    assert found.value == pytest.approx(np.mean(noisy), nan_ok=True)


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_is_scipys_of_the_repeated_observations(ties, rng):
    x, y = rng.normal(size=(2, 200))
    y += x
    if ties:
        x, y = x.round(), np.where(y > 1, np.inf, y)
    weights = rng.integers(0, 4, (5, 200))
    found = spearman(x, [y, -x], weights)
    for row, repeats in enumerate(weights):
        expected = stats.spearmanr(np.repeat(x, repeats), np.repeat(y, repeats)).statistic
        assert found[0, row] == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(found[1], -1)


def test_rank_correlation_with_what_does_not_vary_is_nan():
    assert np.isnan(spearman(np.arange(5.0), [np.ones(5)], np.ones((1, 5), int))).all()


def test_area_under_the_curve_is_scipys_of_the_repeated_observations(rng):
    x = rng.normal(size=200).round(1)
    positive = rng.random(200) < 0.2
    x[positive] += 0.5
    weights = rng.integers(0, 4, (5, 200))
    found = area_under_curve(positive, [x, -x], weights)
    for row, repeats in enumerate(weights):
        groups = (np.repeat(x[at], repeats[at]) for at in (positive, ~positive))
        inside, outside = groups
        u = stats.mannwhitneyu(inside, outside).statistic
        assert found[0, row] == pytest.approx(u / len(inside) / len(outside), abs=1e-12)
    np.testing.assert_allclose(found.sum(axis=0), 1)


def test_area_under_the_curve_without_a_positive_observation_is_nan():
    found = area_under_curve(np.zeros(3, bool), [np.arange(3.0)], np.ones((1, 3), int))
    assert np.isnan(found).all()


def test_bootstrap_is_over_windows_not_over_tokens(rng):
    """The mean of 50 windows, each of 100 equal tokens: 50 observations, not 5,000."""
    window = np.repeat(np.arange(50), 100)
    values = rng.normal(size=50)[window]

    def means(counts):
        weights = counts[:, window]
        return np.array([weights @ values, weights @ (10 - values)]) / weights.sum(1)

    one, other = bootstrap(means, 50, resamples=2000, seed=3)
    error = values.std() / np.sqrt(50)
    assert one.value == pytest.approx(values.mean())
    assert one.high - one.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert other == pytest.approx((10 - one.value, 10 - one.high, 10 - one.low))
    assert bootstrap(means, 50, resamples=2000, seed=3) == [one, other]
    assert bootstrap(means, 50, resamples=2000, seed=4) != [one, other]


def test_every_window_is_drawn_as_often_as_any_other():
    totals = np.zeros(7)

    def count(counts):
        assert (counts.sum(1) == 7).all()
        totals[:] += counts.sum(0)
        return np.zeros((1, len(counts)))

    bootstrap(count, 7, resamples=3000, seed=0)
    assert stats.chisquare(totals).pvalue > 1e-3
