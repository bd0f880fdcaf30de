"""Functions of the determinants det R_t at every position: what training and sampling evaluate.

Second moments where they lose no digit, and centred covariances at the positions where they do;
either way a position's result is a function of its past alone, to the last bit. Of long sequences,
or many of them, nothing of size r x r is kept for all positions, but computed anew in the
derivative.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from probattn.blocks.covariance import centred_covariance, identity_less
from probattn.blocks.elimination import Pivoting, determinant
from probattn.blocks.geometry import Projections, causal_softmax
from probattn.blocks.moments import Pointwise, representable, row_values, slope_of, summed_over_rows
from probattn.blocks.nonfinite import after_nonfinite, zero_nonfinite
from probattn.blocks.per_device import per_device
from probattn.blocks.selection import all_in_batch, compute_where

# Numbers in products of queries and keys, at once: as many as a CPU's cache can hold, or as many
# as an accelerator wants.
AT_ONCE, AT_ONCE_ELSEWHERE = 2**18, 2**24
# Rows at once of a long sequence: at least so many, in at most so many parts.
_ROWS, _PARTS = 64, 4
# Positions to be centred at once, mostly few: so many, or of short sequences so many numbers.
_CENTRED, _CENTRED_NUMBERS = 16, 2**15
FEW = 2**14  # products of queries and keys that are not worth the compilation of two ways
ALL = 2**22  # products that are centred at every position where one needs it: a smaller program


def determinant_values(
    pointwise: Pointwise, projected: Projections, *, summed: bool = False
) -> tuple[Float[Array, "*batch T"], Float[Array, "..."]]:
    """Return the signs of det R_t and a function of them and of log|det R_t|, by position.

    The derivative is R_t^-T, in forward and reverse mode and to any order; at an exactly singular
    block that of a block a rounding error away.

    Args:
        pointwise: function of signs (..., T) and log|det| (..., T), -inf where singular.
        projected: projections of sequences (..., T, d), already checked.
        summed: whether to sum over positions: faster, since the derivative needs no second look
            at the determinants.

    Returns:
        Signs (..., T), 0 where singular, and what `pointwise` returns, (..., T), or its sum (...,).
    """
    *leading, length, rank = projected.keys.shape
    arguments = tuple(
        array.reshape(-1, length, rank)
        for array in (projected.own, projected.queries, projected.keys)
    )
    sign, value = per_device(partial(_in_groups, pointwise, summed), *arguments)
    return sign.reshape(*leading, length), value.reshape(*leading, *value.shape[1:])


def block_values(
    pointwise: Pointwise, blocks: Float[Array, "T r r"], *, summed: bool = False
) -> tuple[Float[Array, " T"], Float[Array, "..."]]:
    """Return what `determinant_values` does, of blocks that are at hand."""
    sign, value = _of_blocks(pointwise, "where needed", jnp.moveaxis(blocks, 0, -1))
    return sign, jnp.sum(value, axis=-1) if summed else value


def _in_groups(
    pointwise: Pointwise,
    summed: bool,
    own: Float[Array, "N T r"],
    queries: Float[Array, "N T r"],
    keys: Float[Array, "N T r"],
) -> tuple[Array, Array]:
    sequences, length, rank = keys.shape
    if math.prod(keys.shape) * length * rank <= FEW:
        sign, value = _where_whole(partial(_directly, pointwise), own, queries, keys)
        return sign, jnp.sum(value, axis=-1) if summed else value
    of = partial(_of_sequences, pointwise, summed)
    together = _together(sequences, length * rank**2)
    if together == sequences:
        return of(own, queries, keys)
    groups = tuple(array.reshape(-1, together, length, rank) for array in (own, queries, keys))
    one = of if summed else jax.checkpoint(of)
    sign, value = lax.map(lambda group: one(*group), groups)
    return sign.reshape(sequences, length), value.reshape(sequences, *value.shape[2:])


def _together(sequences: int, numbers: int) -> int:
    """Return the largest divisor of `sequences` whose numbers fit into memory, so many each."""
    most = AT_ONCE if jax.default_backend() == "cpu" else AT_ONCE_ELSEWHERE
    return next(
        count
        for count in range(sequences, 0, -1)
        if sequences % count == 0 and (count * numbers <= most or count == 1)
    )


def _directly(
    pointwise: Pointwise,
    own: Float[Array, "N T r"],
    queries: Float[Array, "N T r"],
    keys: Float[Array, "N T r"],
) -> tuple[Array, Array]:
    """Centre at every position: accurate everywhere, and compiled in a third of the time."""
    *batch, rank = keys.shape
    weights = causal_softmax(own, keys, jnp.arange(batch[1]))
    covariance = centred_covariance(weights, queries, keys).reshape(-1, rank, rank)
    sign, value = _of_covariances(pointwise, covariance)
    return sign.reshape(batch), value.reshape(batch)


def _where_whole(
    centred: Callable[..., tuple[Array, Array]],
    own: Float[Array, "N T r"],
    queries: Float[Array, "N T r"],
    keys: Float[Array, "N T r"],
) -> tuple[Array, Array]:
    """Let a token that is not finite reach the rows after it, as NaN, and not those before it."""
    lost = after_nonfinite(queries, keys)
    sign, value = centred(own, zero_nonfinite(queries), zero_nonfinite(keys))
    return jnp.where(lost, jnp.nan, sign), jnp.where(lost, jnp.nan, value)


def _of_sequences(
    pointwise: Pointwise,
    summed: bool,
    own: Float[Array, "N T r"],
    queries: Float[Array, "N T r"],
    keys: Float[Array, "N T r"],
) -> tuple[Array, Array]:
    finite = representable(queries, keys)
    # Without the tokens that are too long for any product.
    kept = [jnp.where(finite[..., None], array, 0.0) for array in (own, queries, keys)]
    if summed:
        sign, value, accurate = _summed_by_moments(pointwise, finite, *kept)
    else:
        sign, value, accurate = _by_moments(pointwise, *kept)
    accurate = finite & (lax.stop_gradient(accurate) > 0)
    by_centring: Callable = partial(_by_centring, pointwise, accurate)
    if math.prod(keys.shape) * math.prod(keys.shape[-2:]) <= ALL:
        # Else the derivative would keep its arrays, and those of the fast way zeros in their place.
        by_centring = jax.checkpoint(partial(_directly, pointwise))

    def corrected() -> tuple[Array, Array]:
        centred = _where_whole(by_centring, own, queries, keys)
        signs = jnp.where(accurate, sign, centred[0])
        if summed:
            return signs, value + jnp.sum(jnp.where(accurate, 0.0, centred[1]), axis=-1)
        return signs, jnp.where(accurate, value, centred[1])

    return lax.cond(all_in_batch(accurate), lambda: (sign, value), corrected)


def _by_moments(pointwise: Pointwise, own: Array, queries: Array, keys: Array) -> tuple:
    length = keys.shape[-2]
    if length <= _ROWS:
        return row_values(pointwise, 0, own, queries, keys)
    found = []
    for start, stop in _blocks_of_rows(length):
        past = queries[..., :stop, :], keys[..., :stop, :]
        one = jax.checkpoint(partial(row_values, pointwise, start))
        sign, value, accurate = one(own[..., start:stop, :], *past)
        # One after the other, in the same memory.
        value, own, queries, keys = lax.optimization_barrier((value, own, queries, keys))
        found.append((sign, value, accurate))
    return tuple(jnp.concatenate(parts, axis=-1) for parts in zip(*found, strict=True))


def _summed_by_moments(
    pointwise: Pointwise, finite: Array, own: Array, queries: Array, keys: Array
) -> tuple:
    signs, values, fines = [], [], []
    for start, stop in _blocks_of_rows(keys.shape[-2]):
        past = queries[..., :stop, :], keys[..., :stop, :]
        counted = finite[..., start:stop].astype(own.dtype)
        sign, value, accurate = summed_over_rows(
            pointwise, start, counted, own[..., start:stop, :], *past
        )
        value, own, queries, keys = lax.optimization_barrier((value, own, queries, keys))
        signs.append(sign)
        values.append(value)
        fines.append(accurate)
    return jnp.concatenate(signs, axis=-1), sum(values), jnp.concatenate(fines, axis=-1)


def _blocks_of_rows(length: int) -> list[tuple[int, int]]:
    """Return where blocks of positions start and stop.

    A past of s < stop is all that rows start..stop attend to: the rest need not be computed.
    """
    rows = max(_ROWS, -(-length // _PARTS))
    return [(start, min(start + rows, length)) for start in range(0, length, rows)]


def _by_centring(
    pointwise: Pointwise,
    accurate: Bool[Array, "N T"],
    own: Float[Array, "N T r"],
    queries: Float[Array, "N T r"],
    keys: Float[Array, "N T r"],
) -> tuple[Array, Array]:
    """Centre at the positions that are not accurate; at others the values may be zero."""
    length, rank = keys.shape[-2:]

    @jax.checkpoint
    def centred(picked: Int[Array, " rows"]) -> tuple[Array, Array]:
        sequences, positions = picked // length, picked % length
        attending = own[sequences, positions][:, None]
        weights = causal_softmax(attending, keys[sequences], positions[:, None])
        covariance = centred_covariance(weights, queries[sequences], keys[sequences])[:, 0]
        return _of_covariances(pointwise, covariance)

    return compute_where(centred, accurate, max(_CENTRED_NUMBERS // (length * rank), _CENTRED))


def _of_covariances(
    pointwise: Pointwise, covariance: Float[Array, "n r r"]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    blocks = identity_less(covariance / math.sqrt(covariance.shape[-1]))
    return _of_blocks(pointwise, "always", jnp.moveaxis(blocks, 0, -1))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _of_blocks(
    pointwise: Pointwise, pivoting: Pivoting, blocks: Float[Array, "*batch r r n"]
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch n"]]:
    sign, log_abs, _ = determinant(blocks, pivoting=pivoting)
    return sign, pointwise(sign, log_abs)


@_of_blocks.defjvp
def _of_blocks_jvp(
    pointwise: Pointwise, pivoting: Pivoting, primals: tuple[Array], tangents: tuple[Array]
) -> tuple:
    (blocks,), (tangent,) = primals, tangents
    sign, value, slope, _ = slope_of(pointwise, blocks, pivoting=pivoting)
    change = jnp.sum(slope * jnp.swapaxes(tangent, -3, -2), axis=(-3, -2))
    return (sign, value), (jnp.zeros_like(change), change)
