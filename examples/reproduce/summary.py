"""Statistics over seeds of the tables that `collect` writes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from probattn.inference.evaluation.intervals import Interval, interval
from probattn.inference.runs.csv_tables import read_table

REFERENCE = ("ce", "learning_rate=1x")
PAPER = (REFERENCE, ("margin", "barrier_weight=0.05"))
"""Methods and settings of the paper's Figs 7.4 and 7.5; costs are over the first."""

TUNED_AT = 0.5  # of the embedding RMS: the noise that settings are tuned by, beside none
TEXT = {
    *("method", "setting", "half", "kind", "unit", "min_margin_kind"),
    *("noise", "stage", "statistic", "within"),
}

Row = dict[str, str | float]


@dataclass(frozen=True)
class Results:
    """The tables of a folder.

    Attributes:
        runs: a row for each run.
        curves: a row for each report of a run.
        noise: a row for each point of noise of a run.
        setting: what they have in common.
        margins: a row for each attention stage of a run whose margins were measured.
        comparisons: a row for each comparison of those margins with the harm of noise.
        further: as noise, of further seeds of some settings, with which nothing was chosen.
    """

    runs: list[Row]
    curves: list[Row]
    noise: list[Row]
    setting: str
    margins: list[Row]
    comparisons: list[Row]
    further: list[Row]


def read_results(folder: Path) -> Results:
    """Read the tables that `collect` wrote."""
    runs, curves, noise = (_read(folder / f"{name}.csv") for name in ("runs", "curves", "noise"))
    setting = (folder / "setting.txt").read_text(encoding="utf-8")
    optional = ("sensitivity_margins", "sensitivity_comparisons", "confirmation/noise")
    paths = (folder / f"{name}.csv" for name in optional)
    margins, comparisons, further = (_read(path) if path.exists() else [] for path in paths)
    return Results(runs, curves, noise, setting, margins, comparisons, further)


def paired_difference(values: dict[int, float], reference: dict[int, float]) -> Interval:
    """Return the difference from a reference, paired by seed, as in `paired_cost`."""
    return interval(values[seed] - reference[seed] for seed in sorted(values.keys() & reference))


def by_seed(
    noise: Iterable[Row],
    column: str,
    method: str,
    setting: str,
    *,
    unit: str = "relative",
    level: float = 0.0,
    kind: str = "gaussian",
    half: str = "test",
) -> dict[int, float]:
    """Return a column of noise.csv at one point of noise, by seed."""
    wanted = (method, setting, half, kind, unit)
    return {
        int(row["seed"]): float(row[column])
        for row in noise
        if (row["method"], row["setting"], row["half"], row["kind"], row["unit"]) == wanted
        and row["level"] == level
    }


def of_stages(
    rows: Iterable[Row], column: str, **where: str
) -> dict[tuple[str, str, str], Interval]:
    """Return a column over seeds, by method, setting and stage, in the order of the table.

    Args:
        rows: rows of the table of margins or of comparisons.
        column: column to average.
        where: text that other columns must have.
    """
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if all(row[name] == text for name, text in where.items()):
            name = (str(row["method"]), str(row["setting"]), str(row["stage"]))
            found.setdefault(name, []).append(float(row[column]))
    return {name: interval(values) for name, values in found.items()}


def settings_of(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Return the settings in a table by method, in the order of their numbers."""
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(str(row["method"]), set()).add(str(row["setting"]))
    return {method: sorted(names, key=numbers) for method, names in found.items()}


def numbers(setting: str) -> list[float]:
    """Return the values in a setting's name."""
    return [float(part.partition("=")[2].rstrip("x")) for part in setting.split()]


def tuned_settings(noise: Sequence[Row], seeds: Iterable[int]) -> dict[str, str]:
    """Choose each method's setting whose mean of clean BPC and BPC at half an RMS is least.

    Both are of the half of the text that settings are tuned on, and means over the given seeds. A
    setting that lacks one of the seeds, as its fit failed, is not chosen.
    """
    seeds, chosen = set(seeds), {}
    for method, names in settings_of(noise).items():
        scores = {}
        for name in names:
            clean, noisy = (
                by_seed(noise, "bpc", method, name, level=level, half="tune")
                for level in (0.0, TUNED_AT)
            )
            if seeds <= clean.keys() & noisy.keys():
                scores[name] = np.mean([(clean[n] + noisy[n]) / 2 for n in sorted(seeds)])
        if scores:
            chosen[method] = min(scores, key=scores.__getitem__)
    return chosen


def curves_of(noise: Sequence[Row]) -> dict[str, list[str]]:
    """Return settings with every seed of the reference, of methods with several of them."""
    seeds = by_seed(noise, "bpc", *REFERENCE).keys()
    whole = {
        method: [name for name in names if seeds <= by_seed(noise, "bpc", method, name).keys()]
        for method, names in settings_of(noise).items()
    }
    return {method: names for method, names in whole.items() if len(names) > 1}


def _read(path: Path) -> list[Row]:
    return [
        {
            name: value if name in TEXT else (float(value) if value else np.nan)
            for name, value in row.items()
        }
        for row in read_table(path)
    ]
