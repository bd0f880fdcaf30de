"""Table and figure of the comparison, from its CSV files alone.

python examples/barrier_weight/weighted_report.py examples/barrier_weight/results
"""

import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure
from measured import QUANTITIES

from probattn.inference.figures.style import (
    DOUBLE,
    add_legend,
    label_axes,
    line_style,
    new_figure,
    save_figure,
    styled,
)
from probattn.inference.runs.files import write_text

_DRAWN = (QUANTITIES[0], QUANTITIES[2], QUANTITIES[3])
_UNITS = {
    QUANTITIES[0]: "smallest margin",
    QUANTITIES[1]: "median margin",
    QUANTITIES[2]: "mean log det (nats)",
    QUANTITIES[3]: "held-out density (nats/token)",
}
_ORDER = ("simulated", "pydoc", "tinyshakespeare")
Rows = list[dict[str, str]]


def write_report(folder: Path) -> list[Path]:
    """Write table.md and weights.png into a folder that has those of the data sets."""
    posterior, maps, runs = read_whole(folder)
    write_text(folder / "table.md", tables(posterior, maps, runs))
    figure = weights_figure(posterior, maps)
    return [folder / "table.md", save_figure(figure, folder / "weights.png")]


def tables(posterior: Rows, maps: Rows, runs: Rows) -> str:
    """Return the text of table.md."""
    parts = ["# Which weights lie inside\n", answers_table(posterior, maps)]
    parts += ["# How far the chains and the searches converged\n"]
    parts += [convergence_table(posterior, maps, runs), "# The data\n"]
    parts += [f"- {row['data']}: {row['note']}" for row in runs]
    return "\n".join(parts) + "\n"


def read_whole(folder: Path) -> list[Rows]:
    """Read the tables posterior, maps and runs of every data set that has all three."""
    read = [read_results(folder, name) for name in ("posterior", "maps", "runs")]
    whole = set.intersection(*({row["data"] for row in table} for table in read))
    return [[row for row in table if row["data"] in whole] for table in read]


def answers_table(posterior: Rows, maps: Rows) -> str:
    """Tell for every data set and quantity which weights lie in the posterior's central 90 %."""
    rows = []
    for data in _names(posterior):
        for quantity in QUANTITIES:
            of = _of(posterior, data, quantity)
            low, high = float(of["low"]), float(of["high"])
            inside = (
                weights_inside(maps, data, kind, quantity, low, high)
                for kind in ("full", "margin only")
            )
            exact = next(
                float(row[quantity])
                for row in maps
                if (row["data"], row["kind"]) == (data, "full") and float(row["weight"]) == 1
            )
            numbers = f"{float(of['mean']):.3f} ({low:.3f} to {high:.3f})"
            shown = (", ".join(f"{w:g}" for w in found) or "none" for found in inside)
            rows.append((data, quantity, numbers, f"{exact:.3f}", *shown))
    heads = ("data", "quantity", "posterior mean (90 %)", "MAP, lambda = 1")
    return _markdown((*heads, "full: lambda inside", "margin only: lambda inside"), rows)


def weights_inside(
    maps: Rows, data: str, kind: str, quantity: str, low: float, high: float
) -> list[float]:
    """Return the weights whose point has the quantity in an interval, in increasing order."""
    return sorted(
        float(row["weight"])
        for row in maps
        if (row["data"], row["kind"]) == (data, kind) and low <= float(row[quantity]) <= high
    )


def convergence_table(posterior: Rows, maps: Rows, runs: Rows) -> str:
    """Write diagnostics of the chains, and gradients and agreement of the searches."""
    rows = []
    for run in runs:
        data = run["data"]
        found = [
            row for row in posterior if row["data"] == data and row["r_hat"] not in ("", "nan")
        ]
        every = next(row for row in found if row["quantity"].startswith("every margin"))
        smallest = _of(posterior, data, QUANTITIES[0])
        points = [row for row in maps if row["data"] == data]
        alone = [row for row in points if int(row["agreeing"]) == 1]
        rows.append(
            (
                data,
                *(_diagnostics(row) for row in (smallest, every)),
                f"{max(float(row['r_hat']) for row in found):.4f}",
                run["divergences"],
                f"{float(run['leapfrog_steps']):.0f}",
                f"{max(float(row['gradient norm']) for row in points):.0e}",
                f"{len(points) - len(alone)} of {len(points)}",
                f"{float(run['sampling_seconds']):.0f} s",
            )
        )
    heads = ("data", "smallest margin: r_hat, ess bulk, tail", "every margin, the worst")
    heads += ("largest r_hat", "divergences", "steps per draw", "largest gradient norm")
    return _markdown((*heads, "MAPs that two starts found", "sampling"), rows)


@styled
def weights_figure(posterior: Rows, maps: Rows) -> Figure:
    """Draw the MAPs over lambda on the posterior's 90 %: a column for each data set."""
    names = _names(posterior)
    figure = new_figure(DOUBLE, 0.5 + 1.65 * len(_DRAWN), layout="constrained")
    panels = figure.subplots(len(_DRAWN), len(names), sharex=True, squeeze=False)
    entries = {}
    for line, quantity in enumerate(_DRAWN):
        for column, data in enumerate(names):
            axes, of = panels[line][column], _of(posterior, data, quantity)
            band = axes.axhspan(float(of["low"]), float(of["high"]), color="0.85", linewidth=0)
            mean = axes.axhline(float(of["mean"]), color="0.45", linewidth=0.8)
            entries |= {"posterior, 90 %": band, "posterior mean": mean}
            for number, kind in enumerate(("full", "margin only")):
                points = sorted(
                    (float(row["weight"]), float(row[quantity]))
                    for row in maps
                    if (row["data"], row["kind"]) == (data, kind)
                )
                (entries[f"MAP, {kind}"],) = axes.plot(
                    *zip(*points, strict=True), **line_style(number)
                )
            axes.set_xscale("log")
            label_axes(
                axes,
                line * len(names) + column,
                "barrier weight, lambda" if line == len(_DRAWN) - 1 else "",
                _UNITS[quantity] if column == 0 else "",
                title=data if line == 0 else "",
            )
    add_legend(figure, entries)
    return figure


def _diagnostics(row: dict[str, str]) -> str:
    r_hat, bulk, tail = (float(row[name]) for name in ("r_hat", "ess_bulk", "ess_tail"))
    return f"{r_hat:.4f}, {bulk:.0f}, {tail:.0f}"


def _names(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["data"] for row in rows))


def _of(posterior: Rows, data: str, quantity: str) -> dict[str, str]:
    return next(row for row in posterior if (row["data"], row["quantity"]) == (data, quantity))


def _markdown(heads: tuple, rows: list) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def read_results(folder: Path, name: str) -> Rows:
    """Read a table of every data set in a folder: the known ones in their order, then others."""
    paths = sorted(folder.glob(f"*/{name}.csv"), key=lambda path: (_rank(path.parent.name), path))
    rows: Rows = []
    for path in paths:
        with path.open(encoding="utf-8", newline="") as stream:
            rows += csv.DictReader(stream)
    if not rows:
        raise ValueError(f"{folder}: has no */{name}.csv; expected the folder of a comparison")
    return rows


def _rank(name: str) -> int:
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


if __name__ == "__main__":
    for written in write_report(Path(sys.argv[1])):
        print("wrote", written)
