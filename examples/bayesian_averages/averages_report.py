"""Tables and figure of the comparison, from its CSV files alone.

python examples/bayesian_averages/averages_report.py examples/bayesian_averages/results
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from averages_plan import SCALES, read_methods
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probattn.inference.evaluation.intervals import Interval, interval, paired_cost, shown
from probattn.inference.figures.style import (
    DOUBLE,
    add_legend,
    label_axes,
    line_style,
    new_figure,
    save_figure,
    styled,
)
from probattn.inference.runs.csv_tables import markdown_table, read_table
from probattn.inference.runs.files import write_text

Rows = list[dict[str, str]]
REFERENCE = "map"
_POINTS = ("map", "map_of_file", "ensemble", "pooled", "pooled_of_file")
_NOTE = (
    "Means over seeds with 95 % intervals of Student's t. Costs are over the MAP with all of the "
    "gradients, paired by seed. CPU seconds are medians over seeds and contain what is compiled; "
    "the first seed compiles, and later ones find the programs."
)


class Measured(NamedTuple):
    """The tables of a scale: a row for each run, and one for each coverage of each run."""

    runs: Rows
    coverage: Rows


def write_report(folder: Path) -> list[Path]:
    """Write table.md and averages.png into a folder that has those of the scales.

    Raises:
        ValueError: if it has none.
    """
    found = read_results(folder)
    write_text(folder / "table.md", tables(found))
    return [folder / "table.md", save_figure(averages_figure(found), folder / "averages.png")]


def read_results(folder: Path) -> dict[str, Measured]:
    """Read the tables of every scale in a folder, in the order of `SCALES`.

    Raises:
        ValueError: if there are none.
    """
    found = {}
    for scale in SCALES:
        if (folder / scale / "runs.csv").exists():
            both = (read_table(folder / scale / f"{name}.csv") for name in ("runs", "coverage"))
            found[scale] = Measured(*both)
    found = {scale: measured for scale, measured in found.items() if measured.runs}
    if not found:
        raise ValueError(
            f"{folder}: has no */runs.csv with a run; expected the folder of a comparison"
        )
    return found


def tables(found: Mapping[str, Measured]) -> str:
    """Return the text of table.md."""
    parts = ["# Bayesian averages\n", _NOTE + "\n"]
    for scale in SCALES:
        if scale not in found:
            parts += [f"## {scale}\n", f"Not measured: `averages.py {scale}` does it.\n"]
            continue
        measured = found[scale]
        for objective in _distinct(measured.runs, "objective"):
            parts += [f"## {scale}, {objective}\n", methods_table(measured, objective)]
        if barrier := barrier_table(measured.runs):
            parts += [f"## {scale}, what the barrier changes\n", barrier]
        if left := missing_runs(scale, measured):
            listed = ", ".join(f"{' '.join(name)} ({count})" for name, count in left.items())
            parts += [f"Seeds not measured, which `averages.py {scale}` does: {listed}.\n"]
    return "\n".join(parts)


def missing_runs(scale: str, measured: Measured) -> dict[tuple[str, str], int]:
    """Return how many seeds of a scale are not measured, by objective and method."""
    of_scale, left = SCALES[scale], {}
    for method in read_methods().values():
        for objective in method.objectives or of_scale.objectives:
            found = by_seed(measured.runs, "bpc", objective, method.name)
            if method.name not in of_scale.skipped and len(found) < of_scale.seeds:
                left[objective, method.name] = of_scale.seeds - len(found)
    return left


def methods_table(measured: Measured, objective: str) -> str:
    """Write every method of an objective: what it predicts, its margins, and its cost."""
    stage = "trained_margin" if objective != "ce" else "first_layer_margin"
    clean = by_seed(measured.runs, "bpc", objective, REFERENCE)
    rows = []
    for method, label in _labels(measured.runs, objective):

        def of(column: str, method: str = method) -> Interval:
            return interval(by_seed(measured.runs, column, objective, method).values())

        bpc = by_seed(measured.runs, "bpc", objective, method)
        cost = shown(paired_cost(bpc, clean), 1, signed=True) if method != REFERENCE else ""
        surest = (
            interval(at_coverage(measured.coverage, objective, method, share).values())
            for share in (0.8, 0.5)
        )
        low, middle, high = (of(f"{stage}_{level}") for level in (5, 50, 95))
        margin = shown(middle, 2)
        if of("members").mean > 1:
            margin += f" ({shown(low._replace(half_width=np.nan), 2)} to "
            margin += f"{shown(high._replace(half_width=np.nan), 2)})"
        seconds = np.median([*by_seed(measured.runs, "cpu_seconds", objective, method).values()])
        rows.append(
            (
                *(label, len(bpc), f"{of('gradients').mean:.0f}", shown(of("bpc"), 3), cost),
                shown(Interval(100 * of("accuracy").mean, np.nan, len(bpc)), 1),
                *(shown(of("calibration_error"), 3), *(shown(each, 3) for each in surest)),
                *(shown(of("noise"), 3), margin, f"{seconds:.0f}"),
                f"{of('memory_mib').mean:.0f}",
            )
        )
    of_stage = stage.removesuffix("_margin").replace("_", " ")
    heads = (
        *("method", "seeds", "gradients", "bits per character", "cost over MAP, %", "right, %"),
        *("calibration error", "bits at 80 %", "bits at 50 %", "degradation at half an RMS"),
        *(f"smallest margin, {of_stage}", "CPU s", "memory, MiB"),
    )
    return markdown_table(heads, rows)


def barrier_table(runs: Rows) -> str:
    """Write what margin and full change over ce, of points and of averages of them."""
    rows = []
    for method, label in _labels(runs, "ce"):
        if method not in _POINTS:
            continue
        of_ce = {n: by_seed(runs, n, "ce", method) for n in ("bpc", "noise", "calibration_error")}
        for objective in ("margin", "full"):
            of = {name: by_seed(runs, name, objective, method) for name in of_ce}
            if not of["bpc"]:
                continue
            less = {
                name: interval(of[name][seed] - of_ce[name][seed] for seed in of[name])
                for name in ("noise", "calibration_error")
            }
            cost = shown(paired_cost(of["bpc"], of_ce["bpc"]), 1, signed=True)
            rows.append(
                (label, objective, cost, *(shown(e, 3, signed=True) for e in less.values()))
            )
    heads = ("method", "objective", "cost over ce, %", "degradation less ce's")
    return markdown_table((*heads, "calibration error less ce's"), rows) if rows else ""


def by_seed(rows: Rows, column: str, objective: str, method: str) -> dict[int, float]:
    """Return a column of a method's runs by seed; cells that are empty are left out."""
    return {
        int(row["seed"]): float(row[column])
        for row in rows
        if (row["objective"], row["method"]) == (objective, method) and row[column]
    }


