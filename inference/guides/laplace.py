"""Hessian of the whole objective at a mode: the precision of a Laplace approximation.

Forward over reverse, a few columns and a few sequences of the training text at a time, so that
memory is bounded by the Hessian itself.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jaxtyping import Array, Float, Int
from numpyro.infer.util import compute_log_probs

from probattn.inference.config import RunConfig
from probattn.inference.runtime.progress import progress_bar
from probattn.models import language_model
from probattn.text.batches import batched_rows, windows

_COLUMNS = 32  # columns of the Hessian in one call
_TOKENS = 2048  # tokens of the training text that are differentiated at once
_BLOCKS = 16_384  # blocks of the training text; more only if it takes more to cover it

Unpack = Callable[[Float[Array, " n"]], Mapping[str, Array]]
Loss = Callable[[Float[Array, " n"]], Float[Array, ""]]


class LaplaceError(RuntimeError):
    """A point is no mode, so it has no Laplace approximation: the message says by how much."""


def text_batches(
    tokens: Int[np.ndarray, " N"], block: int, *, most_tokens: int | None = None
) -> tuple[
    Int[np.ndarray, "batches B block"],
    Int[np.ndarray, "batches B block"],
    Float[np.ndarray, "batches B"],
]:
    """Return the blocks of a text, the symbols that follow them, and what each block counts.

    Their weighted sum is the expectation over the minibatches of a fit, which draw blocks at every
    offset: only that has its mode where a fit ends. So all blocks are summed, of a long text those
    at every few offsets that cover it, and count as the N / block sequences that `fit` gives the
    text.

    Args:
        tokens: the training text, (N,), N > block.
        block: tokens of a block.
        most_tokens: at most so many in all blocks together, which are spread evenly over the text;
            by default no bound.
    """
    plan = windows(len(tokens) - 1, block=block, stride=min(block, max(1, len(tokens) // _BLOCKS)))
    if most_tokens is not None:
        plan = plan.spread(most_tokens)
    inputs, targets = plan.take(tokens), plan.take(tokens[1:])
    sequences, weight = len(inputs), len(tokens) // block / len(inputs)
    rows = np.stack(list(batched_rows(sequences, max(1, _TOKENS // block))))
    # The last batch is filled up, with sequences that do not count.
    filling = np.arange(rows.size).reshape(rows.shape) >= sequences
    return inputs[rows], targets[rows], np.where(filling, 0.0, weight)


class Text:
    """Minus the log likelihood of a training text, with the attention factors of the objective.

    Args:
        config: configuration of the run.
        tokens: the training text, (N,), N > block.
        vocabulary_size: number of symbols.
    """

    def __init__(
        self, config: RunConfig, tokens: Int[np.ndarray, " N"], vocabulary_size: int
    ) -> None:
        self._model = partial(
            language_model,
            vocabulary_size=vocabulary_size,
            config=config.model,
            objective=config.objective,
        )
        self._batches = text_batches(tokens, config.model.block)

    def hessian_columns(
        self, unpack: Unpack, z: Float[Array, " n"], tangents: Float[Array, "k n"]
    ) -> Float[Array, "k n"]:
        """Multiply the Hessian in z, whose parameters by name `unpack` gives, by tangents."""

        def add(total: Array, batch: Any) -> tuple[Array, None]:
            return total + _columns(lambda z: self._loss(unpack(z), *batch), z, tangents), None

        total, _ = jax.lax.scan(add, jnp.zeros_like(tangents), self._batches)
        return total

    def _loss(
        self,
        parameters: Mapping[str, Array],
        inputs: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        weights: Float[Array, " B"],
    ) -> Float[Array, ""]:
        # Without the priors, which count once.
        model = numpyro.handlers.block(
            numpyro.handlers.substitute(self._model, data=dict(parameters)), hide=list(parameters)
        )
        terms, _ = compute_log_probs(model, (inputs, targets), {}, {}, sum_log_prob=False)
        return -jnp.sum(weights * sum(terms.values(), start=jnp.zeros(())))


def hessian(
    prior_loss: Loss, z: Float[Array, " n"], *, text: Text, unpack: Unpack, progress: bool = False
) -> Float[Array, "n n"]:
    """Compute the Hessian of minus the log joint of a text and the parameters of a vector z.

    Args:
        prior_loss: minus the log prior of a vector.
        z: the vector, (n,).
        text: the training text.
        unpack: gives the parameters of a vector by site name.
        progress: show a progress bar.

    Raises:
        LaplaceError: if it is not positive definite.
    """

    @jax.jit
    def columns(z: Array, tangents: Array) -> Array:
        return _columns(prior_loss, z, tangents) + text.hessian_columns(unpack, z, tangents)

    size = len(z)
    result = np.empty((size, size), z.dtype)
    with progress_bar("Hessian", total=size, unit="column", visible=progress) as bar:
        for chosen in batched_rows(size, min(_COLUMNS, size)):
            result[chosen] = columns(z, jax.nn.one_hot(chosen, size, dtype=z.dtype))
            bar.update(len(np.unique(chosen)))
    _check_positive_definite(result)
    return jnp.asarray(result)


def _columns(loss: Loss, z: Float[Array, " n"], tangents: Float[Array, "k n"]) -> Array:
    return jax.vmap(jax.linearize(jax.grad(loss), z)[1])(tangents)


def _check_positive_definite(matrix: Float[np.ndarray, "n n"]) -> None:
    if not np.isfinite(matrix).all():
        raise LaplaceError("the Hessian of minus the log joint is not finite")
    try:
        np.linalg.cholesky(matrix[::-1, ::-1])  # in the order in which NumPyro takes it
    except np.linalg.LinAlgError:
        eigenvalues = np.linalg.eigvalsh(matrix)
        raise LaplaceError(
            f"{int((eigenvalues <= 0).sum())} of the {len(matrix)} eigenvalues of the Hessian of "
            f"minus the log joint are not positive, the smallest is {eigenvalues[0]:.3g}"
        ) from None
