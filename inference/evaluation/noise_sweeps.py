"""Losses of a run at growing levels of noise of any kind, over those without."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import jax
import numpy as np
from jaxtyping import Float

from probattn.inference.evaluation.intervals import ratio
from probattn.inference.evaluation.perturbations import NoiseKind, perturbation
from probattn.inference.evaluation.scoring import Scorer
from probattn.inference.runs.checks import check_same_corpus
from probattn.inference.runs.run import FittedRun
from probattn.text.corpora import load_corpus
from probattn.text.tokens import corpus_tokens

NOISE_ABSOLUTE = (0.0, 0.1, 0.2, 0.5)
NOISE_RELATIVE = (0.0, 0.25, 0.5, 1.0)
SUBSTITUTED = (0.0, 0.05, 0.1, 0.2)
ASCENT_TOKENS = 16_384
_COUNTED = 2**20  # tokens at once, of which NumPy makes integers of 64 bits


@dataclass(frozen=True)
class NoisePoint:
    """Loss at one level of noise on what enters the stack.

    Attributes:
        sigma: standard deviation of the noise, in the embedding's unit; of a worst-case direction
            the radius of its ball over sqrt(d); None of substitution.
        relative: the same in units of the embedding's root mean square.
        bpc: bits per character.
        degradation: bpc over the clean bpc of the same text.
        degradation_low: lower end of its 95 % interval over windows, NaN of a single window.
        degradation_high: upper end.
        kind: kind of the noise.
        probability: probability of a token to be replaced, None for noise on embeddings.
    """

    sigma: float | None
    relative: float | None
    bpc: float
    degradation: float
    degradation_low: float
    degradation_high: float
    kind: NoiseKind = "gaussian"
    probability: float | None = None


class NoiseSweeps:
    """Sweeps of a run over levels of noise, on one text.

    The noise of every level of a kind is the same draw, scaled, so that levels and runs of one
    configuration compare. Worst-case directions, which cost a training step's work for each of
    their steps, are looked for in windows spread evenly over the text.

    Args:
        run: run whose parameters are used.
        tokens: tokens of the text.
        scorer: scorer for the whole text.
        clean: sums of the scorer without noise.
        seed: seed of the noise.
        ascent_tokens: at most so many tokens for worst-case directions.
        done: called after each level.
    """

    def __init__(
        self,
        run: FittedRun,
        tokens: np.ndarray,
        scorer: Scorer,
        clean: Float[np.ndarray, " windows"],
        *,
        seed: int,
        ascent_tokens: int,
        done: Callable[[], object],
    ) -> None:
        self._run, self._tokens = run, tokens
        self._whole = scorer, clean
        self._seed, self._ascent_tokens, self._done = seed, ascent_tokens, done
        self.rms = scorer.embedding_rms(run.parameters)

    def of_embeddings(
        self, kinds: Sequence[NoiseKind], levels: Sequence[float], unit: float
    ) -> tuple[NoisePoint, ...]:
        """Return points of every kind but substitution, at each level times the unit."""
        return tuple(
            NoisePoint(level * unit, level * unit / self.rms, *self._measured(kind, level * unit))
            for kind in kinds
            if kind != "substitution"
            for level in levels
        )

    def of_tokens(
        self, kinds: Sequence[NoiseKind], probabilities: Sequence[float]
    ) -> tuple[NoisePoint, ...]:
        """Return points of substitution at each probability, if it is among the kinds."""
        chosen = probabilities if "substitution" in kinds else ()
        return tuple(
            NoisePoint(None, None, *self._measured("substitution", each), probability=each)
            for each in chosen
        )

    def _measured(
        self, kind: NoiseKind, level: float
    ) -> tuple[float, float, float, float, NoiseKind]:
        scorer, clean = self._part if kind.startswith("ascent") else self._whole
        noisy = clean
        if level:
            frequencies = self._frequencies if kind == "substitution" else None
            disturbed = perturbation(kind, level, frequencies=frequencies)
            key = jax.random.key(self._seed)
            noisy = scorer.sums(self._run.parameters, disturbed, rng_key=key)
        over_windows = ratio(noisy, clean)
        bpc = scorer.summed(noisy).bpc
        self._done()
        return bpc, bpc / scorer.summed(clean).bpc, over_windows.low, over_windows.high, kind

    @cached_property
    def _part(self) -> tuple[Scorer, Float[np.ndarray, " windows"]]:
        run = self._run
        part = Scorer(run.network, run.vocabulary, self._tokens, most_tokens=self._ascent_tokens)
        return part, part.sums(run.parameters)

    @cached_property
    def _frequencies(self) -> Float[np.ndarray, " V"]:
        return training_frequencies(self._run)


def training_frequencies(run: FittedRun) -> Float[np.ndarray, " V"]:
    """Return the relative frequency of every symbol in the training text of a run.

    Raises:
        ValueError: if the text is not there any more.
    """
    corpus = load_corpus(run.config.data)
    check_same_corpus(run, corpus)
    tokens, _ = corpus_tokens(corpus, run.vocabulary)
    counts = np.zeros(run.vocabulary.size, np.int64)
    for first in range(0, len(tokens), _COUNTED):
        counts += np.bincount(tokens[first : first + _COUNTED], minlength=len(counts))
    return counts / counts.sum()


def check_kinds(name: str, kinds: Sequence[str]) -> None:
    """Refuse unknown kinds of noise.

    Raises:
        ValueError: if one is unknown; it is named after the argument.
    """
    for kind in kinds:
        if kind not in get_args(NoiseKind):
            expected = ", ".join(get_args(NoiseKind))
            raise ValueError(f"{name}: got {kind!r}, expected one of {expected}")


def check_levels(name: str, levels: Sequence[float], *, probabilities: bool = False) -> None:
    """Refuse levels that no noise has.

    Raises:
        ValueError: if one is negative or not finite, or above 1 where they are probabilities.
    """
    expected = "probabilities from 0 to 1" if probabilities else "finite numbers >= 0"
    for level in levels:
        if not (level >= 0 and math.isfinite(level)) or (probabilities and level > 1):
            raise ValueError(f"{name}: got {level}, expected {expected}")
