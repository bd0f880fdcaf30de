"""Figures of runs: training, robustness to noise, and margins along a text, over it and in sum.

The functions return a figure and write nothing; `save_figure` does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from probattn.inference import figure_data as data
from probattn.inference.figure_style import (
    COLOURS,
    DOUBLE,
    SINGLE,
    SUPPORT_COLOUR,
    TYPE_SIZE,
    add_legend,
    drawable,
    dress,
    look,
    mark_boundary,
    new_figure,
    save_figure,
    styled,
)
from probattn.inference.text_figure import text_by_margin

__all__ = [
    "margin_along_text",
    "margin_distribution",
    "noise_sweep",
    "save_figure",
    "text_by_margin",
    "training_curves",
]

_SIGMA, _TIMES = "\N{GREEK SMALL LETTER SIGMA}", "\N{MULTIPLICATION SIGN}"
_TRAINING: dict[str, Any] = {"linestyle": (0, (4, 1.5)), "linewidth": 0.8, "marker": ""}
_POINTS = 600  # of a line along a text; more would lie less than two pixels apart
_WINDOW_TICKS = 200  # window starts; more would be a band


@styled
def training_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Bits per character and smallest margin while fitting.

    Panel (a) has the training text dashed and the validation text solid; its axis ends above the
    values of the last four fifths of the steps, so that the steep start does not flatten the rest.
    A further panel follows for each kind of margin that was monitored: margins of different kinds
    share no axis.

    Args:
        runs: label of a run -> the rows of its metrics.jsonl, with keys step, bpc, validation_bpc,
            min_margin and min_margin_kind. A value that is None was not measured and is left out.

    Raises:
        ValueError: if there is no run, or a run without rows, or a row without one of the keys.
    """
    data.check_any("runs", runs)
    margins = {label: data.smallest_margins(label, rows) for label, rows in runs.items()}
    kinds = list(dict.fromkeys(kind for of_run in margins.values() for kind in of_run))
    columns = min(3, 1 + len(kinds))
    lines = -(-(1 + len(kinds)) // columns)
    width = DOUBLE if kinds else SINGLE
    figure = new_figure(width, 0.5 + 2.0 * lines, layout="constrained")
    curves, *panels = (
        figure.add_subplot(lines, columns, 1 + index) for index in range(1 + len(kinds))
    )
    entries: dict[str, Artist] = {}
    late: list[data.Values] = []
    for number, (label, rows) in enumerate(runs.items()):
        sparse = (0.04 * number % 0.2, 0.2) if len(rows) > 12 else None
        style = look(number) | {"linestyle": "-", "label": label, "markevery": sparse}
        for key, kind_of_line in (("bpc", _TRAINING), ("validation_bpc", {})):
            steps, bpc = data.metric(label, rows, key)
            curves.plot(steps, bpc, **style | kind_of_line)
            late.append(data.after_the_start(steps, bpc))
        for panel, kind in zip(panels, kinds, strict=True):
            if kind in margins[label]:
                panel.plot(*margins[label][kind], **style)
        entries[label] = curves.lines[-1]
    entries["training text"] = Line2D([], [], color="0.3", **_TRAINING)
    entries["validation text"] = Line2D([], [], color="0.3")
    low, high = data.finite_range(np.concatenate(late))
    room = max(0.1 * (high - low), 0.02 * high)
    if curves.dataLim.y1 > high + room:
        curves.set_ylim(low - room, high + room)
    dress(curves, 0 if kinds else None, "optimizer step", "bits per character")
    for number, (panel, kind) in enumerate(zip(panels, kinds, strict=True), start=1):
        dress(panel, number, "optimizer step", f"smallest margin\n({drawable(kind)})")
        entries |= mark_boundary(panel, "y")
    add_legend(figure, entries)
    return figure


@styled
def noise_sweep(results: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Bits per character under Gaussian noise on the embeddings.

    Panels (a) and (b) are against its standard deviation sigma, (c) and (d) against sigma in units
    of the embedding RMS; (b) and (d) are relative to the same run without noise.

    Args:
        results: label of a run -> noise_absolute, bpc_absolute, noise_relative and bpc_relative;
            the least noise of a list is 0.

    Raises:
        ValueError: if there is no run, one of the four lists is missing, the two of a pair differ
            in length, the least noise is not 0, or the BPC there is not positive.
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
            panels[row, 0].plot(noise, bpc, label=label, **look(number))
            panels[row, 1].plot(noise, bpc / bpc[0], label=label, **look(number))
        dress(panels[row, 0], 2 * row, described, "bits per character")
        dress(panels[row, 1], 2 * row + 1, described, f"bits per character ({_TIMES} clean)")
    add_legend(figure, {line.get_label(): line for line in panels[0, 0].lines})
    return figure


@styled
def margin_along_text(
    margins: Mapping[str, ArrayLike],
    *,
    support: ArrayLike,
    window_starts: ArrayLike | None = None,
    title: str | None = None,
) -> Figure:
    """Margins of one text against the position, a panel for each label, with the boundary at 0.

    Of more than 1200 tokens a panel shows the smallest margin in each of at most 600 stretches, at
    its own position, and the axis says so. A margin of -inf is drawn at a lower edge, one of NaN or
    +inf not at all. More than 200 window starts are left out.

    Args:
        margins: label, with the kind of margin -> margins, shape (N,).
        support: positions of the support tokens of the first label, shape (k,).
        window_starts: positions where the context was started afresh, shape (windows,).
        title: one line above the panels.

    Raises:
        ValueError: if there are no margins, they are no vectors of one length, or a position is no
            integer from 0 to N - 1.
    """
    values = data.aligned(margins)
    length = len(next(iter(values.values())))
    support = data.positions("support", support, length)
    starts = data.positions("window_starts", () if window_starts is None else window_starts, length)
    stride = 1 if length <= 2 * _POINTS else -(-length // _POINTS)
    figure = new_figure(DOUBLE, 0.7 + max(1.05 * len(values), 1.5), layout="constrained")
    panels = figure.subplots(len(values), 1, sharex=True, squeeze=False)[:, 0]
    entries: dict[str, Artist] = {}
    for number, (panel, (label, margin)) in enumerate(zip(panels, values.items(), strict=True)):
        drawn = data.above_an_edge(margin)
        at = data.smallest_of_each(drawn, stride)
        panel.plot(at, drawn[at], color=COLOURS[0], linewidth=0.7, label=label)
        if number == 0 and support.size:
            [entries["support token"]] = panel.plot(
                support,
                drawn[support],
                linestyle="",
                marker="D",
                markersize=4.5,
                color=SUPPORT_COLOUR,
                markeredgecolor="black",
                markeredgewidth=0.6,
                zorder=3,
                label="support token",
            )
        dress(panel, number if len(values) > 1 else None, "", "", title=label)
        entries |= mark_boundary(panel, "y")
        if 0 < starts.size <= _WINDOW_TICKS:
            bottom, top = panel.get_ylim()
            panel.set_ylim(bottom, top + 0.12 * (top - bottom))  # room above the data
            along = panel.get_xaxis_transform()
            panel.vlines(starts, 0.93, 1.0, transform=along, color="0.5", linewidth=0.6)
            entries["window start"] = Line2D([], [], color="0.5", marker="|", linestyle="")
        panel.set_xlim(-0.01 * length, 1.01 * length)
        panel.yaxis.set_major_locator(MaxNLocator(4))
    panels[-1].set_xlabel("position in the text (tokens)")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supylabel(
        "margin" if stride == 1 else f"smallest margin of each {stride} tokens", size=TYPE_SIZE
    )
    add_legend(figure, entries, title=title or "")
    return figure


@styled
def margin_distribution(margins: Mapping[str, ArrayLike]) -> Figure:
    """Empirical distribution of margins, its lower tail spread out by a logarithmic axis.

    A marker is at the smallest margin of each label, which the legend states. NaN is left out; -inf
    and +inf count but are not drawn, and the legend says how many.

    Args:
        margins: label, with the kind of margin -> margins, shape (N,), N of its own.

    Raises:
        ValueError: if there are no margins, or those of a label are no vector or none is finite.
    """
    data.check_any("margins", margins)
    figure = new_figure(SINGLE, 2.3 + 0.17 * len(margins), layout="constrained")
    axes = figure.add_subplot()
    entries: dict[str, Artist] = {}
    for number, (label, margin) in enumerate(margins.items()):
        ordered, fraction = data.cumulative(f"margins[{label!r}]", margin)
        style = look(number) | {"drawstyle": "steps-post", "markevery": [0]}
        [line] = axes.plot(ordered, fraction, label=label, **style)
        others = np.size(margin) - len(ordered)
        note = f", {others} not finite" if others else ""
        entries[f"{label} (min {ordered[0]:.3g}{note})"] = line
    axes.set_yscale("log")
    axes.set_ylim(top=1.3)
    dress(axes, None, "margin of a token", "cumulative fraction")
    add_legend(figure, entries | mark_boundary(axes, "x"))
    return figure
