"""Figures of posteriors: smallest margins, and the probability of being the support token.

The functions return a figure and write nothing; `save_figure` does.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from probattn.inference.figure_style import (
    COLOURS,
    DOUBLE,
    SINGLE,
    add_legend,
    drawable,
    dress,
    look,
    mark_boundary,
    new_figure,
    styled,
)

# A space, and the symbol that stands for all characters that a vocabulary does not keep.
_SHOWN = str.maketrans({" ": "\N{OPEN BOX}", "\N{REPLACEMENT CHARACTER}": "\N{MIDDLE DOT}"})
_MOST_SYMBOLS = 32 * 64  # cells of a map that are wide enough for the token's symbol


@styled
def smallest_margin(
    draws: ArrayLike, marks: Mapping[str, float] | None = None, *, label: str = "posterior"
) -> Figure:
    """Posterior of the smallest margin, with point estimates marked in it.

    Args:
        draws: smallest margin, (chain, draw). Each chain is a thin line, all together the area.
        marks: smallest margin of point estimates, by label.
        label: of the posterior.

    Raises:
        ValueError: if there is no draw, or one is not finite.
    """
    draws = np.asarray(draws, dtype=np.float64)
    marks = marks or {}
    if draws.ndim != 2 or draws.size == 0 or not np.isfinite(draws).all():
        raise ValueError(f"draws have shape {draws.shape}: expected finite (chain, draw)")
    figure = new_figure(SINGLE if len(marks) < 4 else DOUBLE, 2.6, layout="constrained")
    axes = figure.add_subplot()
    entries: dict[str, Artist] = {}
    edges = np.histogram_bin_edges(draws, bins=min(40, max(10, round(2 * draws.size ** (1 / 3)))))
    heights, _ = np.histogram(draws, edges, density=True)
    entries[label] = axes.stairs(heights, edges, fill=True, color="0.85", linewidth=0)
    for number, chain in enumerate(draws):
        height, _ = np.histogram(chain, edges, density=True)
        (line,) = axes.plot(
            (edges[1:] + edges[:-1]) / 2, height, color="0.45", linewidth=0.6, zorder=2
        )
        if number == 0:
            entries["each chain"] = line
    for number, (name, value) in enumerate(marks.items()):
        style = look(number)
        entries[name] = axes.axvline(
            value, color=style["color"], linestyle=style["linestyle"], linewidth=1.2, zorder=3
        )
    entries |= mark_boundary(axes, "x")
    axes.set_ylim(bottom=0)
    dress(axes, None, "smallest margin (sigma_min)", "posterior density")
    add_legend(figure, entries)
    return figure


@styled
def support_map(probability: ArrayLike, symbols: Sequence[Sequence[str]] | None = None) -> Figure:
    """Posterior probability that each position is its sequence's support token.

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
    dress(axes, None, "position in the sequence", "sequence")
    axes.grid(visible=False)
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label("P(support token)")
    bar.ax.tick_params(labelsize=7)
    return figure
