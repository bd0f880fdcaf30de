"""Predictions of an ensemble of parameters: their density, calibration and robustness to noise.

The probability of a token is its mean over the ensemble, which for draws of a posterior is its
posterior predictive probability. Models of both kinds are scored on the same text: windows of what
they see at once, with no memory from one to the next.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpyro.handlers import substitute

from probattn.inference.comparison.particle_filter import PARTICLES, filter_tokens
from probattn.inference.evaluation.perturbations import Gaussian
from probattn.models import LanguageModelConfig, LatentEmbeddingsConfig
from probattn.models.coupling import sample_coupling
from probattn.models.transformer import Parameters, embed, logits
from probattn.text.batches import Windows, map_batches, windows
from probattn.text.vocabulary import Vocabulary

BINS = 10  # bins of the reliability diagram, equally wide in predicted probability
_NOISE_ABSOLUTE, _NOISE_RELATIVE = 0.5, 1.0  # the paper's, and one root mean square
MEMBERS = 32  # members of an ensemble, spread evenly over its draws

_TOKENS = 8192  # tokens of the held-out text, in windows spread evenly
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
    """How an ensemble predicts a text; what does not apply to its model is None.

    Attributes:
        members: parameter sets in the ensemble.
        log_predictive_density: mean over tokens, in nats.
        bpc: the same as bits per character.
        reliability: calibration of the most probable token.
        noise_absolute: bits per character at noise of standard deviation 0.5 on what enters the
            stack, over those without; of a language model. All members see the same noise.
        noise_relative: the same at noise of one root mean square of what enters the stack, of each
            member its own; in that unit the noise is the same.
        unconverged: fraction of a latent model's particles that were left out because their
            equation was not solved, see `particle_filter.filter_tokens`.
    """

    members: int
    log_predictive_density: float
    bpc: float
    reliability: Reliability
    noise_absolute: float | None = None
    noise_relative: float | None = None
    unconverged: float | None = None


def predictions(
    vocabulary: Vocabulary,
    model: LanguageModelConfig,
    members: Mapping[str, np.ndarray],
    held_out: Int[np.ndarray, " N"],
    *,
    seed: int,
) -> Predictions:
    """Score an ensemble of networks on a text, on at most 8192 tokens.

    In windows of model.block tokens; the first is predicted from the token before the window.

    Args:
        vocabulary: symbols of the tokens.
        model: size of the network.
        members: parameters by name, the ensemble as the leading axis; at most `MEMBERS` are taken.
        held_out: tokens of the text, at least 2.
        seed: seed of the noise.
    """
    plan = _plan(held_out, model.block)
    inputs, targets = plan.take(held_out), plan.take(held_out[1:])
    chosen = list(members_of(members))
    deviations = [
        math.sqrt(float(jnp.mean(embed(one, jnp.asarray(inputs)) ** 2))) for one in chosen
    ]

    # The same noise for every member: the mean over members would average out noise of their own,
    # and an ensemble look more robust than a point though nothing else differed.
    key = jax.random.key(seed)

    def predicted(sigmas: Sequence[float]) -> np.ndarray:
        of_all = np.zeros((*inputs.shape, vocabulary.size))
        for one, sigma in zip(chosen, sigmas, strict=True):
            of_all += np.exp(_log_probabilities(one, inputs, sigma, key, model))
        return of_all[plan.reported] / len(chosen)

    shown = targets[plan.reported]
    scored = _scored(vocabulary, predicted([0.0] * len(chosen)), shown, len(chosen))
    absolute, relative = (
        _log_density(predicted(sigmas), shown) / scored.log_predictive_density
        for sigmas in (
            [_NOISE_ABSOLUTE] * len(chosen),
            [_NOISE_RELATIVE * deviation for deviation in deviations],
        )
    )
    return replace(scored, noise_absolute=absolute, noise_relative=relative)


def latent_predictions(
    vocabulary: Vocabulary,
    config: LatentEmbeddingsConfig,
    members: Mapping[str, np.ndarray],
    held_out: Int[np.ndarray, " N"],
    *,
    seed: int,
) -> Predictions:
    """Score an ensemble of latent models on a text, on at most 8192 tokens.

    The windows have latent.length tokens. `particle_filter.filter_tokens` predicts each token from
    those before it in the window, and the first from none. The tokens scored are those of a
    language model whose block is as long, which is given one token more before each of them.

    Args:
        vocabulary: symbols of the tokens.
        config: coupling and size of the process.
        members: values by sample site, the ensemble as the leading axis; at most `MEMBERS` are
            taken, and of their embeddings, which are those of other sequences, none.
        held_out: tokens of the text, at least 2.
        seed: seed of the particles.

    Raises:
        FilterError: if a filter has no particle left.
    """
    plan = _plan(held_out, config.length)
    tokens = plan.take(held_out[1:])
    shared = {name: value for name, value in members.items() if not name.startswith("embeddings")}
    chosen = list(members_of(shared))
    of_all = np.zeros((*tokens.shape, vocabulary.size))
    unconverged = 0.0
    for number, one in enumerate(chosen):
        of_draw = substitute(sample_coupling, one)
        coupling = of_draw(config.coupling, config.width, config.context_bound)
        filtered = filter_tokens(
            jax.random.fold_in(jax.random.key(seed), number),
            tokens,
            coupling.astype(one["emission"].dtype),
            one["emission"],
            one["emission_bias"],
            bound=config.context_bound,
        )
        of_all += np.exp(filtered.log_probabilities.astype(np.float64))
        unconverged += float(filtered.unconverged.mean()) / PARTICLES / len(chosen)
    of_all = of_all[plan.reported] / len(chosen)
    scored = _scored(vocabulary, of_all, tokens[plan.reported], len(chosen))
    return replace(scored, unconverged=unconverged)


def _plan(held_out: Int[np.ndarray, " N"], block: int) -> Windows:
    """Place windows over the tokens that have one before them, for models of both kinds."""
    return windows(len(held_out) - 1, block=block).spread(_TOKENS)


def _scored(
    vocabulary: Vocabulary,
    probabilities: Float[np.ndarray, "tokens V"],
    targets: Int[np.ndarray, " tokens"],
    members: int,
) -> Predictions:
    density = _log_density(probabilities, targets)
    characters = int(vocabulary.token_characters[targets].sum())
    return Predictions(
        members=members,
        log_predictive_density=density,
        bpc=-density * len(targets) / math.log(2) / characters,
        reliability=reliability(probabilities, targets),
    )


def _log_density(
    probabilities: Float[np.ndarray, "tokens V"], targets: Int[np.ndarray, " tokens"]
) -> float:
    """Return the mean log probability of the targets, in nats."""
    return float(np.log(probabilities[np.arange(len(targets)), targets]).mean())


def reliability(
    probabilities: Float[np.ndarray, "tokens V"], targets: Int[np.ndarray, " tokens"]
) -> Reliability:
    """Compare how often the most probable token is right with its probability, in `BINS` bins."""
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
    model: LanguageModelConfig,
) -> Float[np.ndarray, "windows T V"]:
    def of_batch(number: int, rows: Int[np.ndarray, " B"]) -> Array:
        key = jax.random.fold_in(rng_key, number)
        return _log_softmax(parameters, inputs[rows], sigma, key, model)

    # In float64, in which the probability of no token underflows.
    return map_batches(of_batch, len(inputs), _BATCH).astype(np.float64)


@partial(jax.jit, static_argnames="model")
def _log_softmax(
    parameters: Parameters,
    inputs: Array,
    sigma: float,
    rng_key: Array,
    model: LanguageModelConfig,
) -> Array:
    x = Gaussian(sigma)(rng_key, parameters, inputs)
    return jax.nn.log_softmax(logits(parameters, x, heads=model.heads, cap=model.spectral_cap))


def members_of(members: Mapping[str, np.ndarray]) -> Iterator[dict[str, Array]]:
    """Yield parameter sets of an ensemble, at most `MEMBERS`, spread evenly over it."""
    count = len(next(iter(members.values())))
    for number in np.linspace(0, count - 1, min(count, MEMBERS)).round().astype(int):
        yield {name: jnp.asarray(values[number], jnp.float32) for name, values in members.items()}
