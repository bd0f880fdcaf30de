"""Figures of posteriors: smallest margins, and the probability of being the support token.

The functions return a figure and write nothing; `save_figure` does.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from probattn.inference.figures.style import (
    COLOURS,
    DOUBLE,
    SINGLE,
    add_legend,
    drawable,
    label_axes,
    line_style,
    mark_boundary,
    new_figure,
    styled,
)

# A space, and the symbol that stands for all characters that a vocabulary does not keep.
_SHOWN = str.maketrans({" ": "\N{OPEN BOX}", "\N{REPLACEMENT CHARACTER}": "\N{MIDDLE DOT}"})
_MOST_SYMBOLS = 32 * 64  # cells of a map that are wide enough for the token's symbol


@styled
def smallest_margin(draws: ArrayLike, marks: Mapping[str, float] | None = None) -> Figure:
    """Draw the posterior of the smallest margin, with point estimates marked in it.

    Args:
        draws: smallest margin, (chain, draw). Each chain is a thin line, all together the area. A
            draw whose margin is not known, NaN, is left out, and the legend says how many are.
        marks: smallest margin of point estimates, by label.

    Raises:
        ValueError: if there is no draw whose margin is known, or one is infinite.
    """
    figure = new_figure(SINGLE if not marks else DOUBLE, 2.6, layout="constrained")
    add_legend(figure, _posterior_panel(figure.add_subplot(), None, _checked(draws), marks or {}))
    return figure


@styled
def barrier_weights(
    draws: ArrayLike, weights: Mapping[float, float], others: Mapping[str, float]
) -> Figure:
    """Draw which weight of the barrier stands for the posterior: the central comparison.

    Panel (a) is the posterior of the smallest margin with the point estimates in it, panel (b) the
    smallest margin of the MAP over the weight of the barrier, on the posterior's median and its
    central 50 and 90 %.

    Args:
        draws: smallest margin of the posterior, (chain, draw); NaN as in `smallest_margin`.
        weights: smallest margin of the MAP of objective margin, by its weight lambda_m > 0.
        others: smallest margins of other point estimates, by label.

    Raises:
        ValueError: if there is no draw whose margin is known or no weight, or a number is infinite.
    """
    draws = _checked(draws)
    if not weights or not all(0 < weight < np.inf for weight in weights):
        raise ValueError(f"weights are {list(weights)}: expected finite numbers > 0")
    figure = new_figure(DOUBLE, 3.0, layout="constrained")
    left, right = figure.subplots(1, 2)
    ordered = dict(sorted(weights.items()))
    marks = {f"margin {weight:g}": value for weight, value in ordered.items()} | dict(others)
    entries = _posterior_panel(left, 0, draws, marks)
    low, lower, middle, upper, high = np.nanquantile(draws, [0.05, 0.25, 0.5, 0.75, 0.95])
    right.axhspan(low, high, color="0.92", linewidth=0)
    right.axhspan(lower, upper, color="0.82", linewidth=0)
    right.axhline(middle, color="0.45", linewidth=0.8)
    for number, (name, value) in enumerate(marks.items()):
        if name in others:
            style = line_style(number)
            right.axhline(value, color=style["color"], linestyle=style["linestyle"], linewidth=1.2)
    (curve,) = right.plot(
        list(ordered), list(ordered.values()), "o-", color=COLOURS[2], markersize=3.5, linewidth=0.9
    )
    right.set_xscale("log")
    entries["MAP of margin over its weight"] = curve
    label_axes(right, 1, "weight of the barrier, lambda_m", "smallest margin (sigma_min)")
    add_legend(figure, entries)
    return figure


@styled
def reliability_diagram(curves: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Figure:
    """Draw how often the most probable token is right, over the probability it was given.

    Args:
        curves: confidence and accuracy of every bin, by label of a run; NaN where it is empty.
    """
    figure = new_figure(SINGLE, 3.0, layout="constrained")
    axes = figure.add_subplot()
    entries: dict[str, Artist] = {}
    (entries["calibrated"],) = axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
    for number, (label, (confidence, accuracy)) in enumerate(curves.items()):
        kept = np.isfinite(confidence)
        (entries[label],) = axes.plot(
            np.asarray(confidence)[kept], np.asarray(accuracy)[kept], **line_style(number)
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    label_axes(axes, None, "predicted probability", "fraction right")
    add_legend(figure, entries)
    return figure


@styled
def support_map(probability: ArrayLike, symbols: Sequence[Sequence[str]] | None = None) -> Figure:
    """Draw the posterior probability that each position is its sequence's support token.

    Args:
        probability: (sequence, position).
        symbols: the token of every cell, drawn where cells are large enough.

    Raises:
        ValueError: if the probabilities are no table.
    """
    probability = np.asarray(probability, dtype=np.float64)
    if probability.ndim != 2 or probability.size == 0:
        raise ValueError(
            f"probability has shape {probability.shape}: expected (sequence, position)"
        )
    rows, columns = probability.shape
    figure = new_figure(DOUBLE, min(8.0, 0.9 + 0.19 * rows), layout="constrained")
    axes = figure.add_subplot()
    image = axes.pcolormesh(
        np.arange(columns), np.arange(rows), probability, cmap="Greys", vmin=0.0, shading="nearest"
    )
    dark = probability.max() / 2
    if symbols is not None and probability.size <= _MOST_SYMBOLS:
        for row, column in np.ndindex(rows, columns):
            axes.text(
                column,
                row,
                drawable(symbols[row][column]).translate(_SHOWN),
                ha="center",
                va="center",
                fontsize=6,
                color="white" if probability[row, column] > dark else COLOURS[0],
                parse_math=False,
            )
    axes.invert_yaxis()
    label_axes(axes, None, "position in the sequence", "sequence")
    axes.grid(visible=False)
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label("P(support token)")
    bar.ax.tick_params(labelsize=7)
    return figure


def _checked(draws: ArrayLike) -> np.ndarray:
    draws = np.asarray(draws, dtype=np.float64)
    if draws.ndim != 2 or np.isnan(draws).all() or np.isinf(draws).any():
        raise ValueError(
            f"draws have shape {draws.shape}, {np.isfinite(draws).sum()} of them finite: expected "
            "(chain, draw), at least one finite and the others finite or NaN"
        )
    return draws


def _posterior_panel(
    axes: Axes, number: int | None, draws: np.ndarray, marks: Mapping[str, float]
) -> dict[str, Artist]:
    entries: dict[str, Artist] = {}
    known = draws[~np.isnan(draws)]
    edges = np.histogram_bin_edges(known, bins=min(40, max(10, round(2 * known.size ** (1 / 3)))))
    heights, _ = np.histogram(known, edges, density=True)
    unknown = draws.size - known.size
    label = (
        f"posterior without {unknown} of {draws.size} draws: not known" if unknown else "posterior"
    )
    entries[label] = axes.stairs(heights, edges, fill=True, color="0.85", linewidth=0)
    for chain in draws:
        of_chain = chain[~np.isnan(chain)]
        if not of_chain.size:
            continue
        height, _ = np.histogram(of_chain, edges, density=True)
        middles = (edges[1:] + edges[:-1]) / 2
        (line,) = axes.plot(middles, height, color="0.45", linewidth=0.6, zorder=2)
        entries["each chain"] = line
    for position, (name, value) in enumerate(marks.items()):
        style = line_style(position)
        entries[name] = axes.axvline(
            value, color=style["color"], linestyle=style["linestyle"], linewidth=1.2, zorder=3
        )
    entries |= mark_boundary(axes, "x")
    axes.set_ylim(bottom=0)
    label_axes(axes, number, "smallest margin (sigma_min)", "posterior density")
    return entries
