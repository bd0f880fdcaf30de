"""Which weight of the barrier stands for the Bayesian answer? Modes of a full posterior.

    python examples/posterior_language_model.py [--starts 8] [--draws 1500] [--out runs/small]

A network of 316 parameters on 16 sequences of 16 characters (examples/small.toml): MAPs by SVI of
the objective full from several seeds, and of ce and margin over a grid of weights; a chain from
each MAP of full; what distinguishes the chains, and their stacking weights; and the point
estimates beside them. Leaves the runs, modes.csv, modes.png, comparison.csv and the figures in
--out.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import arviz as az
import numpy as np

from probattn import stability_margin
from probattn.inference import (
    SampleConfig,
    compare,
    fit,
    load_posterior,
    load_run,
    read_config,
    sample_run,
    stack_chains,
    to_datatree,
)
from probattn.inference.figures import save_figure, smallest_margin
from probattn.inference.figures.report import compared_report
from probattn.inference.runs.csv_tables import write_table
from probattn.inference.sampling.posterior_runs import fitted_starts
from probattn.models import ObjectiveConfig

parser = argparse.ArgumentParser(description="modes of a full posterior, and point estimates")
parser.add_argument("--weights", type=float, nargs="+", default=[0.1, 1.0, 10.0])
parser.add_argument("--starts", type=int, default=8)
parser.add_argument("--steps", type=int, default=3000)
parser.add_argument("--warmup", type=int, default=500)
parser.add_argument("--draws", type=int, default=1500)
parser.add_argument("--out", type=Path, default=Path("runs/small"))
options = parser.parse_args()

config = read_config(Path(__file__).with_name("small.toml"))
steps = options.steps
fitting = replace(config.fit, steps=steps, learning_rate=0.1, eval_every=steps)
config = replace(config, fit=replace(fitting, evaluation_tokens=8192))


def fitted(label, objective, seed):
    own = replace(config, objective=objective, fit=replace(config.fit, seed=seed))
    fit(own, options.out / label, overwrite=True)
    return load_run(options.out / label)


full = ObjectiveConfig("full")
starts = [fitted(f"full {seed}", full, seed) for seed in range(options.starts)]

sampling = SampleConfig(
    method="ensemble", chains=options.starts, warmup=options.warmup, draws=options.draws
)
described, values = fitted_starts([run.path for run in starts], sampling)
posterior, result = sample_run(
    described, options.out / "posterior", init_values=values, overwrite=True
)
print(f"{result.divergences} of {options.draws * sampling.chains} iterations were refused")

tree = to_datatree(load_posterior(posterior), log_likelihood=True)
draws = tree["posterior"]
norms = np.linalg.norm(draws["position_embedding"].values, axis=-1).mean(1)
anchors = [tuple(np.flatnonzero(row > 1).tolist()) for row in norms]


def r_hat(margin):
    """Return the largest r_hat of margins (chain, draw, margin)."""
    margin = margin.reshape(*margin.shape[:2], -1)
    margin = margin[..., np.ptp(margin, axis=(0, 1)) > 0]
    return max(float(az.rhat(margin[..., n])) for n in range(margin.shape[-1]))


def halves(margin):
    """Return the two halves of one chain as chains."""
    half = margin.shape[0] // 2
    return np.stack([margin[:half], margin[half : 2 * half]])


margin, smallest = draws["margin"].values, draws["smallest_margin"].values
rows = []
for mode in stack_chains(tree):
    chain = mode.chain
    rows.append(
        {
            "chain": chain,
            "anchors": " and ".join(str(position) for position in anchors[chain]),
            "log density": tree["sample_stats"]["lp"].values[chain].mean(),
            "log det": draws["log_det"].values[chain, ..., 2:].mean(),
            "smallest margin": smallest[chain].mean(),
            "r_hat within": r_hat(halves(margin[chain])),
            "loo": mode.elpd,
            "k": mode.pareto_k,
            "weight": mode.weight,
        }
    )
for row in rows:
    print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
write_table(options.out / "modes.csv", list(rows[0]), [list(row.values()) for row in rows])
print(f"largest r_hat of a margin over all chains: {r_hat(margin):.2f}")
print(f"smallest margin over all chains: r_hat {az.rhat(smallest):.3f}, ess {az.ess(smallest):.0f}")
for pair in sorted(set(anchors)):
    same = [chain for chain, own in enumerate(anchors) if own == pair]
    if len(same) > 1:
        print(f"anchors {pair}: {len(same)} chains, r_hat {r_hat(margin[same]):.2f}")
weights = np.array([row["weight"] for row in rows])
chosen = np.random.default_rng(0).choice(len(weights), 10_000, p=weights / weights.sum())
mixed = np.random.default_rng(1).choice(smallest.shape[1], chosen.size)
low, high = np.quantile(smallest[chosen, mixed], [0.05, 0.95])
print(f"stacked smallest margin: {low:.3f} to {high:.3f} (90 %)")

inputs, _ = result.model_args
names = ("token_embedding", "position_embedding", "w_query", "w_key")
marks = {}
for seed, run in enumerate(starts):
    token, position, w_query, w_key = (run.parameters[name] for name in names)
    found = stability_margin(token[inputs] + position, w_query, w_key)
    marks[f"MAP {seed}"] = float(found[:, 2:].min())
    print(f"MAP {seed}: smallest margin {marks[f'MAP {seed}']:.3f}")
save_figure(smallest_margin(smallest, marks), options.out / "modes.png")

runs = {"full": starts[0], "ce": fitted("ce", ObjectiveConfig("ce"), 0)}
for weight in options.weights:
    label = f"margin {weight:g}"
    runs[label] = fitted(label, ObjectiveConfig("margin", barrier_weight=weight), 0)
compared = compare({"posterior": posterior, **runs}, progress=True)
for one in compared:
    print(
        f"{one.label:12s} held-out {one.predictions.bpc:.3f} bits per character, smallest margin "
        f"{one.smallest_margin:.3f} ({one.margin_stage})"
    )
for path in compared_report(compared, options.out):
    print("wrote", path)
