"""What every function of the blocks starts from: queries, keys, values and attention weights."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from probattn.arguments import check_bound, floating
from probattn.blocks.nonfinite import after_nonfinite, zero_nonfinite
from probattn.blocks.promotion import with_rank

_HIGHEST = lax.Precision.HIGHEST  # on a GPU the default would round the factors to TF32


class Projections(NamedTuple):
    """What attention weights and covariances are computed from.

    Values and keys are taken relative to the first token: covariances and the softmax do not see
    a common shift, and in floating point the differences are what carries the information. The
    first token, and not the mean, because it keeps the past free of the future's rounding errors.

    Attributes:
        values: (..., T, d), x_s - x_0, or phi(x_s) - phi(x_0) where there is a bound.
        own: (..., T, r), the query q_t with which each token attends.
        queries: (..., T, r), the query projection of `values`.
        keys: (..., T, r), the key projection of `values`.
    """

    values: Float[Array, "*batch T d"]
    own: Float[Array, "*batch T r"]
    queries: Float[Array, "*batch T r"]
    keys: Float[Array, "*batch T r"]


class Geometry(NamedTuple):
    """Projections of a sequence, and its attention weights.

    Attributes:
        values: as in `Projections`, (..., T, d).
        queries: likewise, (..., T, r).
        keys: likewise, (..., T, r).
        weights: (..., T, T), the attention weights of the sequence itself.
    """

    values: Float[Array, "*batch T d"]
    queries: Float[Array, "*batch T r"]
    keys: Float[Array, "*batch T r"]
    weights: Float[Array, "*weights T T"]


class Start(NamedTuple):
    """What blocks are made from, of plain attention or of a stage.

    Attributes:
        values: as in `Geometry`.
        queries: likewise.
        keys: likewise; with a cap those of the network, and not relative to the first.
        weights: likewise.
        slopes: (..., T, T), derivatives of capped logits; None without a cap.
        transforms: B (..., T, r, r), where the query q_t has the derivative B_t W_Q^T; None where
            it is W_Q^T.
    """

    values: Float[Array, "*batch T d"]
    queries: Float[Array, "*batch T r"]
    keys: Float[Array, "*batch T r"]
    weights: Float[Array, "*weights T T"]
    slopes: Float[Array, "*weights T T"] | None = None
    transforms: Float[Array, "*batch T r r"] | None = None


def bounded(x: ArrayLike, bound: ArrayLike | None) -> Float[Array, "*batch d"]:
    """Bound x, as values and keys need it: phi(x) = x / sqrt(1 + |x|^2 / c^2), or x itself.

    Args:
        x: vectors (..., d).
        bound: c > 0, in the unit of x; None leaves x as it is.

    Returns:
        (..., d), of norm below c.

    Raises:
        ValueError: if the bound is no positive finite number.
    """
    x = floating("x", x)
    check_bound(bound)
    if bound is None:
        return x
    bound = jnp.asarray(bound, x.dtype)
    # Both sides of the fraction by a common factor, which the derivative need not know of: the
    # square of a token far away would overflow.
    size = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True) / bound, 1)
    small = x / lax.stop_gradient(size)
    squared = jnp.sum((small / bound) ** 2, axis=-1, keepdims=True)
    return small * lax.rsqrt(lax.stop_gradient(size) ** -2 + squared)


def geometry(
    x: Float[Array, "*batch T d"],
    w_query: Float[Array, "*weights d r"],
    w_key: Float[Array, "*weights d r"],
    bound: ArrayLike | None,
) -> Geometry:
    """Compute projections and attention weights, the start of covariances and margins.

    The arguments are those of `residual`, already checked by `check_arguments`.
    """
    values, own, queries, keys = projections(x, w_query, w_key, bound)
    weights = causal_softmax(own, keys)
    # A token that is not finite reaches the rows after it, as NaN; not those before it, where its
    # weight of zero would make it NaN too.
    weights = jnp.where(after_nonfinite(values, queries, keys)[..., None], jnp.nan, weights)
    return Geometry(zero_nonfinite(values), zero_nonfinite(queries), zero_nonfinite(keys), weights)


def projections(
    x: Float[Array, "*batch T d"],
    w_query: Float[Array, "*weights d r"],
    w_key: Float[Array, "*weights d r"],
    bound: ArrayLike | None,
) -> Projections:
    """Compute queries and keys of a sequence; the arguments are those of `geometry`."""
    context = bounded(x, bound)
    # No result depends on it, nor then does a derivative.
    first = lax.stop_gradient(context[..., :1, :])
    values = context - first
    both = _project(values, jnp.concatenate([w_query, w_key], axis=-1))
    queries, keys = jnp.split(both, 2, axis=-1)
    if bound is None:
        own = queries + jnp.matmul(first, w_query, precision=_HIGHEST)
    else:
        own = _project(x, w_query)
    return Projections(values, own, queries, keys)


def causal_softmax(
    queries: Float[Array, "*queries rows r"],
    keys: Float[Array, "*keys past r"],
    positions: Int[Array, "*positions rows"] | None = None,
) -> Float[Array, "*batch rows past"]:
    """Return attention weights of rows at these positions, by default 0, 1, ..., over all keys."""
    rows, past, rank = queries.shape[-2], keys.shape[-2], keys.shape[-1]
    if rows == 0:
        leading = jnp.broadcast_shapes(queries.shape[:-2], keys.shape[:-2])
        return jnp.zeros((*leading, rows, past), queries.dtype)
    if positions is None:
        positions = jnp.arange(rows)
    logits = jnp.matmul(queries, jnp.swapaxes(keys, -1, -2), precision=_HIGHEST)
    places = with_rank(jnp.arange(past), positions.ndim + 1)
    causal = places < positions[..., None]
    # Row 0 has no past: one finite logit, a constant, keeps its softmax and derivative finite.
    no_past = (positions == 0)[..., None] & (places == 0)
    masked = jnp.where(no_past, 0.0, -jnp.inf).astype(logits.dtype)
    weights = jax.nn.softmax(jnp.where(causal, logits / math.sqrt(rank), masked), axis=-1)
    return jnp.where(causal, weights, jnp.zeros((), logits.dtype))


def weights_and_slopes(
    queries: Float[Array, "*queries T r"],
    keys: Float[Array, "*keys T r"],
    cap: float | None,
    window: int | None,
) -> tuple[Float[Array, "*batch T T"], Float[Array, "*batch T T"] | None]:
    """Return attention weights of capped logits over a window, and the slopes of these logits.

    Args:
        queries: of all positions, (..., T, r).
        keys: likewise.
        cap: C of the logits C tanh(q_t . k_s / (C sqrt(r))), or None.
        window: how many tokens before its own a position attends to, or None for all.
    """
    if cap is None and window is None:
        return causal_softmax(queries, keys), None
    logits = jnp.matmul(queries, jnp.swapaxes(keys, -1, -2), precision=_HIGHEST)
    logits, slopes = logit_slopes(logits / math.sqrt(keys.shape[-1]), cap)
    behind = jnp.arange(keys.shape[-2])[:, None] - jnp.arange(keys.shape[-2])[None, :]
    seen = (behind > 0) & (behind <= (len(behind) if window is None else window))
    seen = with_rank(seen, logits.ndim)
    if slopes is not None:
        slopes = jnp.where(seen, slopes, jnp.zeros((), slopes.dtype))
    # Row 0 sees nothing: one finite logit, a constant, keeps its softmax and derivative finite.
    masked = jnp.where(behind == 0, 0.0, -jnp.inf).astype(logits.dtype)
    masked = jnp.where((jnp.arange(len(behind)) == 0)[:, None], masked, -jnp.inf)
    weights = jax.nn.softmax(jnp.where(seen, logits, with_rank(masked, logits.ndim)), axis=-1)
    return jnp.where(seen, weights, jnp.zeros((), logits.dtype)), slopes


def logit_slopes(
    logits: Float[Array, "*batch T"], cap: float | None
) -> tuple[Float[Array, "*batch T"], Float[Array, "*batch T"] | None]:
    """Return capped logits C tanh(l / C) and their slopes; the logits and None without a cap."""
    if cap is None:
        return logits, None
    # The square of the hyperbolic secant, without cancellation where it is small.
    small = jnp.exp(-2 * jnp.abs(logits / cap))
    return cap * jnp.tanh(logits / cap), 4 * small / (1 + small) ** 2


def _project(
    x: Float[Array, "*x T d"], weights: Float[Array, "*weights d m"]
) -> Float[Array, "*batch T m"]:
    if weights.ndim > 2:
        return jnp.matmul(x, weights, precision=_HIGHEST)
    # One product of matrices, and so is its derivative with respect to the weights.
    rows = jnp.matmul(x.reshape(-1, x.shape[-1]), weights, precision=_HIGHEST)
    return rows.reshape(*x.shape[:-1], weights.shape[-1])
