"""What no context at all can do to an attention stage: the certificate of a table of tokens.

A stage of a language model sees one vector for every symbol at every position, and nothing else. So
its contexts are made of a finite table, although nobody could list them all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from probattn.arguments import check_bound, check_weights, floating
from probattn.blocks.geometry import bounded
from probattn.blocks.majorants import (
    Majorants,
    largest_eigenvalue,
    largest_lengths,
    largest_of_squares,
    majorants,
    pair_squares,
    projected,
)

MOST_ROWS = 16_384  # rows whose pairs are all looked at; those of a larger table are grouped
_TILE = 512  # rows that are compared with as many others in one step


class TableCertificate(NamedTuple):
    """What `table_certificate` finds, for every pair of matrices.

    Attributes:
        rho: (...); below 1 no context of the table's tokens folds, whatever x_t is.
        pair: (..., 2), the two rows of the table for which d^T A d / 4 is largest, with d their
            difference.
        pair_rho: (...), that number, at most rho but for rounding; 0 where no two rows may
            meet. Above 1 the context of these two tokens folds at every x_t that attends to both
            alike. NaN where the table was too large to look at all pairs.
    """

    rho: Float[Array, "*weights"]
    pair: Int[Array, "*weights 2"]
    pair_rho: Float[Array, "*weights"]


def table_certificate(
    table: ArrayLike,
    w_query: ArrayLike,
    w_key: ArrayLike,
    *,
    bound: ArrayLike | None = None,
    position: ArrayLike | None = None,
) -> TableCertificate:
    """Compute rho of a table: no context of its tokens has a larger `certificate`.

    The certificate of a context is a quarter of the largest squared distance of two of its tokens,
    in the best of several norms. Here the two may be any two rows of the table. Rounding is towards
    unproved, as there. (Not in the paper.)

    Where the table has more than `MOST_ROWS` rows, groups of consecutive rows take their place: the
    distance of two groups is that of their middle rows, and twice the largest radius is added.
    That rho is an upper bound too, and less sharp. So rows that are alike should stand together,
    such as one symbol at all positions.

    Args:
        table: tokens (N, d), such as every symbol's embedding at every position.
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        bound: c of a bounded context, > 0, in the unit of the table; None leaves it unbounded.
        position: (N,) integers; two rows of equal position never stand in one past. None lets any
            two of them do so.

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point or the bound is not
            positive.
    """
    check_bound(bound)
    table = floating("table", table)
    w_query, w_key = check_weights(w_query, w_key)
    width = w_query.shape[-2]
    if table.ndim != 2 or table.shape[0] < 1 or table.shape[1] != width:
        raise ValueError(
            f"table has shape {table.shape}: expected (N, d) with N >= 1 and d = {width}, "
            f"to fit w_query of shape {w_query.shape}"
        )
    rows = len(table)
    place = jnp.arange(rows) if position is None else jnp.asarray(position)
    if place.shape != (rows,) or not jnp.issubdtype(place.dtype, jnp.integer):
        raise ValueError(
            f"position has shape {place.shape} and dtype {place.dtype}: expected integers of shape "
            f"({rows},), one for each row of the table"
        )
    return _certify(table, place, w_query, w_key, bound)


@jax.jit
def _certify(
    table: Array, place: Array, w_query: Array, w_key: Array, bound: ArrayLike | None
) -> TableCertificate:
    tokens = bounded(table, bound)
    size = -(-len(tokens) // MOST_ROWS)  # rows of a group
    values = tokens - tokens[size // 2][None]
    reach = jnp.max(jnp.linalg.norm(values, axis=-1))
    if bound is not None:
        reach += 2 * jnp.max(jnp.linalg.norm(tokens, axis=-1))
    leading = w_query.shape[:-2]
    matrices = [matrix.reshape(-1, *matrix.shape[-2:]) for matrix in (w_query, w_key)]

    def of_one(pair: tuple[Array, Array]) -> TableCertificate:
        factors = majorants(*pair)
        points = projected(values, factors)
        if size == 1:
            return _of_pairs(points, place, reach, factors)
        return _of_groups(points, size, reach, factors)

    found = lax.map(of_one, tuple(matrices))
    return TableCertificate(*(field.reshape(*leading, *field.shape[1:]) for field in found))


def _of_pairs(
    points: Float[Array, "N 3*m"],
    place: Int[Array, " N"],
    reach: Float[Array, ""],
    factors: Majorants,
) -> TableCertificate:
    largest, pair, fold = _farthest(points, place)
    rho = largest_eigenvalue(largest[None], reach[None], factors)[0]
    return TableCertificate(rho, pair, jnp.where(jnp.isfinite(fold), fold / 4, 0.0))


def _of_groups(
    points: Float[Array, "N 3*m"], size: int, reach: Float[Array, ""], factors: Majorants
) -> TableCertificate:
    missing = -len(points) % size
    whole = jnp.concatenate([points, jnp.broadcast_to(points[-1:], (missing, points.shape[-1]))])
    groups = whole.reshape(-1, size, points.shape[-1])
    centres = groups[:, size // 2]  # the first of them is the origin
    radius = largest_lengths((groups - centres[:, None]).reshape(whole.shape))
    largest, pair, _ = _farthest(centres, jnp.arange(len(centres)))
    widened = (jnp.sqrt(largest) + 2 * radius) ** 2
    rho = largest_eigenvalue(widened[None], reach[None], factors)[0]
    rows = jnp.minimum(pair * size + size // 2, len(points) - 1)
    return TableCertificate(rho, rows, jnp.full_like(rho, jnp.nan))


def _farthest(
    points: Float[Array, "N 3*m"], place: Int[Array, " N"]
) -> tuple[Float[Array, " n"], Int[Array, " 2"], Float[Array, ""]]:
    """Return the largest squared distances in every norm, and the pair of largest d^T A d."""
    rows = len(points)
    size = min(_TILE, rows)
    # The last tile is moved back to end with the rows, and has some of them in common with another.
    starts = jnp.minimum(jnp.arange(0, rows, size), rows - size)
    # Both numbers of a pair are those of the pair turned round, so half of the tiles will do.
    tiles = jnp.stack([starts[each] for each in jnp.triu_indices(len(starts))], axis=-1)

    def of_tile(tile: Int[Array, " 2"]) -> tuple[Array, Array, Array]:
        index = tile[:, None] + jnp.arange(size)
        first, second = points[index]
        apart = place[index[0]][:, None] != place[index[1]][None, :]
        squares = pair_squares(first, second)
        largest = jnp.max(largest_of_squares(squares, apart), axis=0)
        fold = jnp.where(apart, squares[-1], -jnp.inf)
        best = jnp.argmax(fold)
        pair = jnp.stack([index[0, best // size], index[1, best % size]])
        return largest, pair, fold.ravel()[best]

    largest, pairs, folds = lax.map(of_tile, tiles)
    best = jnp.argmax(folds)
    return jnp.max(largest, axis=0), pairs[best], folds[best]