def at_coverage(coverage: Rows, objective: str, method: str, share: float) -> dict[int, float]:
    """Return the bits per character of the surest tokens, such a share of all, by seed."""
    of_share = [row for row in coverage if float(row["coverage"]) == share]
    return by_seed(of_share, "coverage_bpc", objective, method)


@styled
def averages_figure(found: Mapping[str, Measured]) -> Figure:
    """Draw bits over coverage, and calibration beside bits: a row for each scale."""
    figure = new_figure(DOUBLE, 0.8 + 2.2 * len(found), layout="constrained")
    panels = figure.subplots(len(found), 2, squeeze=False)
    numbers = {method: number for number, method in enumerate(read_methods())}
    entries: dict[str, Artist] = {}
    for line, (scale, measured) in enumerate(found.items()):
        objective = _shown_objective(measured.runs)
        for method, label in _labels(measured.runs, objective):
            style = line_style(numbers[method])
            shares = sorted({float(row["coverage"]) for row in measured.coverage})
            curves = (at_coverage(measured.coverage, objective, method, n) for n in shares)
            means = [interval(curve.values()).mean for curve in curves]
            (entries[label],) = panels[line][0].plot(shares, means, **style)
            _point(panels[line][1], measured.runs, objective, method, style)
        title = f"{scale}, {objective}"
        bits, error = "bits per character", "calibration error"
        x = "share of the tokens, the surest"
        label_axes(panels[line][0], 2 * line, x, bits, title=title)
        label_axes(panels[line][1], 2 * line + 1, bits, error, title=title)
    add_legend(figure, entries)
    return figure


def _point(axes: Axes, runs: Rows, objective: str, method: str, style: Mapping[str, Any]) -> None:
    """Draw a method's mean over seeds, with its intervals."""
    bits, error = (
        interval(by_seed(runs, column, objective, method).values())
        for column in ("bpc", "calibration_error")
    )
    reach = [0.0 if np.isnan(each.half_width) else each.half_width for each in (bits, error)]
    marked = {name: style[name] for name in ("color", "marker", "markersize")}
    axes.errorbar([bits.mean], [error.mean], xerr=reach[0], yerr=reach[1], elinewidth=0.6, **marked)


def _shown_objective(runs: Rows) -> str:
    """Return the objective that most methods have, the first of several."""
    names = _distinct(runs, "objective")
    return max(names, key=lambda name: len({r["method"] for r in runs if r["objective"] == name}))


def _labels(runs: Rows, objective: str) -> Iterable[tuple[str, str]]:
    """Return the methods that an objective was measured with, in their order, and their labels."""
    there = {row["method"] for row in runs if row["objective"] == objective}
    return [(name, each.label) for name, each in read_methods().items() if name in there]


def _distinct(rows: Rows, column: str) -> Sequence[str]:
    return list(dict.fromkeys(row[column] for row in rows))


if __name__ == "__main__":
    for written in write_report(Path(sys.argv[1])):
        print("wrote", written)
