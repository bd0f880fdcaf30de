"""Figures of what noise does: in sum, kind by kind, and token by token."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from probattn.inference.figures import data
from probattn.inference.figures.style import (
    DOUBLE,
    TYPE_SIZE,
    add_legend,
    label_axes,
    line_style,
    new_figure,
    panel_grid,
    styled,
)

__all__ = ["loss_by_margin", "noise_kinds", "noise_sweep"]

_SIGMA, _TIMES = "\N{GREEK SMALL LETTER SIGMA}", "\N{MULTIPLICATION SIGN}"


@styled
def noise_kinds(results: Mapping[str, Mapping[tuple[str, str], ArrayLike]]) -> Figure:
    """Draw degradation under several kinds of noise: a row for each, a panel per unit of a level.

    Panels share no axis: a worst-case direction harms many times as much as noise of its size. The
    units of a row stand in the order in which they are given.

    Args:
        results: label of a run -> (kind of noise, unit of its levels) -> table (levels, 4) of the
            level, bits per character over those without noise, and the ends of its interval.

    Raises:
        ValueError: if there is no run, a run no table, or a table has another shape.
    """
    data.check_any("results", results)
    tables = {
        label: {
            panel: data.table(f"results[{label!r}][{panel}]", values, 4)
            for panel, values in of_run.items()
        }
        for label, of_run in results.items()
    }
    panels = list(dict.fromkeys(panel for of_run in tables.values() for panel in of_run))
    data.check_any("results", dict.fromkeys(map(str, panels)))
    kinds = list(dict.fromkeys(kind for kind, _ in panels))
    columns = max(sum(kind == each for each, _ in panels) for kind in kinds)
    figure = new_figure(DOUBLE, 0.6 + 1.45 * len(kinds), layout="constrained")
    entries: dict[str, Artist] = {}
    for number, (kind, unit) in enumerate(sorted(panels, key=lambda each: kinds.index(each[0]))):
        place = [each for row, each in panels if row == kind].index(unit)
        panel = figure.add_subplot(len(kinds), columns, 1 + columns * kinds.index(kind) + place)
        for of_run, (label, found) in enumerate(tables.items()):
            if (kind, unit) in found:
                entries[label] = _with_intervals(panel, found[kind, unit], of_run)
        last = [row for row, each in panels if each == unit][-1]
        label_axes(panel, number, unit if kind == last else "", "", title=kind)
    figure.supylabel(f"bits per character ({_TIMES} clean)", size=TYPE_SIZE)
    add_legend(figure, entries)
    return figure


@styled
def loss_by_margin(bins: Mapping[str, Mapping[str, ArrayLike]]) -> Figure:
    """Draw the mean increase of the loss under noise in groups of tokens of growing margin.

    Args:
        bins: what the groups are made by, such as a kind of margin -> label of an attention stage
            -> table (groups, 3) of the mean increase and the ends of its interval, in nats.

    Raises:
        ValueError: if there are no panels or no stages, or a table has another shape.
    """
    data.check_any("bins", bins)
    labels = list(dict.fromkeys(label for stages in bins.values() for label in stages))
    figure, axes = panel_grid(len(bins), 2.3)
    entries: dict[str, Artist] = {}
    for number, (panel, (by, stages)) in enumerate(zip(axes, bins.items(), strict=True)):
        data.check_any(f"bins[{by!r}]", stages)
        for place, (label, values) in enumerate(stages.items()):
            found = data.table(f"bins[{by!r}][{label!r}]", values, 3)
            # Side by side, so that no interval hides another.
            group = 1 + np.arange(len(found)) + 0.09 * (place - (len(stages) - 1) / 2)
            points = np.column_stack([group, found])
            entries[label] = _with_intervals(panel, points, labels.index(label))
        groups = len(found)
        described = f"group of {groups}, by growing margin"
        label_axes(panel, number, described, "increase of the loss (nats)", title=by)
        panel.set_xticks(range(1, groups + 1))
        panel.axhline(0, color="0.3", linewidth=0.6)
    add_legend(figure, entries)
    return figure


@styled
def noise_sweep(results: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Draw bits per character under Gaussian noise on the embeddings.

    Panels (a) and (b) are against its standard deviation sigma, (c) and (d) against sigma in units
    of the embedding RMS; (b) and (d) are relative to the same run without noise.

    Args:
        results: label of a run -> noise_absolute, bpc_absolute, noise_relative and bpc_relative;
            the least noise of a list is 0.

    Raises:
        ValueError: if there is no run, the two lists of a pair differ in length, the least noise is
            not 0, or the BPC there is not positive.
        KeyError: if one of the four lists is missing.
    """
    data.check_any("results", results)
    units = {
        "absolute": f"noise {_SIGMA} (embedding units)",
        "relative": f"noise {_SIGMA} / embedding RMS",
    }
    figure = new_figure(DOUBLE, 4.4, layout="constrained")
    panels = figure.subplots(2, 2)
    for row, (unit, described) in enumerate(units.items()):
        for number, (label, result) in enumerate(results.items()):
            noise, bpc = data.sweep(label, result, unit)
            panels[row, 0].plot(noise, bpc, label=label, **line_style(number))
            panels[row, 1].plot(noise, bpc / bpc[0], label=label, **line_style(number))
        label_axes(panels[row, 0], 2 * row, described, "bits per character")
        label_axes(panels[row, 1], 2 * row + 1, described, f"bits per character ({_TIMES} clean)")
    add_legend(figure, {line.get_label(): line for line in panels[0, 0].lines})
    return figure


def _with_intervals(panel: Axes, table: data.Values, number: int) -> Artist:
    """Draw a curve of the columns 0 and 1 with intervals from column 2 to column 3."""
    x, y, low, high = table.T
    style: dict[str, Any] = line_style(number)
    [line] = panel.plot(x, y, **style)
    panel.vlines(x, low, high, color=style["color"], linewidth=0.9)
    panel.xaxis.set_major_locator(MaxNLocator(6))
    panel.yaxis.set_major_locator(MaxNLocator(4))
    return line
