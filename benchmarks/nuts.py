"""Effective samples per second of `sample` and of BlackJAX's NUTS on the same log density."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import count
from typing import Any, NamedTuple

import arviz as az
import blackjax
import jax
import numpy as np
from blackjax.adaptation.base import get_filter_adapt_info_fn
from calibration import QUANTITIES
from harness import CONTROL, alternate, ratio
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import init_to_sample
from numpyro.infer.util import constrain_fn, initialize_model

from probattn.inference import SampleConfig, sample
from probattn.inference.runs.segments import SegmentFolder
from probattn.models import LatentEmbeddingsConfig, latent_embeddings, observed_embeddings

SEQUENCES, LENGTH, SYMBOLS = 8, 16, 8
METHODS = ("parallel", "vectorized")  # of `SampleConfig.chain_method`


class _Problem(NamedTuple):
    """A model, data simulated from it, and the identified quantities of a draw."""

    model: Callable
    args: tuple
    quantities: Mapping[str, Callable[[Mapping[str, Any]], Any]]


class _Outcome(NamedTuple):
    """One run of all chains: leapfrog steps (chains, iterations), warm-up included."""

    seconds: float
    compile_seconds: float
    steps: np.ndarray
    diverging: int
    draws: Mapping[str, np.ndarray]


class _Figures(NamedTuple):
    """What is told of a run; per step and second: of all chains together, on all cores."""

    seconds: float
    compile_seconds: float
    steps: float
    warmup_steps: float
    seconds_per_step: float
    ess: float
    ess_per_second: float
    diverging: int
    r_hat: float
    ess_of: dict[str, float]


def nuts(rounds: int, config: SampleConfig | None = None) -> dict[str, Any]:
    """Measure seconds, leapfrog steps and smallest bulk ESS of identified quantities.

    Both samplers have the same chains, iterations, target acceptance, depth and diagonal mass
    matrix, start from draws of the prior, give draws of the sites back, and run at double precision
    in programs compiled before. Seconds are of warm-up and draws together. Every run has a seed of
    its own; `sample` runs twice a round, as a control.
    """
    config = SampleConfig() if config is None else config
    with jax.enable_x64(True):
        return {
            "blackjax": version("blackjax"),
            "rounds": rounds,
            "chains": config.chains,
            "warmup": config.warmup,
            "draws": config.draws,
            "target_accept": config.target_accept,
            "models": {
                name: _compare(problem, config, rounds) for name, problem in _problems().items()
            },
        }


def report(results: dict[str, Any]) -> None:
    """Print a table of what `nuts` returns."""
    for model, methods in results["models"].items():
        for method, table in methods.items():
            for name, row in table["samplers"].items():
                label = "sample again" if name == CONTROL else name
                print(
                    f"nuts, {model}, {method:10s} {label:12s} {row['seconds']:7.2f} s   "
                    f"{row['steps']:6.1f} steps of {1e6 * row['seconds_per_step']:7.1f} us   "
                    f"ESS {row['ess']:6.0f}, {row['ess_per_second']:8.2f} per s   "
                    f"R-hat {row['r_hat']:.3f}   compiling {row['compile_seconds']:.1f} s"
                )
            for pair, figures in table["ratios"].items():
                told = ", ".join(
                    f"{name} x {each['ratio']:.3f} "
                    f"({each['ratio_low']:.3f} to {each['ratio_high']:.3f})"
                    for name, each in figures.items()
                )
                print(f"nuts, {model}, {method:10s} {pair}: {told}")


def _problems() -> dict[str, _Problem]:
    """Make the problems: one of 281 parameters, nearly all of them embeddings, one of ten."""
    size = {"coupling": "bounded", "sequences": SEQUENCES, "length": LENGTH}
    latent = partial(
        latent_embeddings,
        vocabulary_size=SYMBOLS,
        config=LatentEmbeddingsConfig(width=2, **size),
    )
    observed = partial(observed_embeddings, config=LatentEmbeddingsConfig(width=3, **size))
    with_scale = {**QUANTITIES, "scale": lambda site: site["scale"]}
    return {
        "latent_embeddings": _Problem(latent, (_simulated(latent, "tokens"),), QUANTITIES),
        "observed_embeddings": _Problem(
            observed, (_simulated(observed, "embeddings"),), with_scale
        ),
    }


def _simulated(model: Callable, name: str) -> np.ndarray:
    def draw(rng_key: jax.Array) -> jax.Array:
        return trace(seed(model, rng_key)).get_trace(None)[name]["value"]

    return np.asarray(jax.jit(draw)(jax.random.key(0)))


def _compare(problem: _Problem, config: SampleConfig, rounds: int) -> dict[str, Any]:
    seeds = count()
    measure = _measure(problem, config)
    runs: dict[str, Callable[[int], _Outcome]] = {}
    for method in METHODS:
        own = replace(config, chain_method=method)
        runs[f"{method} sample"] = partial(_sample, problem, own)
        runs[f"{method} blackjax"] = _blackjax(problem, own)
    runs[CONTROL] = runs["parallel sample"]
    figures = alternate(
        {name: lambda run=run: measure(run(next(seeds))) for name, run in runs.items()},
        rounds=rounds,
    )
    results = {}
    for method in METHODS:
        found = {name: figures[f"{method} {name}"] for name in ("sample", "blackjax")}
        pairs = [("sample", "blackjax")]
        if method == "parallel":
            found[CONTROL] = figures[CONTROL]
            pairs.append((CONTROL, "sample"))
        results[method] = {
            "samplers": {name: _summary(each) for name, each in found.items()},
            "ratios": {
                f"{name} / {reference}": {
                    figure: ratio(
                        [getattr(each, figure) for each in found[name]],
                        [getattr(each, figure) for each in found[reference]],
                    )
                    for figure in ("ess_per_second", "seconds_per_step", "ess", "steps")
                }
                for name, reference in pairs
            },
        }
    return results


def _summary(rounds: list[_Figures]) -> dict[str, Any]:
    """Take medians over rounds; of divergences the sum, of R-hat the largest."""
    of = {name: [getattr(each, name) for each in rounds] for name in _Figures._fields}
    special = {
        "diverging": sum(of.pop("diverging")),
        "r_hat": max(of.pop("r_hat")),
        "ess_of": {
            name: statistics.median(each.ess_of[name] for each in rounds)
            for name in of.pop("ess_of")[0]
        },
    }
    return {name: statistics.median(values) for name, values in of.items()} | special


def _sample(problem: _Problem, config: SampleConfig, number: int) -> _Outcome:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = sample(
            problem.model,
            model_args=problem.args,
            config=replace(config, seed=number),
            out=folder,  # which tells the steps of the warm-up; chains go on while it is written
        )
        elapsed = time.perf_counter() - started
        steps = [segment.statistics["n_steps"] for segment in SegmentFolder(folder).load()]
    return _Outcome(
        seconds=result.seconds,
        compile_seconds=elapsed - result.seconds,
        steps=np.concatenate(steps, 1),
        diverging=result.divergences,
        draws=result.draws,
    )


def _blackjax(problem: _Problem, config: SampleConfig) -> Callable[[int], _Outcome]:
    """Sample the same chains by BlackJAX, in threads or in one call, as `Chains` runs them."""
    each = config.chain_method == "parallel"
    initialize = partial(
        initialize_model,
        model=problem.model,
        init_strategy=init_to_sample,
        dynamic_args=False,
        model_args=problem.args,
    )
    potential = initialize(jax.random.key(0)).potential_fn

    def start(rng_key: jax.Array) -> dict[str, jax.Array]:
        return initialize(rng_key).param_info.z

    def log_density(z: dict[str, jax.Array]) -> jax.Array:
        return -potential(z)

    def chain(rng_key: jax.Array, z: dict[str, jax.Array]) -> tuple:
        warmup_key, draw_key = jax.random.split(rng_key)
        warmup = blackjax.window_adaptation(
            blackjax.nuts,
            log_density,
            is_mass_matrix_diagonal=True,
            target_acceptance_rate=config.target_accept,
            adaptation_info_fn=get_filter_adapt_info_fn(info_keys={"num_integration_steps"}),
            max_num_doublings=config.max_tree_depth,
        )
        adapted, warm = warmup.run(warmup_key, z, config.warmup)
        kernel = blackjax.nuts(log_density, **adapted.parameters)

        def step(state: Any, rng_key: jax.Array) -> tuple:
            state, info = kernel.step(rng_key, state)
            # Without what no draw needs, the model is not run again.
            draw = constrain_fn(problem.model, problem.args, {}, state.position)
            return state, (draw, info.num_integration_steps, info.is_divergent)

        keys = jax.random.split(draw_key, config.draws)
        _, (draws, steps, diverging) = jax.lax.scan(step, adapted.state, keys)
        return draws, (warm.info.num_integration_steps, steps), diverging

    def one_of(i: int, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[i], tree)

    def keys_of(number: int) -> tuple[jax.Array, jax.Array]:
        return tuple(jax.random.split(jax.random.key(number), (2, config.chains)))

    started = time.perf_counter()
    start_keys, chain_keys = keys_of(0)
    starts = jax.jit(jax.vmap(start)).lower(start_keys).compile()
    example = chain_keys, starts(start_keys)
    of_all = chain if each else jax.vmap(chain)
    if each:
        example = one_of(0, example)
    program = jax.jit(of_all).lower(*example).compile()
    compile_seconds = time.perf_counter() - started

    def thread(one: tuple) -> tuple:
        with jax.enable_x64(True):  # each thread has settings of its own
            return jax.block_until_ready(program(*one))

    def run(number: int) -> _Outcome:
        start_keys, chain_keys = keys_of(number)
        z = starts(start_keys)
        chains = jax.block_until_ready([one_of(i, (chain_keys, z)) for i in range(config.chains)])
        started = time.perf_counter()
        if each:
            with ThreadPoolExecutor(min(config.chains, os.cpu_count() or 1)) as pool:
                found = list(pool.map(thread, chains))
            found = jax.tree.map(lambda *leaves: np.stack(leaves), *found)
        else:
            found = jax.tree.map(np.asarray, thread((chain_keys, z)))
        elapsed = time.perf_counter() - started
        draws, steps, diverging = found
        return _Outcome(
            elapsed, compile_seconds, np.concatenate(steps, 1), int(diverging.sum()), draws
        )

    return run


def _measure(problem: _Problem, config: SampleConfig) -> Callable[[_Outcome], _Figures]:
    def of_one(draw: dict[str, jax.Array]) -> list[jax.Array]:
        model = seed(substitute(problem.model, draw), jax.random.key(0))
        sites = trace(model).get_trace(*problem.args)
        values = {name: site["value"] for name, site in sites.items() if "value" in site}
        return [of(values) for of in problem.quantities.values()]

    of_all = jax.jit(lambda draws: jax.lax.map(of_one, draws, batch_size=100))

    def measure(outcome: _Outcome) -> _Figures:
        shape = config.chains, config.draws
        rows = {name: value.reshape(-1, *value.shape[2:]) for name, value in outcome.draws.items()}
        columns = [np.asarray(column).reshape(shape) for column in of_all(rows)]
        ess = [float(az.ess(column, method="bulk")) for column in columns]
        warmup, steps = np.split(outcome.steps, [config.warmup], 1)
        return _Figures(
            seconds=outcome.seconds,
            compile_seconds=outcome.compile_seconds,
            steps=float(steps.mean()),
            warmup_steps=float(warmup.mean()),
            seconds_per_step=outcome.seconds / int(outcome.steps.sum()),
            ess=min(ess),
            ess_per_second=min(ess) / outcome.seconds,
            diverging=outcome.diverging,
            r_hat=max(float(az.rhat(column)) for column in columns),
            ess_of=dict(zip(problem.quantities, ess, strict=True)),
        )

    return measure
