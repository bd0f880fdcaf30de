"""Functions of the determinants det R_t from second moments: the fast way.

With P the products q_s x k_s of the past's queries and keys, P alpha^T holds the second moments of
every position: one matrix product, and its derivative is two. Here positions lie along the last
axis, (r, r, T), as `elimination` wants them.

A difference of second moments loses digits where attention is sharp and tokens are far from the
first one, from which all are measured. What is lost is watched, position by position.
"""

import functools
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from probattn.blocks.elimination import Pivoting, determinant, eliminate
from probattn.blocks.geometry import causal_softmax
from probattn.blocks.promotion import with_rank

# Second moments leave an error of eps times their size in I - Cov / sqrt(r). Fine are positions
# where they are at most so large, or at most so many times the variances, of which centring
# itself leaves a rounding error.
LARGEST_MOMENT, _LARGEST_RATIO = 32.0, 8.0

# Of sign and log|det|, elementwise: what is wanted of the determinants.
Pointwise = Callable[[Array, Array], Array]

_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
# Keeps a result in memory as it is laid out here: XLA would else compute it anew wherever it is
# used, or transpose it inside a matrix product, where it takes several times as long.
_materialise = lax.optimization_barrier


def representable(
    queries: Float[Array, "*batch T r"], keys: Float[Array, "*batch T r"]
) -> Bool[Array, "*batch T"]:
    """Tell up to which positions no product of queries and keys can overflow."""
    squares = (jnp.sum(lax.stop_gradient(vectors) ** 2, axis=-1) for vectors in (queries, keys))
    longest = [lax.cummax(square, axis=square.ndim - 1) for square in squares]
    limits = jnp.finfo(keys.dtype)
    return longest[0] * longest[1] < limits.max * limits.eps


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def row_values(
    pointwise: Pointwise,
    start: int,
    own: Float[Array, "*batch rows r"],
    queries: Float[Array, "*batch past r"],
    keys: Float[Array, "*batch past r"],
) -> tuple[Float[Array, "*batch rows"], Float[Array, "*batch rows"], Float[Array, "*batch rows"]]:
    """Return signs of det R_t and a function of them and log|det R_t|, with derivative R_t^-T.

    Args:
        pointwise: function of signs and log|det|, -inf where singular.
        start: first of the positions, which end where the past ends.
        own: queries with which they attend.
        queries: those of the past, relative to one token.
        keys: likewise.

    Returns:
        Signs, 0 where singular; what `pointwise` returns; and 1 where no digit is lost, else 0.
    """
    weights = _last(_weights(own, keys, start))
    blocks, _, _, accurate = _blocks(weights, _last(queries), _last(keys))
    sign, log_abs, stable = determinant(blocks, pivoting="never")
    return sign, pointwise(sign, log_abs), accurate * stable


@row_values.defjvp
def _of_rows_jvp(pointwise: Pointwise, start: int, primals: tuple, tangents: tuple) -> tuple:
    sign, value, accurate, pull = _with_pullback(pointwise, start, *primals)
    # Transposed, so that forward mode has it too; in reverse mode JAX transposes it back.
    (change,) = jax.linear_transpose(pull, value)(tangents)
    still = jnp.zeros_like(change)
    return (sign, value, accurate), (still, change, still)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def summed_over_rows(
    pointwise: Pointwise,
    start: int,
    counted: Float[Array, "*batch rows"],
    own: Float[Array, "*batch rows r"],
    queries: Float[Array, "*batch past r"],
    keys: Float[Array, "*batch past r"],
) -> tuple[Float[Array, "*batch rows"], Float[Array, " *batch"], Float[Array, "*batch rows"]]:
    """Return what `row_values` does, the function summed over the positions that count.

    The derivative of a sum is one number for every entry of own, queries and keys. It is computed
    with the value, so nothing is computed anew for it and nothing of size r x r is kept.

    Args:
        pointwise: as there.
        start: as there.
        counted: 1 where a position may count, else 0.
        own: as there.
        queries: as there.
        keys: as there.

    Returns:
        Signs; the sum; and 1 where a position counts, else 0: one that may, and is accurate.
    """
    sign, value, accurate = row_values(pointwise, start, own, queries, keys)
    accurate *= counted
    return sign, _sum(value, accurate), accurate


