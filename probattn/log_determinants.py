"""Exact log-determinant of the attention change of variables, and its barrier for training.

The Jacobian of x -> e is block lower triangular with diagonal blocks
D_t = I_d - Cov_{alpha_t}(x_s, k_s) W_Q^T / sqrt(r) (paper, Theorem 1). Its determinant needs only
the r x r matrix R_t = I_r - Cov_{alpha_t}(q_s, k_s) / sqrt(r): by Sylvester's identity
det(I_d - C W_Q^T) = det(I_r - W_Q^T C), and W_Q^T Cov(x_s, k_s) = Cov(q_s, k_s).
"""

import math
from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from probattn.arguments import is_positive
from probattn.blocks.covariance import attention_covariance, identity_less
from probattn.blocks.determinants import block_values, determinant_values
from probattn.blocks.moments import Pointwise
from probattn.one_program import one_program
from probattn.stages.stage import (
    AttentionStage,
    Tokens,
    by_head,
    checked,
    plain_projections,
    prepared,
)

# The quadratic branch of the relaxed barrier ends this many delta below zero (see _relaxed).
_QUADRATIC_DEPTH = 10.0


@one_program()
def reduced_blocks(
    x: Tokens,
    w_query: ArrayLike | None = None,
    w_key: ArrayLike | None = None,
    *,
    bound: ArrayLike | None = None,
) -> Float[Array, "*batch T r r"]:
    """Compute R_t = I_r - Cov_{alpha_t}(q_s, k_s) / sqrt(r), with det R_t = det D_t.

    Args:
        x: token embeddings (..., T, d), or an `AttentionStage` in place of all other arrays.
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.

    Returns:
        (..., T, r, r); the identity at positions 0 and 1, whose past has no spread.

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point or the bound is
            not positive.
    """
    start, w_query = prepared(x, w_query, w_key, bound)
    covariance = attention_covariance(start.weights, start.queries, start.keys, start.slopes)
    if start.transforms is not None:
        covariance = jnp.matmul(start.transforms, covariance, precision=lax.Precision.HIGHEST)
    return identity_less(covariance / math.sqrt(w_query.shape[-1]))


@one_program()
def jacobian_blocks(
    x: Tokens,
    w_query: ArrayLike | None = None,
    w_key: ArrayLike | None = None,
    *,
    bound: ArrayLike | None = None,
) -> Float[Array, "*batch T d d"]:
    """Compute the Jacobian blocks D_t = I_d - Cov_{alpha_t}(x_s, k_s) W_Q^T / sqrt(r), dense.

    For small d: every result that can is computed from smaller matrices elsewhere.

    Args:
        x: token embeddings (..., T, d), or an `AttentionStage` in place of all other arrays.
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.

    Returns:
        (..., T, d, d), the derivative of e_t with respect to x_t (paper, Theorem 1).

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point or the bound is
            not positive.
    """
    start, w_query = prepared(x, w_query, w_key, bound)
    covariance = attention_covariance(start.weights, start.values, start.keys, start.slopes)
    transposed = jnp.swapaxes(w_query, -1, -2)[..., None, :, :] / math.sqrt(w_query.shape[-1])
    if start.transforms is not None:
        transposed = jnp.matmul(start.transforms, transposed, precision=lax.Precision.HIGHEST)
    return identity_less(jnp.matmul(covariance, transposed, precision=lax.Precision.HIGHEST))


@one_program("summed")
def log_det(
    x: Tokens,
    w_query: ArrayLike | None = None,
    w_key: ArrayLike | None = None,
    *,
    bound: ArrayLike | None = None,
    summed: bool = False,
) -> tuple[Float[Array, "*batch T"], Float[Array, "..."]]:
    """Compute sign and log absolute value of det D_t at every position, from the reduced blocks.

    The derivative is R_t^-T, exact up to the boundary, in forward and reverse mode and to any
    order. At an exactly singular block there is none; what is returned there is that of a block a
    rounding error away, large and finite, so that the other positions' derivatives stay right.

    Args:
        x: token embeddings (..., T, d), or an `AttentionStage` in place of all other arrays.
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.
        summed: whether to sum log|det D_t| over positions. The derivative then comes with the
            value, in less time and memory than that of the positions one by one.

    Returns:
        The sign (..., T) (+1, -1, or 0 where singular) and log|det D_t| in nats (-inf where
        singular), (..., T), or its sum, (...,): the sequence's log-density term (paper,
        Corollary 3.1), which stands only where every sign is +1.

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point or the bound is
            not positive.
    """
    return _values(lambda _, log_abs: log_abs, x, w_query, w_key, bound, summed)


