"""Covariances under attention weights, position by position.

`attention_covariance` centres its factors at each row's own mean before it multiplies them: exact
to rounding, at the price of T x T centred vectors. `reduced_covariance`, of queries and keys, is a
difference of second moments, which are one matrix product for all positions, wherever queries and
keys are so short that the difference loses no digit of the reduced block it is taken from.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from probattn.unanimous import unanimous

# Positions at once, which bounds the memory and leaves out products with the future: of matrix
# products; and of centred vectors, of which there are positions x past x r.
_ROWS = 256
_CENTRED_ROWS, _CENTRED_NUMBERS = (16, 64), 2**17
# Largest |q_s| |k_s| / sqrt(r) at which second moments are taken: they leave an error of eps times
# that in I - Cov / sqrt(r).
_LARGEST_PRODUCT = 32.0

_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def attention_covariance(
    weights: Float[Array, "*weights T T"],
    left: Float[Array, "*left T m"],
    right: Float[Array, "*right T n"],
) -> Float[Array, "*batch T m n"]:
    """Covariance of `left` and `right` under each row of the attention weights.

    Both factors are centred at the row's own mean before they are multiplied: a difference of
    second moments loses all its digits where attention is sharp (at scale 10 the float32 log
    determinant was wrong by 100 times its rounding error).

    Args:
        weights: (..., T, T), strictly causal.
        left: (..., T, m).
        right: (..., T, n).

    Returns:
        (..., T, m, n); zero at positions 0 and 1.
    """
    return _centred_by_rows(weights, left, right)


def reduced_covariance(
    weights: Float[Array, "*weights T T"],
    queries: Float[Array, "*queries T r"],
    keys: Float[Array, "*keys T r"],
) -> Float[Array, "*batch T r r"]:
    """Covariance of queries and keys, as good as `attention_covariance` in I - Cov / sqrt(r).

    Args:
        weights: (..., T, T), strictly causal.
        queries: (..., T, r), relative to a token of the sequence.
        keys: (..., T, r), likewise.

    Returns:
        (..., T, r, r); zero at positions 0 and 1.
    """
    limit = _LARGEST_PRODUCT**2 * keys.shape[-1]
    squares = [jnp.sum(lax.stop_gradient(vectors) ** 2, -1) for vectors in (queries, keys)]

    def moments(*arguments: Array) -> Array:
        return _by_rows(_second_moments, _ROWS, *arguments)

    def either(*arguments: Array) -> Array:
        # By the tokens so far: a later one must not change even a rounding error here.
        longest = [lax.cummax(square, axis=square.ndim - 1) for square in squares]
        short = (longest[0] * longest[1] <= limit)[..., None, None]
        return jnp.where(short, moments(*arguments), _centred_by_rows(*arguments))

    longest = [jnp.max(square, initial=0.0) for square in squares]
    # Recomputed in the derivative: else either side's intermediate results would be kept.
    return lax.cond(
        unanimous(longest[0] * longest[1] <= limit),
        jax.checkpoint(moments),
        jax.checkpoint(either),
        weights,
        queries,
        keys,
    )


def _centred_by_rows(weights: Array, left: Array, right: Array) -> Array:
    least, most = _CENTRED_ROWS
    rows = _CENTRED_NUMBERS // max(right.shape[-2] * right.shape[-1], 1)
    return _by_rows(_centred, max(least, min(rows, most)), weights, left, right)


def _by_rows(
    covariance_of: Callable, rows: int, weights: Array, left: Array, right: Array
) -> Array:
    length = weights.shape[-1]
    if length <= rows:
        return covariance_of(weights, left, right)
    # A past of s < stop is all that rows start..stop attend to: half of the products fall away.
    of_rows = jax.checkpoint(covariance_of)
    blocks = []
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        past = weights[..., start:stop, :stop]
        blocks.append(of_rows(past, left[..., :stop, :], right[..., :stop, :]))
    return jnp.concatenate(blocks, axis=-3)


def _centred(
    weights: Float[Array, "*weights rows past"],
    left: Float[Array, "*left past m"],
    right: Float[Array, "*right past n"],
) -> Float[Array, "*batch rows m n"]:
    def centred(factor: Array) -> Array:
        return factor[..., None, :, :] - _matmul(weights, factor)[..., :, None, :]

    return jnp.einsum(
        "...tsm,...tsn->...tmn",
        weights[..., None] * centred(left),
        centred(right),
        precision=lax.Precision.HIGHEST,
    )


def _second_moments(
    weights: Float[Array, "*weights rows past"],
    left: Float[Array, "*left past m"],
    right: Float[Array, "*right past n"],
) -> Float[Array, "*batch rows m n"]:
    m, n = left.shape[-1], right.shape[-1]
    products = left[..., :, None] * right[..., None, :]
    moments = _matmul(weights, products.reshape(*products.shape[:-2], m * n))
    means = _matmul(weights, left)[..., :, None] * _matmul(weights, right)[..., None, :]
    return moments.reshape(*moments.shape[:-1], m, n) - means
