"""Evaluate a run: bits per character, robustness to noise of several kinds, margins."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from probattn.blocks.promotion import default_promotion
from probattn.inference.evaluation.attention_stages import StageMargins, stage_margins, stages
from probattn.inference.evaluation.noise_sweeps import (
    ASCENT_TOKENS,
    NOISE_ABSOLUTE,
    NOISE_RELATIVE,
    SUBSTITUTED,
    NoisePoint,
    NoiseSweeps,
    check_kinds,
    check_levels,
)
from probattn.inference.evaluation.perturbations import NoiseKind
from probattn.inference.evaluation.post_hoc import usual_prior
from probattn.inference.evaluation.scoring import Scorer
from probattn.inference.evaluation.stage_certificates import trained_certificate
from probattn.inference.evaluation.texts import check_seed, text_tokens
from probattn.inference.runs.folder import LOCK_SECONDS
from probattn.inference.runs.run import FittedRun
from probattn.inference.runtime.progress import Bar, progress_bar
from probattn.text.batches import windows

QUANTILES = (0.0, 0.01, 0.1, 0.5)

MARGIN_TOKENS = 2048  # positions whose margins are taken, in windows spread over the text


@dataclass(frozen=True)
class MarginSummary:
    """Margins of one attention stage over the positions >= 2 of a text.

    Attributes:
        label: label of the stage.
        kind: kind of the margin.
        quantiles: margin by quantile, of those that are known; that at 0 is the smallest.
        mean_log_det: mean log det D_t in nats over positions of positive determinant.
        infeasible_fraction: fraction of positions at which D_t has a real eigenvalue <= 0, or the
            margin is not known.
        certified_fraction: fraction of positions with certificate rho_t < 1.
        positions: how many positions.
        unknown: positions among them whose margin is not known (NaN).
    """

    label: str
    kind: str
    quantiles: Mapping[float, float]
    mean_log_det: float
    infeasible_fraction: float
    certified_fraction: float
    positions: int
    unknown: int = 0


@dataclass(frozen=True)
class EvaluateResult:
    """What `evaluate` measures.

    Attributes:
        text: name of the text.
        step: step of the fit, after which the parameters were as they are here.
        cross_entropy: nats per token.
        bpc: bits per character.
        tokens: predicted tokens.
        embedding_rms: root mean square, per coordinate, of what enters the stack.
        noise_absolute: losses at given sigma, in the embedding's unit, kind after kind.
        noise_relative: losses at given multiples of the embedding's root mean square, likewise.
        noise_substituted: losses at given probabilities of a token to be replaced.
        margins: per attention stage: post hoc, trained where there is one, and the heads of the
            first layer.
        post_hoc_converged: whether the fit of the post-hoc attention prior came to rest.
        table_certificate: rho of the stage that objective margin or full trains, over all texts;
            below 1 no text can fold it. None for other objectives.
    """

    text: str
    step: int
    cross_entropy: float
    bpc: float
    tokens: int
    embedding_rms: float
    noise_absolute: tuple[NoisePoint, ...]
    noise_relative: tuple[NoisePoint, ...]
    noise_substituted: tuple[NoisePoint, ...]
    margins: tuple[MarginSummary, ...]
    post_hoc_converged: bool
    table_certificate: float | None = None


@default_promotion()
def evaluate(
    run: FittedRun,
    text: str | os.PathLike[str] | None = None,
    *,
    noise_absolute: Sequence[float] = NOISE_ABSOLUTE,
    noise_relative: Sequence[float] = NOISE_RELATIVE,
    noise_kinds: Sequence[NoiseKind] = ("gaussian",),
    substituted: Sequence[float] = SUBSTITUTED,
    ascent_tokens: int = ASCENT_TOKENS,
    seed: int = 0,
    progress: bool = False,
) -> EvaluateResult:
    """Evaluate a run and store the result in its summary, unless the run is read-only.

    The noise of every level of a kind is the same draw, scaled, so that levels and runs of one
    configuration compare. Margins are those of at most 2048 positions, in windows spread evenly.

    Args:
        run: a run from `load_run` or `fit`.
        text: UTF-8 file to evaluate on, by default the run's validation text.
        noise_absolute: standard deviations of noise, in the embedding's unit; 0 is always added.
        noise_relative: standard deviations in units of the embedding's root mean square, likewise.
        noise_kinds: kinds of noise, see `perturbations`.
        substituted: probabilities of a token to be replaced, for the kind substitution, likewise.
        ascent_tokens: worst-case directions are looked for in windows of at most so many tokens,
            spread evenly over the text.
        seed: seed of the noise.
        progress: show progress bars.

    Raises:
        ValueError: if a noise level is negative or not finite, a probability above 1 or a kind
            unknown, the text cannot be read, is shorter than two tokens or has a character that
            the vocabulary lacks, or another process is writing to the run (RunError).
    """
    check_kinds("noise_kinds", noise_kinds)
    check_levels("noise_absolute", noise_absolute)
    check_levels("noise_relative", noise_relative)
    check_levels("substituted", substituted, probabilities=True)
    if ascent_tokens < 1:
        raise ValueError(f"ascent_tokens: got {ascent_tokens}, expected an integer >= 1")
    check_seed(seed)
    noise_kinds = list(dict.fromkeys(noise_kinds))
    noise_absolute, noise_relative, substituted = (
        sorted({0.0, *levels}) for levels in (noise_absolute, noise_relative, substituted)
    )
    tokens, name = text_tokens(run, text)
    writable = run.is_writable()  # refused before the work rather than after it
    prior = usual_prior(run, progress=progress)
    scorer = Scorer(run.network, run.vocabulary, tokens)
    sums = scorer.sums(run.parameters)
    clean = scorer.summed(sums)
    substitutes = "substitution" in noise_kinds
    levels = (len(noise_kinds) - substitutes) * (len(noise_absolute) + len(noise_relative))
    levels += len(substituted) * substitutes
    total = levels + len(list(stages(run, prior)))
    with progress_bar("evaluate", total=total, unit="part", visible=progress) as bar:
        if not writable:
            bar.line(f"{run.path}: is read-only, so nothing is stored in it")
        sweeps = NoiseSweeps(
            run,
            tokens,
            scorer,
            sums,
            seed=seed,
            ascent_tokens=ascent_tokens,
            done=lambda: bar.update(1),
        )
        absolute = sweeps.of_embeddings(noise_kinds, noise_absolute, 1.0)
        relative = sweeps.of_embeddings(noise_kinds, noise_relative, sweeps.rms)
        replaced = sweeps.of_tokens(noise_kinds, substituted)
        margins = _margins(run, prior, tokens, bar)
    result = EvaluateResult(
        text=name,
        step=run.step or 0,
        cross_entropy=clean.cross_entropy,
        bpc=clean.bpc,
        tokens=clean.tokens,
        embedding_rms=sweeps.rms,
        noise_absolute=absolute,
        noise_relative=relative,
        noise_substituted=replaced,
        margins=margins,
        post_hoc_converged=prior is None or prior.converged,
        table_certificate=trained_certificate(run),
    )
    if writable:
        with run.lock(wait=LOCK_SECONDS):
            run.update_summary(evaluate=_plain(asdict(result)))
    return result


def _margins(run: FittedRun, prior: Any, tokens: np.ndarray, bar: Bar) -> tuple[MarginSummary, ...]:
    plan = windows(len(tokens), block=run.network.block).spread(MARGIN_TOKENS)
    inputs = plan.take(tokens)
    if inputs.shape[1] < 3:
        return ()
    summaries = []
    for stage in stages(run, prior):
        summaries.append(_summary(stage_margins(run, stage, inputs), plan.reported[:, 2:]))
        bar.update(1)
    return tuple(summaries)


def _summary(margins: StageMargins, reported: Bool[np.ndarray, "windows T-2"]) -> MarginSummary:
    """Summarise the reported positions >= 2: the last window repeats some of the one before."""
    margin, log_det = margins.margin[:, 2:][reported], margins.log_det[:, 2:][reported]
    known = margin[~np.isnan(margin)]
    positive = np.isfinite(log_det)
    return MarginSummary(
        label=margins.label,
        kind="sigma_min",
        quantiles={
            level: float(np.quantile(known, level)) if known.size else math.nan
            for level in QUANTILES
        },
        mean_log_det=float(log_det[positive].mean()) if positive.any() else -math.inf,
        infeasible_fraction=float(margins.infeasible[:, 2:][reported].mean()),
        certified_fraction=float((margins.certificate[:, 2:][reported] < 1).mean()),
        positions=margin.size,
        unknown=margin.size - known.size,
    )


def _plain(value: Any) -> Any:
    """Return the result as JSON has it: keys are strings, infinities None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
