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
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from probattn.arguments import check_arguments, check_bound, check_weights
from probattn.attention import coupling
from probattn.blocks.geometry import bounded
from probattn.blocks.singular_values import singular_value_decomposition

_HIGHEST = lax.Precision.HIGHEST


def is_proper(
    w_query: ArrayLike, w_key: ArrayLike, *, bound: ArrayLike | None = None
) -> Bool[Array, "*batch"]:
    """Tell whether every conditional is a density of mass one, whatever the context.

    With A the coupling and lambda the largest eigenvalue of its symmetric part (A + A^T) / 2, the
    answer is exact: it is yes if and only if lambda <= 0, or c^2 lambda <= 1 where there is a bound
    c. The antisymmetric part of A may be as large as it likes.

    It is sufficient. Let Sigma be the covariance of the past under any attention weights. Every
    eigenvalue of Sigma A has a real part of at most ||Sigma||_2 max(lambda, 0), and ||Sigma||_2 <
    c^2 since |phi(x_s)| < c. So every eigenvalue of D_t = I - Sigma A has a positive real part,
    and det D_t > 0. It is necessary. Two tokens at +- R v, with v the eigenvector of lambda and R
    large enough, fold the map around x_t = 0. The proofs are in docs/mathematics.md, section 4. In
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
        ValueError: if the shapes do not fit, the arrays are not floating point or the bound is
            not positive.
    """
    check_bound(bound)
    w_query, w_key = check_weights(w_query, w_key)
    width, rank = w_query.shape[-2:]
    sizes = jnp.linalg.norm(w_query, axis=-2) * jnp.linalg.norm(w_key, axis=-2)
    rounding = (width + rank) * jnp.finfo(sizes.dtype).eps * sizes.sum(-1) / math.sqrt(rank)
    largest = _largest_attraction(w_query, w_key)
    # Norms overflow before their product does, and nothing is forgiven then.
    proper = (largest <= rounding) & jnp.isfinite(rounding)
    if bound is not None:
        proper |= jnp.asarray(bound, largest.dtype) ** 2 * (largest + rounding) <= 1
    return proper


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


def certificate(
    x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike, *, bound: ArrayLike | None = None
) -> Float[Array, "*batch T"]:
    """Compute rho_t of the context x_0 .. x_{t-1}: below 1 it proves position t invertible.

    rho_t = diam{q_s : s < t} diam{k_s : s < t} / (4 sqrt(r)), after W_Q and W_K are balanced by
    the singular value decomposition of A, and with phi(x_s) W_Q for q_s where there is a bound.
    For unit vectors u, v Gruess' inequality bounds the covariance of u.q_s and v.k_s by a quarter
    of the product of their ranges, so the balanced reduced covariance has norm <= rho_t whatever
    the attention weights are, hence for every x_t.
    If rho_t < 1, then x_t -> e_t is a global diffeomorphism (Hadamard) and the smallest singular
    value of the balanced R_t, though not that of D_t, is at least 1 - rho_t. (Not in the paper.)

    Args:
        x: token embeddings (..., T, d).
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.

    Returns:
        (..., T), without unit; 0 at positions 0 and 1.

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point or the bound is
            not positive.
    """
    x, w_query, w_key = check_arguments(x, w_query, w_key, bound)
    query_side, key_side = balanced(w_query, w_key)
    context = bounded(x, bound)
    values = context - context[..., :1, :]
    spread_q = _past_diameter(jnp.matmul(values, query_side, precision=_HIGHEST))
    spread_k = _past_diameter(jnp.matmul(values, key_side, precision=_HIGHEST))
    return spread_q * spread_k / 4


def balanced(
    w_query: ArrayLike, w_key: ArrayLike
) -> tuple[Float[Array, "*batch d m"], Float[Array, "*batch d m"]]:
    """Factor the coupling in a balanced way: A = K Q^T, Q^T Q = K^T K diagonal, m = min(d, r).

    Args:
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).

    Returns:
        Q and K, each (..., d, m), from the singular value decomposition of A; the factor
        1 / sqrt(r) of the logits is inside them.

    Raises:
        ValueError: if the shapes do not fit or the arrays are not floating point.
    """
    w_query, w_key = check_weights(w_query, w_key)
    basis_q, core_q = jnp.linalg.qr(w_query)
    basis_k, core_k = jnp.linalg.qr(w_key)
    core = jnp.matmul(core_k, jnp.swapaxes(core_q, -1, -2), precision=_HIGHEST)
    left, sizes, right = singular_value_decomposition(core / math.sqrt(w_query.shape[-1]))
    root = jnp.sqrt(sizes)[..., None, :]
    return (
        jnp.matmul(basis_q, jnp.swapaxes(right, -1, -2) * root, precision=_HIGHEST),
        jnp.matmul(basis_k, left * root, precision=_HIGHEST),
    )


def _past_diameter(points: Float[Array, "*batch T m"]) -> Float[Array, "*batch T"]:
    """Return the largest distance of two points before each position; 0 at positions 0 and 1."""
    rows = jnp.moveaxis(points, -2, 0)

    def farthest_before(position: Array) -> Array:
        squared = jnp.sum((points - rows[position][..., None, :]) ** 2, axis=-1)
        earlier = jnp.arange(points.shape[-2]) <= position
        return jnp.max(jnp.where(earlier, squared, jnp.zeros_like(squared)), axis=-1)

    # One row of distances at a time: all of them at once would take T^2 m numbers.
    farthest = lax.map(farthest_before, jnp.arange(points.shape[-2]))
    diameter = lax.cummax(farthest, axis=0)
    shifted = jnp.concatenate([jnp.zeros_like(diameter[:1]), diameter[:-1]], axis=0)
    spread = shifted != 0  # the root has no derivative at zero; NaN stays NaN
    root = jnp.where(spread, jnp.sqrt(jnp.where(spread, shifted, 1.0)), 0.0)
    return jnp.moveaxis(root.astype(points.dtype), 0, -1)
