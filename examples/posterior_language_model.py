"""Which weight of the barrier stands for the Bayesian answer? MAPs within a full posterior.

    python examples/posterior_language_model.py [--warmup 1000] [--draws 2000] [--out runs/small]

A network of 316 parameters on 16 sequences of 16 characters (examples/small.toml): its MAP by SVI
with the objectives ce, margin over a grid of weights, and full; the posterior of full by NUTS,
started from its MAP; and all of them side by side. Leaves the runs, comparison.csv and the figures
in --out.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from probattn.inference import SampleConfig, compare, fit, load_run, read_config, sample_run
from probattn.inference.figures.report import compared_report, posterior_report
from probattn.inference.sampling.posterior_runs import config_of_fit
from probattn.models import ObjectiveConfig

parser = argparse.ArgumentParser(description="point estimates within a full posterior")
parser.add_argument("--weights", type=float, nargs="+", default=[0.01, 0.1, 1.0, 3.0, 10.0])
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--warmup", type=int, default=1000)
parser.add_argument("--draws", type=int, default=2000)
parser.add_argument("--out", type=Path, default=Path("runs/small"))
options = parser.parse_args()

config = read_config(Path(__file__).with_name("small.toml"))
config = replace(config, fit=replace(config.fit, steps=options.steps))
objectives = {"ce": ObjectiveConfig("ce"), "full": ObjectiveConfig("full")}
for weight in options.weights:
    objectives[f"margin {weight:g}"] = ObjectiveConfig("margin", barrier_weight=weight)
runs = {}
for label, objective in objectives.items():
    fit(replace(config, objective=objective), options.out / label, overwrite=True)
    runs[label] = load_run(options.out / label)

sampling = SampleConfig(warmup=options.warmup, draws=options.draws, max_tree_depth=8)
posterior, result = sample_run(
    config_of_fit(runs["full"], sampling),
    options.out / "posterior",
    init_values=runs["full"].parameters,
    overwrite=True,
    progress=True,
)
_, files = posterior_report(posterior)
print(f"{result.divergences} of {options.draws * sampling.chains} draws diverged")

compared = compare({"posterior": posterior, **runs}, progress=True)
for one in compared:
    print(
        f"{one.label:12s} held-out {one.predictions.bpc:.3f} bits per character, smallest margin "
        f"{one.smallest_margin:.3f} ({one.margin_stage})"
    )
for path in [*files, *compared_report(compared, options.out)]:
    print("wrote", path)
