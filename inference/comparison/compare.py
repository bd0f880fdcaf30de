"""Runs side by side: what they predict, how sure they are, how close to instability they came.

A run is an ensemble of parameters: one set of a MAP run, draws of a guide or of NUTS. The
probability of a token is its mean over the ensemble, so that all runs are scored alike.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from probattn.blocks.promotion import default_promotion
from probattn.inference.comparison.marginal import marginal_leave_one_out
from probattn.inference.comparison.predictive import Predictions, latent_predictions, predictions
from probattn.inference.evaluation.attention_stages import RunStage, stages
from probattn.inference.evaluation.post_hoc import post_hoc_prior
from probattn.inference.evaluation.token_margins import reported_margins, stage_series
from probattn.inference.export.diagnostics import leave_one_out, values_of
from probattn.inference.export.page_series import drawn_series
from probattn.inference.export.to_arviz import to_datatree
from probattn.inference.pages.page import Series
from probattn.inference.runs.checks import check_same_corpus
from probattn.inference.runs.files import RunError
from probattn.inference.runs.run import (
    FittedRun,
    ImportedRun,
    PosteriorRun,
    Run,
    RunDirectory,
    TunedRun,
)
from probattn.inference.runtime.one_thread import one_thread_at_a_time
from probattn.inference.runtime.progress import progress_bar
from probattn.inference.sampling.posterior_runs import (
    guide_posterior,
    load_posterior,
    training_sequences,
)
from probattn.inference.sampling.result import PosteriorResult
from probattn.models import ObjectiveConfig
from probattn.models.networks import TransformerNetwork
from probattn.text.corpora import load_corpus
from probattn.text.tokens import corpus_tokens

QUANTILES = (0.01, 0.1, 0.5)

_SEQUENCES = 64  # sequences for margins where no posterior names them
_OF_IMPORTED = 1  # sequence of a published model, which is long and has many heads
_DRAWS = 400  # draws of a guide


@dataclass(frozen=True)
class ComparedRun:
    """One run in a comparison; what does not apply to it is None.

    Attributes:
        label: label of the run.
        model: "language", "latent", or "imported" for a published model.
        objective: objective of a language model, such as "margin".
        barrier_weight: lambda_m.
        inference: "map", a guide, or a method of `sample`, with its temperature if not 1.
        predictions: predictions of held-out text.
        smallest_margin: smallest margin over the compared sequences; the median over draws.
        margin_quantiles: quantiles of all positions >= 2, by level; of all draws together.
        unknown_margins: how many margins are not known (NaN); smallest margins and quantiles are of
            the others.
        margin_stage: attention stage that the margins are taken at: "trained", "first layer" (all
            its heads), or "post hoc" for a run whose objective acts on none; "post hoc, not
            converged" if the fit of that stage did not come to rest.
        smallest_margin_draws: smallest margin in every draw, (chain, draw).
        elpd_loo: expected log predictive density by leave-one-out, nats; where draws are of the
            posterior, as those of guides are not. Of a latent model see `marginal_leave_one_out`.
        elpd_loo_se: its standard error.
        elpd_loo_filter_error: Monte Carlo error of a latent model's, by the particles of a filter.
        pareto_k: the largest Pareto k; above 0.7 the estimate cannot be trusted.
        divergences: draws whose iteration diverged or was refused.
        seconds: time that fitting or sampling took.
        sequences: the compared sequences, what is shown of each token; where there are margins.
        series: margins of their tokens, one sequence after the other, stage by stage.
    """

    label: str
    model: str
    objective: str | None = None
    barrier_weight: float | None = None
    inference: str = "map"
    predictions: Predictions | None = None
    smallest_margin: float | None = None
    margin_quantiles: Mapping[float, float] | None = None
    unknown_margins: int | None = None
    margin_stage: str | None = None
    smallest_margin_draws: np.ndarray | None = None
    elpd_loo: float | None = None
    elpd_loo_se: float | None = None
    elpd_loo_filter_error: float | None = None
    pareto_k: float | None = None
    divergences: int | None = None
    seconds: float | None = None
    sequences: tuple[tuple[str, ...], ...] | None = None
    series: tuple[Series, ...] = ()


@default_promotion()
@one_thread_at_a_time
def compare(
    runs: Mapping[str, FittedRun | PosteriorRun], *, seed: int = 0, progress: bool = False
) -> list[ComparedRun]:
    """Compare runs on the same text: predictions, calibration, robustness, margins, time.

    Predictions are of at most 8192 held-out tokens, in windows of what a run sees at once; see
    `predictive` for the one token by which language models and latent models differ in it.
    Published models have tokens of their own, and may stand beside any run on the same text.
    Margins are taken over sequences of the training text. Those of fits are over the sequences
    that the sampled posteriors of language models among the runs are given, so that a MAP can be
    marked in them; if there is none, over 64, or all that the text has. Latent models share no
    margins with language models, and their sequences may be others.

    Args:
        runs: runs by label, at least one, from `load_run`.
        seed: seed of the noise, of particles and of the draws of guides.
        progress: show a progress bar.

    Raises:
        ValueError: if there is no run, their data differ (RunError names what), or a text is not
            there any more.
        FilterError: if a filter of a latent model has no particle left, see `filtering`.
    """
    if not runs:
        raise ValueError("runs: got none, expected at least one")
    _check_same_data(runs)
    corpus = load_corpus(next(iter(runs.values())).config.data)
    for run in runs.values():
        check_same_corpus(run, corpus)
    compared = []
    with progress_bar("compare", total=len(runs), unit="run", visible=progress) as bar:
        sequences = _sequences(runs)
        for label, run in runs.items():
            bar.show(run=label)
            _, held_out = corpus_tokens(corpus, run.vocabulary)
            if isinstance(run, PosteriorRun):
                compared.append(_sampled(label, run, held_out, seed))
            elif isinstance(run, ImportedRun | TunedRun):
                compared.append(_imported(label, run, held_out, seed))
            else:
                compared.append(_fitted(label, run, held_out, sequences, seed))
            bar.update(1)
    return compared


def _sequences(runs: Mapping[str, FittedRun | PosteriorRun]) -> int:
    """Return the largest number of sequences for the margins of fits."""
    sizes = (_sizes(run, "language") for run in runs.values())
    return next((size[0] for size in sizes if size), _SEQUENCES)


def _sampled(label: str, run: PosteriorRun, held_out: np.ndarray, seed: int) -> ComparedRun:
    result = load_posterior(run)
    found = _of_draws(label, run, result, run.config.latent is None and result.temperature == 1)
    found |= {"divergences": result.divergences, "seconds": result.seconds}
    model, objective = run.config.model, run.config.objective
    if model is None or objective is None:
        assert run.config.latent is not None  # SampleRunConfig has one or the other
        found["predictions"] = latent_predictions(
            run.vocabulary, run.config.latent, _members(result), held_out, seed=seed
        )
        if result.temperature == 1:
            tokens = np.asarray(result.model_args[0])
            left = marginal_leave_one_out(result.draws, tokens, run.config.latent, seed=seed)
            found |= left._asdict() if left else {}
        return ComparedRun(label, "latent", **found)
    found |= _objective(objective)
    network = TransformerNetwork(model)
    found["predictions"] = predictions(
        run.vocabulary, network, _members(result), held_out, seed=seed
    )
    return ComparedRun(label, "language", **found)


def _fitted(label: str, run: Run, held_out: np.ndarray, sequences: int, seed: int) -> ComparedRun:
    objective = run.config.objective
    found: dict[str, Any] = {"seconds": _fit_seconds(run), **_objective(objective)}
    if run.config.fit.guide != "map":
        result = guide_posterior(run, draws=_DRAWS, seed=seed, sequences=sequences)
        found |= _of_draws(label, run, result, loo=False)
        found["predictions"] = predictions(
            run.vocabulary, run.network, _members(result), held_out, seed=seed
        )
        return ComparedRun(label, "language", **found)
    inputs, _ = training_sequences(run, sequences)
    compared = _trained(objective)
    # A fit takes a while and is written into the run: only where its stage is compared.
    prior = post_hoc_prior(run) if compared == "post hoc" else None
    chosen = [stage for stage in stages(run, prior) if _label(stage.label) == compared]
    found |= _of_stages(label, run, chosen, inputs)
    converged = prior is None or prior.converged
    found["margin_stage"] = compared if converged else f"{compared}, not converged"
    members = {name: np.asarray(value)[None] for name, value in run.parameters.items()}
    found["predictions"] = predictions(run.vocabulary, run.network, members, held_out, seed=seed)
    return ComparedRun(label, "language", **found)


def _imported(
    label: str, run: ImportedRun | TunedRun, held_out: np.ndarray, seed: int
) -> ComparedRun:
    inputs, _ = training_sequences(run, _OF_IMPORTED)
    members = jax.tree.map(lambda value: value[None], run.parameters)
    fitted: dict[str, Any] = {}
    if isinstance(run, TunedRun):
        fitted = {"seconds": _fit_seconds(run), **_objective(run.config.objective)}
    return ComparedRun(
        label,
        "imported",
        **fitted,
        margin_stage="first layer",
        predictions=predictions(run.vocabulary, run.network, members, held_out, seed=seed),
        **_of_stages(label, run, list(stages(run, None)), inputs),
    )


def _of_stages(
    label: str, run: FittedRun, chosen: Sequence[RunStage], inputs: np.ndarray
) -> dict[str, Any]:
    """Return the margins of stages over sequences, and what a page shows of them."""
    everywhere = np.ones(inputs.shape, bool)
    of_stages = [reported_margins(run, stage, inputs, everywhere) for stage in chosen]
    margins = [stage.margin.reshape(inputs.shape) for stage in of_stages]
    return _margins(np.stack(margins, axis=1)[None, None]) | {
        "sequences": _shown(run, inputs),
        "series": tuple(stage_series(label, stage) for stage in of_stages),
    }


def _trained(objective: ObjectiveConfig) -> str:
    """Return the stage that an objective trains, or the one fitted to it if it trains none."""
    if objective.name == "ce":
        return "post hoc"
    return "trained" if objective.trains_attention_prior else "first layer"


def _label(stage: str) -> str:
    return "first layer" if stage.startswith("layer 1 head") else stage


def _shown(run: RunDirectory, inputs: np.ndarray) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(run.vocabulary.display(row)) for row in inputs)


def _of_draws(label: str, run: RunDirectory, result: PosteriorResult, loo: bool) -> dict[str, Any]:
    tree = to_datatree(result, log_likelihood=loo)
    margin = values_of(tree, "posterior", "margin")
    left = leave_one_out(tree)
    found = {"inference": result.label, **(left._asdict() if left else {})}
    if margin is None:
        return found
    stage = "first layer" if margin.ndim == 5 else "trained"
    found["sequences"] = _shown(run, np.asarray(result.model_args[0]))
    found["series"] = tuple(drawn_series(label, tree))
    return found | _margins(margin) | {"margin_stage": stage}


def _members(result: PosteriorResult) -> dict[str, np.ndarray]:
    """Return the draws of all chains, one after the other."""
    return {name: value.reshape(-1, *value.shape[2:]) for name, value in result.draws.items()}


def _objective(objective: ObjectiveConfig) -> dict[str, Any]:
    weight = objective.weights[0] if objective.has_barrier else None
    return {"objective": objective.name, "barrier_weight": weight}


def _margins(margin: Float[np.ndarray, "chain draw *stage T"]) -> dict[str, Any]:
    """Summarise margins: smallest of every draw, its median, quantiles of all at positions >= 2."""
    inner = margin[..., 2:]
    unknown, within = np.isnan(inner), tuple(range(2, inner.ndim))
    smallest = np.where(unknown, np.inf, inner).min(within)
    smallest = np.where(unknown.all(within), np.nan, smallest)
    return {
        "smallest_margin": _quantile(smallest, 0.5),
        "smallest_margin_draws": smallest,
        "margin_quantiles": {level: _quantile(inner, level) for level in QUANTILES},
        "unknown_margins": int(unknown.sum()),
    }


def _quantile(values: Float[np.ndarray, "..."], level: float) -> float:
    """Return a quantile of the values that are known; NaN where none is."""
    known = values[~np.isnan(values)]
    return float(np.quantile(known, level)) if known.size else math.nan


def _check_same_data(runs: Mapping[str, FittedRun | PosteriorRun]) -> None:
    """Refuse runs of different texts or symbols, or with margins over different sequences.

    Margins are compared among language models, and among latent models.
    """
    own = {label: run for label, run in runs.items() if not isinstance(run, ImportedRun | TunedRun)}
    for what, values in (
        ("corpus", {label: run.data["sha256"] for label, run in runs.items()}),
        ("vocabulary", {label: run.vocabulary for label, run in own.items()}),
    ):
        for label, value in values.items():
            first = next(iter(values))
            if value != values[first]:
                raise RunError(
                    f"{first} and {label} differ in the {what}: expected runs on the same data"
                )
    for kind in ("language", "latent"):
        sizes = {label: size for label, run in runs.items() if (size := _sizes(run, kind))}
        if not sizes:
            continue
        first, size = next(iter(sizes.items()))
        for label, other in sizes.items():
            if other != size:
                raise RunError(
                    f"{first} has {size[0]} sequences of {size[1]} tokens and {label} {other[0]} "
                    f"of {other[1]}: expected posteriors given the same sequences"
                )
        for label, run in runs.items():
            if kind == "language" and isinstance(run, Run) and run.config.model.block != size[1]:
                raise RunError(
                    f"{label} sees {run.config.model.block} tokens (model.block), and the "
                    f"sequences of {first} have {size[1]}: expected the same"
                )


def _sizes(run: FittedRun | PosteriorRun, kind: str) -> tuple[int, int] | None:
    """Return number and length of the sequences of such a posterior, None of others."""
    if not isinstance(run, PosteriorRun):
        return None
    model, latent = run.config.model, run.config.latent
    if latent is not None:
        return (latent.sequences, latent.length) if kind == "latent" else None
    assert model is not None  # one or the other
    return (run.config.sample.sequences, model.block) if kind == "language" else None


def _fit_seconds(run: Run | TunedRun) -> float:
    """Return the seconds of steps, from the rate in every report."""
    fit, done, seconds = run.config.fit, 0, 0.0
    for row in run.metrics("tokens_per_s"):
        if row["tokens_per_s"]:
            tokens = (row["step"] - done) * fit.batch * run.network.block
            seconds += tokens / row["tokens_per_s"]
        done = row["step"]
    return seconds
