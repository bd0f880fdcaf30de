"""Figures and tables, drawn from the CSV files of a folder alone.

    python examples/reproduce/figures.py examples/reproduce/results

Each is drawn if its runs are there. Means are over seeds, bands and bars are their 95 % intervals.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from plan import TUNING_SEEDS, read_labels
from summary import (
    PAPER,
    REFERENCE,
    Results,
    Row,
    by_seed,
    curves_of,
    numbers,
    of_stages,
    read_results,
    settings_of,
    tuned_settings,
)
from table import write_tables

from probattn.inference.evaluation.intervals import Interval, interval, paired_cost
from probattn.inference.figures.style import (
    DOUBLE,
    add_legend,
    label_axes,
    line_style,
    new_figure,
    save_figure,
    styled,
)

_TIMES, _SIGMA = "\N{MULTIPLICATION SIGN}", "\N{GREEK SMALL LETTER SIGMA}"
_DEGRADATION = f"bits per character ({_TIMES} clean)"
_UNITS = {
    "absolute": f"noise {_SIGMA} (embedding units)",
    "relative": f"noise {_SIGMA} / embedding RMS",
}
_POINTS = {"0.5": ("absolute", 0.5), "0.5 RMS": ("relative", 0.5), "1 RMS": ("relative", 1.0)}


def draw(folder: Path) -> list[Path]:
    """Draw what can be drawn of the tables in a folder, into it; returns the files."""
    results = read_results(folder)
    there = settings_of(results.noise)
    written = write_tables(results, folder)
    if all(name in there.get(method, ()) for method, name in PAPER):
        written.append(save_figure(training_curves(results.curves), folder / "curves.png"))
        written.append(save_figure(noise_sweep(results.noise), folder / "noise.png"))
    if len(there.get("margin", ())) > 1 and REFERENCE[1] in there.get("ce", ()):
        written.append(save_figure(weight_sweep(results), folder / "sweep.png"))
    if len(there) > 2 and REFERENCE[1] in there.get("ce", ()):
        written.append(save_figure(trade_off(results.noise), folder / "trade_off.png"))
    if len(_frontier_curves(results.noise)) > 1:
        written.append(save_figure(frontier(results.noise), folder / "frontier.png"))
    if results.comparisons:
        written.append(save_figure(harm_by_margin(results), folder / "sensitivity.png"))
    return written


@styled
def training_curves(curves: Sequence[Row]) -> Figure:
    """Draw bits per character of training and evaluation text against epochs, as in Fig. 7.4."""
    figure = new_figure(DOUBLE, 2.5, layout="constrained")
    entries: dict[str, Artist] = {}
    panels = {"bpc": "text that is fitted", "validation_bpc": "text to evaluate on"}
    for number, (column, title) in enumerate(panels.items()):
        axes = figure.add_subplot(1, 2, 1 + number)
        late = []
        for place, (method, setting) in enumerate(PAPER):
            rows = [r for r in curves if (r["method"], r["setting"]) == (method, setting)]
            steps = sorted({row["step"] for row in rows})
            found = [interval(row[column] for row in rows if row["step"] == step) for step in steps]
            epochs = [next(row["epoch"] for row in rows if row["step"] == step) for step in steps]
            entries[_label(method, setting)] = _curve(axes, epochs, found, place)
            late += [each.mean for each in found[len(found) // 5 :]]
        # The steep start would flatten the rest.
        room = 0.15 * (max(late) - min(late)) + 0.02
        axes.set_ylim(min(late) - room, max(late) + room)
        label_axes(axes, number, "epoch", "bits per character", title=title)
    add_legend(figure, entries)
    return figure


@styled
def noise_sweep(noise: Sequence[Row]) -> Figure:
    """Draw bits per character under Gaussian noise, and over those without, as in Fig. 7.5."""
    figure = new_figure(DOUBLE, 4.4, layout="constrained")
    entries: dict[str, Artist] = {}
    columns = {"bpc": "bits per character", "degradation": _DEGRADATION}
    for line, (unit, described) in enumerate(_UNITS.items()):
        for place, (column, y) in enumerate(columns.items()):
            axes = figure.add_subplot(2, 2, 1 + 2 * line + place)
            for number, (method, setting) in enumerate(PAPER):
                levels = _levels(noise, method, setting, unit)
                found = [
                    interval(
                        by_seed(noise, column, method, setting, unit=unit, level=level).values()
                    )
                    for level in levels
                ]
                entries[_label(method, setting)] = _curve(axes, levels, found, number)
            label_axes(axes, 2 * line + place, described, y)
    add_legend(figure, entries)
    return figure


@styled
def weight_sweep(results: Results) -> Figure:
    """Draw what the weight of the barrier costs, gains, and does to the size of embeddings."""
    noise, (method, unweighted) = results.noise, REFERENCE
    figure = new_figure(DOUBLE, 2.5, layout="constrained")
    costs, degradations, sizes = (figure.add_subplot(1, 3, 1 + place) for place in range(3))
    names = settings_of(noise)["margin"]
    weights = [numbers(name)[-1] for name in names]
    clean = by_seed(noise, "bpc", *REFERENCE)
    found = [paired_cost(by_seed(noise, "bpc", "margin", name), clean) for name in names]
    _curve(costs, weights, found, 0)
    costs.axhline(0, color="0.3", linewidth=0.8)
    entries: dict[str, Artist] = {}
    for number, (label, (unit, level)) in enumerate(_POINTS.items()):
        at = {"unit": unit, "level": level}
        found = [interval(by_seed(noise, "degradation", "margin", n, **at).values()) for n in names]
        entries[f"{_SIGMA} = {label}"] = _curve(degradations, weights, found, number)
        of_ce = interval(by_seed(noise, "degradation", method, unweighted, **at).values()).mean
        style = {key: line_style(number)[key] for key in ("color", "linestyle")}
        degradations.axhline(of_ce, linewidth=0.7, **style)
    rms = {
        name: interval(
            row["embedding_rms"] for row in results.runs if (row["method"], row["setting"]) == name
        )
        for name in [REFERENCE, *(("margin", each) for each in names)]
    }
    _curve(sizes, weights, [rms["margin", name] for name in names], 0)
    sizes.axhline(rms[REFERENCE].mean, color="0.3", linewidth=0.8)
    weight = "weight of the barrier"
    label_axes(costs, 0, weight, "clean bits per character (% over ce)")
    label_axes(degradations, 1, weight, _DEGRADATION, title="level line: ce")
    label_axes(sizes, 2, weight, "embedding RMS", title="level line: ce")
    for axes in (costs, degradations, sizes):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    add_legend(figure, entries)
    return figure


@styled
def trade_off(noise: Sequence[Row]) -> Figure:
    """Draw clean cost against degradation, at half and at one embedding RMS.

    A line joins the values of a method's setting, which were tried with the seeds that tune it; the
    marker with bars is its tuned setting with every seed. Costs are paired by seed.
    """
    tried, chosen = settings_of(noise), tuned_settings(noise, range(TUNING_SEEDS))
    clean = by_seed(noise, "bpc", *REFERENCE)
    figure = new_figure(DOUBLE, 3.9, layout="constrained")
    entries: dict[str, Artist] = {}
    for level, axes in _cost_panels(figure):
        for number, (method, names) in enumerate(tried.items()):
            style = line_style(number)
            seeds = range(TUNING_SEEDS)
            line = [_both(noise, clean, method, name, level, seeds) for name in names]
            points = np.array([[x.mean, y.mean] for x, y in line])
            axes.plot(*points.T, **style | {"linewidth": 0.7, "markersize": 1.8})
            if method in chosen:
                x, y = _both(noise, clean, method, chosen[method], level)
                entries[_label(method)] = axes.errorbar(
                    x.mean,
                    y.mean,
                    xerr=_bar(x),
                    yerr=_bar(y),
                    **style | {"linestyle": "none", "elinewidth": 0.8, "markersize": 5},
                )
        axes.yaxis.set_major_locator(MaxNLocator(6))
    add_legend(figure, entries)
    return figure


@styled
def frontier(noise: Sequence[Row]) -> Figure:
    """Draw `trade_off` of the settings that have every seed: means with intervals.

    `margin` is left out, which is swept on its own and would hide the rest. Shaded is what halves
    the excess degradation of ce for half a per cent of clean bits per character.
    """
    curves = _frontier_curves(noise)
    clean = by_seed(noise, "bpc", *REFERENCE)
    figure = new_figure(DOUBLE, 3.2, layout="constrained")
    entries: dict[str, Artist] = {}
    for level, axes in _cost_panels(figure):
        for number, (method, names) in enumerate(curves.items()):
            style = line_style(number)
            points = [_both(noise, clean, method, name, level) for name in names]
            points.sort(key=lambda point: point[0].mean)
            x, y = zip(*points, strict=True)
            entries[_label(method)] = axes.errorbar(
                *([each.mean for each in values] for values in (x, y)),
                xerr=[each.half_width for each in x],
                yerr=[each.half_width for each in y],
                **style | {"linewidth": 1.0, "elinewidth": 0.6, "markersize": 4},
            )
    _, ce = _both(noise, clean, *REFERENCE, 0.5)
    axes = figure.axes[0]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.fill_between([left, 0.5], bottom, (1 + ce.mean) / 2, color="0.9", linewidth=0, zorder=0)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    add_legend(figure, entries)
    return figure


@styled
def harm_by_margin(results: Results) -> Figure:
    """Draw whether noise harms most where margins are small, by attention stage and method.

    A row for each stage; markers are means over seeds, among all tokens and among tokens of one
    symbol. The paper's idea is left of zero in the first panel and right of it in the second.
    """
    stages = list(of_stages(results.comparisons, "estimate"))
    figure = new_figure(DOUBLE, 0.9 + 0.22 * len(stages), layout="constrained")
    panels = {
        "margin": "rank correlation of margin and harm",
        "support": "harm at support tokens less elsewhere (nats)",
    }
    entries: dict[str, Artist] = {}
    heights = np.arange(len(stages))[::-1]
    for place, (statistic, described) in enumerate(panels.items()):
        axes = figure.add_subplot(1, 2, 1 + place)
        for number, (within, label) in enumerate(
            {"text": "among all tokens", "token": "among tokens of one symbol"}.items()
        ):
            found = of_stages(results.comparisons, "estimate", statistic=statistic, within=within)
            entries[label] = axes.errorbar(
                [found[stage].mean for stage in stages],
                heights + 0.13 - 0.26 * number,
                xerr=[np.nan_to_num(found[stage].half_width) for stage in stages],
                **line_style(number) | {"linestyle": "none", "elinewidth": 0.8},
            )
        axes.axvline(0, color="0.3", linewidth=0.8)
        names = [f"{_label(method)}, {stage}" for method, _, stage in stages]
        axes.set_yticks(heights, names if place == 0 else [""] * len(stages))
        label_axes(axes, place, described, "")
    add_legend(figure, entries)
    return figure


def _cost_panels(figure: Figure) -> Iterator[tuple[float, Axes]]:
    """Make panels of clean cost against degradation, at half and at one embedding RMS."""
    for place, level in enumerate((0.5, 1.0)):
        axes = figure.add_subplot(1, 2, 1 + place)
        yield level, axes
        cost = "clean bits per character (% over ce)"
        label_axes(axes, place, cost, _DEGRADATION, title=f"noise of {level:g} RMS")


def _frontier_curves(noise: Sequence[Row]) -> dict[str, list[str]]:
    return {method: names for method, names in curves_of(noise).items() if method != "margin"}


def _both(
    noise: Sequence[Row],
    clean: dict[int, float],
    method: str,
    setting: str,
    level: float,
    seeds: Iterable[int] | None = None,
) -> tuple[Interval, Interval]:
    """Return cost in per cent and degradation, over some seeds or all."""
    costs = by_seed(noise, "bpc", method, setting)
    worse = by_seed(noise, "degradation", method, setting, level=level)
    kept = costs.keys() if seeds is None else set(seeds)
    return (
        paired_cost({seed: each for seed, each in costs.items() if seed in kept}, clean),
        interval(each for seed, each in worse.items() if seed in kept),
    )


def _levels(noise: Sequence[Row], method: str, setting: str, unit: str) -> list[float]:
    wanted = (method, setting, "test", "gaussian", unit)
    return sorted(
        {
            float(row["level"])
            for row in noise
            if (row["method"], row["setting"], row["half"], row["kind"], row["unit"]) == wanted
        }
    )


def _curve(axes: Axes, x: Sequence[float], found: Sequence[Interval], number: int) -> Artist:
    """Draw means joined by a line, with a band or, of few points, bars for the intervals."""
    style = line_style(number)
    means = np.array([each.mean for each in found])
    reach = np.array([each.half_width for each in found])
    [line] = axes.plot(x, means, **style)
    axes.fill_between(x, means - reach, means + reach, color=style["color"], alpha=0.2, linewidth=0)
    axes.vlines(x, means - reach, means + reach, color=style["color"], linewidth=0.8)
    return line


def _bar(found: Interval) -> float | None:
    return None if np.isnan(found.half_width) else found.half_width


def _label(method: str, setting: str | None = None) -> str:
    label = read_labels().get(method, method)
    weighted = setting is not None and method == "margin"
    return f"{label}, {setting.replace('_', ' ').replace('=', ' ')}" if weighted else label


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python figures.py FOLDER, where run.py wrote its tables")
    for path in draw(Path(sys.argv[1])):
        print(path)
