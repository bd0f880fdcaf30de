"""Figures of what noise does, token by token and kind by kind, and of what the barrier does."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from probattn.inference import figure_data as data
from probattn.inference.figure_style import (
    DOUBLE,
    TYPE_SIZE,
    add_legend,
    drawable,
    dress,
    look,
    new_figure,
    styled,
)

__all__ = ["barrier_curves", "loss_by_margin", "noise_kinds"]

_TIMES = "\N{MULTIPLICATION SIGN}"

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
def noise_kinds(results: Mapping[str, Mapping[tuple[str, str], ArrayLike]]) -> Figure:
    """Degradation under noise of several kinds: a row for each, a panel for each unit of a level.

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
        dress(panel, number, unit if kind == last else "", "", title=kind)
    figure.supylabel(f"bits per character ({_TIMES} clean)", size=TYPE_SIZE)
    add_legend(figure, entries)
    return figure


@styled
def loss_by_margin(bins: Mapping[str, Mapping[str, ArrayLike]]) -> Figure:
    """Mean increase of the loss under noise in groups of tokens of growing margin.

    Args:
        bins: what the groups are made by, such as a kind of margin -> label of an attention stage
            -> table (groups, 3) of the mean increase and the ends of its interval, in nats.

    Raises:
        ValueError: if there are no panels or no stages, or a table has another shape.
    """
    data.check_any("bins", bins)
    labels = list(dict.fromkeys(label for stages in bins.values() for label in stages))
    figure, axes = _grid(len(bins), 2.3)
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
        dress(panel, number, described, "increase of the loss (nats)", title=by)
        panel.set_xticks(range(1, groups + 1))
        panel.axhline(0, color="0.3", linewidth=0.6)
    add_legend(figure, entries)
    return figure


@styled
def barrier_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """What the barrier does while fitting: coupling, margins, determinants, embeddings.

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
    figure, axes = _grid(len(panels), 1.85)
    entries: dict[str, Artist] = {}
    for number, (panel, ((shown, stage), found)) in enumerate(
        zip(axes, panels.items(), strict=True)
    ):
        for of_run, label in enumerate(runs):
            for steps, values in found.get(label, ()):
                style = look(of_run) | {"markevery": 0.2 if len(steps) > 12 else None}
                [entries[label]] = panel.plot(steps, values, **style)
        dress(panel, number, "optimizer step", shown + drawable(stage).replace(" (", "\n("))
        panel.yaxis.set_major_locator(MaxNLocator(4))
        panel.ticklabel_format(axis="y", useOffset=False)
        if shown.endswith("fraction"):
            panel.set_ylim(bottom=min(0, panel.dataLim.y0))
    add_legend(figure, entries)
    return figure


def _grid(count: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    """A figure of a double column with that many panels, at most three in a row."""
    columns = min(count, 3) if count != 4 else 2
    lines = -(-count // columns)
    figure = new_figure(DOUBLE, 0.5 + height * lines, layout="constrained")
    return figure, [figure.add_subplot(lines, columns, 1 + index) for index in range(count)]


def _with_intervals(panel: Axes, table: data.Values, number: int) -> Artist:
    """A curve of the columns 0 and 1 with intervals from column 2 to column 3."""
    x, y, low, high = table.T
    style: dict[str, Any] = look(number)
    [line] = panel.plot(x, y, **style)
    panel.vlines(x, low, high, color=style["color"], linewidth=0.9)
    panel.xaxis.set_major_locator(MaxNLocator(6))
    panel.yaxis.set_major_locator(MaxNLocator(4))
    return line
