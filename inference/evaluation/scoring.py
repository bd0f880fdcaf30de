"""Losses of a language model on a text, clean or under a perturbation of what enters its stack."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from probattn.inference.evaluation.perturbations import Gaussian, Perturbation
from probattn.models.networks import Network, Parameters
from probattn.text.batches import Windows, each_batch, map_batches, windows
from probattn.text.vocabulary import Vocabulary

BATCH = 32  # windows in one call
_TOGETHER = 2**20  # positions of a text that are counted at once
_LOGITS = 2**27  # numbers, of one call
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
    Scores hold the sums of each window and one batch of windows, and nothing as long as the text.

    Args:
        network: the network.
        vocabulary: symbols of the tokens.
        tokens: the text, (N,), N >= 2.
        most_tokens: if given, only that many tokens, in windows spread evenly over the text.
    """

    def __init__(
        self,
        network: Network,
        vocabulary: Vocabulary,
        tokens: Int[np.ndarray, " N"],
        *,
        most_tokens: int | None = None,
    ) -> None:
        plan = windows(len(tokens) - 1, block=network.block)
        self._plan = plan if most_tokens is None else plan.spread(most_tokens)
        self._tokens = tokens
        self._of_token = vocabulary.token_characters
        self._network = network
        self._batch = _windows_together(network.block, vocabulary.size)

    @cached_property
    def inputs(self) -> Int[np.ndarray, "windows T"]:
        """Tokens of each window, (windows, T)."""
        return self._plan.take(self._tokens)

    @cached_property
    def starts(self) -> Int[np.ndarray, " windows"]:
        """Where each window begins in the text, (windows,)."""
        return self._plan.starts

    @cached_property
    def reported(self) -> Bool[np.ndarray, "windows T"]:
        """Which losses count, (windows, T).

        The last window is moved back to end with the text and repeats some of the one before.
        """
        return self._plan.reported

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
        return self.summed(self.sums(parameters, perturbation, rng_key=rng_key))

    def summed(self, sums: Float[np.ndarray, " windows"]) -> Score:
        """Score given sums of losses, those of `sums`.

        Raises:
            ValueError: if the predicted tokens begin no character.
        """
        tokens, characters = self._counts
        if characters == 0:
            raise ValueError(
                "the predicted tokens begin no character, so there are no bits per character: "
                "expected a longer text"
            )
        total = float(sums.sum(dtype=np.float64))
        return Score(
            cross_entropy=total / tokens,
            bpc=total / math.log(2) / characters,
            tokens=tokens,
            characters=characters,
        )

    def sums(
        self,
        parameters: Parameters,
        perturbation: Perturbation = _CLEAN,
        *,
        rng_key: Array | None = None,
    ) -> Float[np.ndarray, " windows"]:
        """Compute the sum of the losses that count in each window, in nats, of 64 bits."""
        found = []
        for losses, reported in self._batches(parameters, perturbation, rng_key):
            found.append(np.where(reported, losses, 0).sum(1, dtype=np.float64))
        return np.concatenate(found)

    def losses(
        self,
        parameters: Parameters,
        perturbation: Perturbation = _CLEAN,
        *,
        rng_key: Array | None = None,
    ) -> Float[np.ndarray, "windows T"]:
        """Compute the loss of every position of every window, in nats."""
        batches = self._batches(parameters, perturbation, rng_key)
        return np.concatenate([losses for losses, _ in batches])

    def embedding_rms(self, parameters: Parameters) -> float:
        """Return the root mean square, per coordinate, of what enters the stack over this text."""
        length = self._plan.length
        table, added = self._network.tables(parameters)
        counts = np.zeros((len(table), length if added is not None else 1))
        for part in self._plan.parts(_TOGETHER):
            columns = np.arange(length) if added is not None else np.zeros(length, int)
            np.add.at(counts, (part.take(self._tokens), columns), part.reported)
        tokens = np.asarray(table, np.float64)
        if added is None:  # what enters the stack is a row of one table
            return math.sqrt((counts[:, 0] * (tokens**2).mean(1)).sum() / counts.sum())
        positions = np.asarray(added, np.float64)[:length]
        # Sum over (symbol, position) pairs of count * |token + position|^2, without the pairs.
        total = (
            (counts.sum(1) * (tokens**2).sum(1)).sum()
            + (counts.sum(0) * (positions**2).sum(1)).sum()
            + 2 * np.einsum("vt,vd,td->", counts, tokens, positions, optimize=True)
        )
        return math.sqrt(total / (counts.sum() * tokens.shape[1]))

    def _batches(
        self, parameters: Parameters, perturbation: Perturbation, rng_key: Array | None
    ) -> Iterator[tuple[Float[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]]:
        """Yield the losses of one batch of windows after another, and which of them count."""
        rng_key = jax.random.key(0) if rng_key is None else rng_key

        def of_batch(number: int, rows: Int[np.ndarray, " B"]) -> tuple[Array, np.ndarray]:
            key, part = jax.random.fold_in(rng_key, number), self._plan.part(rows)
            inputs, targets = part.take(self._tokens), self._targets(part)
            losses = perturbed_losses(
                perturbation, parameters, inputs, targets, key, network=self._network
            )
            return losses, part.reported

        return each_batch(of_batch, len(self._plan.numbers), self._batch)

    def _targets(self, part: Windows) -> Int[np.ndarray, "windows T"]:
        """Return the token that follows each of those in some windows."""
        return part.take(self._tokens[1:])

    @cached_property
    def _counts(self) -> tuple[int, int]:
        """How many tokens are predicted, and how many characters begin in them."""
        tokens = characters = 0
        for part in self._plan.parts(_TOGETHER):
            predicted = self._targets(part)[part.reported]
            tokens += predicted.size
            characters += int(self._of_token[predicted].sum(dtype=np.int64))
        return tokens, characters


def window_losses(
    network: Network,
    parameters: Parameters,
    inputs: Int[np.ndarray, "windows T"],
    targets: Int[np.ndarray, "windows T"],
    *,
    symbols: int,
) -> Float[np.ndarray, "windows T"]:
    """Compute the loss of every target of some windows, in nats, without noise.

    Args:
        network: the network.
        parameters: its parameters.
        inputs: tokens of each window.
        targets: the token after each.
        symbols: size of the vocabulary.
    """
    clean = partial(perturbed_losses, _CLEAN, parameters, network=network)
    key = jax.random.key(0)
    return map_batches(
        lambda _, rows: clean(inputs[rows], targets[rows], key),
        len(inputs),
        _windows_together(network.block, symbols),
    )


def _windows_together(block: int, symbols: int) -> int:
    """Return so many windows in a call that the logits of a large vocabulary have room."""
    return max(1, min(BATCH, _LOGITS // (block * symbols)))


@partial(jax.jit, static_argnames="network")
def perturbed_losses(
    perturbation: Perturbation,
    parameters: Parameters,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    rng_key: Array,
    *,
    network: Network,
) -> Float[Array, "B T"]:
    """Compute the loss of every target of a batch of windows, in nats, in one compiled call.

    Args:
        perturbation: makes what enters the stack of the tokens; see `perturbations`.
        parameters: those of the network.
        inputs: tokens of each window.
        targets: the token after each.
        rng_key: random key of the perturbation.
        network: the network.
    """

    def losses(x: Float[Array, "B T d"]) -> Float[Array, "B T"]:
        predicted = network.logits(parameters, x)
        return optax.softmax_cross_entropy_with_integer_labels(predicted, targets)

    embed = partial(network.embed, parameters)
    return losses(perturbation(rng_key, embed, inputs, losses))
