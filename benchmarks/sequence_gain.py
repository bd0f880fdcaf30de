"""Whether the gain of a sequence tells better than its smallest margin how much noise harms it.

Fits a small language model with a margin objective, and takes windows of its validation text. Each
has a smallest margin and a gain, and a harm: by how much Gaussian noise on the embeddings, of half
their root mean square, raises the mean loss of the window.
"""

import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from probattn import sequence_gain as gain_of
from probattn.inference import FitConfig, RunConfig, fit, post_hoc_prior
from probattn.inference.evaluation.attention_stages import RunStage, stage_margins, stages
from probattn.inference.evaluation.intervals import bootstrap, spearman
from probattn.inference.evaluation.perturbations import perturbation
from probattn.inference.evaluation.scoring import Scorer
from probattn.inference.evaluation.texts import text_tokens
from probattn.inference.figures.style import DOUBLE, label_axes, line_style, new_figure, styled
from probattn.inference.runs.run import Run
from probattn.models import LanguageModelConfig, ObjectiveConfig
from probattn.models.transformer import embed, rms_normalised
from probattn.text.batches import map_batches
from probattn.text.corpora import DataConfig

CONFIG = RunConfig(
    data=DataConfig("pydoc"),
    model=LanguageModelConfig(layers=2, heads=4, width=64, block=64, prior_rank=8),
    objective=ObjectiveConfig("margin"),
    fit=FitConfig(steps=400, warmup=40, eval_every=200, checkpoint_every=400),
)
WINDOWS = 96
LEVEL = 0.5  # of the noise, in units of the embeddings' root mean square
RESAMPLES = 2000
PREDICTORS = ("smallest_margin", "gain", "clean_loss")
_BATCH = 8


def sequence_gain(rounds: int) -> dict[str, Any]:
    """Correlate the harm, over as many draws of the noise as there are rounds, with predictors."""
    with tempfile.TemporaryDirectory() as folder:
        run = fit(CONFIG, Path(folder) / "run").run
        return _measured(run, draws=rounds)


def _measured(run: Run, *, draws: int) -> dict[str, Any]:
    model = run.config.model
    tokens, _ = text_tokens(run, None)
    scorer = Scorer(run.network, run.vocabulary, tokens, most_tokens=WINDOWS * model.block)
    whole = scorer.reported.all(-1)
    clean = scorer.losses(run.parameters)
    noise = perturbation("gaussian", LEVEL * scorer.embedding_rms(run.parameters))
    noisy = np.mean(
        [
            scorer.losses(run.parameters, noise, rng_key=jax.random.key(number))
            for number in range(draws)
        ],
        axis=0,
    )
    harm, clean = ((losses.mean(-1))[whole] for losses in (noisy - clean, clean))
    inputs = scorer.inputs[whole]
    found = {}
    for stage in stages(run, post_hoc_prior(run)):
        if stage.input == "first_layer":
            continue
        gain = map_batches(
            lambda _, rows, stage=stage: _gain(run, stage, inputs[rows]), len(inputs), _BATCH
        )
        margin = stage_margins(run, stage, inputs).margin[:, 2:].min(-1)
        values = dict(zip(PREDICTORS, (margin, gain, clean), strict=True))
        found[stage.label] = {
            "correlations": _correlations(harm, values),
            **{name: np.asarray(value, float).tolist() for name, value in values.items()},
        }
    return {"windows": len(inputs), "level": LEVEL, "harm": harm.tolist(), "stages": found}


def _gain(run: Run, stage: RunStage, inputs: np.ndarray) -> jax.Array:
    x = embed(run.parameters, inputs)
    if stage.input == "normalised":
        x = rms_normalised(x)
    return gain_of(x, stage.w_query, stage.w_key, bound=stage.bound).gain


def _correlations(harm: np.ndarray, values: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Return Spearman's correlations with 95 % intervals over windows, and what gain adds."""

    def statistic(counts: np.ndarray) -> np.ndarray:
        found = spearman(harm, list(values.values()), counts)
        names = list(values)
        gain, margin = (found[names.index(name)] for name in ("gain", "smallest_margin"))
        return np.concatenate([found, (np.abs(gain) - np.abs(margin))[None]])

    estimates = bootstrap(statistic, len(harm), resamples=RESAMPLES, seed=0)
    names = [*values, "absolute_gain_less_absolute_smallest_margin"]
    return {name: list(estimate) for name, estimate in zip(names, estimates, strict=True)}


def report(results: dict[str, Any]) -> None:
    """Print a table of what `sequence_gain` returns."""
    for label, stage in results["stages"].items():
        for name, (value, low, high) in stage["correlations"].items():
            print(f"sequence gain, {label:9s} {name:44s} {value:+.3f} ({low:+.3f} to {high:+.3f})")
        gain, margin = (np.array(stage[name]) for name in ("gain", "smallest_margin"))
        print(
            f"sequence gain, {label:9s} median gain {np.median(gain):.1f}, 1 / smallest margin "
            f"{np.median(1 / np.abs(margin)):.1f}, of {len(gain)} windows"
        )


@styled
def figure(results: dict[str, Any]) -> Figure:
    """Draw the harm against the smallest margin and against the gain, a row for each stage."""
    labels = {"smallest_margin": "smallest margin", "gain": "gain of the sequence"}
    drawn = new_figure(DOUBLE, 2.3 * len(results["stages"]), layout="constrained")
    panels = drawn.subplots(len(results["stages"]), len(labels), sharey=True, squeeze=False)
    for row, (label, stage) in enumerate(results["stages"].items()):
        for column, (name, shown) in enumerate(labels.items()):
            axes = panels[row, column]
            style = line_style(0) | {"linestyle": "", "markersize": 3}
            axes.plot(stage[name], results["harm"], **style)
            if name == "gain":
                axes.set_xscale("log")
                if max(stage[name]) < 100 * min(stage[name]):
                    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                    axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter(NullFormatter())
            value, low, high = stage["correlations"][name]
            label_axes(
                axes,
                row * len(labels) + column,
                shown,
                "" if column else "harm by noise, nats per token",
                title=f"{label}: rank correlation {value:.2f} ({low:.2f} to {high:.2f})",
            )
    return drawn
