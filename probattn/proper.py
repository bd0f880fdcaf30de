"""Where the process is proper: each conditional a density of total mass exactly one.

The density of x_t given its past is that of e_t times det D_t. It integrates to one where
x_t -> e_t is a diffeomorphism of R^d onto itself, and to more where the map folds
(`conditional_mass`). By Hadamard's theorem a smooth map of R^d is a diffeomorphism if its Jacobian
is nowhere singular and |e_t| grows without limit as |x_t| does; mu_t stays within the convex hull
of the past, so the second always holds, and det D_t > 0 for every x_t is all that is left to prove.
(Not in the paper.)
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool

from probattn.arguments import check_bound, check_weights
from probattn.attention import coupling


def is_proper(
    w_query: ArrayLike, w_key: ArrayLike, *, bound: ArrayLike | None = None
) -> Bool[Array, "*batch"]:
    """Tell whether every context leaves it proper: a repulsive coupling or a bounded context.

    With A the coupling, Sigma_t the attention-weighted covariance of the context and D_t = I -
    Sigma_t A:

    1. Repulsive: A + A^T negative semidefinite. The eigenvalues of Sigma A are those of S A S with
       S = Sigma^(1/2). For one of them, lambda with unit eigenvector v, Re lambda = v* S (A + A^T)
       S v / 2 <= 0. So the eigenvalues of D_t have real part >= 1, and det D_t >= 1, whatever the
       context. In the scalar case this is the paper's a < 0.
    2. Bounded: c^2 ||A||_2 < 1. The context lies within distance c of the origin, so its variance
       in any direction is at most c^2 and ||Sigma A||_2 <= c^2 ||A||_2 < 1.

    Neither is necessary: False means that this test proves nothing. The certificate speaks of one
    context and may hold where neither does.

    Args:
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.

    Returns:
        (...), truth values. Rounding is forgiven: (A + A^T) / 2 may have eigenvalues up to
        (d + r) eps ||A||_2, as W_Q = -W_K has in floating point. Where they are not mere rounding,
        a context with |x|^2 beyond about 1 / ((d + r) eps ||A||_2) can still fold.

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point or the bound is
            not positive.
    """
    check_bound(bound)
    w_query, w_key = check_weights(w_query, w_key)
    matrix = coupling(w_query, w_key)
    rounding = sum(w_query.shape[-2:]) * jnp.finfo(matrix.dtype).eps
    size = jnp.linalg.norm(matrix, ord=2, axis=(-2, -1))
    symmetric = (matrix + jnp.swapaxes(matrix, -1, -2)) / 2
    proper = jnp.linalg.eigvalsh(symmetric)[..., -1] <= rounding * size
    if bound is not None:
        proper |= jnp.asarray(bound, matrix.dtype) ** 2 * size < 1
    return proper
