"""Strictly causal attention: weights, conditional mean and residual.

Symbols of the paper and their names here, with T positions, d embedding dimensions and rank r:
x_t is row t of `x` (T, d); W_Q and W_K are `w_query` and `w_key` (d, r); the logits are
l_ts = q_t . k_s / sqrt(r) for s < t; alpha_t is row t of the attention weights (T, T); mu_t is
`conditional_mean` and e_t = x_t - mu_t is `residual`. Positions are 0-based, and position 0, which
has no past, has mean zero.

With a `bound` c, values and keys are those of phi(x) = x / sqrt(1 + |x|^2 / c^2), which lies
within distance c of the origin, and only the query q_t is that of x_t itself: mu_t = sum over
s < t of alpha_ts phi(x_s) and k_s = phi(x_s) W_K. A context so bounded has a bounded covariance,
which makes the process proper where c^2 ||A||_2 < 1 (see `proper`). Not in the paper, whose process
is that of bound = None.
"""

import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from probattn.broken_tokens import reached, without_broken

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


def attention_weights(queries: ArrayLike, keys: ArrayLike) -> Float[Array, "*batch T T"]:
    """Strictly causal softmax weights alpha_ts, with logits q_t . k_s / sqrt(r) over s < t.

    Args:
        queries: (..., T, r).
        keys: (..., T, r).

    Returns:
        (..., T, T). Row t sums to one over its columns s < t; row 0 is all zero.

    Raises:
        ValueError: if the shapes do not fit or the arrays are not floating point.
    """
    queries = _floating("queries", queries)
    keys = _floating("keys", keys)
    if queries.ndim < 2 or keys.ndim < 2 or queries.shape[-2:] != keys.shape[-2:]:
        raise ValueError(
            f"queries have shape {queries.shape} and keys {keys.shape}: "
            "expected both as (..., T, r) with the same T and r"
        )
    if queries.shape[-1] < 1:
        raise ValueError(f"queries have shape {queries.shape}: expected (..., T, r) with r >= 1")
    _check_leading_axes(queries=queries.shape[:-2], keys=keys.shape[:-2])
    return causal_softmax(queries, keys)


def bounded(x: ArrayLike, bound: ArrayLike | None) -> Float[Array, "*batch d"]:
    """What values and keys see of x: phi(x) = x / sqrt(1 + |x|^2 / c^2), or x itself.

    Args:
        x: vectors (..., d).
        bound: c > 0, in the unit of x; None leaves x as it is.

    Returns:
        (..., d), of norm below c.

    Raises:
        ValueError: if the bound is no positive finite number.
    """
    x = _floating("x", x)
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


def conditional_mean(
    x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike, *, bound: ArrayLike | None = None
) -> Float[Array, "*batch T d"]:
    """Attention-weighted mean of the past, mu_t = sum over s < t of alpha_ts x_s, and mu_0 = 0.

    Args:
        x: token embeddings (..., T, d).
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.

    Returns:
        (..., T, d).

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point or the bound is
            not positive.
    """
    x, w_query, w_key = check_arguments(x, w_query, w_key, bound)
    weights = geometry(x, w_query, w_key, bound).weights
    return jnp.matmul(weights, without_broken(bounded(x, bound)), precision=_HIGHEST)


def residual(
    x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike, *, bound: ArrayLike | None = None
) -> Float[Array, "*batch T d"]:
    """Residual e_t = x_t - mu_t of the attention process, e_t ~ Normal(0, sigma^2 I).

    Args:
        x: token embeddings (..., T, d).
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.

    Returns:
        (..., T, d).

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point or the bound is
            not positive.
    """
    x = _floating("x", x)
    return x - conditional_mean(x, w_query, w_key, bound=bound)


def coupling(w_query: ArrayLike, w_key: ArrayLike) -> Float[Array, "*batch d d"]:
    """Coupling matrix A = W_K W_Q^T / sqrt(r), all that the process sees of W_Q and W_K.

    Args:
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).

    Returns:
        (..., d, d). In the scalar case its one entry is the paper's coupling a.

    Raises:
        ValueError: if the shapes do not fit or the arrays are not floating point.
    """
    w_query, w_key = check_weights(w_query, w_key)
    scaled = w_key / math.sqrt(w_key.shape[-1])
    return jnp.matmul(scaled, jnp.swapaxes(w_query, -1, -2), precision=_HIGHEST)


def geometry(
    x: Float[Array, "*batch T d"],
    w_query: Float[Array, "*weights d r"],
    w_key: Float[Array, "*weights d r"],
    bound: ArrayLike | None,
) -> Geometry:
    """Projections and attention weights that covariances and margins start from.

    The arguments are those of `residual`, already checked by `check_arguments`.
    """
    values, own, queries, keys = projections(x, w_query, w_key, bound)
    weights = causal_softmax(own, keys)
    # A token that is not finite reaches the rows after it, as NaN; not those before it, where its
    # weight of zero would make it NaN too.
    weights = jnp.where(reached(values, queries, keys)[..., None], jnp.nan, weights)
    return Geometry(without_broken(values), without_broken(queries), without_broken(keys), weights)


