"""Functions of the determinants det R_t at every position: what training and sampling evaluate.

Second moments where they lose no digit, and centred covariances at the positions where they do;
either way a position's result is a function of its past alone, to the last bit. Of long sequences,
or many of them, nothing of size r x r is kept for all positions, but computed anew in the
derivative.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from probattn.attention import Projections, causal_softmax, finite_rows, follows, without_broken
from probattn.covariance import centred_covariance
from probattn.elimination import determinant
from probattn.moments import Pointwise, of_rows, representable, slope_of
from probattn.unanimous import unanimous

# Numbers in products of queries and keys, at once: as many as a CPU's cache can hold, or as many
# as an accelerator wants.
_AT_ONCE, _AT_ONCE_ELSEWHERE = 2**18, 2**24
# Rows at once of a long sequence: at least so many, in at most so many parts.
_ROWS, _PARTS = 128, 4
_CENTRED = 2**17  # numbers in centred vectors, at once


def of_determinants(
    pointwise: Pointwise, projected: Projections
) -> tuple[Float[Array, "*batch T"], Float[Array, "*batch T"]]:
    """Signs of det R_t and a function of them and of log|det R_t|, at every position.

    The derivative is R_t^-T, in forward and reverse mode and to any order; at an exactly singular
    block that of a block a rounding error away.

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
    of = partial(_of_sequences, pointwise)
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


def _of_sequences(
    pointwise: Pointwise,
    own: Float[Array, "N T r"],
    queries: Float[Array, "N T r"],
    keys: Float[Array, "N T r"],
) -> tuple[Array, Array]:
    finite = representable(queries, keys)
    # Without the tokens that are too long for any product.
    kept = (jnp.where(finite[..., None], array, 0.0) for array in (own, queries, keys))
    sign, value, fine = _by_moments(pointwise, *kept)
    fine = finite & (lax.stop_gradient(fine) > 0)

    def corrected() -> tuple[Array, Array]:
        # A token that is not finite reaches the rows after it, as NaN, and not those before it.
        broken = ~(finite_rows(queries) & finite_rows(keys))
        whole = without_broken(queries), without_broken(keys)
        reached = follows(broken)
        centred = _by_centring(pointwise, fine, own, *whole)
        after = [jnp.where(reached, jnp.nan, part) for part in centred]
        return jnp.where(fine, sign, after[0]), jnp.where(fine, value, after[1])

    return lax.cond(unanimous(fine), lambda: (sign, value), corrected)


def _by_moments(pointwise: Pointwise, own: Array, queries: Array, keys: Array) -> tuple:
    length = keys.shape[-2]
    if length <= _ROWS:
        return of_rows(pointwise, 0, own, queries, keys)
    rows = max(_ROWS, -(-length // _PARTS))
    found = []
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        # A past of s < stop is all that rows start..stop attend to.
        past = queries[..., :stop, :], keys[..., :stop, :]
        one = jax.checkpoint(partial(of_rows, pointwise, start))
        sign, value, fine = one(own[..., start:stop, :], *past)
        # One after the other, in the same memory.
        value, own, queries, keys = lax.optimization_barrier((value, own, queries, keys))
        found.append((sign, value, fine))
    return tuple(jnp.concatenate(parts, axis=-1) for parts in zip(*found, strict=True))


def _by_centring(
    pointwise: Pointwise,
    fine: Bool[Array, "N T"],
    own: Float[Array, "N T r"],
    queries: Float[Array, "N T r"],
    keys: Float[Array, "N T r"],
) -> tuple[Array, Array]:
    """At the positions that are not fine; elsewhere perhaps, perhaps zero."""
    length, rank = keys.shape[-2:]
    # Those that are not fine come first, so that most of the parts have nothing to do.
    order = jnp.argsort(fine.ravel())
    size = min(max(_CENTRED // (length * rank), 1), order.size)
    parts = -(-order.size // size)
    padded = jnp.concatenate([order, jnp.broadcast_to(order[-1], parts * size - order.size)])

    @jax.checkpoint
    def centred(picked: Int[Array, " rows"]) -> tuple[Array, Array]:
        sequences, positions = picked // length, picked % length
        attending = own[sequences, positions][:, None]
        weights = causal_softmax(attending, keys[sequences], positions[:, None])
        covariance = centred_covariance(weights, queries[sequences], keys[sequences])[:, 0]
        blocks = jnp.eye(rank, dtype=covariance.dtype) - covariance / math.sqrt(rank)
        return _of_blocks(pointwise, jnp.moveaxis(blocks, 0, -1))

    def part(picked: Int[Array, " rows"]) -> tuple[Array, Array]:
        none = jnp.zeros(size, own.dtype)
        idle = unanimous(fine.ravel()[picked])
        return lax.cond(idle, lambda: (none, none), lambda: centred(picked))

    found = lax.map(part, padded.reshape(parts, size))
    back = jnp.argsort(order)
    return tuple(array.ravel()[back].reshape(fine.shape) for array in found)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _of_blocks(
    pointwise: Pointwise, blocks: Float[Array, "*batch r r n"]
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch n"]]:
    sign, log_abs = determinant(blocks, pivoting=True)
    return sign, pointwise(sign, log_abs)


@_of_blocks.defjvp
def _of_blocks_jvp(pointwise: Pointwise, primals: tuple[Array], tangents: tuple[Array]) -> tuple:
    (blocks,), (tangent,) = primals, tangents
    sign, value, slope = slope_of(pointwise, blocks, pivoting=True)
    change = jnp.sum(slope * tangent, axis=(-3, -2))
    return (sign, value), (jnp.zeros_like(change), change)
