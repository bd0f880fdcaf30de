"""Predictions of an ensemble of parameters: their density, calibration and robustness to noise.

The probability of a token is its mean over the ensemble, which for draws of a posterior is its
posterior predictive probability. Models of both kinds are scored on the same text: windows of what
they see at once, with no memory from one to the next.
"""

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from probattn.inference.comparison.particle_filter import PARTICLES, filter_of_draw
from probattn.inference.evaluation.perturbations import Gaussian
from probattn.models import LatentEmbeddingsConfig
from probattn.models.networks import Network, Parameters
from probattn.text.batches import Windows, map_batches, windows
from probattn.text.vocabulary import Vocabulary

BINS = 10  # bins of the reliability diagram, equally wide in predicted probability
_NOISE_ABSOLUTE, NOISE_RELATIVE = 0.5, 1.0  # the paper's, and one root mean square
COVERAGES = tuple(part / 10 for part in range(1, 11))  # shares of the tokens that are predicted
MEMBERS = 32  # members of an ensemble, spread evenly over its draws

_TOKENS = 8192  # tokens of the held-out text, in windows spread evenly
_BATCH = 32  # windows in one call
_PROBABILITIES = 2**26  # numbers, of one call


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
class Selective:
    """Predictions of the tokens alone that an ensemble is surest of.

    A token is the surer the more probable its most probable symbol is held.

    Attributes:
        coverage: shares of the tokens that are predicted, `COVERAGES`.
        bpc: bits per character of the tokens that are, for each share.
        accuracy: fraction of them whose most probable symbol is right, likewise.
        area: mean of the bits per character over all coverages, one for each number of tokens.
    """

    coverage: Float[np.ndarray, " coverages"]
    bpc: Float[np.ndarray, " coverages"]
    accuracy: Float[np.ndarray, " coverages"]
    area: float


@dataclass(frozen=True)
class Predictions:
    """How an ensemble predicts a text; what does not apply to its model is None.

    Attributes:
        members: parameter sets in the ensemble.
        log_predictive_density: mean over tokens, in nats.
        bpc: the same as bits per character.
        reliability: calibration of the most probable token.
        selective: predictions of the tokens that it is surest of; those of all are the last.
        noise_absolute: bits per character at noise of standard deviation 0.5 on what enters the
            stack, over those without; of a language model. All members see the same noise.
        noise_relative: the same at noise of one root mean square of what enters the stack, or as
            many as `predictions` was given, of each member its own; in that unit the noise is the
            same.
        unconverged: fraction of a latent model's particles that were left out because their
            equation was not solved, see `particle_filter.filter_tokens`.
    """

    members: int
    log_predictive_density: float
    bpc: float
    reliability: Reliability
    selective: Selective
    noise_absolute: float | None = None
    noise_relative: float | None = None
    unconverged: float | None = None