@summed_over_rows.defjvp
def _summed_over_rows_jvp(
    pointwise: Pointwise, start: int, primals: tuple, tangents: tuple
) -> tuple:
    counted, *arrays = primals
    sign, value, accurate, pull = _with_pullback(pointwise, start, *arrays)
    accurate *= counted
    change = sum(
        jnp.sum(slope * tangent, axis=(-2, -1))
        for slope, tangent in zip(pull(accurate), tangents[1:], strict=True)
    )
    still = jnp.zeros_like(accurate)
    return (sign, _sum(value, accurate), accurate), (still, change, still)


def _with_pullback(
    pointwise: Pointwise, start: int, own: Array, queries: Array, keys: Array
) -> tuple[Array, Array, Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """Return what `row_values` does, and the map from cotangents of its values to its arrays."""
    rank = keys.shape[-1]
    weights = _materialise(_weights(own, keys, start))  # (..., rows, past)
    weights_last = _last(weights)
    own_last, queries_last, keys_last = (_last(array) for array in (own, queries, keys))
    blocks, query_mean, key_mean, accurate = _blocks(weights_last, queries_last, keys_last)
    # Nobody uses values that are not accurate, and they need not be finite.
    sign, value, by_moment, stable = slope_of(
        pointwise, blocks, factor=-accurate / math.sqrt(rank), pivoting="never"
    )
    accurate *= stable

    # The value's derivative with respect to moments and means, (..., r * r or r, rows), then to
    # weights and logits, (..., past, rows), and to the queries that attend, (..., r, rows). Here
    # moments are keys x queries, since the slope is that of the transposed block.
    by_moment = _materialise(by_moment)
    by_mean = [_contracted(by_moment, key_mean, -3), _contracted(by_moment, query_mean, -2)]
    by_mean = _materialise(-jnp.concatenate(by_mean, axis=-2))
    by_moment = _flat(by_moment)
    products = _materialise(keys[..., :, None] * queries[..., None, :])
    products = products.reshape(*products.shape[:-2], rank**2)
    both = jnp.concatenate([queries, keys], axis=-1)
    by_weight = _materialise(_matmul(products, by_moment) + _matmul(both, by_mean))
    centre = jnp.sum(weights_last * by_weight, axis=-2, keepdims=True)
    by_logit = _materialise(weights_last * (by_weight - centre) / math.sqrt(rank))
    by_own = _materialise(_matmul(keys_last, by_logit))

    def pull(cotangent: Float[Array, "*batch rows"]) -> tuple[Array, Array, Array]:
        scaled = weights * cotangent[..., None]
        by_product = _materialise(_matmul(by_moment, scaled))  # (..., r * r, past)
        by_product = by_product.reshape(*by_product.shape[:-2], rank, rank, -1)
        query, key = jnp.split(_matmul(by_mean, scaled), 2, axis=-2)
        query += _contracted(by_product, keys_last, -3)
        key += _contracted(by_product, queries_last, -2)
        key += _matmul(own_last, jnp.swapaxes(by_logit * cotangent[..., None, :], -1, -2))
        own_queries = by_own * cotangent[..., None, :]
        return _rows(own_queries), _rows(query), _rows(key)

    return sign, value, accurate, pull


def _sum(value: Float[Array, "*batch rows"], counted: Float[Array, "*batch rows"]) -> Array:
    return jnp.sum(jnp.where(counted > 0, value, jnp.zeros_like(value)), axis=-1)


def slope_of(
    pointwise: Pointwise,
    blocks: Float[Array, "*batch r r T"],
    *,
    factor: Float[Array, "*batch T"] | float = 1.0,
    pivoting: Pivoting = "where needed",
) -> tuple[Array, Array, Array, Array]:
    """Return sign, value, a multiple of its derivative by the transposed block, and what is stable.

    Where the factor is zero, so is the multiple, whatever the derivative is. Not by the chain rule
    through log|det R|: at det R = 0 the product of R^-T with a slope that vanishes as fast is
    finite, though R^-T is not.
    """
    found = eliminate(blocks, pivoting)
    value = pointwise(found.sign, jnp.where(found.sign == 0, -jnp.inf, found.log_abs))
    _, slope = jax.jvp(
        partial(pointwise, found.nearby_sign), (found.log_abs,), (jnp.ones_like(found.log_abs),)
    )
    slope = jnp.where(factor == 0, jnp.zeros_like(slope), slope * factor)
    slope = _materialise(slope)[..., None, None, :]
    # Where several pivots vanish so does the adjugate, and the inverse may overflow.
    multiple = jnp.where(slope == 0, jnp.zeros_like(slope), slope * found.inverse)
    return found.sign, value, multiple, found.stable


def _weights(own: Array, keys: Array, start: int) -> Float[Array, "*batch rows past"]:
    return causal_softmax(own, keys, start + jnp.arange(own.shape[-2]))


def _blocks(
    weights: Float[Array, "*batch past rows"],
    queries: Float[Array, "*batch r past"],
    keys: Float[Array, "*batch r past"],
) -> tuple[Array, Array, Array, Array]:
    """Return R_t (..., r, r, rows), mean query and key (..., r, rows), and what is accurate."""
    rank = keys.shape[-2]
    products = _materialise(queries[..., :, None, :] * keys[..., None, :, :])
    moments = _matmul(_flat(products), weights)
    moments = moments.reshape(*moments.shape[:-2], rank, rank, -1)
    squares = [jnp.sum(part**2, axis=-2, keepdims=True) for part in (queries, keys)]
    means = _materialise(_matmul(jnp.concatenate([queries, keys, *squares], axis=-2), weights))
    query, key, query_square, key_square = jnp.split(means, [rank, 2 * rank, 2 * rank + 1], axis=-2)
    covariance = moments - query[..., :, None, :] * key[..., None, :, :]
    identity = jnp.eye(rank, dtype=covariance.dtype)[..., None]
    blocks = with_rank(identity, covariance.ndim) - covariance / math.sqrt(rank)
    moment, variance = query_square * key_square, jnp.ones_like(key_square)
    for mean, square in ((query, query_square), (key, key_square)):
        variance *= jnp.maximum(square - jnp.sum(mean**2, axis=-2, keepdims=True), 0.0)
    allowed = jnp.maximum(LARGEST_MOMENT**2 * rank, _LARGEST_RATIO**2 * variance)
    accurate = lax.stop_gradient(moment <= allowed)[..., 0, :].astype(blocks.dtype)
    return _materialise(blocks), query, key, accurate


def _flat(array: Float[Array, "*batch i j n"]) -> Float[Array, "*batch i*j n"]:
    return array.reshape(*array.shape[:-3], -1, array.shape[-1])


def _last(array: Float[Array, "*batch past r"]) -> Float[Array, "*batch r past"]:
    return _materialise(jnp.swapaxes(array, -1, -2))


def _rows(array: Float[Array, "*batch r past"]) -> Float[Array, "*batch past r"]:
    return jnp.swapaxes(_materialise(array), -1, -2)


def _contracted(
    array: Float[Array, "*batch i j n"], vectors: Float[Array, "*batch m n"], axis: int
) -> Float[Array, "*batch k n"]:
    """Sum, over j (axis -2) or i (axis -3), the entries times the vectors', for each n."""
    # Term by term: as a reduction XLA would write out all terms before it adds them.
    size = vectors.shape[-2]
    vectors = jnp.expand_dims(vectors, -3 if axis == -2 else -2)
    parts = (lax.split(part, [1] * size, part.ndim + axis) for part in (array, vectors))
    terms = (left * right for left, right in zip(*parts, strict=True))
    return jnp.squeeze(functools.reduce(jnp.add, terms), axis)
