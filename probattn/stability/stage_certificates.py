"""The certificate of a stage of real attention, whose keys turn against its queries.

The nonzero eigenvalues of C_t M_t, which D_t = I - C_t M_t subtracts from one, are those of
Cov_{alpha_t}(u_s, f'_ts z_ts) with u_s = W_Q^T n_s and z_ts = c B_t^T k_s, the keys as the query's
own position sees them. Their real parts are at most lambda_max of the covariance of the points
(a u_s + f'_ts z_ts / a) / 2, whatever a > 0 is (docs/mathematics.md; not in the paper).
"""

import math
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

    def at(past: int, position: Array) -> Array:
        seen = (places[:past] < position) & (places[:past] >= position - window)
        keys, sizes = start.keys[:past] / math.sqrt(rank), jnp.ones((), reach.dtype)
        error = jnp.zeros((), reach.dtype)
        if stage.transforms is not None:
            transform = stage.transforms[position]
            sizes = jnp.linalg.norm(transform)
            error = (rank + 16) * eps * sizes * _largest(jnp.linalg.norm(keys, axis=-1), seen)
            keys = _matmul(keys, transform)
        own = query_error * _largest(reach[:past], seen)
        return _rho(start.queries[:past], keys, seen, own, error, capped=stage.cap is not None)

    part, found = max(-(-length // _PARTS), _ROWS), []
    for first in range(0, length, part):
        last = min(first + part, length)
        found.append(lax.map(partial(at, last), places[first:last]))
    lost = after_nonfinite(stage.values, stage.keys)
    return jnp.where(lost, jnp.nan, jnp.concatenate(found))


def _rho(
    queries: Float[Array, "N r"],
    keys: Float[Array, "N r"],
    seen: Bool[Array, " N"],
    query_error: Float[Array, ""],
    key_error: Float[Array, ""],
    *,
    capped: bool,
) -> Float[Array, ""]:
    """Return the smallest bound of the tokens that are seen, rounding towards unproved."""
    rank = queries.shape[-1]
    pairs = seen[:, None] & seen[None, :] & ~jnp.eye(len(seen), dtype=bool)
    of_queries, of_keys, mixed = (
        _matmul(one, other.T) for one, other in ((queries, queries), (keys, keys), (queries, keys))
    )
    query, key = _apart(of_queries), _apart(of_keys)
    along = jnp.diagonal(mixed)
    cross = along[:, None] + along[None, :] - mixed - mixed.T
    # Of a pair, which parts of the keys count: both, and with a cap the first alone or none.
    corners = [(key, cross)]
    if capped:
        alone = jnp.broadcast_to(jnp.diagonal(of_keys)[:, None], key.shape)
        # (u_s - u_s') . z_s
        corners += [(alone, along[:, None] - mixed.T), (jnp.zeros_like(key),) * 2]
    eps = float(jnp.finfo(query.dtype).eps)
    rounding = (8 * rank + 64) * eps
    longest_query, longest_key = (
        _largest(jnp.diagonal(part), seen) for part in (of_queries, of_keys)
    )
    widest_query = _largest(query, pairs) + rounding * longest_query
    widest_key = _most([_largest(key, pairs) for key, _ in corners])
    widest_key = widest_key + rounding * longest_key

    balanced = jnp.sqrt(widest_key) / jnp.sqrt(widest_query)
    balanced = jnp.where((widest_key > 0) & (widest_query > 0), balanced, 1.0)
    query_length = jnp.sqrt(widest_query) + 2 * query_error
    bounds = [query_length * (jnp.sqrt(widest_key) + 2 * key_error)]
    for scale in _SCALES:
        square = scale * balanced  # a^2
        widest = _most(
            [_largest(square * query + key / square + 2 * cross, pairs) for key, cross in corners]
        )
        widest = widest + 2 * rounding * (square * longest_query + longest_key / square)
        root = jnp.sqrt(square)
        length = jnp.sqrt(widest) / 2 + root * query_error + key_error / root
        bounds.append(length**2)
    return (1 + 16 * eps) * jnp.min(jnp.stack(bounds)) / 4


def _apart(products: Float[Array, "N N"]) -> Float[Array, "N N"]:
    """Return squared distances of points from their inner products."""
    own = jnp.diagonal(products)
    return own[:, None] + own[None, :] - 2 * products


def _largest(values: Float[Array, "..."], counted: Bool[Array, "..."]) -> Float[Array, ""]:
    return jnp.maximum(jnp.max(jnp.where(counted, values, 0.0)), 0.0)


def _most(values: list[Array]) -> Float[Array, ""]:
    return jnp.max(jnp.stack(values))