def predictions(
    vocabulary: Vocabulary,
    network: Network,
    members: Mapping[str, Any],
    held_out: Int[np.ndarray, " N"],
    *,
    seed: int,
    relative: float = NOISE_RELATIVE,
) -> Predictions:
    """Score an ensemble of networks on a text, on at most 8192 tokens.

    In windows of what the network sees at once; the first is predicted from the token before the
    window.

    Args:
        vocabulary: symbols of the tokens.
        network: the network.
        members: a tree of parameters, such as a dictionary by name, the ensemble as the leading
            axis; at most `MEMBERS` are taken.
        held_out: tokens of the text, at least 2.
        seed: seed of the noise.
        relative: standard deviation of the noise of `noise_relative`, in root mean squares.
    """
    plan = _plan(held_out, network.block)
    inputs, targets = plan.take(held_out), plan.take(held_out[1:])
    chosen = list(members_of(members))
    deviations = [_root_mean_square(network, one, inputs) for one in chosen]
    # So many windows in a call that the probabilities of a large vocabulary have room.
    size = max(1, min(_BATCH, _PROBABILITIES // (network.block * vocabulary.size)))

    # The same noise for every member: the mean over members would average out noise of their own,
    # and an ensemble look more robust than a point though nothing else differed.
    key = jax.random.key(seed)

    def predicted(sigmas: Sequence[float]) -> _Predicted:
        def of_batch(number: int, rows: Int[np.ndarray, " B"]) -> _Predicted:
            noise = jax.random.fold_in(key, number)
            of_all = np.zeros((*inputs[rows].shape, vocabulary.size))
            for one, sigma in zip(chosen, sigmas, strict=True):
                found = _log_softmax(one, inputs[rows], sigma, noise, network=network)
                # In float64, in which the probability of no token underflows.
                of_all += np.exp(np.asarray(found).astype(np.float64))
            return _of_probabilities(of_all / len(chosen), targets[rows])

        found = map_batches(of_batch, len(inputs), size)
        return _Predicted(*(part[plan.reported] for part in found))

    shown = targets[plan.reported]
    scored = _scored(vocabulary, predicted([0.0] * len(chosen)), shown, len(chosen))
    absolute, relative = (
        float(np.log(predicted(sigmas).target).mean()) / scored.log_predictive_density
        for sigmas in (
            [_NOISE_ABSOLUTE] * len(chosen),
            [relative * deviation for deviation in deviations],
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
        rng_key = jax.random.fold_in(jax.random.key(seed), number)
        filtered = filter_of_draw(rng_key, tokens, one, config)
        of_all += np.exp(filtered.log_probabilities.astype(np.float64))
        unconverged += float(filtered.unconverged.mean()) / PARTICLES / len(chosen)
    shown = tokens[plan.reported]
    predicted = _of_probabilities(of_all[plan.reported] / len(chosen), shown)
    scored = _scored(vocabulary, predicted, shown, len(chosen))
    return replace(scored, unconverged=unconverged)


def _plan(held_out: Int[np.ndarray, " N"], block: int) -> Windows:
    """Place windows over the tokens that have one before them, for models of both kinds."""
    return windows(len(held_out) - 1, block=block).spread(_TOKENS)


class _Predicted(NamedTuple):
    """What is kept of the probabilities of tokens: of that which came, and of the most probable."""

    target: Float[np.ndarray, "*tokens"]
    confidence: Float[np.ndarray, "*tokens"]
    right: Bool[np.ndarray, "*tokens"]


def _of_probabilities(
    probabilities: Float[np.ndarray, "*tokens V"], targets: Int[np.ndarray, "*tokens"]
) -> _Predicted:
    return _Predicted(
        np.take_along_axis(probabilities, targets[..., None].astype(int), -1)[..., 0],
        probabilities.max(-1),
        probabilities.argmax(-1) == targets,
    )


def _scored(
    vocabulary: Vocabulary, predicted: _Predicted, targets: Int[np.ndarray, " tokens"], members: int
) -> Predictions:
    density = float(np.log(predicted.target).mean())
    characters = vocabulary.token_characters[targets]
    return Predictions(
        members=members,
        log_predictive_density=density,
        bpc=-density * len(targets) / math.log(2) / int(characters.sum()),
        reliability=_reliability(predicted),
        selective=selective(*predicted, characters),
    )


def selective(
    target: Float[np.ndarray, " tokens"],
    confidence: Float[np.ndarray, " tokens"],
    right: Bool[np.ndarray, " tokens"],
    characters: Int[np.ndarray, " tokens"],
) -> Selective:
    """Predict the tokens alone that are surest, for every share of them.

    Args:
        target: probability of the token that came.
        confidence: probability of the most probable one.
        right: whether it was the one that came.
        characters: how many characters the token has.
    """
    surest = np.argsort(-confidence, kind="stable")
    count = np.arange(1, len(surest) + 1)
    bpc = np.cumsum(-np.log2(target[surest])) / np.cumsum(characters[surest])
    accuracy = np.cumsum(right[surest]) / count
    # At least one token, and no more than the share of them.
    last = np.maximum([int(round(share * len(surest), 6)) for share in COVERAGES], 1) - 1
    return Selective(np.array(COVERAGES), bpc[last], accuracy[last], float(bpc.mean()))


def reliability(
    probabilities: Float[np.ndarray, "tokens V"], targets: Int[np.ndarray, " tokens"]
) -> Reliability:
    """Compare how often the most probable token is right with its probability, in `BINS` bins."""
    return _reliability(_of_probabilities(probabilities, targets))


def _reliability(predicted: _Predicted) -> Reliability:
    _, confidence, right = predicted
    number = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(number, minlength=BINS)
    with np.errstate(invalid="ignore"):
        return Reliability(
            np.bincount(number, confidence, BINS) / count,
            np.bincount(number, right, BINS) / count,
            count,
        )


def _root_mean_square(
    network: Network, parameters: Parameters, inputs: Int[np.ndarray, "windows T"]
) -> float:
    """Return that of what enters the stack."""
    return math.sqrt(float(jnp.mean(network.embed(parameters, jnp.asarray(inputs)) ** 2)))


@partial(jax.jit, static_argnames="network")
def _log_softmax(
    parameters: Parameters, inputs: Array, sigma: float, rng_key: Array, *, network: Network
) -> Array:
    x = Gaussian(sigma)(rng_key, partial(network.embed, parameters), inputs)
    return jax.nn.log_softmax(network.logits(parameters, x))


def members_of(members: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield parameter sets of an ensemble, at most `MEMBERS`, spread evenly over it."""
    count = len(jax.tree.leaves(members)[0])
    for number in np.linspace(0, count - 1, min(count, MEMBERS)).round().astype(int):
        one = jax.tree.map(operator.itemgetter(number), dict(members))
        yield jax.tree.map(lambda values: jnp.asarray(values, jnp.float32), one)
