"""What figures are drawn from: arguments checked and made into arrays, without Matplotlib."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]
Positions = NDArray[np.intp]

_MOST_POINTS, _FIRST_POINTS = 4000, 1000  # of a distribution that is drawn


def check_any(name: str, entries: Mapping[str, Any]) -> None:
    """Refuse an empty mapping.

    Raises:
        ValueError: if there is no entry.
    """
    if not entries:
        raise ValueError(f"{name}: got no entries, expected at least one label")


def metric(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[Values, Values]:
    """Return steps and values of one metric, without the rows where it is None."""
    kept = [(row["step"], row[key]) for row in rows if row[key] is not None]
    found = np.array(kept, np.float64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def measured(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[Values, Values]:
    """Return the same of a metric that rows of earlier versions lack."""
    return metric([row for row in rows if key in row], key)


def table(name: str, values: ArrayLike, columns: int) -> Values:
    """Return a table of floats with at least one row.

    Raises:
        ValueError: if it has another number of columns, or no row.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 2 or array.shape[1] != columns or not len(array):
        raise ValueError(
            f"{name}: got an array of shape {array.shape}, expected rows of {columns} columns"
        )
    return array


def after_the_start(steps: Values, values: Values) -> Values:
    """Return values of the last four fifths of the steps; all where there are fewer than ten."""
    return values if len(values) < 10 else values[steps >= 0.2 * steps.max()]


def finite_range(values: Values) -> tuple[float, float]:
    """Return the smallest and largest finite value; 0 and 0 if there is none."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def smallest_margins(
    label: str, rows: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[Values, Values]]:
    """Return, by kind of margin, steps and min_margin of the rows that have one of that kind.

    Raises:
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError(f"runs[{label!r}]: got no rows, expected the lines of a metrics.jsonl")
    kinds = dict.fromkeys(row["min_margin_kind"] for row in rows if row["min_margin"] is not None)
    return {
        kind: metric([row for row in rows if row["min_margin_kind"] == kind], "min_margin")
        for kind in kinds
    }


def sweep(label: str, result: Mapping[str, Sequence[float]], unit: str) -> tuple[Values, Values]:
    """Return noise and bits per character of one sweep, in order of growing noise.

    Raises:
        ValueError: if the two differ in length, the least noise is not 0, or the bits per
            character there, which divide the others, are not positive.
    """
    columns = np.array([result[f"noise_{unit}"], result[f"bpc_{unit}"]], np.float64)
    noise, bpc = columns[:, np.argsort(columns[0], kind="stable")]
    if not len(noise) or noise[0] != 0 or not bpc[0] > 0:
        first = f"noise {noise[0]:g} with BPC {bpc[0]:g}" if len(noise) else "no points"
        raise ValueError(
            f"results[{label!r}]: got {first} for the least noise_{unit}, expected noise 0 with a "
            "positive BPC, to which the others are relative"
        )
    return noise, bpc


def vector(name: str, values: ArrayLike) -> Values:
    """Return a one-dimensional array of floats.

    Raises:
        ValueError: if it has another number of dimensions.
    """
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.floating):  # long ones are not copied
        array = array.astype(np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name}: got an array of shape {array.shape}, expected one dimension")
    return array


def aligned(margins: Mapping[str, ArrayLike]) -> dict[str, Values]:
    """Return several margins of one text, as vectors.

    Raises:
        ValueError: if there are none, or they are no vectors of one length, at least 1.
    """
    check_any("margins", margins)
    values = {label: vector(f"margins[{label!r}]", margin) for label, margin in margins.items()}
    first = next(iter(values))
    for label, margin in values.items():
        if len(margin) != len(values[first]) or not len(margin):
            raise ValueError(
                f"margins[{label!r}]: got {len(margin)} margins, expected one for each token of a "
                f"text, as many as the {len(values[first]) or 'tokens'} of margins[{first!r}]"
            )
    return values


