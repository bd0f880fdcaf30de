"""The certificate of a stage of real attention, whose keys turn against its queries.

The nonzero eigenvalues of C_t M_t, which D_t = I - C_t M_t subtracts from one, are those of
Cov_{alpha_t}(u_s, f'_ts z_ts) with u_s = W_Q^T n_s and z_ts = c B_t^T k_s, the keys as the query's
own position sees them. Their real parts are at most lambda_max of the covariance of the points
(a u_s + f'_ts z_ts / a) / 2, whatever a > 0 is (docs/mathematics.md; not in the paper).
"""

import math
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from probattn.blocks.nonfinite import after_nonfinite
from probattn.stages.stage import AttentionStage, by_head, prepared

_PARTS, _ROWS = 8, 64  # of the positions: so many parts, of at least so many rows
_SCALES = (0.5, 1.0, 2.0)  # values of a^2 that are tried, relative to the balanced one

_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def stage_certificate(stage: AttentionStage) -> Float[Array, "*batch T"]:
    """Compute rho_t of a checked stage: below 1 it proves position t invertible.

    Raises:
        ValueError: if B_t may depend on the token: then no proof holds whatever the token is.
    """
    if stage.transforms is not None and not stage.positional:
        raise ValueError(
            "certificate of an AttentionStage whose transforms depend on tokens: expected "
            "positional=True. A norm of the queries has a derivative up to gain / sqrt(eps), and "
            "nothing is proved of every token; use stability_margin"
        )
    return by_head(_of_head, lax.stop_gradient(stage))


