"""One run: fitted, or carried on, and measured under noise. What is done is not done again.

The text to evaluate on is cut in two halves: settings are tuned on the first, and the second is
what is reported. Points are kept in the run's summary.json, with what they were measured with.
"""

import dataclasses
import json
import math
import time
from typing import Any

import numpy as np
from plan import Task
from summary import TUNED_AT

from probattn.inference import Run, fit, load_run
from probattn.inference.evaluation.noise_sweeps import NoisePoint, NoiseSweeps
from probattn.inference.evaluation.scoring import Scorer
from probattn.inference.evaluation.sensitivity import sensitivity, tables
from probattn.inference.evaluation.texts import text_tokens
from probattn.inference.runs.checks import check_same_config

HALVES = ("tune", "test")
SEED = 0  # of the noise: the same draws for every run
_NOISE = ("gaussian", "kinds")  # what is measured together
_PLANNED = {
    "gaussian": ("absolute", "relative", "tokens"),
    "kinds": ("kinds", "kinds_relative", "substituted", "tokens", "ascent_tokens"),
    "sensitivity": ("sensitivity_tokens", "sensitivity_draws"),
}


def is_fitted(task: Task) -> bool:
    """Tell whether the run is there, of this configuration, to its end.

    Raises:
        RunError: if the run is there with another configuration.
    """
    if not (task.out / "config.toml").exists():
        return False
    run = load_run(task.out)
    check_same_config(run, task.config)
    return "fit" in run.summary()


def is_done(task: Task) -> bool:
    """Tell whether the run is fitted, and everything that the task asks for is measured."""
    return is_fitted(task) and not _missing(task, load_run(task.out))


def work(task: Task) -> None:
    """Fit the run and measure it, as far as it is not done.

    Raises:
        Interrupted: on SIGINT or SIGTERM while fitting, after the state was saved.
        ValueError: see `fit`; and FitError, if it cannot go on.
    """
    if is_fitted(task):
        run = load_run(task.out)
    else:
        started = time.monotonic()
        resumed = (task.out / "config.toml").exists()
        run = fit(task.config, task.out, resume=resumed).run
        if not resumed:
            _update(run, seconds=time.monotonic() - started)
    for name in _missing(task, run):
        points = _compare(task, run) if name == "sensitivity" else _measure(task, run, name)
        _update(run, **{name: {"plan": _plan(task, name), "points": points}})


def measured(task: Task, run: Run) -> list[dict[str, Any]]:
    """Return every point of noise that was measured of a run, as the task would measure it."""
    return [point for name in _NOISE for point in _kept(task, run, name) or []]


def compared(task: Task, run: Run) -> dict[str, list[dict[str, Any]]]:
    """Return what `sensitivity` found of a run, by table, as the task would look at it."""
    return _kept(task, run, "sensitivity") or {}


def _missing(task: Task, run: Run) -> list[str]:
    wanted = {"gaussian": True, "kinds": task.kinds, "sensitivity": task.sensitivity}
    return [name for name in wanted if wanted[name] and _kept(task, run, name) is None]


def _kept(task: Task, run: Run, name: str) -> Any:
    """Return points that were measured, None if they were not or in another way."""
    kept = run.summary().get("reproduce", {}).get(name, {})
    return kept["points"] if kept.get("plan") == _plan(task, name) else None


def _plan(task: Task, name: str) -> dict[str, Any]:
    """Return what the points depend on beside the run, as JSON gives it back."""
    plan = {field: getattr(task.noise, field) for field in _PLANNED[name]}
    return json.loads(json.dumps(plan))


def _update(run: Run, **results: Any) -> None:
    with run.lock():
        run.update_summary(reproduce=run.summary().get("reproduce", {}) | results)


def _measure(task: Task, run: Run, name: str) -> list[dict[str, Any]]:
    noise, rows = task.noise, []
    tokens, _ = text_tokens(run, None)
    middle = len(tokens) // 2
    for half, part in zip(HALVES, (tokens[:middle], tokens[middle:]), strict=True):
        if name == "kinds" and half == "tune":
            continue
        scorer = Scorer(run.network, run.vocabulary, part, most_tokens=noise.tokens)
        sweeps = NoiseSweeps(
            run,
            part,
            scorer,
            scorer.sums(run.parameters),
            seed=SEED,
            ascent_tokens=noise.ascent_tokens,
            done=lambda: None,
        )
        if half == "tune":
            levels = [0.0, TUNED_AT]
            points = {"relative": sweeps.of_embeddings(["gaussian"], levels, sweeps.rms)}
        elif name == "gaussian":
            absolute = sweeps.of_embeddings(["gaussian"], [0.0, *noise.absolute], 1.0)
            relative = sweeps.of_embeddings(["gaussian"], [0.0, *noise.relative], sweeps.rms)
            points = {"absolute": absolute, "relative": relative}
        else:
            levels = [0.0, *noise.kinds_relative]
            points = {
                "relative": sweeps.of_embeddings(noise.kinds, levels, sweeps.rms),
                "probability": sweeps.of_tokens(noise.kinds, [0.0, *noise.substituted]),
            }
        rows += [_row(half, unit, point) for unit, of_unit in points.items() for point in of_unit]
    return rows


def _compare(task: Task, run: Run) -> dict[str, list[dict[str, Any]]]:
    """Compare margins with the harm of noise, over the evaluation text."""
    found = sensitivity(
        run,
        level=TUNED_AT,
        draws=task.noise.sensitivity_draws,
        most_tokens=task.noise.sensitivity_tokens,
        seed=SEED,
    )
    later = found.position >= 2  # before, there is no spread, and the margin is 1
    of_stages = [(stage.label, stage.margin[later]) for stage in found.stages]
    margins = [
        (label, np.min(margin), np.median(margin), np.mean(margin < 0), len(margin))
        for label, margin in of_stages
    ]
    every = tables(found)
    del every["sensitivity"]  # a row for each token
    columns = ("stage", "smallest", "median", "negative", "positions")
    every["sensitivity_margins"] = (columns, margins)
    return {
        name: [
            {column: _plain(value) for column, value in zip(columns, row, strict=True)}
            for row in rows
        ]
        for name, (columns, rows) in every.items()
    }


def _plain(value: Any) -> Any:
    """Return values as JSON has them: it knows no NaN."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _row(half: str, unit: str, point: NoisePoint) -> dict[str, Any]:
    levels = {"absolute": point.sigma, "relative": point.relative, "probability": point.probability}
    values = dataclasses.asdict(point)
    kept = {name: values[name] for name in ("kind", "bpc", "degradation")}
    # As it was given: a multiple of the root mean square comes back with an error of rounding.
    return {"half": half, "unit": unit, "level": round(levels[unit], 9), **kept}
