"""Determinants and inverses of many small matrices at once, which lie along the last axis.

Gaussian elimination without pivoting, vectorised over the matrices: a few rows at a time, so that
the matrices pass through memory once for several pivots. One factorisation serves the determinant
and the inverse. LAPACK, called matrix by matrix, takes 2 to 4 times as long on a CPU for 8 to 64
rows (`benchmarks/log_det.py`), but it pivots. So multipliers are watched: where one is large,
pivoting is what keeps the digits, and LAPACK factorises the batch instead.
"""

import functools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from probattn.unanimous import unanimous

# Rows eliminated in one pass: of matrices of up to 16 rows, and of larger ones.
_FEW, _MORE = 4, 8
_LARGEST_MULTIPLIER = 4.0  # partial pivoting keeps them below 1; each may cost its size in digits

# XLA would else compute a pivot row anew for every entry that it changes.
_once = lax.optimization_barrier


class Elimination(NamedTuple):
    """Determinant and inverse of square matrices, from one factorisation.

    Attributes:
        sign: (..., n), of the determinant; 0 where the matrix is singular.
        nearby_sign: the same, but where it is singular that of a matrix a rounding error away.
        log_abs: (..., n), log|det|, and there that of the matrix a rounding error away.
        inverse: (..., r, r, n), likewise.
    """

    sign: Float[Array, "*batch n"]
    nearby_sign: Float[Array, "*batch n"]
    log_abs: Float[Array, "*batch n"]
    inverse: Float[Array, "*batch r r n"]


