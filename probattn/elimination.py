"""Determinants and inverses of many small matrices at once.

Gaussian elimination without pivoting, vectorised over the matrices: leading blocks of at most
`_SWEPT` rows are eliminated entry by entry, larger ones joined by their Schur complement, which is
matrix products. One factorisation serves the determinant and the inverse. LAPACK, called matrix by
matrix, takes 2 to 3 times as long on a CPU for 8 to 64 rows (`benchmarks/log_det.py`), but it
pivots. So multipliers are watched: where one is large, pivoting is what keeps the digits, and
LAPACK factorises the batch instead.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from probattn.unanimous import unanimous

_SWEPT = 8  # rows, at most, that are eliminated entry by entry
_LARGEST_MULTIPLIER = 4.0  # partial pivoting keeps them below 1; each may cost its size in digits

_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
# XLA would else compute a pivot row anew for every entry that it changes.
_once = lax.optimization_barrier


class Elimination(NamedTuple):
    """Determinant and inverse of square matrices, from one factorisation.

    Attributes:
        sign: (...), of the determinant; 0 where the matrix is singular.
        nearby_sign: the same, but where it is singular that of a matrix a rounding error away.
        log_abs: (...), log|det|, and there that of the matrix a rounding error away.
        inverse: (..., r, r), likewise.
    """

    sign: Float[Array, "*batch"]
    nearby_sign: Float[Array, "*batch"]
    log_abs: Float[Array, "*batch"]
    inverse: Float[Array, "*batch r r"]


def determinant(
    blocks: Float[Array, "*batch r r"],
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Sign and log|det|, 0 and -inf where singular; without a derivative."""
    return _sign_and_log_abs(_pivots(blocks))


@jax.custom_jvp
def eliminate(blocks: Float[Array, "*batch r r"]) -> Elimination:
    """Determinant and inverse; differentiable to any order."""
    pivots, inverse = _eliminate(blocks)
    nearby_sign, log_abs = _sign_and_log_abs(_without_zeros(pivots, blocks))
    return Elimination(_sign_and_log_abs(pivots)[0], nearby_sign, log_abs, inverse)


@eliminate.defjvp
def _eliminate_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple:
    (tangent,) = tangents
    found = eliminate(*primals)
    still = jnp.zeros_like(found.sign)
    change = -_matmul(_matmul(found.inverse, tangent), found.inverse)
    return found, Elimination(still, still, trace_product(found.inverse, tangent), change)


def trace_product(
    left: Float[Array, "*batch r r"], right: Float[Array, "*batch r r"]
) -> Float[Array, "*batch"]:
    """Trace of left @ right."""
    return jnp.sum(jnp.swapaxes(left, -1, -2) * right, axis=(-2, -1))


def _sign_and_log_abs(pivots: Float[Array, "*batch r"]) -> tuple[Array, Array]:
    return jnp.prod(jnp.sign(pivots), axis=-1), jnp.sum(jnp.log(jnp.abs(pivots)), axis=-1)


def _without_zeros(
    pivots: Float[Array, "*batch r"], blocks: Float[Array, "*batch r r"]
) -> Float[Array, "*batch r"]:
    """Pivots, those that are zero moved by one rounding error of the block."""
    limits = jnp.finfo(blocks.dtype)
    size = jnp.max(jnp.abs(blocks), axis=(-2, -1))[..., None]
    rounding = limits.eps * jnp.where(size > 0, size, jnp.ones_like(size))
    return jnp.where(_is_zero(pivots), rounding, pivots)


def _is_zero(pivots: Array) -> Array:
    limits = jnp.finfo(pivots.dtype)
    return jnp.abs(pivots) < limits.tiny / limits.eps  # its reciprocal overflows, or nearly


def _pivots(blocks: Float[Array, "*batch r r"]) -> Float[Array, "*batch r"]:
    """Numbers whose product is the determinant, its sign included."""
    flat = blocks.reshape(-1, *blocks.shape[-2:])
    found, largest = _swept_pivots(flat)
    stable = largest <= _LARGEST_MULTIPLIER

    def pivoted() -> Array:
        return jnp.where(stable[:, None], found, _lapack_pivots(*lax.linalg.lu(flat)[:2]))

    return lax.cond(unanimous(stable), lambda: found, pivoted).reshape(blocks.shape[:-1])


def _eliminate(blocks: Float[Array, "*batch r r"]) -> tuple[Array, Array]:
    """The same and the inverse."""
    flat = blocks.reshape(-1, *blocks.shape[-2:])
    found, inverse, largest = _swept(flat)
    stable = largest <= _LARGEST_MULTIPLIER

    def pivoted() -> tuple[Array, Array]:
        pivots, other = _lapack(flat)
        return (
            jnp.where(stable[:, None], found, pivots),
            jnp.where(stable[:, None, None], inverse, other),
        )

    found, inverse = lax.cond(unanimous(stable), lambda: (found, inverse), pivoted)
    return found.reshape(blocks.shape[:-1]), inverse.reshape(blocks.shape)


