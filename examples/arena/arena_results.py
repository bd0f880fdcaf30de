"""What all runs have found, as tables: runs.csv, rates.csv, curves.csv and geometry.csv."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from arena_measure import NOISE, result, tuned_settings
from arena_plan import Methods, Run, Scale, chosen, rate_runs, seed_runs, tuning_runs

from probattn.inference.runs.csv_tables import write_table

RUN = ("method", "setting", "rate", "clip", "seed")
NUMBERS = (
    *("tuned", "always", "diverged", "spikes", "rejected", "initial_bpc", "bpc"),
    *(f"noise_{level:g}" for level in NOISE),
    *("rounded", "tune_bpc", "tune_noise_0.5", "rms"),
)
RATE = ("diverged", "spikes", "rejected", "initial_bpc", "bpc", "loss")
QUANTILES = ("median", "quantile_0.05", "quantile_0.95")
_WINDOW, _DEVIATIONS = 50, 7.0
_STEPS = 20  # of a curve, whose mean and maximum are kept


def spikes(losses: np.ndarray) -> int:
    """Count the steps whose loss is 7 standard deviations above the mean of the 50 before."""
    found = 0
    for step in range(_WINDOW, len(losses)):
        before = losses[step - _WINDOW : step]
        found += bool(losses[step] > before.mean() + _DEVIATIONS * before.std())
    return found


def write_results(methods: Methods, scale: Scale, folder: Path, out: Path) -> None:
    """Write the tables of all runs that are done."""
    tuned = tuned_settings(methods, scale, folder)
    kept = chosen(methods, tuned)
    whole, rates, curves, geometry = [], [], [], []
    for run, found in _done(
        [*tuning_runs(methods, scale), *seed_runs(methods, tuned, scale)], folder
    ):
        flags = run.setting in tuned.values(), run.setting.always
        whole.append((*_name(run), *flags, *_numbers(found)))
        curves += _curve(run, found)
        if run.setting in kept:
            geometry += [
                (*_name(run), quantity, *values) for quantity, values in found["geometry"].items()
            ]
    for run, found in _done(rate_runs(methods, tuned, scale), folder):
        rates.append((*_name(run), *_rate(found)))
        curves += _curve(run, found)
    write_table(out / "runs.csv", (*RUN, *NUMBERS), whole)
    write_table(out / "rates.csv", (*RUN, *RATE), rates)
    columns = (*RUN, "step", "mean_loss", "largest_loss")
    write_table(out / "curves.csv", columns, dict.fromkeys(curves))
    write_table(out / "geometry.csv", (*RUN, "quantity", *QUANTILES), geometry)


def _done(runs: list[Run], folder: Path) -> Iterator[tuple[Run, dict[str, Any]]]:
    for run in {each.path: each for each in runs}.values():
        found = result(run, folder)
        if found is not None:
            yield run, found


def _name(run: Run) -> tuple[str, str, float, float, int]:
    return run.setting.method, run.setting.name, run.rate, run.clip, run.seed


def _numbers(found: dict[str, Any]) -> tuple:
    noise = found["noise"]
    return (
        *(found["diverged"], _spikes(found), found["rejected"]),
        *(found["initial_bpc"], found["bpc"]["test"]),
        *(noise["test"][f"{level:g}"] for level in NOISE),
        *(found["rounded_bpc"], found["bpc"]["tune"], noise["tune"]["0.5"], found["rms"]),
    )


def _rate(found: dict[str, Any]) -> tuple:
    initial, final = found["initial_bpc"], found["bpc"]["test"]
    loss = initial if final is None or not np.isfinite(final) else min(initial, final)
    return found["diverged"], _spikes(found), found["rejected"], initial, final, loss


def _losses(found: dict[str, Any]) -> np.ndarray:
    return np.array([np.nan if loss is None else loss for loss in found["losses"]])


def _spikes(found: dict[str, Any]) -> int:
    return spikes(_losses(found))


def _curve(run: Run, found: dict[str, Any]) -> list[tuple]:
    losses = _losses(found)
    starts = range(0, len(losses), _STEPS)
    parts = [losses[start : start + _STEPS] for start in starts]
    return [
        (*_name(run), start, *(float(f"{value:.4g}") for value in (part.mean(), part.max())))
        for start, part in zip(starts, parts, strict=True)
    ]
