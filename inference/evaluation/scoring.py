"""Losses of a language model on a text, clean or under a perturbation of what enters its stack."""

import math
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from probattn.inference.evaluation.perturbations import Gaussian, Perturbation
from probattn.models import LanguageModelConfig
from probattn.models.transformer import Parameters, Precision, logits
from probattn.text.batches import map_batches, windows
from probattn.text.vocabulary import Vocabulary

BATCH = 32  # windows in one call
_CLEAN = Gaussian(0.0)  # noise at level 0: one program scores a text clean and under noise


@dataclass(frozen=True)
class Score:
    """How well a text is predicted.

    Attributes:
        cross_entropy: nats per token.
        bpc: bits per character, comparable between vocabularies.
        tokens: predicted tokens.
        characters: characters that they stand for.
    """

    cross_entropy: float
    bpc: float
    tokens: int
    characters: int


class Scorer:
    """Loss of every token of a text, each predicted once from the tokens of its window.

    The text is cut into windows of a block without overlap; its first token is not predicted.

    Attributes:
        inputs: tokens of each window, (windows, T).
        targets: the token that follows each of them, (windows, T).
        starts: where each window begins in the text, (windows,).
        reported: (windows, T), True where a loss counts; the last window is moved back to end with
            the text and repeats some of the one before.

    Args:
        config: size of the network.
        vocabulary: symbols of the tokens.
        tokens: the text, (N,), N >= 2.
        most_tokens: if given, only that many tokens, in windows spread evenly over the text.
        precision: precision of the matrix products.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        vocabulary: Vocabulary,
        tokens: Int[np.ndarray, " N"],
        *,
        most_tokens: int | None = None,
        precision: Precision = "float32",
    ) -> None:
        plan = windows(len(tokens) - 1, block=config.block)
        if most_tokens is not None:
            plan = plan.spread(most_tokens)
        self.inputs = plan.take(tokens)
        self.targets = plan.take(tokens[1:])
        self.starts = plan.starts
        self.reported = plan.reported
        self._characters = vocabulary.token_characters[self.targets]
        self._losses = partial(_losses, heads=config.heads, precision=precision)

    def score(
        self,
        parameters: Parameters,
        perturbation: Perturbation = _CLEAN,
        *,
        rng_key: Array | None = None,
    ) -> Score:
        """Score the text.

        Args:
            parameters: parameters of the network.
            perturbation: perturbation of what enters the stack; by default none.
            rng_key: random key of the perturbation.

        Raises:
            ValueError: if the predicted tokens begin no character.
        """
        return self.summed(self.losses(parameters, perturbation, rng_key=rng_key))

    def summed(self, losses: Float[np.ndarray, "windows T"]) -> Score:
        """Score given losses, those of `losses`.

        Raises:
            ValueError: if the predicted tokens begin no character.
        """
        losses = losses[self.reported]
        characters = int(self._characters[self.reported].sum())
        if characters == 0:
            raise ValueError(
                "the predicted tokens begin no character, so there are no bits per character: "
                "expected a longer text"
            )
        total = float(losses.sum(dtype=np.float64))
        return Score(
            cross_entropy=total / losses.size,
            bpc=total / math.log(2) / characters,
            tokens=losses.size,
            characters=characters,
        )

    def losses(
        self,
        parameters: Parameters,
        perturbation: Perturbation = _CLEAN,
        *,
        rng_key: Array | None = None,
    ) -> Float[np.ndarray, "windows T"]:
        """Compute the loss of every position of every window, in nats."""
        rng_key = jax.random.key(0) if rng_key is None else rng_key

        def of_batch(number: int, rows: Int[np.ndarray, " B"]) -> Array:
            key = jax.random.fold_in(rng_key, number)
            inputs, targets = self.inputs[rows], self.targets[rows]
            return self._losses(perturbation, parameters, inputs, targets, key)

        return map_batches(of_batch, len(self.inputs), BATCH)

    def embedding_rms(self, parameters: Parameters) -> float:
        """Return the root mean square, per coordinate, of what enters the stack over this text."""
        counts = np.zeros((len(parameters["token_embedding"]), self.inputs.shape[1]))
        np.add.at(counts, (self.inputs, np.arange(self.inputs.shape[1])), self.reported)
        tokens, positions = (
            np.asarray(parameters[name], np.float64)
            for name in ("token_embedding", "position_embedding")
        )
        positions = positions[: self.inputs.shape[1]]
        # Sum over (symbol, position) pairs of count * |token + position|^2, without the pairs.
        total = (
            (counts.sum(1) * (tokens**2).sum(1)).sum()
            + (counts.sum(0) * (positions**2).sum(1)).sum()
            + 2 * np.einsum("vt,vd,td->", counts, tokens, positions, optimize=True)
        )
        return math.sqrt(total / (counts.sum() * tokens.shape[1]))


@partial(jax.jit, static_argnames=("heads", "precision"))
def _losses(
    perturbation: Perturbation,
    parameters: Parameters,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    rng_key: Array,
    *,
    heads: int,
    precision: Precision,
) -> Float[Array, "B T"]:
    def losses(x: Float[Array, "B T d"]) -> Float[Array, "B T"]:
        predicted = logits(parameters, x, heads=heads, precision=precision)
        return optax.softmax_cross_entropy_with_integer_labels(predicted, targets)

    return losses(perturbation(rng_key, parameters, inputs, losses))
