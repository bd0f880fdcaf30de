"""Strictly causal attention: weights, conditional mean and residual.

Symbols of the paper and their names here, with T positions, d embedding dimensions and rank r:
x_t is row t of `x` (T, d); W_Q and W_K are `w_query` and `w_key` (d, r); the logits are
l_ts = q_t . k_s / sqrt(r) for s < t; alpha_t is row t of the attention weights (T, T); mu_t is
`conditional_mean` and e_t = x_t - mu_t is `residual`. Positions are 0-based, and position 0, which
has no past, has mean zero.

With a `bound` c, values and keys are those of phi(x) = x / sqrt(1 + |x|^2 / c^2), which lies
within distance c of the origin, and only the query q_t is that of x_t itself: mu_t = sum over
s < t of alpha_ts phi(x_s) and k_s = phi(x_s) W_K. A context so bounded has a bounded covariance,
which makes the process proper where c^2 ||A||_2 < 1 (see `proper`). Not in the paper, whose process
is that of bound = None.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from probattn.arguments import (
    check_arguments,
    check_leading_axes,
    floating,
)
from probattn.blocks.geometry import bounded, causal_softmax, geometry
from probattn.blocks.nonfinite import zero_nonfinite
from probattn.blocks.promotion import with_rank
from probattn.one_program import one_program
from probattn.stages.stage import AttentionStage, weights_alone

_HIGHEST = lax.Precision.HIGHEST  # on a GPU the default would round the factors to TF32


def attention_weights(queries: ArrayLike, keys: ArrayLike) -> Float[Array, "*batch T T"]:
    """Compute the strictly causal softmax weights alpha_ts of logits q_t · k_s / sqrt(r), s < t.

    Args:
        queries: (..., T, r).
        keys: (..., T, r).

    Returns:
        (..., T, T). Row t sums to one over its columns s < t; row 0 is all zero.

    Raises:
        ValueError: if the shapes do not fit or the arrays are not floating point.
    """
    queries = floating("queries", queries)
    keys = floating("keys", keys)
    if queries.ndim < 2 or keys.ndim < 2 or queries.shape[-2:] != keys.shape[-2:]:
        raise ValueError(
            f"queries have shape {queries.shape} and keys {keys.shape}: "
            "expected both as (..., T, r) with the same T and r"
        )
    if queries.shape[-1] < 1:
        raise ValueError(f"queries have shape {queries.shape}: expected (..., T, r) with r >= 1")
    check_leading_axes(queries=queries.shape[:-2], keys=keys.shape[:-2])
    return causal_softmax(queries, keys)


@one_program()
def conditional_mean(
    x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike, *, bound: ArrayLike | None = None
) -> Float[Array, "*batch T d"]:
    """Average the past by attention: mu_t = sum over s < t of alpha_ts x_s, and mu_0 = 0.

    Args:
        x: token embeddings (..., T, d).
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.

    Returns:
        (..., T, d).

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point or the bound is
            not positive.
    """
    x, w_query, w_key = check_arguments(x, w_query, w_key, bound)
    weights = geometry(x, w_query, w_key, bound).weights
    return jnp.matmul(weights, zero_nonfinite(bounded(x, bound)), precision=_HIGHEST)


@one_program()
def residual(
    x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike, *, bound: ArrayLike | None = None
) -> Float[Array, "*batch T d"]:
    """Compute the residual e_t = x_t - mu_t of the attention process, e_t ~ Normal(0, sigma^2 I).

    Args:
        x: token embeddings (..., T, d).
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.

    Returns:
        (..., T, d).

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point or the bound is
            not positive.
    """
    x = floating("x", x)
    mean = conditional_mean(x, w_query, w_key, bound=bound)
    return with_rank(x, mean.ndim) - mean


def coupling(
    w_query: ArrayLike | AttentionStage, w_key: ArrayLike | None = None
) -> Float[Array, "*batch d d"]:
    """Compute A = W_K W_Q^T / sqrt(r), all that the process depends on of W_Q and W_K.

    Args:
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).

    Returns:
        (..., d, d). In the scalar case its one entry is the paper's coupling a.

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point, or an
            `AttentionStage` is given, which has no single coupling.
    """
    w_query, w_key = weights_alone("coupling", w_query, w_key)
    scaled = w_key / math.sqrt(w_key.shape[-1])
    return jnp.matmul(scaled, jnp.swapaxes(w_query, -1, -2), precision=_HIGHEST)