def projections(
    x: Float[Array, "*batch T d"],
    w_query: Float[Array, "*weights d r"],
    w_key: Float[Array, "*weights d r"],
    bound: ArrayLike | None,
) -> Projections:
    """Queries and keys of a sequence; the arguments are those of `geometry`."""
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
    """Attention weights of rows at these positions, by default 0, 1, ..., over tokens 0, 1, ..."""
    rows, past, rank = queries.shape[-2], keys.shape[-2], keys.shape[-1]
    if rows == 0:
        leading = jnp.broadcast_shapes(queries.shape[:-2], keys.shape[:-2])
        return jnp.zeros((*leading, rows, past), queries.dtype)
    if positions is None:
        positions = jnp.arange(rows)
    logits = jnp.matmul(queries, jnp.swapaxes(keys, -1, -2), precision=_HIGHEST)
    causal = jnp.arange(past) < positions[..., None]
    # Row 0 has no past: one finite logit, a constant, keeps its softmax and derivative finite.
    no_past = (positions == 0)[..., None] & (jnp.arange(past) == 0)
    masked = jnp.where(no_past, 0.0, -jnp.inf).astype(logits.dtype)
    weights = jax.nn.softmax(jnp.where(causal, logits / math.sqrt(rank), masked), axis=-1)
    return jnp.where(causal, weights, jnp.zeros((), logits.dtype))


def check_arguments(
    x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike, bound: ArrayLike | None
) -> tuple[Float[Array, "*batch T d"], Float[Array, "*weights d r"], Float[Array, "*weights d r"]]:
    """Arguments of the public functions as arrays of one floating dtype, at least float32.

    Raises:
        ValueError: if a shape, a dtype or the bound does not fit.
    """
    check_bound(bound)
    x = _floating("x", x)
    w_query, w_key = check_weights(w_query, w_key)
    d = w_query.shape[-2]
    if x.ndim < 2 or x.shape[-1] != d:
        raise ValueError(
            f"x has shape {x.shape}: expected (..., T, d) with d = {d}, "
            f"to fit w_query of shape {w_query.shape}"
        )
    if x.shape[-2] < 1:
        raise ValueError(f"x has shape {x.shape}: expected (..., T, d) with T >= 1")
    _check_leading_axes(x=x.shape[:-2], w_query=w_query.shape[:-2], w_key=w_key.shape[:-2])
    return x, w_query, w_key


def check_weights(
    w_query: ArrayLike, w_key: ArrayLike
) -> tuple[Float[Array, "*batch d r"], Float[Array, "*batch d r"]]:
    """Projection matrices as arrays of one shape and of a floating dtype, at least float32.

    Raises:
        ValueError: if a shape or a dtype does not fit.
    """
    w_query = _floating("w_query", w_query)
    w_key = _floating("w_key", w_key)
    if w_query.ndim < 2 or w_key.ndim < 2 or w_query.shape[-2:] != w_key.shape[-2:]:
        raise ValueError(
            f"w_query has shape {w_query.shape} and w_key {w_key.shape}: "
            "expected both as (..., d, r) with the same d and r"
        )
    if min(w_query.shape[-2:]) < 1:
        raise ValueError(
            f"w_query has shape {w_query.shape}: expected (..., d, r) with d >= 1 and r >= 1"
        )
    _check_leading_axes(w_query=w_query.shape[:-2], w_key=w_key.shape[:-2])
    shape = jnp.broadcast_shapes(w_query.shape, w_key.shape)
    return jnp.broadcast_to(w_query, shape), jnp.broadcast_to(w_key, shape)


def check_bound(bound: ArrayLike | None) -> None:
    """Refuse a bound that is no positive finite number; a traced one is taken at its word.

    Raises:
        ValueError: if it is anything else.
    """
    if bound is None:
        return
    shape = getattr(bound, "shape", ())
    if shape != ():
        raise ValueError(f"bound has shape {shape}: expected one number > 0, or None")
    if isinstance(bound, jax.core.Tracer):
        return
    if not is_positive(bound):
        raise ValueError(f"bound is {bound!r}: expected a finite number > 0, or None")


def is_positive(value: object) -> bool:
    """Whether something is a finite number > 0; texts, lists and complex numbers are none."""
    try:
        return not isinstance(value, str | bytes) and 0 < float(cast(float, value)) < math.inf
    except (TypeError, ValueError, OverflowError):
        return False


def _floating(name: str, array: ArrayLike) -> Float[Array, "..."]:
    try:
        array = jnp.asarray(array)
    except (TypeError, ValueError):  # a text, an object, lists of several lengths
        raise ValueError(
            f"{name} is a {type(array).__name__} that is no array: expected numbers of a "
            "floating-point dtype"
        ) from None
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {array.dtype}: expected a floating-point dtype")
    # Half precision has no LAPACK, and too few digits for a determinant.
    return array.astype(jnp.float32) if array.dtype.itemsize < 4 else array


def _check_leading_axes(**shapes: tuple[int, ...]) -> None:
    try:
        jnp.broadcast_shapes(*shapes.values())
    except ValueError:
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(
            f"leading axes do not broadcast: got {given}; expected shapes that NumPy broadcasts"
        ) from None


def _project(
    x: Float[Array, "*x T d"], weights: Float[Array, "*weights d m"]
) -> Float[Array, "*batch T m"]:
    if weights.ndim > 2:
        return jnp.matmul(x, weights, precision=_HIGHEST)
    # One product of matrices, and so is its derivative with respect to the weights.
    rows = jnp.matmul(x.reshape(-1, x.shape[-1]), weights, precision=_HIGHEST)
    return rows.reshape(*x.shape[:-1], weights.shape[-1])
