"""Effective draws per gradient of the smallest margin: MCLMC beside NUTS, on simulated data.

MCLMC is taken as it is, at two step sizes, and adjusted, with two lengths of trajectory.

    python benchmarks/samplers.py [--warmup 500] [--draws 1000] [--out benchmarks/results]

The model and its data are those of examples/posterior_simulated.py. Gradients are of the draws
alone and not of the warm-up, whose length is a choice. A step of MCLMC has two.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import arviz as az
import jax
import numpy as np
from harness import environment
from numpyro.handlers import seed, trace

from probattn.inference import SampleConfig, sample, to_datatree
from probattn.models import LatentEmbeddingsConfig, latent_embeddings

QUANTITIES = ("smallest_margin", "coupling_trace", "coupling_norm")


def measured(config: SampleConfig, model: Any, tokens: np.ndarray) -> dict[str, Any]:
    """Sample, and return figures of the draws."""
    result = sample(model, model_args=(tokens,), config=config)
    posterior = to_datatree(result)["posterior"]
    gradients = int(result.statistics["n_steps"].sum())
    found: dict[str, Any] = {
        "gradients": gradients,
        "seconds": result.seconds,
        "diverging": result.divergences,
        "step_size": result.statistics["step_size"][:, 0].tolist(),
    }
    for name in QUANTITIES:
        draws = posterior[name].values
        ess = float(az.ess(draws, method="bulk"))
        found[name] = {
            "mean": float(draws.mean()),
            "sd": float(draws.std()),
            "mcse": float(az.mcse(draws)),
            "r_hat": float(az.rhat(draws)),
            "ess": ess,
            "ess per 1000 gradients": 1000 * ess / gradients,
        }
    return found


def main() -> None:
    """Run the comparison that the command line describes."""
    parser = argparse.ArgumentParser(description="MCLMC beside NUTS, by gradients")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--adjusted-steps", type=int, nargs="+", default=(2, 4))
    parser.add_argument("--energy-variance", type=float, nargs="+", default=(5e-4, 5e-3))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()

    size = {"sequences": options.sequences, "length": options.length}
    config = LatentEmbeddingsConfig(width=3, coupling="bounded", bound=1.0, **size)
    model = partial(latent_embeddings, vocabulary_size=12, config=config)
    with jax.enable_x64(True):
        tokens = np.asarray(trace(seed(model, 7)).get_trace()["tokens"]["value"])
    found = {"environment": environment(), **size, "warmup": options.warmup, "draws": options.draws}
    configs = {"nuts": SampleConfig(warmup=options.warmup, draws=options.draws)}
    for wanted in options.energy_variance:
        configs[f"mclmc, energy variance {wanted:g}"] = SampleConfig(
            method="mclmc",
            warmup=options.warmup,
            draws=options.draws,
            steps=options.steps,
            energy_variance=wanted,
        )
    for steps in options.adjusted_steps:
        configs[f"mclmc, adjusted, {steps} steps"] = SampleConfig(
            method="mclmc",
            adjusted=True,
            warmup=options.warmup,
            draws=options.draws * options.steps // steps,
            steps=steps,
        )
    for name, config_of in configs.items():
        found[name] = measured(config_of, model, tokens)
        print(name, json.dumps(found[name]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "samplers.json"
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
