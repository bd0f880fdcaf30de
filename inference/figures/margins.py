"""Figures of margins: along a text, and their distribution."""

from collections.abc import Mapping

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from probattn.inference.figures import data
from probattn.inference.figures.style import (
    COLOURS,
    DOUBLE,
    SINGLE,
    SUPPORT_COLOUR,
    TYPE_SIZE,
    add_legend,
    label_axes,
    line_style,
    mark_boundary,
    new_figure,
    styled,
)

__all__ = ["margin_along_text", "margin_distribution"]

_POINTS = 600  # points of a line along a text; more would lie less than two pixels apart
_WINDOW_TICKS = 200  # window starts; more would be a band


@styled
def margin_along_text(
    margins: Mapping[str, ArrayLike],
    *,
    support: ArrayLike,
    window_starts: ArrayLike | None = None,
    title: str | None = None,
) -> Figure:
    """Draw margins of one text against the position, a panel per label, and the boundary at 0.

    Of more than 1200 tokens a panel shows the smallest margin in each of at most 600 stretches, at
    its own position, and the axis says so. A margin of -inf is drawn at a lower edge, one of NaN or
    +inf not at all. Of more than 1200 support tokens those of the smallest margin in a stretch are
    marked. More than 200 window starts are left out.

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
        at = data.smallest_of_each(margin, stride)
        marked = support if number == 0 else support[:0]
        if len(marked) > 2 * _POINTS:
            marked = data.one_of_each(margin, marked, stride)
        drawn = data.above_an_edge(np.concatenate([margin[at], margin[marked]]))
        panel.plot(at, drawn[: len(at)], color=COLOURS[0], linewidth=0.7, label=label)
        if marked.size:
            [entries["support token"]] = panel.plot(
                marked,
                drawn[len(at) :],
                linestyle="",
                marker="D",
                markersize=4.5,
                color=SUPPORT_COLOUR,
                markeredgecolor="black",
                markeredgewidth=0.6,
                zorder=3,
                label="support token",
            )
        label_axes(panel, number if len(values) > 1 else None, "", "", title=label)
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
def margin_distribution(
    margins: Mapping[str, ArrayLike], *, among: ArrayLike | slice = slice(None)
) -> Figure:
    """Draw the empirical distribution of margins, with a logarithmic axis for its lower tail.

    A marker is at the smallest margin of each label, which the legend states. NaN is left out; -inf
    and +inf count but are not drawn, and the legend says how many.

    Args:
        margins: label, with the kind of margin -> margins, shape (N,), N of its own.
        among: which of them count, an index of each array; by default all.

    Raises:
        ValueError: if there are no margins, or those of a label are no vector or none is finite.
    """
    data.check_any("margins", margins)
    figure = new_figure(SINGLE, 2.3 + 0.17 * len(margins), layout="constrained")
    axes = figure.add_subplot()
    entries: dict[str, Artist] = {}
    kept = among if isinstance(among, slice) else np.asarray(among)
    for number, (label, margin) in enumerate(margins.items()):
        name = f"margins[{label!r}]"
        counted = data.vector(name, margin)[kept]
        ordered, fraction = data.cumulative(name, counted)
        style = line_style(number) | {"drawstyle": "steps-post", "markevery": [0]}
        [line] = axes.plot(ordered, fraction, label=label, **style)
        others = counted.size - int(np.isfinite(counted).sum())
        note = f", {others} not finite" if others else ""
        entries[f"{label} (min {ordered[0]:.3g}{note})"] = line
    axes.set_yscale("log")
    axes.set_ylim(top=1.3)
    label_axes(axes, None, "margin of a token", "cumulative fraction")
    add_legend(figure, entries | mark_boundary(axes, "x"))
    return figure
