"""One run: fitted, sampled, and measured on text that is held out. Nothing is done twice."""

import dataclasses
import json
import os
import resource
import shutil
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from averages_plan import Task

from probattn.inference import PosteriorResult, Run, SampleConfig, fit, guide_draws, sample_run
from probattn.inference.comparison.predictive import MEMBERS, Predictions, predictions
from probattn.inference.export.site_values import site_values
from probattn.inference.runs.files import write_text
from probattn.inference.runs.run import load_fit
from probattn.inference.sampling.posterior_runs import fitted_starts, training_sequences
from probattn.models import ObjectiveConfig, language_model
from probattn.text.corpora import load_corpus
from probattn.text.tokens import corpus_tokens

NOISE = 0.5  # in root mean squares of the embeddings
MARGIN_LEVELS = (0.05, 0.5, 0.95)  # quantiles over the members
_FIRST_LAYER = ObjectiveConfig("margin", attention="first_layer")


@dataclasses.dataclass(frozen=True)
class Made:
    """What a method leaves: members of an ensemble, and what they cost.

    Attributes:
        members: parameters by site, the ensemble as the leading axis.
        gradients: of a minibatch, that were taken.
        divergences: draws whose iteration diverged or was refused; None without a sampler.
    """

    members: Mapping[str, np.ndarray]
    gradients: int
    divergences: int | None = None


def measured(task: Task) -> dict[str, Any] | None:
    """Return what was measured of a task, None if it was not, or in another way."""
    path = task.out / "measured.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["results"] if found["plan"] == _plan(task) else None


