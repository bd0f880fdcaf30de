"""Figures of a fit: what it learned and what the barrier did meanwhile."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from probattn.inference.figures import data
from probattn.inference.figures.style import (
    DOUBLE,
    SINGLE,
    add_legend,
    drawable,
    label_axes,
    line_style,
    mark_boundary,
    new_figure,
    panel_grid,
    styled,
)

__all__ = ["barrier_curves", "training_curves"]

_TRAINING: dict[str, Any] = {"linestyle": (0, (4, 1.5)), "linewidth": 0.8, "marker": ""}


@styled
def training_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draw bits per character and smallest margin while fitting.

    Panel (a) has the training text dashed and the validation text solid; its axis ends above the
    values of the last four fifths of the steps, so that the steep start does not flatten the rest.
    A further panel follows for each kind of margin that was monitored: margins of different kinds
    share no axis.

    Args:
        runs: label of a run -> the rows of its metrics.jsonl, with keys step, bpc, validation_bpc,
            min_margin and min_margin_kind. A value that is None was not measured and is left out.

    Raises:
        ValueError: if there is no run, or a run without rows.
        KeyError: if a row lacks one of the keys.
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
        style = line_style(number) | {"linestyle": "-", "label": label, "markevery": sparse}
        for key, kind_of_line in (("bpc", _TRAINING), ("validation_bpc", {})):
            steps, bpc = data.metric(rows, key)
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
    label_axes(curves, 0 if kinds else None, "optimizer step", "bits per character")
    for number, (panel, kind) in enumerate(zip(panels, kinds, strict=True), start=1):
        label_axes(panel, number, "optimizer step", f"smallest margin\n({drawable(kind)})")
        entries |= mark_boundary(panel, "y")
    add_legend(figure, entries)
    return figure


# What a panel shows, and whether it is of the attention stage that is watched -> keys of a row.
_WATCHED: dict[tuple[str, bool], tuple[str, ...]] = {
    ("eigenvalues of A + A\N{MODIFIER LETTER CAPITAL T}", True): (
        "coupling_eigenvalue_min",
        "coupling_eigenvalue_max",
    ),
    ("mean margin", True): ("mean_margin",),
    ("mean log det (nats)", True): ("mean_log_det",),
    ("infeasible fraction", True): ("infeasible_fraction",),
    ("embedding RMS", False): ("embedding_rms",),
}


@styled
def barrier_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draw what the barrier does while fitting: coupling, margins, determinants, embeddings.

    Quantities of an attention stage have a panel for each kind of stage that was watched; the
    smallest and the largest eigenvalue of the coupling, A + A^T, share one.

    Args:
        runs: label of a run -> the rows of its metrics.jsonl. Rows that lack a quantity, as those
            of earlier versions do, are left out of its panel.

    Raises:
        ValueError: if there is no run, or no row has any of the quantities.
    """
    data.check_any("runs", runs)
    panels: dict[tuple[str, str], dict[str, list[tuple[data.Values, data.Values]]]] = {}
    for (shown, of_stage), keys in _WATCHED.items():
        for label, rows in runs.items():
            for kind in dict.fromkeys(row.get("min_margin_kind") for row in rows):
                chosen = [row for row in rows if row.get("min_margin_kind") == kind]
                curves = [data.measured(chosen, key) for key in keys]
                if any(steps.size for steps, _ in curves):
                    stage = f" ({kind.split(', ')[-1]})" if of_stage and kind else ""
                    panels.setdefault((shown, stage), {}).setdefault(label, []).extend(curves)
    data.check_any("runs", {"".join(name): None for name in panels})
    figure, axes = panel_grid(len(panels), 1.85)
    entries: dict[str, Artist] = {}
    for number, (panel, ((shown, stage), found)) in enumerate(
        zip(axes, panels.items(), strict=True)
    ):
        for of_run, label in enumerate(runs):
            for steps, values in found.get(label, ()):
                style = line_style(of_run) | {"markevery": 0.2 if len(steps) > 12 else None}
                [entries[label]] = panel.plot(steps, values, **style)
        label_axes(panel, number, "optimizer step", shown + drawable(stage).replace(" (", "\n("))
        panel.yaxis.set_major_locator(MaxNLocator(4))
        panel.ticklabel_format(axis="y", useOffset=False)
        if shown.endswith("fraction"):
            panel.set_ylim(bottom=min(0, panel.dataLim.y0))
    add_legend(figure, entries)
    return figure