def _swept(blocks: Float[Array, "n r r"]) -> tuple[Array, Array, Array]:
    """Pivots, inverse and largest multiplier (n,), by elimination without pivoting."""
    rank = blocks.shape[-1]
    if rank > _SWEPT:
        first = rank // 2
        a, b, c, d = _quarters(blocks, first)
        upper, a_inverse, largest = _swept(a)
        left, right = _matmul(c, a_inverse), _matmul(a_inverse, b)
        lower, s_inverse, other = _swept(d - _matmul(left, b))
        corner = _matmul(s_inverse, left)
        inverse = jnp.block(
            [
                [a_inverse + _matmul(right, corner), -_matmul(right, s_inverse)],
                [-corner, s_inverse],
            ]
        )
        largest = jnp.maximum(jnp.maximum(largest, other), jnp.max(jnp.abs(left), (1, 2)))
        return jnp.concatenate([upper, lower], -1), inverse, largest
    a = _once(jnp.moveaxis(blocks, 0, -1))  # (r, r, n): contiguous over the matrices
    found, largest = [], jnp.zeros_like(a[0, 0])
    for j in range(rank):
        pivot = a[j, j]
        row, column = _once((a[j].at[j].set(1.0) / pivot, a[:, j]))
        largest = jnp.maximum(largest, _multiplier(column[j + 1 :], pivot))
        a = a.at[:, j].set(0.0)
        a = _once((a - column[:, None] * row[None]).at[j].set(row))
        found.append(pivot)
    return jnp.stack(found, -1), jnp.moveaxis(a, -1, 0), largest


def _swept_pivots(blocks: Float[Array, "n r r"]) -> tuple[Array, Array]:
    rank = blocks.shape[-1]
    if rank > _SWEPT:
        a, b, c, d = _quarters(blocks, rank // 2)
        upper, a_inverse, largest = _swept(a)
        left = _matmul(c, a_inverse)
        lower, other = _swept_pivots(d - _matmul(left, b))
        largest = jnp.maximum(jnp.maximum(largest, other), jnp.max(jnp.abs(left), (1, 2)))
        return jnp.concatenate([upper, lower], -1), largest
    a = _once(jnp.moveaxis(blocks, 0, -1))
    found, largest = [], jnp.zeros_like(a[0, 0])
    for _ in range(rank):
        pivot, column = _once((a[0, 0], a[1:, 0]))
        largest = jnp.maximum(largest, _multiplier(column, pivot))
        a = _once(a[1:, 1:] - (column / pivot)[:, None] * a[0, 1:])
        found.append(pivot)
    return jnp.stack(found, -1), largest


def _multiplier(column: Float[Array, "rows n"], pivot: Float[Array, " n"]) -> Float[Array, " n"]:
    """The largest of each matrix; infinite where the pivot is zero."""
    largest = jnp.max(jnp.abs(column), axis=0, initial=0.0)
    return jnp.where(_is_zero(pivot), jnp.inf, largest / jnp.abs(pivot))


def _quarters(blocks: Array, first: int) -> tuple[Array, Array, Array, Array]:
    upper, lower = blocks[..., :first, :], blocks[..., first:, :]
    return upper[..., :first], upper[..., first:], lower[..., :first], lower[..., first:]


def _lapack(blocks: Float[Array, "*batch r r"]) -> tuple[Array, Array]:
    factors, swaps, permutation = lax.linalg.lu(blocks)
    diagonal = jnp.diagonal(factors, axis1=-2, axis2=-1)
    shift = _without_zeros(diagonal, factors) - diagonal
    identity = jnp.eye(blocks.shape[-1], dtype=blocks.dtype)
    solvable = factors + shift[..., None] * identity
    forward = lax.linalg.triangular_solve(
        solvable, identity[permutation], left_side=True, lower=True, unit_diagonal=True
    )
    inverse = lax.linalg.triangular_solve(solvable, forward, left_side=True, lower=False)
    return _lapack_pivots(factors, swaps), inverse


def _lapack_pivots(factors: Array, swaps: Array) -> Array:
    """The diagonal, the sign of the permutation in its first entry."""
    diagonal = jnp.diagonal(factors, axis1=-2, axis2=-1)
    count = jnp.sum(swaps != jnp.arange(swaps.shape[-1], dtype=swaps.dtype), axis=-1)
    return diagonal.at[..., 0].multiply(jnp.where(count % 2 == 0, 1, -1).astype(diagonal.dtype))
