"""Whether blocks are feasible, and the smallest singular value of every D_t with its sign."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from probattn.blocks.covariance import attention_covariance, identity_less, wide_covariance
from probattn.blocks.geometry import Start
from probattn.blocks.inverse_iteration import smallest_triple
from probattn.blocks.selection import compute_where
from probattn.blocks.singular_values import finite_blocks, moving_vectors
from probattn.stages.eigenvalues import eigenvalues

_HIGHEST = lax.Precision.HIGHEST
_PARTS = 16  # parts of the positions whose eigenvalues may have to be found


def smallest_singular_value_of(
    start: Start,
    w_query: Float[Array, "*weights d r"],
    *,
    of_head: bool = False,
    moving: bool = False,
) -> tuple[Float[Array, "*all T"], Float[Array, "*all T d"], Float[Array, "*all T d"]]:
    """Return the signed smallest singular value of every D_t, and its vectors u and v.

    In an orthonormal basis that begins with one of W_Q's columns, C_t B_t W_Q^T has no more than r
    columns that are not zero, and D_t is the identity in all others. Of one head of one sequence
    it is found in less time and memory, by `wide_covariance`. The vectors are constants of the
    derivative, unless they are to be `moving`; of a stage they are constants always.
    """
    d, rank = w_query.shape[-2:]
    values, keys, weights, transforms = start.values, start.keys, start.weights, start.transforms
    # The basis is a constant of the derivative: u^T dD v needs no more.
    basis, factor = jnp.linalg.qr(lax.stop_gradient(w_query), mode="complete")
    within = min(d, rank)
    factor = jnp.swapaxes(factor[..., None, :within, :], -1, -2) / math.sqrt(rank)
    if transforms is not None:
        factor = jnp.matmul(lax.stop_gradient(transforms), factor, precision=_HIGHEST)
    rotated = jnp.matmul(values, basis, precision=_HIGHEST)
    if of_head:
        across = wide_covariance(weights, keys, rotated, start.slopes)
        covariance = jnp.swapaxes(across, -1, -2)
        factor, across = jnp.swapaxes(factor, -1, -2), lax.stop_gradient(across)
        # Rows of d numbers lie in memory as later products want them.
        change = lax.optimization_barrier(jnp.matmul(factor, across, precision=_HIGHEST))
        below = change[..., within:]
        squared = jnp.matmul(below, jnp.swapaxes(below, -1, -2), precision=_HIGHEST)
        change = jnp.swapaxes(change, -1, -2)
    else:
        squared = None
        covariance = attention_covariance(weights, rotated, keys, start.slopes)
        change = jnp.matmul(lax.stop_gradient(covariance), factor, precision=_HIGHEST)
    top = identity_less(change[..., :within, :])
    u, size, v = smallest_triple(top, change[..., within:, :], squared)

    original = jnp.matmul(v, jnp.swapaxes(basis, -1, -2), precision=_HIGHEST)
    v_scaled = jnp.matmul(original, w_query, precision=_HIGHEST) / math.sqrt(rank)
    if transforms is not None:
        v_scaled = jnp.matmul(transforms, v_scaled[..., None], precision=_HIGHEST)[..., 0]
    linear = -_bilinear(u, covariance, v_scaled)
    if moving:
        queries = jnp.matmul(jnp.swapaxes(basis, -1, -2), w_query, precision=_HIGHEST)
        u, v = moving_vectors(u, v, covariance, queries / math.sqrt(rank))
        original = jnp.matmul(v, jnp.swapaxes(basis, -1, -2), precision=_HIGHEST)
    u = jnp.matmul(u, jnp.swapaxes(basis, -1, -2), precision=_HIGHEST)
    # Other eigenvalues of D_t than those of its upper block are 1.
    return _signed(infeasible_blocks(top), size, linear), u, original


def infeasible_blocks(blocks: Float[Array, "*batch T r r"]) -> Bool[Array, "*batch T"]:
    """Tell which blocks have a real eigenvalue <= 0, or are not finite.

    An eigenvalue counts as real if its imaginary part is at most sqrt(r eps) times the Frobenius
    norm of the block.
    """
    blocks = lax.stop_gradient(blocks)
    *leading, rank, _ = blocks.shape
    blocks = blocks.reshape(-1, rank, rank)
    if len(blocks) == 0:
        return jnp.zeros(leading, bool)
    # Eigenvalues take 40 times as long as the proof that there is nothing to find.
    proved = _surely_positive_real_parts(blocks)
    crossed = compute_where(
        lambda picked: _has_crossed(blocks[picked]), proved, -(-len(blocks) // _PARTS)
    )
    return crossed.reshape(leading)


def _surely_positive_real_parts(blocks: Float[Array, "n r r"]) -> Bool[Array, " n"]:
    """Tell where the symmetric part is positive definite, whatever rounding may do."""
    rank = blocks.shape[-1]
    symmetric = (blocks + jnp.swapaxes(blocks, -1, -2)) / 2
    # More than what Cholesky's method errs by (Higham 2002, Theorem 10.3).
    largest = jnp.max(jnp.diagonal(symmetric, axis1=-2, axis2=-1), axis=-1)
    slack = 4 * rank * (rank + 1) * jnp.finfo(blocks.dtype).eps * jnp.abs(largest)
    shifted = symmetric - slack[:, None, None] * jnp.eye(rank, dtype=blocks.dtype)[None]
    factor = jnp.linalg.cholesky(shifted, symmetrize_input=False)
    return jnp.all(jnp.isfinite(factor), axis=(-2, -1))


def _has_crossed(blocks: Float[Array, "n r r"]) -> Bool[Array, " n"]:
    finite, whole = finite_blocks(blocks)
    real, imaginary = eigenvalues(whole)
    known = finite & jnp.all(jnp.isfinite(real) & jnp.isfinite(imaginary), axis=-1)
    # Rounding makes a pair of equal eigenvalues complex, by as much as its root.
    size = jnp.linalg.norm(whole, axis=(-2, -1))
    reach = math.sqrt(blocks.shape[-1] * float(jnp.finfo(blocks.dtype).eps)) * size
    return ~known | jnp.any((jnp.abs(imaginary) <= reach[:, None]) & (real <= 0), axis=-1)


def _bilinear(
    u: Float[Array, "*batch m"], matrix: Float[Array, "*batch m n"], v: Float[Array, "*batch n"]
) -> Float[Array, "*batch"]:
    return jnp.einsum("...i,...ij,...j->...", u, matrix, v, precision=_HIGHEST)


def _signed(
    negative: Bool[Array, "*batch"], size: Float[Array, "*batch"], linear: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Return `size` with the derivative of `linear`, both with a minus sign where told."""
    value = size + (linear - lax.stop_gradient(linear))
    return jnp.where(negative, -value, value)
