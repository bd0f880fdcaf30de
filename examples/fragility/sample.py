"""What is measured: a model, and windows spread over a text, with the documents they lie in."""

import re
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from questions import Scale

from probattn.inference.evaluation.perturbations import Gaussian, Perturbation
from probattn.inference.evaluation.scoring import Scorer, perturbed_losses
from probattn.inference.evaluation.texts import text_tokens
from probattn.inference.runs.run import FittedRun, Run
from probattn.models.networks import DecoderNetwork
from probattn.models.transformer_decoder import as_decoder
from probattn.text.batches import map_batches
from probattn.text.corpora import read_text

# The empty line before the heading of an article of WikiText; one without such lines is a formula.
_ARTICLE = re.compile(r"(?m)^ ?\n(?= = [^=\n].*[^=\n] = ?\n ?\n)")
_TOGETHER = 2  # windows in a call: more of them are no faster on a CPU, and need more memory
_CLEAN = Gaussian(0.0)


@dataclass(frozen=True)
class Subject:
    """A model and the tokens that it is measured at.

    Attributes:
        run: the run that holds the model.
        network: the model as a decoder.
        parameters: its parameters.
        inputs: tokens of each window, (W, T).
        targets: the token after each, (W, T).
        reported: which tokens count: the last window may repeat some of the one before, (W, T).
        document: number of the document that each window begins in, (W,).
        frequency: share of each token's type in the whole text, (W, T).
        rms: root mean square of the embeddings.
        scale: how much is measured.
        seed: of the random draws.
    """

    run: FittedRun
    network: DecoderNetwork
    parameters: dict[str, Any]
    inputs: np.ndarray
    targets: np.ndarray
    reported: np.ndarray
    document: np.ndarray
    frequency: np.ndarray
    rms: float
    scale: Scale
    seed: int

    @cached_property
    def type(self) -> np.ndarray:
        """Number of each token's type among those here, the most frequent first, (W, T)."""
        _, place, counts = np.unique(self.inputs, return_inverse=True, return_counts=True)
        number = np.empty(len(counts), int)
        number[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
        return number[place].reshape(self.inputs.shape)

    def key(self, draw: int) -> jax.Array:
        """Return the random key of a draw."""
        return jax.random.fold_in(jax.random.key(self.seed), draw)

    def each(self, measure: Any, rows: np.ndarray, together: int = _TOGETHER) -> Any:
        """Call a function of windows' numbers for a few of these rows at a time, and join."""
        return map_batches(lambda _, few: measure(rows[few]), len(rows), together)

    def losses(
        self,
        rows: np.ndarray,
        perturbation: Perturbation = _CLEAN,
        *,
        parameters: dict[str, Any] | None = None,
        draw: int = 0,
    ) -> np.ndarray:
        """Compute the loss of every prediction in some windows, in nats, (rows, T)."""
        of_batch = partial(
            perturbed_losses,
            perturbation,
            self.parameters if parameters is None else parameters,
            network=self.network,
        )

        def measure(few: np.ndarray) -> jax.Array:
            key = jax.random.fold_in(self.key(draw), int(few[0]))
            return of_batch(self.inputs[few], self.targets[few], key)

        return self.each(measure, rows)


def open_subject(run: FittedRun, text: Path, scale: Scale, *, seed: int) -> Subject:
    """Read a text with a model.

    Raises:
        ValueError: if the text cannot be read, or holds less than two windows, or the model reads
            something before it.
    """
    tokens, name = text_tokens(run, text)
    if isinstance(run, Run):
        config, parameters = as_decoder(run.parameters, run.config.model)
        network = DecoderNetwork(config, run.network.block)
    else:
        network, parameters = run.network, run.parameters
        if network.prefix:
            raise ValueError(
                f"{run.path}: reads {' '.join(run.vocabulary.display(network.prefix))} before each "
                "text, which this study does not: expected a model that begins with a text"
            )
    scorer = Scorer(network, run.vocabulary, tokens, most_tokens=scale.tokens)
    if len(scorer.inputs) < 2:
        raise ValueError(
            f"{name}: {len(tokens)} tokens, {scale.tokens} of which are asked for: expected at "
            f"least two windows of {network.block}; give a longer text or more tokens"
        )
    counts = np.bincount(tokens, minlength=run.vocabulary.size)
    return Subject(
        run=run,
        network=network,
        parameters=parameters,
        inputs=scorer.inputs,
        targets=tokens[scorer.starts[:, None] + 1 + np.arange(network.block)].astype(np.int32),
        reported=scorer.reported,
        document=_documents(run, text, tokens, scorer.starts),
        frequency=counts[scorer.inputs] / len(tokens),
        rms=scorer.embedding_rms(parameters),
        scale=scale,
        seed=seed,
    )


def _documents(run: FittedRun, text: Path, tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the number of the document that each window begins in, or that of the window.

    A window is a document of its own in a text without headings of articles.
    """
    articles = np.array([found.start() for found in _ARTICLE.finditer(read_text(text))])
    if len(articles) < 2:
        return np.arange(len(starts))
    begun = np.cumsum(run.vocabulary.token_characters[tokens], dtype=np.int64)
    # Characters before a window's second token: an article at its very start is its own.
    return np.searchsorted(articles, begun[starts])
