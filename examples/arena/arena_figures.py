"""The figures of the arena: losses at every learning rate, and the trade-off of tuned networks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from arena_statistics import (
    BySeed,
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
    COLOURS,
    DOUBLE,
    SINGLE,
    add_legend,
    label_axes,
    new_figure,
    styled,
)

_PANELS = {
    "what practitioners use": ("sigma_reparam", "qk_norm", "z_loss", "dropout"),
    "barriers": ("margin", "margin_first_layer", "full"),
    "bounds on attention": ("spectral_cap", "jacobian"),
    "noise": ("occasional", "occasional_first_layer", "latent"),
}
_COLOURS = [each for each in COLOURS if each != "#000000"]  # black is for ce
_MARKERS = "s^Dv"  # of the panels
_TIMES = "\N{MULTIPLICATION SIGN}"
_APART = 1.06  # between the bars of two methods at one rate


@styled
def rates_figure(results: Results, labels: dict[str, str], clip: float) -> Figure:
    """Draw the loss of every method against the learning rate, with intervals over seeds.

    A wide interval is cut off where the panel ends.
    """
    reference = losses_by_rate(results, results.reference, clip)
    panels = {
        title: {
            subject: losses
            for subject in _of_methods(results, methods)
            if (losses := losses_by_rate(results, subject, clip))
        }
        for title, methods in _PANELS.items()
    }
    panels = {title: found for title, found in panels.items() if found}
    columns = 2 if len(panels) > 1 else 1
    rows = max(1, -(-len(panels) // columns))
    figure = new_figure(DOUBLE if columns > 1 else SINGLE, 3.1 * rows, layout="constrained")
    means: list[float] = []
    for place, (title, found) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, 1 + place)
        for number, (subject, losses) in enumerate(found.items()):
            moved = _APART ** (number - (len(found) - 1) / 2)
            label = _label(results, subject, labels, rate=False)
            means += _curve(axes, losses, _style(results, subject), label, moved=moved)
        if reference:  # last, and so above the others
            means += _curve(axes, reference, _style(results, results.reference), "ce")
        axes.set_xscale("log")
        label_axes(axes, place, "learning rate", "bits per character", title=title)
        axes.legend(loc="upper left")
    for axes in figure.axes:
        axes.set_ylim(min(means) - 0.3, max(means) + 0.4)
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
            style = _style(results, subject) | {"linestyle": "none", "markersize": 5}
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


def _style(results: Results, subject: Subject) -> dict[str, Any]:
    """Return how a subject is drawn in all figures: ce is black, and a panel has one marker."""
    if subject.method == "ce":
        tuned = subject != results.reference
        return {"color": "0.6" if tuned else "black", "marker": "o", "markersize": 3.5}
    for marker, methods in zip(_MARKERS, _PANELS.values(), strict=True):
        if subject.method in methods:
            number = [each[:2] for each in _of_methods(results, methods)].index(subject[:2])
            colour = _COLOURS[number % len(_COLOURS)]
            return {"color": colour, "marker": marker, "markersize": 3.5}
    raise KeyError(subject.method)


def _label(results: Results, subject: Subject, labels: dict[str, str], *, rate: bool = True) -> str:
    """Return what a legend calls a subject: with its setting where the method has several."""
    label = labels[subject.method]
    several = sum(each.method == subject.method for each in results.subjects()) > 1
    if not several:
        return label
    if subject.setting == "plain":
        return f"{label}, rate {subject.rate:g}" if rate else label
    return f"{label}, {subject.setting.replace('=', ' ')}"


def _curve(
    axes: Axes,
    losses: Mapping[float, BySeed],
    style: Mapping[str, Any],
    label: str,
    *,
    moved: float = 1.0,
) -> list[float]:
    """Draw means and intervals, and return the means."""
    found = [interval(of_rate.values()) for of_rate in losses.values()]
    axes.errorbar(
        [rate * moved for rate in losses],
        [each.mean for each in found],
        yerr=[np.nan_to_num(each.half_width) for each in found],
        **{**style, "label": label, "linewidth": 1.2, "elinewidth": 0.6},
    )
    return [each.mean for each in found]


def _reach(found: Interval) -> float | None:
    return None if np.isnan(found.half_width) else found.half_width
