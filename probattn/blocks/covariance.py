"""Covariances under attention weights, position by position, centred at each row's own mean."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from probattn.blocks.promotion import with_rank

# Positions at once, which bounds the memory: there are positions x past x m centred vectors.
_ROWS, _NUMBERS = (32, 64), 2**17

_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def attention_covariance(
    weights: Float[Array, "*weights T T"],
    left: Float[Array, "*left T m"],
    right: Float[Array, "*right T n"],
    slopes: Float[Array, "*weights T T"] | None = None,
) -> Float[Array, "*batch T m n"]:
    """Return the covariance of `left` and `right` under each row of the attention weights.

    Both factors are centred at the row's own mean before they are multiplied: a difference of
    second moments loses all its digits where attention is sharp (at scale 10 the float32 log
    determinant was wrong by 100 times its rounding error). Where it loses none it is faster, see
    `moments`.

    Args:
        weights: (..., T, T), strictly causal.
        left: (..., T, m).
        right: (..., T, n).
        slopes: numbers with which row t multiplies `right` first, (..., T, T), or None.

    Returns:
        (..., T, m, n); zero at positions 0 and 1.
    """
    length = weights.shape[-1]
    least, most = _ROWS
    rows = max(least, min(_NUMBERS // max(length * right.shape[-1], 1), most))
    if length <= rows:
        return centred_covariance(weights, left, right, slopes)
    # A past of s < stop is all that rows start..stop attend to: half of the products fall away.
    row_values = jax.checkpoint(centred_covariance)
    blocks = []
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        past = weights[..., start:stop, :stop]
        sloped = None if slopes is None else slopes[..., start:stop, :stop]
        block = row_values(past, left[..., :stop, :], right[..., :stop, :], sloped)
        # One after the other, in the same memory.
        block, weights, left, right = lax.optimization_barrier((block, weights, left, right))
        blocks.append(block)
    return jnp.concatenate(blocks, axis=-3)


def centred_covariance(
    weights: Float[Array, "*weights rows past"],
    left: Float[Array, "*left past m"],
    right: Float[Array, "*right past n"],
    slopes: Float[Array, "*weights rows past"] | None = None,
) -> Float[Array, "*batch rows m n"]:
    """Return the covariance under any rows of weights, of all rows at once."""
    return jnp.einsum(
        "...tsm,...tsn->...tmn",
        weights[..., None] * _centred(weights, left),
        _centred(weights, right, slopes),
        precision=lax.Precision.HIGHEST,
    )


def _centred(
    weights: Float[Array, "*weights rows past"],
    factor: Float[Array, "*factor past m"],
    slopes: Float[Array, "*weights rows past"] | None = None,
) -> Float[Array, "*batch rows past m"]:
    means = _matmul(weights if slopes is None else weights * slopes, factor)
    each = with_rank(factor, means.ndim)[..., None, :, :]
    if slopes is not None:
        each = slopes[..., None] * each
    return each - means[..., :, None, :]


def wide_covariance(
    weights: Float[Array, "T T"],
    narrow: Float[Array, "T n"],
    wide: Float[Array, "T m"],
    slopes: Float[Array, "T T"] | None = None,
) -> Float[Array, "T n m"]:
    """Return the covariance of `narrow` and `wide` under each row of one sequence's weights.

    Only `narrow` is centred, which slopes multiply first. So all rows of a block are one product of
    matrices with `wide`, in a third of the time of `attention_covariance` and without its memory.
    Digits are lost where the rows of `wide` are much longer than their differences.
    """
    length, size = narrow.shape

    @jax.checkpoint
    def rows_of(past: Array, sloped: Array | None, narrow: Array, wide: Array) -> Array:
        centred = past[..., None] * _centred(past, narrow, sloped)
        flat = jnp.swapaxes(centred, -1, -2).reshape(-1, len(wide))
        return _matmul(flat, wide).reshape(-1, size, wide.shape[-1])

    blocks, most = [], _ROWS[1]
    for start in range(0, length, most):
        stop = min(start + most, length)
        sloped = None if slopes is None else slopes[start:stop, :stop]
        block = rows_of(weights[start:stop, :stop], sloped, narrow[:stop], wide[:stop])
        # One after the other, in the same memory.
        block, weights, narrow, wide = lax.optimization_barrier((block, weights, narrow, wide))
        blocks.append(block)
    return jnp.concatenate(blocks)


def identity_less(matrices: Float[Array, "*batch m m"]) -> Float[Array, "*batch m m"]:
    """Return I - M for every matrix M."""
    identity = jnp.eye(matrices.shape[-1], dtype=matrices.dtype)
    return jnp.broadcast_to(identity, matrices.shape) - matrices
