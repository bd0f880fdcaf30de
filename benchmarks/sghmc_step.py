"""Cost of a step of SGHMC against one of `fit`, for the same network and minibatches.

    python benchmarks/sghmc_step.py [--rounds 15]

The network is that of examples/tinyshakespeare.toml, 0.8 million parameters, and the text so long
that an iteration of 20 steps takes it once. SGHMC is timed with and without the density of all the
text that it computes for every draw.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import compare, environment

from probattn.inference import RunConfig, SampleConfig, read_config
from probattn.inference.fitting.svi import Trainer
from probattn.inference.sampling.stochastic import stochastic_kernel
from probattn.models import ObjectiveConfig, language_model

VOCABULARY, STEPS = 65, 20
CONFIG = Path(__file__).parents[1] / "examples" / "tinyshakespeare.toml"


def main() -> None:
    """Time the three in turn, and print and write their ratios."""
    parser = argparse.ArgumentParser(description="a step of SGHMC against one of fit")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    config = replace(read_config(CONFIG), objective=ObjectiveConfig("ce"))
    batch, block = config.fit.batch, config.model.block
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, VOCABULARY, STEPS * batch * block + 1, dtype=np.int32)
    found = compare(
        {
            "fit": _fit(config, tokens),
            "sghmc": _sghmc(config, tokens, full_density=False),
            "sghmc, density of all the text": _sghmc(config, tokens, full_density=True),
        },
        rounds=options.rounds,
    )
    for name, figures in found.items():
        milliseconds = 1e3 * figures["seconds"] / STEPS
        low, high = figures["ratio_low"], figures["ratio_high"]
        print(
            f"{name:32s} {milliseconds:7.2f} ms  x {figures['ratio']:.3f} ({low:.3f} to {high:.3f})"
        )
    path = options.out / "sghmc_step.json"
    text = json.dumps({"environment": environment(), "ratios": found}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def _fit(config: RunConfig, tokens: np.ndarray) -> Callable[[], Any]:
    trainer = Trainer(config, jnp.asarray(tokens), VOCABULARY)
    state = trainer.init()

    def run() -> Any:
        nonlocal state
        state, progress = trainer.advance(state, 0, STEPS)
        return progress

    return run


def _sghmc(config: RunConfig, tokens: np.ndarray, *, full_density: bool) -> Callable[[], Any]:
    batch, block = config.fit.batch, config.model.block
    model = partial(
        language_model,
        vocabulary_size=VOCABULARY,
        config=config.model,
        objective=config.objective,
        minibatch=batch,
    )
    data = tuple(jnp.asarray(part).reshape(-1, block) for part in (tokens[:-1], tokens[1:]))
    sample = SampleConfig(
        method="sghmc", warmup=1, steps=STEPS, step_size=1e-3, full_density=full_density
    )
    kernel = stochastic_kernel(model, (data, {}), sample, {})
    step = jax.jit(kernel.step)
    state = jax.jit(kernel.init)(jax.random.key(0), jnp.int32(0))

    def run() -> Any:
        nonlocal state
        state = step(state)
        return state.log_density

    return run


if __name__ == "__main__":
    main()
