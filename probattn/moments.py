"""Functions of the determinants det R_t, from second moments: what training and sampling evaluate.

With P the products q_s x k_s of the past's queries and keys, P alpha^T holds the second moments of
every position: one matrix product, and its derivative is two. Here positions lie along the last
axis, (r, r, T), as `elimination` wants them.

A difference of second moments loses digits where |q_s||k_s| is large. So the fast way is taken at
the positions up to which all of them are short, and centred covariances behind; and whatever the
way, it looks at a position's past alone.
"""

import functools
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from probattn.attention import Projections, causal_softmax
from probattn.covariance import attention_covariance
from probattn.elimination import determinant, eliminate
from probattn.unanimous import unanimous

# Largest |q_s| |k_s| / sqrt(r) at which second moments are taken: they leave an error of eps times
# that in I - Cov / sqrt(r).
_LARGEST_PRODUCT = 32.0
_ROWS = 128  # positions at once, of a long sequence: its memory grows with its length alone
# Numbers in products of queries and keys, at once: as many as a CPU's cache can hold, or as many
# as an accelerator wants.
_AT_ONCE, _AT_ONCE_ELSEWHERE = 2**18, 2**24

# Of sign and log|det|, elementwise: what is wanted of the determinants.
Pointwise = Callable[[Array, Array], Array]

_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
# Keeps a result in memory as it is laid out here: XLA would else compute it anew wherever it is
# used, or transpose it inside a matrix product, where it takes several times as long.
_once = lax.optimization_barrier


def of_determinants(
    pointwise: Pointwise, projected: Projections
) -> tuple[Float[Array, "*batch T"], Float[Array, "*batch T"]]:
    """Signs of det R_t and a function of them and of log|det R_t|, at every position.

    The derivative is R_t^-T, in forward and reverse mode and to any order; at an exactly singular
    block that of a block a rounding error away. Of long sequences, or many of them, nothing of
    size r x r is kept for all positions, but computed anew in the derivative.

    Args:
        pointwise: of signs (..., T) and log|det| (..., T), -inf where singular.
        projected: of sequences (..., T, d), already checked.

    Returns:
        Signs (..., T), 0 where singular, and what `pointwise` returns, (..., T).
    """
    *leading, length, rank = projected.keys.shape
    arguments = tuple(
        array.reshape(-1, length, rank)
        for array in (projected.own, projected.queries, projected.keys)
    )
    of = partial(_either, pointwise)
    together = _together(len(arguments[0]), length * rank**2)
    if together < len(arguments[0]):
        groups = tuple(array.reshape(-1, together, length, rank) for array in arguments)
        one = jax.checkpoint(of)
        sign, value = lax.map(lambda group: one(*group), groups)
    else:
        sign, value = of(*arguments)
    return sign.reshape(*leading, length), value.reshape(*leading, length)


def _together(sequences: int, numbers: int) -> int:
    """The largest divisor of `sequences` of which, with so many numbers each, there is room."""
    most = _AT_ONCE if jax.default_backend() == "cpu" else _AT_ONCE_ELSEWHERE
    return next(
        count
        for count in range(sequences, 0, -1)
        if sequences % count == 0 and (count * numbers <= most or count == 1)
    )


def _either(
    pointwise: Pointwise,
    own: Float[Array, "*batch T r"],
    queries: Float[Array, "*batch T r"],
    keys: Float[Array, "*batch T r"],
) -> tuple[Array, Array]:
    squares = [jnp.sum(lax.stop_gradient(vectors) ** 2, -1) for vectors in (queries, keys)]
    # By the tokens so far: a later one must not change even a rounding error here.
    longest = [lax.cummax(square, axis=square.ndim - 1) for square in squares]
    short = longest[0] * longest[1] <= _LARGEST_PRODUCT**2 * keys.shape[-1]

    # Without the tokens that are too long: their products might overflow.
    kept = (jnp.where(short[..., None], array, 0.0) for array in (own, queries, keys))
    sign, value = _by_moments(pointwise, *kept)

    def corrected() -> tuple[Array, Array]:
        one = jax.checkpoint(partial(_by_centring, pointwise))
        exact = lax.map(lambda sequence: one(*sequence), (own, queries, keys))
        return jnp.where(short, sign, exact[0]), jnp.where(short, value, exact[1])

    return lax.cond(unanimous(short), lambda: (sign, value), corrected)


