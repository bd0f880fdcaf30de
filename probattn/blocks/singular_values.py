"""Smallest singular values of many small matrices, by methods of which one converges.

LAPACK's divide and conquer is the fastest way to singular vectors, and it may fail to converge on a
matrix that is finite and well conditioned: it then returns NaN. QR iteration is slower and takes
the matrices on which it fails.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax.linalg import SvdAlgorithm
from jaxtyping import Array, Bool, Float

from probattn.blocks.covariance import identity_less
from probattn.blocks.selection import all_in_batch


@jax.custom_jvp
def smallest_singular_value(blocks: Float[Array, "*batch m m"]) -> Float[Array, "*batch"]:
    """Return the smallest singular value of every matrix; NaN where a matrix is not finite.

    The first derivative is exact where the value is simple.
    """
    finite, whole = finite_blocks(blocks)
    sizes = _converged(lambda m, how: lax.linalg.svd(m, compute_uv=False, algorithm=how), whole)
    return jnp.where(finite, sizes[..., -1], jnp.nan)


@smallest_singular_value.defjvp
def _smallest_singular_value_jvp(
    primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    u, _, v = last_singular_triple(*primals)
    change = jnp.einsum("...i,...ij,...j->...", u, *tangents, v, precision=lax.Precision.HIGHEST)
    return smallest_singular_value(*primals), change


def last_singular_triple(
    blocks: Float[Array, "*batch m m"],
) -> tuple[Float[Array, "*batch m"], Float[Array, "*batch"], Float[Array, "*batch m"]]:
    """Return the smallest singular value s of every matrix with its vectors: s = u^T M v.

    Returns:
        u (..., m), s (...,) and v (..., m); NaN where a matrix is not finite.
    """
    finite, whole = finite_blocks(blocks)
    u, size, v = _converged(_last_triple, whole)
    u, v = (jnp.where(finite[..., None], vector, jnp.nan) for vector in (u, v))
    return u, jnp.where(finite, size, jnp.nan), v


@jax.custom_jvp
def moving_vectors(
    left: Float[Array, "*batch d"],
    right: Float[Array, "*batch d"],
    change: Float[Array, "*batch d r"],
    queries: Float[Array, "*weights d r"],
) -> tuple[Float[Array, "*batch d"], Float[Array, "*batch d"]]:
    """Give the vectors of the smallest singular value of D = I - C Q^T their derivative.

    Args:
        left: u, (..., T, d), a constant.
        right: v, (..., T, d), a constant.
        change: C, (..., T, d, r).
        queries: Q, (..., d, r), the same at all positions.

    Returns:
        u and v. Their first derivative is exact where the value is simple. What other values that
        coincide with it would add is left out.
    """
    return left, right


@moving_vectors.defjvp
def _moving_vectors_jvp(
    primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Solve D dv + dD v = s du + ds u and D^T du + dD^T u = s dv + ds v, vector by vector."""
    left, right, change, queries = primals
    _, _, change_dot, queries_dot = tangents

    def product(one: Array, other: Array) -> Array:
        other = jnp.swapaxes(other, -1, -2)[..., None, :, :]
        return jnp.matmul(one, other, precision=lax.Precision.HIGHEST)

    _, blocks = finite_blocks(identity_less(product(change, queries)))
    all_left, sizes, all_right = singular_value_decomposition(blocks)
    dot = -product(change_dot, queries) - product(change, queries_dot)
    einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    of_right = einsum("...ji,...jk,...k->...i", all_left, dot, right)
    of_left = einsum("...j,...jk,...ik->...i", left, dot, all_right)
    least = sizes[..., -1:]
    gap = (least - sizes) * (least + sizes)
    apart = gap != 0
    gap = jnp.where(apart, gap, 1.0)
    along_left = jnp.where(apart, (least * of_right + sizes * of_left) / gap, 0.0)
    along_right = jnp.where(apart, (sizes * of_right + least * of_left) / gap, 0.0)
    return (left, right), (
        einsum("...ji,...i->...j", all_left, along_left),
        einsum("...ij,...i->...j", all_right, along_right),
    )


def extreme_singular_values(
    blocks: Float[Array, "*batch m m"],
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Return the smallest and the largest singular value; NaN where a matrix is not finite."""
    finite, whole = finite_blocks(blocks)
    sizes = _converged(lambda m, how: lax.linalg.svd(m, compute_uv=False, algorithm=how), whole)
    sizes = jnp.where(finite[..., None], sizes, jnp.nan)
    return sizes[..., -1], sizes[..., 0]


def singular_value_decomposition(
    matrices: Float[Array, "*batch m m"],
) -> tuple[Float[Array, "*batch m m"], Float[Array, "*batch m"], Float[Array, "*batch m m"]]:
    """Return U, s and V^T of finite square matrices M = U diag(s) V^T."""
    return _converged(_whole, matrices)


def finite_blocks(blocks: Float[Array, "*batch m m"]) -> tuple[Bool[Array, "*batch"], Array]:
    """Tell which matrices are finite, and put the identity in place of the others.

    LAPACK may not return from a matrix that is not finite.
    """
    finite = jnp.all(jnp.isfinite(blocks), axis=(-2, -1))
    return finite, jnp.where(
        finite[..., None, None], blocks, jnp.eye(blocks.shape[-1], dtype=blocks.dtype)
    )


def _whole(matrices: Array, how: SvdAlgorithm) -> tuple[Array, Array, Array]:
    left, sizes, right = lax.linalg.svd(matrices, algorithm=how)
    return left, sizes, right


def _last_triple(matrices: Array, how: SvdAlgorithm) -> tuple[Array, Array, Array]:
    left, sizes, right = _whole(matrices, how)
    return left[..., :, -1], sizes[..., -1], right[..., -1, :]


def _converged[Found](
    decompose: Callable[[Array, SvdAlgorithm], Found], matrices: Float[Array, "*batch m m"]
) -> Found:
    """Decompose by the fastest method, and by QR iteration where that one has failed."""
    first = decompose(matrices, SvdAlgorithm.DEFAULT)
    return _completed(decompose, matrices, first, _is_finite(first, matrices.ndim - 2))


def _completed[Found](
    decompose: Callable[[Array, SvdAlgorithm], Found],
    matrices: Float[Array, "*batch m m"],
    first: Found,
    done: Bool[Array, "*batch"],
) -> Found:
    """Put what QR iteration finds where the first method has failed, if it has anywhere."""

    def second() -> Found:
        def chosen(one: Array, two: Array) -> Array:
            return jnp.where(done.reshape(*done.shape, *[1] * (one.ndim - done.ndim)), one, two)

        # A TPU has one method alone, which is not divide and conquer.
        return lax.platform_dependent(
            matrices,
            tpu=lambda _: first,
            default=lambda m: jax.tree.map(chosen, first, decompose(m, SvdAlgorithm.QR)),
        )

    return lax.cond(all_in_batch(done), lambda: first, second)


def _is_finite(found: Any, leading: int) -> Bool[Array, "*batch"]:
    """Tell where all arrays of a decomposition are finite; the batch is their leading axes."""
    where = [
        jnp.all(jnp.isfinite(array), axis=tuple(range(leading, array.ndim)))
        for array in jax.tree.leaves(found)
    ]
    return jnp.all(jnp.stack(where), axis=0)
