"""Estimates with 95 % intervals: over the windows of a text, and over seeds.

The losses within a window depend on each other, so windows, not tokens, are what is independent
(up to what neighbouring windows of one text share, which the intervals leave out). They speak of
other text of the same kind, under one model; how models differ between seeds is another matter.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

LEVEL = 0.95

_TOGETHER = 50  # resamples at once: each is a row of as many numbers as there are tokens


class Estimate(NamedTuple):
    """A value and its 95 % interval, NaN where there is none.

    Attributes:
        value: estimated.
        low: end of the interval.
        high: end of the interval.
    """

    value: float
    low: float
    high: float


class Interval(NamedTuple):
    """Mean over seeds, and half the width of its 95 % interval: NaN of a single seed.

    Attributes:
        mean: over seeds.
        half_width: half-width of the interval of Student's t.
        seeds: how many.
    """

    mean: float
    half_width: float
    seeds: int


def ratio(
    numerators: Float[np.ndarray, " windows"], denominators: Float[np.ndarray, " windows"]
) -> Estimate:
    """Estimate the ratio of two sums over windows, with the interval of the ratio estimator.

    The standard error is that of linearisation, from the residuals y_i - r x_i (Cochran 1977,
    Sampling Techniques, section 2.11), the quantile that of Student's t with one degree of freedom
    less than there are windows. Of one window there is no interval.

    Args:
        numerators: y, sums of each window.
        denominators: x, likewise.
    """
    from scipy import stats  # loaded in a second, and only where results are summed up

    count, total = len(denominators), denominators.sum(dtype=np.float64)
    with np.errstate(all="ignore"):  # losses under enormous noise are not finite
        value = numerators.sum(dtype=np.float64) / total
        residuals = numerators - value * denominators
        if count < 2:
            return Estimate(float(value), np.nan, np.nan)
        error = np.sqrt(count / (count - 1) * np.sum(residuals**2, dtype=np.float64)) / total
        reach = stats.t.ppf((1 + LEVEL) / 2, count - 1) * error
        return Estimate(float(value), float(value - reach), float(value + reach))


def interval(values: Iterable[float]) -> Interval:
    """Return mean and 95 % interval of Student's t over seeds."""
    from scipy import stats

    found = np.array(list(values), float)
    if len(found) < 2:
        return Interval(float(found.mean()) if len(found) else np.nan, np.nan, len(found))
    error = found.std(ddof=1) / np.sqrt(len(found))
    reach = stats.t.ppf((1 + LEVEL) / 2, len(found) - 1) * error
    return Interval(float(found.mean()), float(reach), len(found))


def paired_cost(values: Mapping[int, float], reference: Mapping[int, float]) -> Interval:
    """Return the increase over a reference in per cent, paired by seed.

    Runs of a seed share their initial network and minibatches, so that the differences spread less
    than the values.

    Args:
        values: values by seed.
        reference: values by seed; seeds that only one of the two has are left out.
    """
    return interval(
        100 * (values[seed] / reference[seed] - 1) for seed in sorted(values.keys() & reference)
    )


def shown(found: Interval, digits: int, *, signed: bool = False, unit: str = "") -> str:
    """Return a mean with its interval, if it has one, as tables show it.

    Args:
        found: the interval.
        digits: after the point.
        signed: show a plus sign before a positive mean.
        unit: what follows the mean.
    """
    if math.isnan(found.mean):
        return "\N{EM DASH}"
    reach = "" if math.isnan(found.half_width) else f" ± {found.half_width:.{digits}f}"
    mean = f"{found.mean:{'+' if signed else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")
    return f"{mean}{unit}{reach}"


