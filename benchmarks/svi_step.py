"""Cost of a step of `fit` against the same network, loss and optimizer written without NumPyro."""

import math
import operator
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from harness import CONTROL, ratios, timed_in_turn

from probattn import log_det, relaxed_barrier
from probattn.inference.config import RunConfig
from probattn.inference.fitting.optimizers import default_optimizer
from probattn.inference.fitting.svi import Trainer
from probattn.models import ObjectiveConfig, language_model
from probattn.models.transformer import embed, logits
from probattn.positivity import certainly_positive
from probattn.text.batches import random_blocks

VOCABULARY, TOKENS = 65, 1_000_000
STEPS = 20  # in one call, as `fit` makes several
PROCESSES = 5


def svi_step(rounds: int) -> dict[str, Any]:
    """Compare a trainer's step with the hand-written one, and one with the barrier with ce.

    Rounds are shared out among processes: where a process has its arrays moves such a ratio by
    several hundredths, whatever the number of its rounds.
    """
    shares = [rounds // PROCESSES + (number < rounds % PROCESSES) for number in range(PROCESSES)]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        found = list(pool.map(_in_one_process, [share for share in shares if share]))
    return {title: _pooled([part[title] for part in found]) for title in found[0]}


def _pooled(parts: Sequence[dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """Return `harness.ratios` of all rounds, with the median ratio of each process."""
    first = next(iter(parts[0]))
    distributed = {name: [second for part in parts for second in part[name]] for name in parts[0]}
    return {
        name: figures
        | {
            "ratio_of_each_process": [
                statistics.median(map(operator.truediv, part[name], part[first])) for part in parts
            ]
        }
        for name, figures in ratios(distributed).items()
    }


def _in_one_process(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each round, by comparison and alternative."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, TOKENS, dtype=np.int32))
    configs = {name: RunConfig(objective=ObjectiveConfig(name)) for name in ("ce", "margin")}
    steps = {name: _trainer(config, tokens) for name, config in configs.items()}
    comparisons = {
        name: {"hand-written": _hand_written(config, tokens), "probattn": steps[name]}
        for name, config in configs.items()
    }
    comparisons["barrier"] = steps  # its check included
    return {title: timed_in_turn(runs, rounds=rounds) for title, runs in comparisons.items()}


def report(results: dict[str, Any]) -> None:
    """Print a table of what `svi_step` returns."""
    for objective, table in results.items():
        for name, figures in table.items():
            label = f"{next(iter(table))} again" if name == CONTROL else name
            print(
                f"svi step, {objective:7s} {label:20s} {1e3 * figures['seconds'] / STEPS:7.2f} ms  "
                f"x {figures['ratio']:.3f} "
                f"({figures['ratio_low']:.3f} to {figures['ratio_high']:.3f}; of each process "
                + " ".join(f"{each:.3f}" for each in figures["ratio_of_each_process"])
                + ")"
            )


def _trainer(config: RunConfig, tokens: jax.Array) -> Callable[[], Any]:
    trainer = Trainer(config, tokens, VOCABULARY)
    state = trainer.init()

    def run() -> Any:
        nonlocal state
        state, progress = trainer.advance(state, 0, STEPS)
        return progress

    return run


def _hand_written(config: RunConfig, tokens: jax.Array) -> Callable[[], Any]:
    """Write the step as a practitioner would, with the priors' densities by hand."""
    model, fit, objective = config.model, config.fit, config.objective
    with numpyro.handlers.seed(rng_seed=0):
        inputs = jnp.zeros((1, model.block), jnp.int32)
        trace = numpyro.handlers.trace(language_model).get_trace(
            inputs, vocabulary_size=VOCABULARY, config=model, objective=objective
        )
    sites = {
        name: site
        for name, site in trace.items()
        if site["type"] == "sample" and not site["is_observed"] and name != "tokens"
    }
    params = {name: site["value"] for name, site in sites.items()}
    priors = {}
    for name, site in sites.items():
        mean, variance = site["fn"].mean, site["fn"].variance
        priors[name] = float(mean.ravel()[0]), math.sqrt(variance.ravel()[0])
    weight, _ = objective.weights
    optimizer = default_optimizer(fit)

    def inside(params: Any, inputs: jax.Array) -> jax.Array:
        stage = embed(params, inputs), params["w_query"], params["w_key"]
        return jax.lax.cond(
            jnp.all(certainly_positive(*stage)),
            lambda: jnp.bool_(True),
            lambda: jnp.all(log_det(*stage)[0] > 0),
        )

    def loss(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        x = embed(params, inputs)
        predicted = logits(params, x, heads=model.heads)
        value = optax.softmax_cross_entropy_with_integer_labels(predicted, targets).mean()
        if weight:
            barrier = relaxed_barrier(
                x, params["w_query"], params["w_key"], objective.delta, summed=True
            )
            value += weight * barrier.mean() / model.block
        log_prior = sum(
            jnp.sum(
                -(((params[name] - location) / scale) ** 2) / 2
                - math.log(scale)
                - math.log(2 * math.pi) / 2
            )
            for name, (location, scale) in priors.items()
        )
        return value - log_prior / TOKENS

    def step(number: jax.Array, carry: Any) -> Any:
        params, moments, _ = carry
        key = jax.random.fold_in(jax.random.key(0), number)
        inputs, targets = random_blocks(key, tokens, batch=fit.batch, block=model.block)
        value, gradient = jax.value_and_grad(loss)(params, inputs, targets)
        updates, moments = optimizer.update(gradient, moments, params)
        trial = optax.apply_updates(params, updates)
        if weight:  # the trainer's check, without the backtracking that it rarely needs
            trial = jax.lax.cond(inside(trial, inputs), lambda: trial, lambda: params)
        return trial, moments, value

    @jax.jit
    def advance(params: Any, moments: Any) -> Any:
        return jax.lax.fori_loop(0, STEPS, step, (params, moments, jnp.zeros(())))

    state = params, optimizer.init(params)

    def run() -> Any:
        nonlocal state
        params, moments, value = advance(*state)
        state = params, moments
        return value

    return run
