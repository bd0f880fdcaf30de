"""Validation loss of the three objectives on Tiny Shakespeare, with intervals over seeds.

    python benchmarks/tinyshakespeare.py --text input.txt --runs runs/tinyshakespeare

Fits `examples/tinyshakespeare.toml` once per objective and seed (about two minutes each on two
cores), goes on where it was interrupted, and writes benchmarks/results/tinyshakespeare.json.
"""

import argparse
import dataclasses
import json
import math
import statistics
from pathlib import Path

from harness import environment
from scipy.stats import t

from probattn.inference import fit, read_config
from probattn.models import ObjectiveConfig

HERE = Path(__file__).parent
OBJECTIVES = ("ce", "margin", "full")

parser = argparse.ArgumentParser(description="three objectives on Tiny Shakespeare")
parser.add_argument("--text", type=Path, required=True)
parser.add_argument("--runs", type=Path, required=True)
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--out", type=Path, default=HERE / "results" / "tinyshakespeare.json")
options = parser.parse_args()


def interval(values):
    """Return mean and half-width of the 95 % interval of Student's t."""
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": statistics.mean(values), "half_width_95": half, "values": values}


base = read_config(HERE.parent / "examples" / "tinyshakespeare.toml")
losses = {name: [] for name in OBJECTIVES}
details = []
for seed in range(options.seeds):
    for name in OBJECTIVES:
        config = dataclasses.replace(
            base,
            data=dataclasses.replace(base.data, source=str(options.text)),
            objective=ObjectiveConfig(name),
            fit=dataclasses.replace(base.fit, seed=seed),
        )
        out = options.runs / f"{name}-{seed}"
        result = fit(config, out, resume=(out / "config.toml").exists(), progress=True)
        losses[name].append(result.validation_cross_entropy)
        rows = result.metrics
        details.append(
            {
                "objective": name,
                "seed": seed,
                "validation_cross_entropy": result.validation_cross_entropy,
                "best_step": result.run.step,
                "rejected_steps": rows[-1]["rejected_steps"],
                "embedding_rms": rows[-1]["embedding_rms"],
                "min_margin": rows[-1]["min_margin"],
                "min_margin_kind": rows[-1]["min_margin_kind"],
                "infeasible_fraction": rows[-1]["infeasible_fraction"],
            }
        )
        print(f"{name} seed {seed}: {result.validation_cross_entropy:.4f}", flush=True)

entropies = {name: interval(values) for name, values in losses.items()}
# Paired by seed: initial network and minibatches are the same.
costs = {
    name: interval([100 * (a / b - 1) for a, b in zip(losses[name], losses["ce"], strict=True)])
    for name in OBJECTIVES[1:]
}
table = {
    "environment": environment(),
    "config": "examples/tinyshakespeare.toml",
    "validation_cross_entropy": entropies,
    "cost_percent": costs,
    "runs": details,
}
options.out.parent.mkdir(parents=True, exist_ok=True)
options.out.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
for name, row in entropies.items():
    print(f"{name:7s} {row['mean']:.4f} +- {row['half_width_95']:.4f} nats per character")
for name, row in costs.items():
    print(f"{name:7s} costs {row['mean']:+.2f} % +- {row['half_width_95']:.2f}")