def character_heads(tokens: Sequence[str]) -> Positions:
    """Return which token shows the characters of each of N tokens, a vector of N positions.

    It is the token itself, or the one before that has characters, where it has none: it then only
    goes on with a character that began there.
    """
    own = [position if token else 0 for position, token in enumerate(tokens)]
    return np.maximum.accumulate(np.array(own, np.intp))


def character_head(tokens: Sequence[str], position: int) -> int:
    """Return which token shows the characters of the one at a position, as `character_heads`."""
    while position and not tokens[position]:
        position -= 1
    return position


def positions(name: str, values: ArrayLike, length: int) -> Positions:
    """Return positions in a text of `length` tokens, as a vector.

    Raises:
        ValueError: if they are no vector of integers from 0 to length - 1.
    """
    array = np.asarray(values)
    if array.shape == (0,):  # an empty list has dtype float
        array = array.astype(np.intp)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name}: got {array.dtype} of shape {array.shape}, expected a vector of integers"
        )
    outside = array[(array < 0) | (array >= length)]
    if outside.size:
        raise ValueError(f"{name}: got position {outside[0]}, expected 0 to {length - 1}")
    return array.astype(np.intp)


def smallest_of_each(values: Values, stride: int) -> Positions:
    """Find the smallest value in each stretch of `stride`; a NaN only where all are."""
    stretches = (values[start : start + stride] for start in range(0, len(values), stride))
    smallest = [np.argmin(np.where(np.isnan(each), np.inf, each)) for each in stretches]
    return np.arange(0, len(values), stride) + np.array(smallest, np.intp)


def one_of_each(values: Values, at: Positions, stride: int) -> Positions:
    """Keep of some positions that of the smallest value in each stretch of `stride`."""
    order = np.lexsort((values[at], at // stride))
    _, first = np.unique(at[order] // stride, return_index=True)
    return at[order][first]


def above_an_edge(values: Values) -> Values:
    """Move values of -inf to an edge a little below 0 and below all finite ones."""
    finite = np.append(values[np.isfinite(values)], 0.0)
    edge = finite.min() - 0.1 * (float(np.ptp(finite)) or 1.0)
    return np.where(values == -np.inf, edge, values)


def colour_limits(values: Values) -> tuple[float, float]:
    """Return the 1st and 99th percentile of the finite values, never the same number."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = (float(each) for each in np.quantile(finite, [0.01, 0.99]))
    # Without a spread all are of the colour of a large margin: none stands out.
    return (low, high) if high - low > 1e-6 * max(1.0, abs(high)) else (high - 1.0, high)


def cumulative(name: str, values: ArrayLike) -> tuple[Values, Values]:
    """Evaluate the empirical distribution function at the finite values, or at most 4000 of them.

    Returns them in ascending order, and the fraction of all that is not above each. NaN
    counts for nothing; -inf counts below all, +inf above. Of more values there are the 1000
    smallest, the largest, and others at ranks whose logarithms are spread evenly.

    Raises:
        ValueError: if this is no vector, or has no finite value.
    """
    array = vector(name, values)
    ordered = np.sort(array)  # NaN comes last
    total = int(np.searchsorted(ordered, np.nan))
    first = int(np.searchsorted(ordered[:total], -np.inf, side="right"))
    stop = int(np.searchsorted(ordered[:total], np.inf))
    if first >= stop:
        raise ValueError(f"{name}: got {len(array)} margins, none finite, expected at least one")
    ranks = np.arange(min(stop - first, _MOST_POINTS))
    if stop - first > _MOST_POINTS:
        spread = np.geomspace(_FIRST_POINTS, stop - first, _MOST_POINTS - _FIRST_POINTS)
        rest = spread.round().astype(np.intp) - 1
        ranks = np.unique(np.concatenate([ranks[:_FIRST_POINTS], rest]))
    return ordered[first + ranks], (first + ranks + 1) / total
