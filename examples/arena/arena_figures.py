"""The figures of the arena: losses at every learning rate, and the trade-off of tuned networks."""

from collections.abc import Sequence

import numpy as np
from arena_statistics import (
    Results,
    Subject,
    column,
    degradation,
    losses_by_rate,
)
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probattn.inference.evaluation.intervals import Interval, interval, paired_cost
from probattn.inference.figures.style import (
    DOUBLE,
    add_legend,
    label_axes,
    line_style,
    new_figure,
    styled,
)

_PANELS = {
    "what practitioners use": (
        *("ce", "sigma_reparam", "qk_norm", "z_loss"),
        *("spectral_cap", "jacobian", "dropout"),
    ),
    "what this library adds": (
        *("ce", "margin", "full", "margin_first_layer"),
        *("occasional", "occasional_first_layer", "latent"),
    ),
}
_TIMES = "\N{MULTIPLICATION SIGN}"


@styled
def rates_figure(results: Results, labels: dict[str, str], clip: float) -> Figure:
    """Draw the loss of every method against the learning rate, with intervals over seeds."""
    figure = new_figure(DOUBLE, 3.9, layout="constrained")
    entries: dict[str, Artist] = {}
    for place, (title, methods) in enumerate(_PANELS.items()):
        axes = figure.add_subplot(1, 2, 1 + place)
        for subject in _of_methods(results, methods):
            losses = losses_by_rate(results, subject, clip)
            if losses:
                found = [interval(of_rate.values()) for of_rate in losses.values()]
                style = line_style(_number(results, subject))
                entries[_label(results, subject, labels, rate=False)] = _bars(
                    axes, list(losses), found, style
                )
        axes.set_xscale("log")
        label_axes(axes, place, "learning rate", "bits per character", title=title)
    low = min(axes.get_ylim()[0] for axes in figure.axes)
    high = max(axes.get_ylim()[1] for axes in figure.axes)
    for axes in figure.axes:
        axes.set_ylim(low, high)
    add_legend(figure, entries)
    return figure


@styled
def trade_off_figure(results: Results, labels: dict[str, str]) -> Figure:
    """Draw clean cost against what noise and rounding do, of the tuned networks."""
    figure = new_figure(DOUBLE, 3.9, layout="constrained")
    entries: dict[str, Artist] = {}
    clean = column(results, results.reference, "bpc")
    panels = {"noise_0.5": "noise of 0.5 RMS", "rounded": "weights rounded"}
    for place, (name, title) in enumerate(panels.items()):
        axes = figure.add_subplot(1, 2, 1 + place)
        for subject in results.subjects():
            cost = paired_cost(column(results, subject, "bpc"), clean)
            worse = interval(degradation(results, subject, name).values())
            style = line_style(_number(results, subject)) | {"linestyle": "none", "markersize": 5}
            entries[_label(results, subject, labels)] = axes.errorbar(
                cost.mean,
                worse.mean,
                xerr=_reach(cost),
                yerr=_reach(worse),
                **style | {"elinewidth": 0.8},
            )
        cost, worse = "clean bits per character (% over ce)", f"bits per character ({_TIMES} clean)"
        label_axes(axes, place, cost, worse, title=title)
    add_legend(figure, entries)
    return figure


def _of_methods(results: Results, methods: Sequence[str]) -> list[Subject]:
    found: dict[tuple[str, str], Subject] = {}
    for subject in results.subjects():
        if subject.method in methods:
            found.setdefault(subject[:2], subject)
    return list(found.values())


def _number(results: Results, subject: Subject) -> int:
    """Return the number of a subject's line style, the same in all figures."""
    return results.subjects().index(subject)


def _label(results: Results, subject: Subject, labels: dict[str, str], *, rate: bool = True) -> str:
    """Return what a legend calls a subject: with its setting where the method has several."""
    label = labels[subject.method]
    several = sum(each.method == subject.method for each in results.subjects()) > 1
    if not several:
        return label
    if subject.setting == "plain":
        return f"{label}, rate {subject.rate:g}" if rate else label
    return f"{label}, {subject.setting.replace('=', ' ')}"


def _bars(axes: Axes, x: Sequence[float], found: Sequence[Interval], style: dict) -> Artist:
    return axes.errorbar(
        x,
        [each.mean for each in found],
        yerr=[np.nan_to_num(each.half_width) for each in found],
        **style | {"elinewidth": 0.6},
    )


def _reach(found: Interval) -> float | None:
    return None if np.isnan(found.half_width) else found.half_width