def _by_centring(
    pointwise: Pointwise,
    own: Float[Array, "T r"],
    queries: Float[Array, "T r"],
    keys: Float[Array, "T r"],
) -> tuple[Array, Array]:
    covariance = attention_covariance(causal_softmax(own, keys), queries, keys)
    rank = keys.shape[-1]
    blocks = jnp.eye(rank, dtype=covariance.dtype) - covariance / math.sqrt(rank)
    return _of_blocks(pointwise, jnp.moveaxis(blocks, -3, -1))


def _by_moments(pointwise: Pointwise, own: Array, queries: Array, keys: Array) -> tuple:
    length = keys.shape[-2]
    if length <= _ROWS:
        return _of_rows(pointwise, 0, own, queries, keys)
    of_rows = jax.checkpoint(_of_rows, static_argnums=(0, 1))
    signs, values = [], []
    for start in range(0, length, _ROWS):
        stop = min(start + _ROWS, length)
        # A past of s < stop is all that rows start..stop attend to.
        past = queries[..., :stop, :], keys[..., :stop, :]
        sign, value = of_rows(pointwise, start, own[..., start:stop, :], *past)
        # One after the other, in the same memory.
        value, own, queries, keys = _once((value, own, queries, keys))
        signs.append(sign)
        values.append(value)
    return jnp.concatenate(signs, -1), jnp.concatenate(values, -1)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _of_blocks(
    pointwise: Pointwise, blocks: Float[Array, "*batch r r T"]
) -> tuple[Float[Array, "*batch T"], Float[Array, "*batch T"]]:
    sign, log_abs = determinant(blocks, pivoting=True)
    return sign, pointwise(sign, log_abs)


@_of_blocks.defjvp
def _of_blocks_jvp(pointwise: Pointwise, primals: tuple[Array], tangents: tuple[Array]) -> tuple:
    (blocks,), (tangent,) = primals, tangents
    sign, value, slope = _slope(pointwise, blocks, pivoting=True)
    change = jnp.sum(slope * tangent, axis=(-3, -2))
    return (sign, value), (jnp.zeros_like(change), change)


def _slope(
    pointwise: Pointwise, blocks: Float[Array, "*batch r r T"], *, pivoting: bool = False
) -> tuple[Array, Array, Array]:
    """Sign, value, and the value's derivative with respect to the block, (..., r, r, T).

    Not by the chain rule through log|det R|: at det R = 0 the product of R^-T with a slope that
    vanishes as fast is finite, though R^-T is not.
    """
    found = eliminate(blocks, pivoting)
    value = pointwise(found.sign, jnp.where(found.sign == 0, -jnp.inf, found.log_abs))
    _, slope = jax.jvp(
        partial(pointwise, found.nearby_sign), (found.log_abs,), (jnp.ones_like(found.log_abs),)
    )
    slope = slope[..., None, None, :]
    transposed = jnp.swapaxes(found.inverse, -2, -3)
    # Where several pivots vanish so does the adjugate, and the inverse may overflow.
    return found.sign, value, jnp.where(slope == 0, jnp.zeros_like(slope), slope * transposed)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _of_rows(
    pointwise: Pointwise,
    start: int,
    own: Float[Array, "*batch rows r"],
    queries: Float[Array, "*batch past r"],
    keys: Float[Array, "*batch past r"],
) -> tuple[Float[Array, "*batch rows"], Float[Array, "*batch rows"]]:
    """For the positions from `start` to `past`."""
    weights = _last(causal_softmax(own, keys, start))
    sign, log_abs = determinant(_blocks(weights, _last(queries), _last(keys))[0])
    return sign, pointwise(sign, log_abs)