def _of_head(stage: AttentionStage) -> Float[Array, " T"]:
    start, w_query = prepared(stage)
    length, rank = start.keys.shape
    reach = jnp.linalg.norm(start.values, axis=-1)
    eps = float(jnp.finfo(reach.dtype).eps)
    # Sums of d products of rounded numbers.
    query_error = (len(w_query) + 16) * eps * jnp.linalg.norm(w_query)
    places = jnp.arange(length)
    window = length if stage.window is None else stage.window
    keys = start.keys / math.sqrt(rank)
    key_lengths = jnp.linalg.norm(keys, axis=-1)
    apart = (_apart(_matmul(part, part.T)) for part in (start.queries, keys))
    query_squares, key_squares = apart
    query_widest, key_widest = (_widest(part, window) for part in (query_squares, key_squares))

    def at(past: int, position: Array) -> Array:
        seen = (places[:past] < position) & (places[:past] >= position - window)
        own = query_error * _largest(reach[:past], seen)
        error = jnp.zeros((), reach.dtype)
        turned, stretch = keys[:past], jnp.ones((), reach.dtype)
        if stage.transforms is not None:
            transform = stage.transforms[position]
            size = jnp.linalg.norm(transform)
            error = (rank + 16) * eps * size * _largest(key_lengths[:past], seen)
            turned = _matmul(turned, transform)
            stretch = _squared_norm(transform)
        queries = start.queries[:past]
        if stage.cap is not None:
            return _capped_rho(queries, turned, seen, own, error)
        squares = query_squares[:past, :past], stretch * key_squares[:past, :past]
        widest = query_widest[position], stretch * key_widest[position]
        longest = (
            _largest(jnp.sum(queries**2, axis=-1), seen),
            stretch * _largest(key_lengths[:past] ** 2, seen),
        )
        return _rho(queries, turned, squares, widest, longest, seen, own, error)

    part, found = max(-(-length // _PARTS), _ROWS), []
    for first in range(0, length, part):
        last = min(first + part, length)
        found.append(lax.map(partial(at, last), places[first:last]))
    lost = after_nonfinite(stage.values, stage.keys)
    return jnp.where(lost, jnp.nan, jnp.concatenate(found))


def _rho(
    queries: Float[Array, "N r"],
    keys: Float[Array, "N r"],
    squares: tuple[Float[Array, "N N"], Float[Array, "N N"]],
    widest: tuple[Float[Array, ""], Float[Array, ""]],
    longest: tuple[Float[Array, ""], Float[Array, ""]],
    seen: Bool[Array, " N"],
    query_error: Float[Array, ""],
    key_error: Float[Array, ""],
) -> Float[Array, ""]:
    """Return the smallest bound of the tokens that are seen, rounding towards unproved.

    The squared distances of queries and of keys are at hand, and the largest of each that is seen.
    They bound those of the keys as this position sees them, and so do the largest squared lengths.
    What differs from position to position are inner products of both.
    """
    along = jnp.sum(queries * keys, axis=-1)
    # -inf for what is not seen, so that no pair of it is the farthest.
    shown = jnp.where(seen, along, -jnp.inf)
    mixed = _matmul(
        jnp.concatenate([queries, keys], axis=-1), jnp.concatenate([keys, queries], axis=-1).T
    )
    cross = shown[:, None] + shown[None, :] - mixed

    def farthest(square: Array) -> Array:
        of_queries, of_keys = squares
        distances = square * of_queries + of_keys / square + 2 * cross
        return jnp.maximum(jnp.max(distances), 0.0)

    return _smallest_bound(farthest, widest, longest, queries, query_error, key_error)


def _capped_rho(
    queries: Float[Array, "N r"],
    keys: Float[Array, "N r"],
    seen: Bool[Array, " N"],
    query_error: Float[Array, ""],
    key_error: Float[Array, ""],
) -> Float[Array, ""]:
    """Return the same where the cap may weaken the keys of each token, one by one."""
    pairs = seen[:, None] & seen[None, :] & ~jnp.eye(len(seen), dtype=bool)
    of_queries, of_keys, mixed = (
        _matmul(one, other.T) for one, other in ((queries, queries), (keys, keys), (queries, keys))
    )
    query, key = _apart(of_queries), _apart(of_keys)
    along = jnp.diagonal(mixed)
    cross = along[:, None] + along[None, :] - mixed - mixed.T
    alone = jnp.broadcast_to(jnp.diagonal(of_keys)[:, None], key.shape)
    # Of a pair, the keys of both count, of the first alone, or none: (u_s - u_s') . z_s
    corners = [(key, cross), (alone, along[:, None] - mixed.T), (jnp.zeros_like(key),) * 2]
    longest = tuple(_largest(jnp.diagonal(part), seen) for part in (of_queries, of_keys))
    widest = _largest(query, pairs), _most([_largest(key, pairs) for key, _ in corners])

    def farthest(square: Array) -> Array:
        return _most(
            [_largest(square * query + key / square + 2 * cross, pairs) for key, cross in corners]
        )

    return _smallest_bound(farthest, widest, longest, queries, query_error, key_error)


def _smallest_bound(
    farthest: Callable[[Array], Array],
    widest: tuple[Array, ...],
    longest: tuple[Array, ...],
    queries: Float[Array, "N r"],
    query_error: Float[Array, ""],
    key_error: Float[Array, ""],
) -> Float[Array, ""]:
    """Return the smallest of the bounds, each increased by what rounding may have taken from it.

    Args:
        farthest: the largest squared distance of two points a u + z / a, given a^2.
        widest: the largest squared distances of queries and of keys.
        longest: their largest squared lengths.
        queries: the queries.
        query_error: by how much a query may be wrong.
        key_error: by how much a key may be.
    """
    eps = float(jnp.finfo(queries.dtype).eps)
    rounding = (8 * queries.shape[-1] + 64) * eps
    widest_query, widest_key = (
        wide + rounding * long for wide, long in zip(widest, longest, strict=True)
    )
    balanced = jnp.sqrt(widest_key) / jnp.sqrt(widest_query)
    balanced = jnp.where((widest_key > 0) & (widest_query > 0), balanced, 1.0)
    query_length = jnp.sqrt(widest_query) + 2 * query_error
    bounds = [query_length * (jnp.sqrt(widest_key) + 2 * key_error)]
    for scale in _SCALES:
        square = scale * balanced  # a^2
        found = farthest(square) + 2 * rounding * (square * longest[0] + longest[1] / square)
        root = jnp.sqrt(square)
        length = jnp.sqrt(found) / 2 + root * query_error + key_error / root
        bounds.append(length**2)
    return (1 + 16 * eps) * jnp.min(jnp.stack(bounds)) / 4


def _squared_norm(transform: Float[Array, "r r"]) -> Float[Array, ""]:
    """Bound the squared spectral norm from above; the bound is 1 of a rotation but for rounding."""
    size = jnp.abs(transform)
    # By how much a row of B^T B may be wrong: each entry is a sum of r products.
    rounding = (len(size) + 16) * float(jnp.finfo(size.dtype).eps)
    error = rounding * _matmul(size.T, jnp.sum(size, axis=-1))
    gram = jnp.abs(_matmul(transform.T, transform))
    return jnp.max(jnp.sum(gram, axis=-1) + error)


def _widest(squares: Float[Array, "T T"], window: int) -> Float[Array, " T"]:
    """Return the largest squared distance of two tokens that each position sees."""
    length = len(squares)
    places = jnp.arange(length)
    if window >= length:  # of a pair the later token decides who sees it
        with_later = jnp.max(jnp.where(places[None, :] < places[:, None], squares, 0.0), axis=1)
        seen = lax.cummax(with_later)
        return jnp.concatenate([jnp.zeros(1, squares.dtype), seen[:-1]])

    def at(position: Array) -> Array:
        seen = (places < position) & (places >= position - window)
        return _largest(squares, seen[:, None] & seen[None, :])

    return lax.map(at, places)


def _apart(products: Float[Array, "N N"]) -> Float[Array, "N N"]:
    """Return squared distances of points from their inner products."""
    own = jnp.diagonal(products)
    return own[:, None] + own[None, :] - 2 * products


def _largest(values: Float[Array, "..."], counted: Bool[Array, "..."]) -> Float[Array, ""]:
    return jnp.maximum(jnp.max(jnp.where(counted, values, 0.0)), 0.0)


def _most(values: list[Array]) -> Float[Array, ""]:
    return jnp.max(jnp.stack(values))