def bootstrap(
    statistic: Callable[[Int[np.ndarray, "resamples windows"]], Float[np.ndarray, "k resamples"]],
    windows: int,
    *,
    resamples: int,
    seed: int,
) -> list[Estimate]:
    """Compute statistics of a text, with percentile intervals of a bootstrap over its windows.

    Args:
        statistic: function from how often each window was drawn to the k statistics of that text.
        windows: how many there are, at least 2.
        resamples: how many texts to draw.
        seed: seed of the draws.

    Returns:
        k estimates; the value is that of every window counted once.
    """
    from scipy import stats

    def of_draws(drawn: Int[np.ndarray, "resamples windows"], axis: int) -> np.ndarray:
        drawn = np.atleast_2d(np.moveaxis(drawn, axis, -1))
        counts = np.zeros((len(drawn), windows), np.int64)
        np.add.at(counts, (np.arange(len(drawn))[:, None], drawn), 1)
        return statistic(counts)

    with warnings.catch_warnings():
        # Where a statistic is NaN so is its interval, and that says enough.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (np.arange(windows),),
            of_draws,
            n_resamples=resamples,
            batch=_TOGETHER,
            confidence_level=LEVEL,
            method="percentile",
            vectorized=True,
            rng=np.random.default_rng(seed),
        )
    values = statistic(np.ones((1, windows), np.int64))[:, 0]
    low, high = found.confidence_interval
    return [Estimate(*map(float, each)) for each in zip(values, low, high, strict=True)]


def spearman(
    x: Float[np.ndarray, " N"],
    others: Sequence[Float[np.ndarray, " N"]],
    weights: Int[np.ndarray, "resamples N"],
) -> Float[np.ndarray, "others resamples"]:
    """Compute the rank correlation of x and each of the others, over N repeated observations.

    Equal values, the repetitions among them, share the mean of their ranks.

    Args:
        x: one quantity.
        others: quantities to correlate it with.
        weights: how often each observation counts, in each of several resamples.

    Returns:
        NaN where one of the two does not vary.
    """
    repeated = np.ascontiguousarray(weights.T, np.float64)  # whole rows are then gathered
    ranks = _centred_ranks(x, repeated)
    weighted = ranks * repeated
    size = np.sqrt(np.einsum("nr,nr->r", weighted, ranks))
    found = []
    for other in others:
        of_other = _centred_ranks(other, repeated)
        scale = size * np.sqrt(np.einsum("nr,nr,nr->r", repeated, of_other, of_other))
        with np.errstate(invalid="ignore"):
            found.append(np.einsum("nr,nr->r", weighted, of_other) / scale)
    return np.array(found)


def area_under_curve(
    positive: Bool[np.ndarray, " N"],
    others: Sequence[Float[np.ndarray, " N"]],
    weights: Int[np.ndarray, "resamples N"],
) -> Float[np.ndarray, "others resamples"]:
    """Compute the probability that a quantity is larger at a positive observation than elsewhere.

    This is the area under the receiver operating characteristic; equal values count half.

    Args:
        positive: which observations are positive.
        others: quantities that are to tell them from the rest.
        weights: how often each observation counts, in each of several resamples.

    Returns:
        NaN where a resample has no positive observation, or no other.
    """
    repeated = np.ascontiguousarray(weights.T, np.float64)
    of_positive = repeated * positive[:, None]
    positives = of_positive.sum(axis=0)
    pairs = positives * (repeated.sum(axis=0) - positives)
    with np.errstate(invalid="ignore"):
        return np.array(
            [
                np.einsum("nr,nr->r", of_positive, _centred_ranks(other, repeated)) / pairs + 0.5
                for other in others
            ]
        )


def _centred_ranks(
    values: Float[np.ndarray, " N"], weights: Float[np.ndarray, "N resamples"]
) -> Float[np.ndarray, "N resamples"]:
    distinct, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    size = weights[order]
    if len(distinct) < len(values):
        starts = np.searchsorted(group[order], np.arange(len(distinct)))
        size = np.add.reduceat(size, starts, axis=0)
    # Mean rank of a group: what is below it and half of itself; that of all is half of all.
    ranks = np.cumsum(size, axis=0) - size / 2 - weights.sum(axis=0) / 2
    return ranks[group]