def determinant(
    blocks: Float[Array, "*batch r r n"], *, pivoting: bool = False
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch n"]]:
    """Sign and log|det|, 0 and -inf where singular; without a derivative.

    Args:
        blocks: (..., r, r, n).
        pivoting: whether to take the slow way for all of them.
    """
    if pivoting:
        return _sign_and_log_abs(_lapack_pivots(*_factors(blocks)[:2]))
    found, largest = _swept_pivots(blocks)
    stable = largest <= _LARGEST_MULTIPLIER

    def pivoted() -> Array:
        other = _lapack_pivots(*_factors(blocks)[:2])
        return jnp.where(stable[..., None, :], found, other)

    return _sign_and_log_abs(lax.cond(unanimous(stable), lambda: found, pivoted))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def eliminate(blocks: Float[Array, "*batch r r n"], pivoting: bool = False) -> Elimination:
    """Determinant and inverse; differentiable to any order. Arguments: see `determinant`."""
    pivots, inverse = _lapack(blocks) if pivoting else _guarded(blocks)
    nearby_sign, log_abs = _sign_and_log_abs(_without_zeros(pivots, blocks))
    return Elimination(_sign_and_log_abs(pivots)[0], nearby_sign, log_abs, inverse)


@eliminate.defjvp
def _eliminate_jvp(pivoting: bool, primals: tuple[Array], tangents: tuple[Array]) -> tuple:
    (blocks,), (tangent,) = primals, tangents
    found = eliminate(blocks, pivoting)
    still = jnp.zeros_like(found.sign)
    change = -_product(_product(found.inverse, tangent), found.inverse)
    trace = jnp.sum(jnp.swapaxes(found.inverse, -2, -3) * tangent, axis=(-3, -2))
    return found, Elimination(still, still, trace, change)


def _product(
    left: Float[Array, "*batch i j n"], right: Float[Array, "*batch j k n"]
) -> Float[Array, "*batch i k n"]:
    # Term by term: as a reduction XLA would write out all products before it adds them.
    size = left.shape[-2]
    columns = lax.split(left, [1] * size, left.ndim - 2)
    rows = lax.split(right, [1] * size, right.ndim - 3)
    terms = (column * row for column, row in zip(columns, rows, strict=True))
    return functools.reduce(jnp.add, terms)


def _sign_and_log_abs(pivots: Float[Array, "*batch r n"]) -> tuple[Array, Array]:
    return jnp.prod(jnp.sign(pivots), axis=-2), jnp.sum(jnp.log(jnp.abs(pivots)), axis=-2)


def _without_zeros(
    pivots: Float[Array, "*batch r n"], blocks: Float[Array, "*batch r r n"]
) -> Float[Array, "*batch r n"]:
    """Pivots, those that are zero moved by one rounding error of the block."""
    limits = jnp.finfo(blocks.dtype)
    size = jnp.max(jnp.abs(blocks), axis=(-3, -2))[..., None, :]
    rounding = limits.eps * jnp.where(size > 0, size, jnp.ones_like(size))
    return jnp.where(_is_zero(pivots), rounding, pivots)


def _is_zero(pivots: Array) -> Array:
    limits = jnp.finfo(pivots.dtype)
    return jnp.abs(pivots) < limits.tiny / limits.eps  # its reciprocal overflows, or nearly


def _guarded(blocks: Float[Array, "*batch r r n"]) -> tuple[Array, Array]:
    """Pivots and inverse."""
    found, inverse, largest = _swept(blocks)
    stable = largest <= _LARGEST_MULTIPLIER

    def pivoted() -> tuple[Array, Array]:
        pivots, other = _lapack(blocks)
        return (
            jnp.where(stable[..., None, :], found, pivots),
            jnp.where(stable[..., None, None, :], inverse, other),
        )

    return lax.cond(unanimous(stable), lambda: (found, inverse), pivoted)


def _swept(blocks: Float[Array, "*batch r r n"]) -> tuple[Array, Array, Array]:
    """Pivots (..., r, n), inverse and largest multiplier (..., n), without pivoting.

    Gauss and Jordan's way, in place: with p the pivot rows and columns, P the inverse of their
    block, R = P A_p. with P in its own columns, and C = A_.p with -I in its own rows, the next A is
    A without p, minus C R.
    """
    rank, together = blocks.shape[-2], _together(blocks.shape[-2])
    if rank <= together:
        return _swept_singly(blocks)
    found, largest = [], jnp.zeros_like(blocks[..., 0, 0, :])
    for start in range(0, rank, together):
        stop = min(start + together, rank)
        pivots, inverse, own = _swept_singly(blocks[..., start:stop, start:stop, :])
        left = _once(_product(blocks[..., stop:, start:stop, :], inverse))
        largest = jnp.maximum(jnp.maximum(largest, own), _largest(left))
        blocks, largest = _once((_exchange(blocks, inverse, start), largest))
        found.append(pivots)
    return jnp.concatenate(found, -2), blocks, largest


def _swept_singly(blocks: Float[Array, "*batch r r n"]) -> tuple[Array, Array, Array]:
    """The same, one row after the other."""
    rank = blocks.shape[-2]
    blocks = _once(blocks)
    found, largest = [], jnp.zeros_like(blocks[..., 0, 0, :])
    for j in range(rank):
        pivot = blocks[..., j, j, :]
        largest = jnp.maximum(largest, _multiplier(blocks[..., j + 1 :, j, :], pivot))
        blocks = _exchange(blocks, (1 / pivot)[..., None, None, :], j)
        found.append(pivot)
    return jnp.stack(found, -2), blocks, largest


def _exchange(
    blocks: Float[Array, "*batch r r n"], inverse: Float[Array, "*batch p p n"], start: int
) -> Float[Array, "*batch r r n"]:
    """The step of `_swept` that eliminates the rows from `start`, given P."""
    size, stop = inverse.shape[-2], start + inverse.shape[-2]
    inside = _between(start, stop, blocks.shape[-2])
    own = jnp.eye(blocks.shape[-2], dtype=blocks.dtype)[:, start:stop, None]  # I in its own rows
    columns = jnp.where(inside[:, None, None], -own, blocks[..., :, start:stop, :])
    rows = jnp.where(inside[None, :, None], jnp.swapaxes(own, 0, 1), blocks[..., start:stop, :, :])
    rows = _product(inverse, rows) if size > 1 else inverse * rows
    columns, rows = _once((columns, rows))
    others = ~(inside[:, None] | inside[None, :])[..., None]
    rest = jnp.where(others, blocks, jnp.zeros((), blocks.dtype))
    return _once(rest - _product(columns, rows))


def _swept_pivots(blocks: Float[Array, "*batch r r n"]) -> tuple[Array, Array]:
    """Pivots and largest multiplier alone: what is eliminated is left behind."""
    found, largest = [], jnp.zeros_like(blocks[..., 0, 0, :])
    together = _together(blocks.shape[-2])
    halves = slice(None, together), slice(together, None)
    while blocks.shape[-2] > together:
        (a, b), (c, d) = ([blocks[..., i, j, :] for j in halves] for i in halves)
        pivots, inverse, own = _swept_singly(a)
        left = _once(_product(c, inverse))
        largest = jnp.maximum(jnp.maximum(largest, own), _largest(left))
        blocks = _once(d - _product(left, b))
        found.append(pivots)
    blocks = _once(blocks)
    for _ in range(blocks.shape[-2]):
        pivot, column = _once((blocks[..., 0, 0, :], blocks[..., 1:, 0, :]))
        largest = jnp.maximum(largest, _multiplier(column, pivot))
        row = blocks[..., 0, 1:, :] / pivot[..., None, :]
        blocks = _once(blocks[..., 1:, 1:, :] - column[..., :, None, :] * row[..., None, :, :])
        found.append(pivot[..., None, :])
    return jnp.concatenate(found, -2), largest


def _together(rank: int) -> int:
    return _FEW if rank <= 16 else _MORE


def _multiplier(
    column: Float[Array, "*batch rows n"], pivot: Float[Array, "*batch n"]
) -> Float[Array, "*batch n"]:
    """The largest of each matrix; infinite where the pivot is zero."""
    largest = jnp.max(jnp.abs(column), axis=-2, initial=0.0)
    return jnp.where(_is_zero(pivot), jnp.inf, largest / jnp.abs(pivot))


def _largest(left: Float[Array, "*batch i j n"]) -> Float[Array, "*batch n"]:
    return jnp.max(jnp.abs(left), axis=(-3, -2), initial=0.0)


def _between(start: int, stop: int, size: int) -> Bool[Array, " size"]:
    numbers = jnp.arange(size)
    return (numbers >= start) & (numbers < stop)


def _factors(blocks: Float[Array, "*batch r r n"]) -> tuple[Array, Array, Array]:
    return lax.linalg.lu(jnp.moveaxis(blocks, -1, -3))


def _lapack(blocks: Float[Array, "*batch r r n"]) -> tuple[Array, Array]:
    factors, swaps, permutation = _factors(blocks)
    diagonal = jnp.diagonal(factors, axis1=-2, axis2=-1)
    pivots = jnp.moveaxis(diagonal, -1, -2)
    shift = _without_zeros(pivots, jnp.moveaxis(factors, -3, -1)) - pivots
    identity = jnp.eye(blocks.shape[-2], dtype=blocks.dtype)
    solvable = factors + jnp.moveaxis(shift, -1, -2)[..., None] * identity
    solve = partial(lax.linalg.triangular_solve, solvable, left_side=True)
    inverse = solve(solve(identity[permutation], lower=True, unit_diagonal=True), lower=False)
    return _lapack_pivots(factors, swaps), jnp.moveaxis(inverse, -3, -1)


def _lapack_pivots(factors: Array, swaps: Array) -> Array:
    """The diagonal, (..., r, n), the sign of the permutation in its first entry."""
    diagonal = jnp.diagonal(factors, axis1=-2, axis2=-1)
    count = jnp.sum(swaps != jnp.arange(swaps.shape[-1], dtype=swaps.dtype), axis=-1)
    parity = jnp.where(count % 2 == 0, 1, -1).astype(diagonal.dtype)
    return jnp.moveaxis(diagonal.at[..., 0].multiply(parity), -1, -2)