@_of_rows.defjvp
def _of_rows_jvp(pointwise: Pointwise, start: int, primals: tuple, tangents: tuple) -> tuple:
    own, queries, keys = primals
    rank = keys.shape[-1]
    weights = _once(causal_softmax(own, keys, start))  # (..., rows, past)
    weights_last = _last(weights)
    own_last, queries_last, keys_last = (_last(array) for array in primals)
    blocks, query_mean, key_mean = _blocks(weights_last, queries_last, keys_last)
    sign, value, slope = _slope(pointwise, blocks)

    # The value's derivative with respect to moments and means, (..., r * r or r, rows), then to
    # weights and logits, (..., past, rows), and to the queries that attend, (..., r, rows).
    by_moment = _once(-slope / math.sqrt(rank))
    by_mean = [_contracted(by_moment, key_mean, -2), _contracted(by_moment, query_mean, -3)]
    by_mean = _once(-jnp.concatenate(by_mean, axis=-2))
    by_moment = _flat(by_moment)
    products = _once(queries[..., :, None] * keys[..., None, :])
    products = products.reshape(*products.shape[:-2], rank**2)
    both = jnp.concatenate([queries, keys], axis=-1)
    by_weight = _once(_matmul(products, by_moment) + _matmul(both, by_mean))
    centre = jnp.sum(weights_last * by_weight, axis=-2, keepdims=True)
    by_logit = _once(weights_last * (by_weight - centre) / math.sqrt(rank))
    by_own = _once(_matmul(keys_last, by_logit))

    def pull(cotangent: Float[Array, "*batch rows"]) -> tuple[Array, Array, Array]:
        scaled = weights * cotangent[..., None]
        by_product = _once(_matmul(by_moment, scaled))  # (..., r * r, past)
        by_product = by_product.reshape(*by_product.shape[:-2], rank, rank, -1)
        query, key = jnp.split(_matmul(by_mean, scaled), 2, axis=-2)
        query += _contracted(by_product, keys_last, -2)
        key += _contracted(by_product, queries_last, -3)
        key += _matmul(own_last, jnp.swapaxes(by_logit * cotangent[..., None, :], -1, -2))
        found = by_own * cotangent[..., None, :], query, key
        return tuple(jnp.swapaxes(_once(part), -1, -2) for part in found)

    # Transposed, so that forward mode has it too; in reverse mode JAX transposes it back.
    (change,) = jax.linear_transpose(pull, value)(tangents)
    return (sign, value), (jnp.zeros_like(change), change)


def _blocks(
    weights: Float[Array, "*batch past rows"],
    queries: Float[Array, "*batch r past"],
    keys: Float[Array, "*batch r past"],
) -> tuple[Array, Array, Array]:
    """Reduced blocks (..., r, r, rows), and the mean query and key, (..., r, rows)."""
    rank = keys.shape[-2]
    products = _once(queries[..., :, None, :] * keys[..., None, :, :])
    moments = _matmul(_flat(products), weights)
    moments = moments.reshape(*moments.shape[:-2], rank, rank, -1)
    means = _once(_matmul(jnp.concatenate([queries, keys], axis=-2), weights))
    query, key = jnp.split(means, 2, axis=-2)
    covariance = moments - query[..., :, None, :] * key[..., None, :, :]
    identity = jnp.eye(rank, dtype=covariance.dtype)[..., None]
    return _once(identity - covariance / math.sqrt(rank)), query, key


def _flat(array: Float[Array, "*batch i j n"]) -> Float[Array, "*batch i*j n"]:
    return array.reshape(*array.shape[:-3], -1, array.shape[-1])


def _last(array: Float[Array, "*batch past r"]) -> Float[Array, "*batch r past"]:
    return _once(jnp.swapaxes(array, -1, -2))


def _contracted(
    array: Float[Array, "*batch i j n"], vectors: Float[Array, "*batch m n"], axis: int
) -> Float[Array, "*batch k n"]:
    """Sum over j (axis -2) or i (axis -3) of the entries times the vectors', for each n."""
    # Term by term: as a reduction XLA would write out all terms before it adds them.
    size = vectors.shape[-2]
    vectors = jnp.expand_dims(vectors, -3 if axis == -2 else -2)
    parts = (lax.split(part, [1] * size, part.ndim + axis) for part in (array, vectors))
    terms = (left * right for left, right in zip(*parts, strict=True))
    return jnp.squeeze(functools.reduce(jnp.add, terms), axis)
