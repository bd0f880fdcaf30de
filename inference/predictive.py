"""Predictions of an ensemble of parameters: their density, calibration and robustness to noise.

The probability of a token is its mean over the ensemble, which for draws of a posterior is its
posterior predictive probability.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from probattn.batches import batched_rows, windows
from probattn.models import LanguageModelConfig
from probattn.models.transformer import Parameters, embed, logits
from probattn.vocabulary import Vocabulary

BINS = 10  # of the reliability diagram, equally wide in predicted probability
NOISE_ABSOLUTE, NOISE_RELATIVE = 0.5, 1.0  # the paper's, and one root mean square
MEMBERS = 32  # of an ensemble, spread evenly over its draws

_TOKENS = 8192  # of the held-out text, in windows spread evenly
_BATCH = 32  # windows in one call


@dataclass(frozen=True)
class Reliability:
    """How often the most probable token is right, by how probable it was held.

    Attributes:
        confidence: mean predicted probability in each bin, NaN in empty ones.
        accuracy: fraction that was right, likewise.
        count: tokens in each bin.
    """

    confidence: Float[np.ndarray, " bins"]
    accuracy: Float[np.ndarray, " bins"]
    count: Int[np.ndarray, " bins"]

    @property
    def error(self) -> float:
        """Expected calibration error: the mean distance of the two, weighted by tokens."""
        kept = self.count > 0
        distance = np.abs(self.confidence[kept] - self.accuracy[kept])
        return float(np.average(distance, weights=self.count[kept]))


@dataclass(frozen=True)
class Predictions:
    """How an ensemble predicts a text.

    Attributes:
        members: parameter sets in the ensemble.
        log_predictive_density: mean over tokens, in nats.
        bpc: the same as bits per character.
        reliability: calibration of the most probable token.
        noise_absolute: bits per character at noise of standard deviation 0.5 on what enters the
            stack, over those without.
        noise_relative: the same at noise of one root mean square of what enters the stack.
    """

    members: int
    log_predictive_density: float
    bpc: float
    reliability: Reliability
    noise_absolute: float
    noise_relative: float


def predictions(
    vocabulary: Vocabulary,
    model: LanguageModelConfig,
    members: Mapping[str, np.ndarray],
    held_out: Int[np.ndarray, " N"],
    *,
    seed: int,
) -> Predictions:
    """Score an ensemble on a text, of which at most 8192 tokens are taken.

    Args:
        vocabulary: symbols of the tokens.
        model: size of the network.
        members: parameters by name, the ensemble as the leading axis; at most `MEMBERS` are taken.
        held_out: tokens of the text, at least 2.
        seed: of the noise.
    """
    plan = windows(len(held_out) - 1, block=model.block).spread(_TOKENS)
    inputs, targets = plan.take(held_out), plan.take(held_out[1:])
    characters = int(vocabulary.token_characters[targets][plan.reported].sum())
    chosen = list(members_of(members))
    deviations = [
        math.sqrt(float(jnp.mean(embed(one, jnp.asarray(inputs)) ** 2))) for one in chosen
    ]
    held = plan.reported

    def predicted(sigmas: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """Probability of each target, and of every symbol."""
        of_all = np.zeros((*inputs.shape, vocabulary.size))
        for number, (one, sigma) in enumerate(zip(chosen, sigmas, strict=True)):
            key = jax.random.fold_in(jax.random.key(seed), number)
            of_all += np.exp(_log_probabilities(one, inputs, sigma, key, heads=model.heads))
        of_all = of_all[held] / len(chosen)
        return np.take_along_axis(of_all, targets[held][:, None], 1)[:, 0], of_all

    of_target, of_all = predicted([0.0] * len(chosen))
    clean = -float(np.log(of_target).mean())
    noisy = [
        -float(np.log(predicted(sigmas)[0]).mean())
        for sigmas in (
            [NOISE_ABSOLUTE] * len(chosen),
            [NOISE_RELATIVE * deviation for deviation in deviations],
        )
    ]
    return Predictions(
        members=len(chosen),
        log_predictive_density=-clean,
        bpc=clean * of_target.size / math.log(2) / characters,
        reliability=reliability(of_all, targets[held]),
        noise_absolute=noisy[0] / clean,
        noise_relative=noisy[1] / clean,
    )


def reliability(
    probabilities: Float[np.ndarray, "tokens V"], targets: Int[np.ndarray, " tokens"]
) -> Reliability:
    """Reliability of the most probable token, in `BINS` bins of its probability."""
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == targets
    number = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(number, minlength=BINS)
    with np.errstate(invalid="ignore"):
        return Reliability(
            np.bincount(number, confidence, BINS) / count,
            np.bincount(number, right, BINS) / count,
            count,
        )


def _log_probabilities(
    parameters: Parameters,
    inputs: Int[np.ndarray, "windows T"],
    sigma: float,
    rng_key: Array,
    *,
    heads: int,
) -> Float[np.ndarray, "windows T V"]:
    parts = [
        _log_softmax(
            parameters, inputs[rows], sigma, jax.random.fold_in(rng_key, number), heads=heads
        )
        for number, rows in enumerate(batched_rows(len(inputs), _BATCH))
    ]
    # In float64, in which the probability of no token underflows.
    return np.concatenate([np.asarray(part, np.float64) for part in parts])[: len(inputs)]


@partial(jax.jit, static_argnames="heads")
def _log_softmax(
    parameters: Parameters, inputs: Array, sigma: float, rng_key: Array, *, heads: int
) -> Array:
    x = embed(parameters, inputs)
    x = x + sigma * jax.random.normal(rng_key, x.shape, x.dtype)
    return jax.nn.log_softmax(logits(parameters, x, heads=heads))


def members_of(members: Mapping[str, np.ndarray]) -> Iterator[dict[str, Array]]:
    """Parameter sets of an ensemble, at most `MEMBERS`, spread evenly over it."""
    count = len(next(iter(members.values())))
    for number in np.linspace(0, count - 1, min(count, MEMBERS)).round().astype(int):
        yield {name: jnp.asarray(values[number], jnp.float32) for name, values in members.items()}
