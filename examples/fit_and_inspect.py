"""Fit a language model with `probattn.inference.fit` and draw the margins of a text.

    python examples/fit_and_inspect.py [--steps 300] [--width 64] [--out runs/inspect]

Prints bits per character and the support token, and leaves the run and its figures in --out.
"""

import argparse
from pathlib import Path

import numpy as np

from probattn.inference import FitConfig, RunConfig, evaluate, fit, text_margins
from probattn.inference.figures.report import margin_figures
from probattn.models import LanguageModelConfig, ObjectiveConfig
from probattn.text.corpora import load_corpus

parser = argparse.ArgumentParser(description="fit a language model and inspect its margins")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--width", type=int, default=64)
parser.add_argument("--out", type=Path, default=Path("runs/inspect"))
options = parser.parse_args()

config = RunConfig(
    model=LanguageModelConfig(layers=2, heads=2, width=options.width, block=64, prior_rank=8),
    objective=ObjectiveConfig("margin"),
    fit=FitConfig(steps=options.steps, warmup=options.steps // 10, eval_every=100),
)
result = fit(config, options.out, overwrite=True, progress=True)
print(f"validation: {result.validation_bpc:.3f} bits per character")

evaluation = evaluate(result.run)
for point in evaluation.noise_relative:
    print(f"noise of {point.relative:g} embedding RMS: {point.degradation:.3f} x clean")

excerpt = options.out.parent / "excerpt.txt"
excerpt.write_text(load_corpus(config.data).validation[:400], encoding="utf-8")
margins = text_margins(result.run, excerpt)
stage = margins.stages[0]
weakest = int(np.argmin(stage.margin))
print(
    f"support token {margins.tokens[weakest]!r} at {weakest}: margin {stage.margin[weakest]:.3f} "
    f"(sigma_min, {stage.label})"
)
for path in margin_figures(margins, options.out / "figures"):
    print("wrote", path)
