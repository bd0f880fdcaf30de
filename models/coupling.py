"""Couplings A of an attention process: priors that are proper by construction, or free.

Each is invariant under rotations of the embedding space, A -> R^T A R: where the embeddings are
identified only up to one, the prior must not choose among them.
"""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float

from probattn.models.attention_sites import record_coupling

Coupling = Literal["repulsive", "bounded", "free"]

# An accelerator's shorter products would leave the proper regime where weights are large.
_matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def sample_coupling(
    kind: Coupling, width: int, bound: float | None, *, unit: float = 1.0
) -> Float[Array, "d d"]:
    """Sample the coupling A.

    "bounded": A = B (I + B^T B)^(-1/2) / c^2. The singular values of B, s, become s / sqrt(1 +
    s^2) / c^2: every A with c^2 ||A||_2 < 1 is reached, and no other. "repulsive": A = K - L L^T
    with K antisymmetric and L L^T a Wishart matrix, so that A + A^T is negative semidefinite.
    "free": the entries of A are Normal, as the paper leaves them. The first two are proper for
    every context (see `probattn.is_proper`), the third for none of unlimited spread.

    Sample sites: "direction" (d, d), B; "repulsion" (d, d), L, and "rotation" (d (d - 1) / 2,),
    the lower triangle of K; "free_coupling" (d, d). Deterministic sites: those of
    `attention_sites.record_coupling`.

    Args:
        kind: kind of prior.
        width: d.
        bound: c, for "bounded", in the given unit.
        unit: unit of the embeddings; A is what it would be in units of one, divided by unit^2.

    Raises:
        ValueError: if the coupling is "bounded" and the bound is None.
    """
    normal = dist.Normal(0.0, 1.0)
    if kind == "repulsive":
        # The mean of L L^T is (d + 1) / d times the identity.
        repulsion = dist.WishartCholesky(width + 1.0, scale_tril=jnp.eye(width) / math.sqrt(width))
        factor = numpyro.sample("repulsion", repulsion)
        matrix = -_matmul(factor, factor.T)
        if width > 1:
            lower = jnp.tril_indices(width, -1)
            turn = numpyro.sample("rotation", normal.expand((len(lower[0]),)).to_event(1))
            matrix = matrix.at[lower].add(turn).at[lower[::-1]].add(-turn)
    elif kind == "bounded":
        if bound is None:
            raise ValueError("bound is None: expected a number > 0 for the coupling 'bounded'")
        direction = numpyro.sample("direction", normal.expand((width, width)).to_event(2))
        gram = jnp.eye(width) + _matmul(direction.T, direction)
        matrix = jnp.linalg.solve(matrix_sqrt(gram), direction.T).T / bound**2
    else:
        scale = 1 / math.sqrt(width)
        free = dist.Normal(0.0, scale).expand((width, width)).to_event(2)
        matrix = numpyro.sample("free_coupling", free)
    matrix = matrix / unit**2
    return record_coupling(matrix)


def attention_weights_of(
    coupling: Float[Array, "d d"],
) -> tuple[Float[Array, "d d"], Float[Array, "d d"]]:
    """Return W_Q and W_K (d, d), of full rank r = d, with W_K W_Q^T / sqrt(d) = A."""
    width = coupling.shape[0]
    return jnp.eye(width, dtype=coupling.dtype), math.sqrt(width) * coupling


def proper_weights(
    w_query: Float[Array, "d r"], w_key: Float[Array, "d r"], *, bound: float | None
) -> tuple[Float[Array, "d r"], Float[Array, "d r"]]:
    """Make W_Q and W_K (d, r), proper for every context, out of any two matrices.

    The two regimes of `sample_coupling`, at a rank r that may be far below d. With a bound c, each
    matrix W becomes W L^-T with the Cholesky factor L L^T = I + W^T W, and its singular values s
    become s / sqrt(1 + s^2); A is the product of the two over c^2. Every A of rank r with c^2
    ||A||_2 < 1 is reached, and no other. Without a bound W_K becomes W_Q (S - I) with the
    antisymmetric S = W_Q^T W_K - W_K^T W_Q, so that A + A^T = -2 W_Q W_Q^T / sqrt(r) is negative
    semidefinite.
    """
    identity = jnp.eye(w_query.shape[-1], dtype=w_query.dtype)
    if bound is None:
        turn = _matmul(w_query.T, w_key)
        return w_query, _matmul(w_query, turn - turn.T - identity)
    share = w_query.shape[-1] ** 0.25 / bound  # A carries 1 / sqrt(r)

    def squashed(matrix: Float[Array, "d r"]) -> Float[Array, "d r"]:
        factor = jnp.linalg.cholesky(identity + _matmul(matrix.T, matrix))
        return share * jax.scipy.linalg.solve_triangular(factor, matrix.T, lower=True).T

    return squashed(w_query), squashed(w_key)


@jax.custom_jvp
def matrix_sqrt(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """Return the square root of a positive definite matrix, differentiable at equal eigenvalues.

    The derivative solves S dS + dS S = dM, d^2 equations, which limits d to about 32; that of an
    eigendecomposition is singular there.
    """
    values, vectors = jnp.linalg.eigh(matrix)
    return _matmul(vectors * jnp.sqrt(values), vectors.T)


@matrix_sqrt.defjvp
def _matrix_sqrt_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    root = matrix_sqrt(*primals)
    (tangent,) = tangents
    identity = jnp.eye(len(root), dtype=root.dtype)
    operator = jnp.kron(root, identity) + jnp.kron(identity, root)
    return root, jnp.linalg.solve(operator, tangent.ravel()).reshape(root.shape)