def work(task: Task) -> None:
    """Make the run from the beginning, and measure it.

    Raises:
        ValueError: see `fit` and `sample_run`.
    """
    clocks = (time.process_time(), time.monotonic())
    made = _sampled(task) if task.method.sample else _fitted(task)
    costs = {
        "cpu_seconds": time.process_time() - clocks[0],
        "wall_seconds": time.monotonic() - clocks[1],
        "memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    for folder in task.others:  # an average of runs costs what they cost
        theirs = json.loads((folder / "measured.json").read_text(encoding="utf-8"))["results"]
        costs["memory_mib"] = max(costs["memory_mib"], theirs["memory_mib"])
        for name in ("cpu_seconds", "wall_seconds"):
            costs[name] += theirs[name]
    results = {
        "gradients": made.gradients,
        "divergences": made.divergences,
        "load": os.getloadavg()[1],
        **costs,
        **_measure(task, made.members),
    }
    text = json.dumps({"plan": _plan(task), "results": results}, indent=1)
    write_text(task.out / "measured.json", text + "\n")


def _plan(task: Task) -> dict[str, Any]:
    """Return what results depend on, as JSON gives it back; not where the text and runs lie."""
    plan = dataclasses.asdict(task)
    del plan["out"], plan["config"]["data"]["source"]
    del plan["method"]["label"], plan["method"]["objectives"]
    return json.loads(json.dumps(plan | {"others": len(task.others)}))


def _fitted(task: Task) -> Made:
    if task.others:
        runs = list(_runs_of(task))
        return Made(
            _stacked([run.parameters for run in runs]), sum(r.config.fit.steps for r in runs)
        )
    runs = _fits(task)
    steps = sum(run.config.fit.steps for run in runs)
    if task.method.guide == "map":
        return Made(_stacked([run.parameters for run in runs]), steps)
    [run] = runs
    drawn = guide_draws(run, draws=MEMBERS, seed=task.seed)
    if task.method.guide == "laplace":  # a gradient of all the text for every row of the Hessian
        steps += sum(value[0, 0].size for value in drawn.values())
    return Made({name: value[0] for name, value in drawn.items()}, steps)


def _fits(task: Task) -> list[Run]:
    shutil.rmtree(task.out, ignore_errors=True)
    for number, path in enumerate(task.fit_paths):
        fit(task.fit_config(number), path)
    return [load_fit(path) for path in task.fit_paths]


def _runs_of(task: Task) -> Iterator[Run]:
    """Open the runs that a pooled method averages."""
    for folder in task.others:
        yield load_fit(folder / "fit-0")


def _sampled(task: Task) -> Made:
    method, runs = task.method, _fits(task)
    steps = sum(run.config.fit.steps for run in runs)
    settings = {**(method.sample or {}), **task.sample, "sequences": _sequences(task, runs[0])}
    if settings["method"] == "sghmc":
        settings["batch"] = task.config.fit.batch
    config = SampleConfig(chains=method.members, seed=task.seed, **settings)
    most = _gradients_of_iteration(config)
    iterations = (task.gradients - steps) // (method.members * most)
    warmup = int(method.warmup * iterations)
    config = dataclasses.replace(config, warmup=warmup, draws=iterations - warmup)
    described, starts = fitted_starts(task.fit_paths, config)
    _, result = sample_run(described, task.out / "sample", init_values=starts)
    # The warm-up of NUTS is not recorded and counts as much as it may take.
    steps += method.members * warmup * most + int(np.sum(result.statistics["n_steps"]))
    members = {name: value.reshape(-1, *value.shape[2:]) for name, value in result.draws.items()}
    return Made(members, steps, result.divergences)


def _gradients_of_iteration(config: SampleConfig) -> int:
    """Return how many gradients an iteration takes; of NUTS at the most."""
    if config.method == "nuts":
        return 2**config.max_tree_depth - 1
    steps = config.steps or 16
    return steps if config.is_stochastic else 2 * steps


def _sequences(task: Task, run: Run) -> int:
    """Return how many sequences a sampler is given: all that the text has."""
    train, _ = corpus_tokens(load_corpus(task.config.data), run.vocabulary)
    return (len(train) - 1) // run.network.block


def _stacked(each: list[dict[str, jax.Array]]) -> dict[str, np.ndarray]:
    return {name: np.stack([np.asarray(one[name]) for one in each]) for name in each[0]}


def _measure(task: Task, members: Mapping[str, np.ndarray]) -> dict[str, Any]:
    run = next(_runs_of(task)) if task.others else load_fit(task.fit_paths[0])
    _, held_out = corpus_tokens(load_corpus(task.config.data), run.vocabulary)
    found = predictions(run.vocabulary, run.network, members, held_out, seed=0, relative=NOISE)
    count = len(next(iter(members.values())))
    chosen = np.linspace(0, count - 1, found.members).round().astype(int)
    kept = {name: np.asarray(value[chosen], np.float32) for name, value in members.items()}
    margins = {"first_layer": smallest_margins(run, kept, _FIRST_LAYER, task.margin_sequences)}
    if run.config.objective.trains_attention_prior:
        own = run.config.objective
        margins["trained"] = smallest_margins(run, kept, own, task.margin_sequences)
    return _of_predictions(found) | {
        f"{stage}_margin": list(np.quantile(values, MARGIN_LEVELS))
        for stage, values in margins.items()
    }


def _of_predictions(found: Predictions) -> dict[str, Any]:
    surest = found.selective
    return {
        "members": found.members,
        "bpc": found.bpc,
        "accuracy": float(surest.accuracy[-1]),
        "calibration_error": found.reliability.error,
        "area": surest.area,
        "noise": found.noise_relative,
        "coverage": surest.coverage.tolist(),
        "coverage_bpc": surest.bpc.tolist(),
        "coverage_accuracy": surest.accuracy.tolist(),
    }


def smallest_margins(
    run: Run, members: Mapping[str, np.ndarray], objective: ObjectiveConfig, sequences: int
) -> np.ndarray:
    """Return the smallest margin (members,) of an objective's stage over training sequences.

    Args:
        run: a fit of the same network and text.
        members: parameters by site, the ensemble as the leading axis.
        objective: its attention stage is the one measured, all heads of it.
        sequences: at most so many, spread evenly over the training text.
    """
    model = partial(
        language_model,
        vocabulary_size=run.vocabulary.size,
        config=run.config.model,
        objective=objective,
        margins=True,
    )
    drawn = {name: value[None] for name, value in members.items()}
    result = PosteriorResult("members", drawn, model, training_sequences(run, sequences))
    return np.concatenate(
        [
            np.min(values.deterministic["margin"][..., 2:].reshape(rows.stop - rows.start, -1), -1)
            for rows, values in site_values(result)
        ]
    )
