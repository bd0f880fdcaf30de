"""Statistics over seeds of the tables that `arena_results` writes, by the rules of the README."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from probattn.inference.evaluation.intervals import Interval, interval
from probattn.inference.runs.csv_tables import read_table

TRAINS_WITHIN = 0.2  # bits per character above the best rate
_TEXT = {"method", "setting", "quantity"}

Row = dict[str, str | float]
BySeed = dict[int, float]


class Subject(NamedTuple):
    """A method at one value of its setting, and the rate that it has beside the others'."""

    method: str
    setting: str
    rate: float


@dataclass(frozen=True)
class Results:
    """The tables of a folder.

    Attributes:
        runs: a row for each run that was measured whole.
        rates: a row for each run of the study of learning rates.
        geometry: a row for each quantity of the first layer of a run.
        setting: what they have in common.
    """

    runs: list[Row]
    rates: list[Row]
    geometry: list[Row]
    setting: str

    @property
    def reference(self) -> Subject:
        """Cross-entropy alone, at the learning rate of all."""
        for row in self.runs:
            if row["method"] == "ce" and row["always"]:
                return _subject(row)
        raise ValueError("runs.csv has no ce at the learning rate of all: expected it; run ce too")

    @property
    def tuned_reference(self) -> Subject:
        """Cross-entropy alone, at the learning rate that was tuned for it."""
        tuned = (_subject(row) for row in self.runs if row["method"] == "ce" and row["tuned"])
        return next(tuned, self.reference)

    def subjects(self) -> list[Subject]:
        """Return the reference, and what was tuned or always run, in the order of the table."""
        kept = [_subject(row) for row in self.runs if row["tuned"] or row["always"]]
        return list(dict.fromkeys([self.reference, *kept]))

    def is_tuned(self, subject: Subject) -> bool:
        """Tell whether a subject is the tuned one of its method."""
        return any(row["tuned"] for row in self.runs if _subject(row) == subject)


def read_results(folder: Path) -> Results:
    """Read the tables.

    Raises:
        ValueError: if they are not there.
    """
    names = ("runs.csv", "rates.csv", "geometry.csv", "setting.txt")
    if lacking := [name for name in names if not (folder / name).exists()]:
        raise ValueError(
            f"{folder}: has no {', '.join(lacking)}: expected the folder of results of arena.py"
        )
    runs, rates, geometry = (_read(folder / name) for name in names[:3])
    return Results(runs, rates, geometry, (folder / names[3]).read_text(encoding="utf-8"))


def column(results: Results, subject: Subject, name: str) -> BySeed:
    """Return a column of runs.csv by seed; a network that diverged has none."""
    return {
        int(row["seed"]): float(row[name])
        for row in results.runs
        if _subject(row) == subject and np.isfinite(row[name])
    }


def degradation(results: Results, subject: Subject, name: str) -> BySeed:
    """Return a column of bits per character over the clean ones, by seed."""
    return ratio(column(results, subject, name), column(results, subject, "bpc"))


def score(results: Results, subject: Subject) -> BySeed:
    """Return the mean of clean BPC and BPC at half an RMS, which settings are tuned by, by seed."""
    clean, noisy = (column(results, subject, name) for name in ("bpc", "noise_0.5"))
    return {seed: (clean[seed] + noisy[seed]) / 2 for seed in clean.keys() & noisy.keys()}


def ratio(values: BySeed, reference: BySeed) -> BySeed:
    """Return values over a reference, by seed."""
    return {seed: values[seed] / reference[seed] for seed in sorted(values.keys() & reference)}


def difference(values: BySeed, reference: BySeed) -> Interval:
    """Return values less a reference, paired by seed."""
    return interval(values[seed] - reference[seed] for seed in sorted(values.keys() & reference))


def below_zero(found: Interval) -> bool:
    """Tell whether a whole interval lies below zero; one of a single seed does not."""
    return bool(found.mean + found.half_width < 0)


def losses_by_rate(results: Results, subject: Subject, clip: float) -> dict[float, BySeed]:
    """Return the losses of the study of learning rates, by rate and seed, of whole seeds alone."""
    found: dict[float, BySeed] = {}
    for row in results.rates:
        if (row["method"], row["setting"], row["clip"]) == (*subject[:2], clip):
            found.setdefault(float(row["rate"]), {})[int(row["seed"])] = float(row["loss"])
    rates = sorted({float(row["rate"]) for row in results.rates})
    whole = set.intersection(*(set(found.get(rate, {})) for rate in rates)) if rates else set()
    return {rate: {seed: found[rate][seed] for seed in sorted(whole)} for rate in rates if whole}


def sensitivity(losses: Mapping[float, BySeed]) -> BySeed:
    """Return the mean over rates of the loss less the least of them, by seed."""
    found = {}
    for seed in next(iter(losses.values()), {}):
        of_seed = [of_rate[seed] for of_rate in losses.values()]
        found[seed] = float(np.mean(of_seed) - np.min(of_seed))
    return found


def largest_rate(losses: Mapping[float, BySeed]) -> float:
    """Return the largest rate that trains: whose mean loss is within 0.2 of the best one."""
    means = {rate: float(np.mean(list(of_rate.values()))) for rate, of_rate in losses.items()}
    best = min(means.values(), default=np.nan)
    return max(
        (rate for rate, mean in means.items() if mean <= best + TRAINS_WITHIN), default=np.nan
    )


def quantity(results: Results, subject: Subject, name: str, statistic: str) -> BySeed:
    """Return a statistic over tokens of one quantity of geometry.csv, by seed."""
    return {
        int(row["seed"]): float(row[statistic])
        for row in results.geometry
        if _subject(row) == subject and row["quantity"] == name
    }


def _subject(row: Row) -> Subject:
    return Subject(str(row["method"]), str(row["setting"]), float(row["rate"]))


def _read(path: Path) -> list[Row]:
    return [
        {
            name: value if name in _TEXT else (float(value) if value else np.nan)
            for name, value in row.items()
        }
        for row in read_table(path)
    ]
