"""What no text at all can do to an attention stage: a certificate of a finite table of tokens.

A stage of a language model sees one vector for every symbol at every position, and nothing else. So
its contexts, though there are more of them than anyone could list, are made of a finite table.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from probattn.arguments import check_bound, check_weights, floating
from probattn.blocks.geometry import bounded
from probattn.proper import balanced

MOST_ROWS = 16_384  # rows whose pairs are all looked at; those of a larger table are grouped
_PAIRS = 2**21  # pairs of rows in one step

_HIGHEST = lax.Precision.HIGHEST


class TableCertificate(NamedTuple):
    """What `table_certificate` finds, for every pair of matrices.

    Attributes:
        rho: (...); below 1, no context of the table's tokens folds, whatever x_t is.
        pair: (..., 2), rows i and j of the table for which d^T A d / 4 is largest, with d = x_i -
            x_j.
        pair_rho: (...), that number; above 1 a context of these two tokens, with equal weights on
            both, folds. It is never larger than rho.
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
    """Bound rho_t over all contexts whose tokens are rows of a table.

    With A the coupling and F >= (A + A^T) / 2 symmetric and positive semidefinite, every context
    has rho_t <= max d^T F d / 4 over the differences d of two tokens of its past (see
    `certificate`). Two such bounds are computed over all pairs of rows, and the smaller is taken:
    that of the positive part of (A + A^T) / 2, and Gruess' product of the diameters of queries and
    keys. (Not in the paper.)

    A table of more than `MOST_ROWS` rows is cut into groups of consecutive rows, and a pair of
    groups stands for its rows: rho is then an upper bound that is less sharp, and `pair` names the
    first rows of two groups, without `pair_rho`, which is NaN.

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
    rows, width = table.shape if table.ndim == 2 else (0, 0)
    if rows < 1 or width != w_query.shape[-2]:
        raise ValueError(
            f"table has shape {table.shape}: expected (N, d) with N >= 1 and d = "
            f"{w_query.shape[-2]}, to fit w_query of shape {w_query.shape}"
        )
    place = jnp.arange(rows) if position is None else jnp.asarray(position)
    if place.shape != (rows,) or not jnp.issubdtype(place.dtype, jnp.integer):
        raise ValueError(
            f"position is {place.dtype} of shape {place.shape}: expected integers of shape "
            f"({rows},), one for each row of the table"
        )
    return _certify(table, place.astype(jnp.int32), w_query, w_key, bound)


@jax.jit
def _certify(
    table: Array, place: Array, w_query: Array, w_key: Array, bound: ArrayLike | None
) -> TableCertificate:
    tokens = bounded(table, bound)
    tokens = tokens - jnp.mean(tokens, axis=0, keepdims=True)
    leading = w_query.shape[:-2]
    flat = (w_query.reshape(-1, *w_query.shape[-2:]), w_key.reshape(-1, *w_key.shape[-2:]))
    found = lax.map(lambda weights: _of_one(tokens, place, *weights), flat)
    return TableCertificate(*(field.reshape(*leading, *field.shape[1:]) for field in found))


def _of_one(
    tokens: Float[Array, "N d"], place: Int[Array, " N"], w_query: Array, w_key: Array
) -> TableCertificate:
    query, key = balanced(w_query, w_key)
    size = -(-len(tokens) // MOST_ROWS)
    parts = [
        _grouped(_matmul(tokens, factor), size) for factor in (*signed_parts(query, key), query, key)
    ]
    rows = len(parts[0].centre)
    chunk = max(1, min(_PAIRS // rows, rows))

    def farthest_of(first: Array) -> tuple[Array, Array, Array]:
        index = jnp.minimum(first + jnp.arange(chunk), rows - 1)
        plus, minus, queries, keys = (_squared_distances(part, index) for part in parts)
        if size == 1:  # two tokens of one position never stand in one past
            apart = place[index][:, None] != place[None, :]
            plus, queries, keys = (
                jnp.where(apart, squared, 0.0) for squared in (plus, queries, keys)
            )
            minus = jnp.where(apart, minus, jnp.inf)
        fold = plus - minus
        best = jnp.argmax(fold)
        pair = jnp.stack([index[best // rows], best % rows])
        largest = jnp.stack([jnp.max(plus), jnp.max(queries), jnp.max(keys), fold.ravel()[best]])
        return largest, pair

    largest, pairs = lax.map(farthest_of, jnp.arange(0, rows, chunk))
    plus, queries, keys = (jnp.max(largest[:, column]) for column in range(3))
    best = jnp.argmax(largest[:, 3])
    pair_rho = jnp.maximum(largest[best, 3], 0) / 4 if size == 1 else jnp.asarray(jnp.nan)
    rho = jnp.minimum(plus, jnp.sqrt(queries * keys)) / 4
    return TableCertificate(rho, pairs[best] * size, pair_rho)
