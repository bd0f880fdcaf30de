"""Where the process is proper: each conditional a density of total mass exactly one.

The density of x_t given its past is that of e_t times det D_t. It integrates to one where
x_t -> e_t is a diffeomorphism of R^d onto itself, and to more where the map folds
(`conditional_mass`). By Hadamard's theorem a smooth map of R^d is a diffeomorphism if its Jacobian
is nowhere singular and |e_t| grows without limit as |x_t| does; mu_t stays within the convex hull
of the past, so the second always holds, and det D_t > 0 for every x_t is all that is left to prove.
(Not in the paper.)
"""

import math

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from probattn.arguments import check_bound
from probattn.attention import coupling
from probattn.stages.stage import AttentionStage, weights_alone


def is_proper(
    w_query: ArrayLike | AttentionStage,
    w_key: ArrayLike | None = None,
    *,
    bound: ArrayLike | None = None,
) -> Bool[Array, "*batch"]:
    """Tell whether every conditional is a density of mass one, whatever the context.

    With A the coupling and lambda the largest eigenvalue of its symmetric part (A + A^T) / 2, the
    answer is exact: it is yes if and only if lambda <= 0, or c^2 lambda <= 1 where there is a bound
    c. The antisymmetric part of A may be as large as it likes.

    It is sufficient. Let Sigma be the covariance of the past under any attention weights. Every
    eigenvalue of Sigma A has a real part of at most ||Sigma||_2 max(lambda, 0), and ||Sigma||_2 <
    c^2 since |phi(x_s)| < c. So every eigenvalue of D_t = I - Sigma A has a positive real part,
    and det D_t > 0. It is necessary. Two tokens at +- R v, with v the eigenvector of lambda and R
    large enough, fold the map around x_t = 0. The proofs are in docs/mathematics.md, section 5. In
    the scalar case without a bound this is the paper's a <= 0. (Not in the paper.)

    Args:
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.

    Returns:
        (...), truth values. The rounding of lambda is taken to be at most delta = (d + r) eps
        sum_i |q_i| |k_i| / sqrt(r), with q_i and k_i the columns of W_Q and W_K. It is forgiven at
        zero, so that W_Q = -W_K is proper in floating point: the test is lambda <= delta, and a
        context with |x|^2 beyond 1 / delta can still fold. It is not forgiven at the bound: the
        test is c^2 (lambda + delta) <= 1.

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point, the bound is not
            positive, or an `AttentionStage` is given, which has no single coupling.
    """
    check_bound(bound)
    w_query, w_key = weights_alone("is_proper", w_query, w_key)
    largest, rounding = _attraction(w_query, w_key)
    # Norms overflow before their product does, and nothing is forgiven then.
    proper = (largest <= rounding) & jnp.isfinite(rounding)
    return proper | _within_bound(largest, rounding, bound)


def never_folds(
    w_query: Float[Array, "*batch d r"],
    w_key: Float[Array, "*batch d r"],
    bound: ArrayLike | None,
) -> Bool[Array, "*batch"]:
    """Tell whether no context at any distance can fold: `is_proper`, with no rounding forgiven.

    Where W_K is -W_Q to the last bit, A + A^T is negative semidefinite without any rounding.
    Products of weights that underflow are not paid for.
    """
    largest, rounding = _attraction(w_query, w_key)
    opposite = jnp.all(w_key == -w_query, axis=(-2, -1))
    return opposite | (largest + rounding <= 0) | _within_bound(largest, rounding, bound)


def _within_bound(
    largest: Float[Array, "*batch"], rounding: Float[Array, "*batch"], bound: ArrayLike | None
) -> Bool[Array, "*batch"]:
    if bound is None:
        return jnp.zeros(largest.shape, bool)
    return jnp.asarray(bound, largest.dtype) ** 2 * (largest + rounding) <= 1


def _attraction(
    w_query: Float[Array, "*batch d r"], w_key: Float[Array, "*batch d r"]
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Return the largest eigenvalue of (A + A^T) / 2, and what rounding may do to it."""
    width, rank = w_query.shape[-2:]
    sizes = jnp.linalg.norm(w_query, axis=-2) * jnp.linalg.norm(w_key, axis=-2)
    rounding = (width + rank) * jnp.finfo(sizes.dtype).eps * sizes.sum(-1) / math.sqrt(rank)
    return _largest_attraction(w_query, w_key), rounding


def _largest_attraction(
    w_query: Float[Array, "*batch d r"], w_key: Float[Array, "*batch d r"]
) -> Float[Array, "*batch"]:
    """Return the largest eigenvalue of (A + A^T) / 2, or of its part in the span of the weights.

    Where r is small, A is zero outside the span of the 2 r columns of W_Q and W_K. Where that is
    not the whole space, zero is an eigenvalue too, which may be larger.
    """
    width, rank = w_query.shape[-2:]
    if 2 * rank < width:
        core = jnp.linalg.qr(jnp.concatenate([w_query, w_key], axis=-1), mode="r")
        w_query, w_key = core[..., :rank], core[..., rank:]
    matrix = coupling(w_query, w_key)
    return jnp.linalg.eigvalsh((matrix + jnp.swapaxes(matrix, -1, -2)) / 2)[..., -1]