@one_program("delta", "summed")
def relaxed_barrier(
    x: Tokens,
    w_query: ArrayLike | None = None,
    w_key: ArrayLike | None = None,
    delta: float = 1e-3,
    *,
    bound: ArrayLike | None = None,
    summed: bool = False,
) -> Float[Array, "..."]:
    """Compute the relaxed log-barrier on z_t = det D_t: a penalty of every position, in nats.

    It is -log z for z >= delta, the exact barrier; ((z - 2 delta)^2 / delta^2 - 1) / 2 - log delta
    below, down to z = -10 delta, which joins it with two continuous derivatives and is finite on
    the wrong side of the boundary; and from there on an asinh of that parabola, again with two
    continuous derivatives, which grows only like log|z|. (Relaxed barriers: Feller and Ebenbauer,
    IEEE Trans. Automat. Contr. 62(8), 2017.)

    Args:
        x: token embeddings (..., T, d), or an `AttentionStage` in place of all other arrays.
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        delta: determinant below which the barrier is relaxed, > 0.
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.
        summed: whether to sum over positions: see `log_det`.

    Returns:
        (..., T); zero at positions 0 and 1, negative where det D_t > 1. Or its sum, (...,).

    Raises:
        ValueError: if delta or the bound is not positive, the shapes do not fit or the arrays are
            not floating point.
    """
    if not is_positive(delta):
        raise ValueError(f"delta is {delta!r}: expected a finite number > 0")
    barrier = partial(_relaxed, delta=float(delta))
    return _values(barrier, x, w_query, w_key, bound, summed)[1]


def _values(
    pointwise: Pointwise,
    x: Tokens,
    w_query: ArrayLike | None,
    w_key: ArrayLike | None,
    bound: ArrayLike | None,
    summed: bool,
) -> tuple[Array, Array]:
    if isinstance(x, AttentionStage):
        stage = checked(x, w_query, w_key, bound)
        if not stage.is_plain:
            return by_head(
                lambda head: block_values(pointwise, reduced_blocks(head), summed=summed), stage
            )
    projected = plain_projections(x, w_query, w_key, bound)
    return determinant_values(pointwise, projected, summed=summed)


def _relaxed(
    sign: Float[Array, "*batch"], log_abs: Float[Array, "*batch"], delta: float
) -> Float[Array, "*batch"]:
    """Return the relaxed barrier as a function of z = sign * exp(log_abs).

    With u = 1 - z / delta the parabola is p(u) = u + u^2 / 2 above -log delta. Beyond
    u_0 = 1 + _QUADRATIC_DEPTH it turns into p_0 + p_0 asinh(p / p_0 - 1), with p_0 = p(u_0).
    """
    log_ratio = log_abs - math.log(delta)
    exact = (sign > 0) & (log_ratio >= 0)
    # Each branch gets only arguments at which it is finite, else its derivative is 0 * inf.
    far_below = log_ratio > 30.0  # here asinh is its logarithm to 1e-12, and exp might overflow
    near = jnp.where(exact | far_below, jnp.zeros_like(log_ratio), log_ratio)
    u = 1 - sign * jnp.exp(near)
    parabola = u + u**2 / 2
    u_end = 1 + _QUADRATIC_DEPTH
    end = u_end + u_end**2 / 2
    excess = jnp.maximum(parabola / end - 1, jnp.zeros_like(parabola))
    capped = jnp.where(u > u_end, end + end * jnp.arcsinh(excess), parabola)
    far = end + end * (2 * jnp.where(far_below, log_ratio, jnp.zeros_like(u)) - math.log(end))
    below = jnp.where(far_below, far, capped) - math.log(delta)
    return jnp.where(exact, -jnp.where(exact, log_abs, jnp.zeros_like(log_abs)), below)
