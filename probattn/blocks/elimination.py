"""Determinants and inverses of many small matrices at once, which lie along the last axis.

Gaussian elimination without pivoting, vectorised over the matrices: a few rows at a time, so that
the matrices pass through memory once for several pivots; the arithmetic is that of one at a time,
since inverses of pivot blocks would lose digits. One factorisation serves determinant and inverse.
LAPACK, called matrix by matrix, takes 2 to 8 times as long on a CPU for 8 to 64 rows
(`benchmarks/log_det.py`), but it pivots. So multipliers are watched: where one is large, pivoting
is what keeps the digits, and LAPACK factorises these matrices instead, or the caller does
something else about them.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from probattn.blocks.promotion import with_rank
from probattn.blocks.selection import all_in_batch

_LARGEST_MULTIPLIER = 8.0  # partial pivoting keeps them below 1; each may cost its size in digits
# Matrices that are pivoted at once: mostly there is one, and an accelerator takes many as fast.
_PIVOTED, _PIVOTED_ELSEWHERE = 16, 2**10

# XLA would else compute a pivot row anew for every entry that it changes.
_materialise = lax.optimization_barrier


class Elimination(NamedTuple):
    """Determinant and inverse of square matrices, from one factorisation.

    Of a matrix that is not stable they are those of none: its determinant is 1 and its inverse 0.

    Attributes:
        sign: (..., n), of the determinant; 0 where the matrix is singular.
        nearby_sign: the same, but where it is singular that of a matrix a rounding error away.
        log_abs: (..., n), log|det|, and there that of the matrix a rounding error away.
        inverse: (..., r, r, n), likewise.
        stable: (..., n), whether no digit was lost, as a number 1 or 0.
    """

    sign: Float[Array, "*batch n"]
    nearby_sign: Float[Array, "*batch n"]
    log_abs: Float[Array, "*batch n"]
    inverse: Float[Array, "*batch r r n"]
    stable: Float[Array, "*batch n"]


Pivoting = Literal["always", "where needed", "never"]
"""Which matrices LAPACK factorises: without it, some may not be stable."""


def determinant(
    blocks: Float[Array, "*batch r r n"], *, pivoting: Pivoting = "where needed"
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch n"], Float[Array, "*batch n"]]:
    """Return sign and log|det|, 0 and -inf where singular, and what is stable; not differentiable.

    Args:
        blocks: (..., r, r, n).
        pivoting: which of them to take the slow way.
    """

    def lapack(blocks: Array) -> tuple[Array]:
        return (_lapack_pivots(*_factors(blocks)[:2]),)

    if pivoting == "always":
        (pivots,) = lapack(blocks)
        return *_sign_and_log_abs(pivots), jnp.ones_like(pivots[..., 0, :])
    pivots, largest = _swept_pivots(blocks)
    stable = largest <= _LARGEST_MULTIPLIER
    if pivoting == "where needed":
        (pivots,) = _where_unstable(lapack, stable, blocks, (pivots,))
        stable = jnp.ones_like(stable)
    else:
        pivots = jnp.where(stable[..., None, :], pivots, 1.0)
    return *_sign_and_log_abs(pivots), stable.astype(blocks.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def eliminate(
    blocks: Float[Array, "*batch r r n"], pivoting: Pivoting = "where needed"
) -> Elimination:
    """Return determinant and inverse, differentiable to any order. Arguments: see `determinant`."""
    if pivoting == "always":
        pivots, inverse = _lapack(blocks)
        stable = jnp.ones_like(pivots[..., 0, :], bool)
    else:
        pivots, inverse, largest = swept(blocks)
        stable = largest <= _LARGEST_MULTIPLIER
        if pivoting == "where needed":
            pivots, inverse = _where_unstable(_lapack, stable, blocks, (pivots, inverse))
            stable = jnp.ones_like(stable)
        else:
            # Finite, as a derivative multiplies it by zero.
            pivots = jnp.where(stable[..., None, :], pivots, 1.0)
            inverse = jnp.where(stable[..., None, None, :], inverse, 0.0)
            pivots, inverse = _materialise((pivots, inverse))
    nearby_sign, log_abs = _sign_and_log_abs(_without_zeros(pivots))
    sign, _ = _sign_and_log_abs(pivots)
    return Elimination(sign, nearby_sign, log_abs, inverse, stable.astype(blocks.dtype))


@eliminate.defjvp
def _eliminate_jvp(pivoting: Pivoting, primals: tuple[Array], tangents: tuple[Array]) -> tuple:
    (blocks,), (tangent,) = primals, tangents
    found = eliminate(blocks, pivoting)
    still = jnp.zeros_like(found.sign)
    change = -product(product(found.inverse, tangent), found.inverse)
    trace = jnp.sum(jnp.swapaxes(found.inverse, -2, -3) * tangent, axis=(-3, -2))
    return found, Elimination(still, still, trace, change, still)


def product(
    left: Float[Array, "*batch i j n"], right: Float[Array, "*batch j k n"]
) -> Float[Array, "*batch i k n"]:
    """Return the products of matrices, which lie along the last axis."""
    # Term by term: as a reduction XLA would write out all products before it adds them.
    size = left.shape[-2]
    columns = lax.split(left, [1] * size, left.ndim - 2)
    rows = lax.split(right, [1] * size, right.ndim - 3)
    terms = (column * row for column, row in zip(columns, rows, strict=True))
    return functools.reduce(jnp.add, terms)


def _sign_and_log_abs(pivots: Float[Array, "*batch r n"]) -> tuple[Array, Array]:
    return jnp.prod(jnp.sign(pivots), axis=-2), jnp.sum(jnp.log(jnp.abs(pivots)), axis=-2)


def _without_zeros(pivots: Float[Array, "*batch r n"]) -> Float[Array, "*batch r n"]:
    """Return pivots, those that are zero moved by one rounding error of the largest."""
    limits = jnp.finfo(pivots.dtype)
    size = jnp.max(jnp.abs(pivots), axis=-2, keepdims=True)
    rounding = limits.eps * jnp.where(size > 0, size, jnp.ones_like(size))
    return jnp.where(_is_zero(pivots), rounding, pivots)


def _is_zero(pivots: Array) -> Array:
    limits = jnp.finfo(pivots.dtype)
    return jnp.abs(pivots) < limits.tiny / limits.eps  # its reciprocal overflows, or nearly


def _where_unstable(
    pivoted: Callable[[Array], tuple[Array, ...]],
    stable: Bool[Array, "*batch n"],
    blocks: Float[Array, "*batch r r n"],
    found: tuple[Array, ...],
) -> tuple[Array, ...]:
    """Replace what was found, (..., n), of matrices that are not stable by `pivoted`'s."""
    if stable.size == 0:
        return found
    most = _PIVOTED if jax.default_backend() == "cpu" else _PIVOTED_ELSEWHERE
    size, several = min(most, stable.size), blocks.shape[-1]

    # Mostly they are few: they are taken to the front and go some at a time.
    def replaced() -> tuple[Array, ...]:
        done = stable.ravel()
        order, count = jnp.argsort(done), jnp.sum(~done)
        matrices = blocks.reshape(-1, *blocks.shape[-3:])

        def some(state: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
            start, values = state
            places = lax.dynamic_slice_in_dim(order, start, size)
            batch, last = places // several, places % several
            others = pivoted(jnp.moveaxis(matrices[batch, ..., last], 0, -1))
            last = jnp.where(done[places], several, last)  # out of range, and not written
            return start + size, [
                value.at[batch, ..., last].set(jnp.moveaxis(other, -1, 0), mode="drop")
                for value, other in zip(values, others, strict=True)
            ]

        start = jnp.zeros_like(count)
        values = [array.reshape(-1, *array.shape[stable.ndim - 1 :]) for array in found]
        _, values = lax.while_loop(lambda state: state[0] < count, some, (start, values))
        return tuple(value.reshape(array.shape) for value, array in zip(values, found, strict=True))

    # Not the loop alone: sorting takes time, and out of a loop, if it has no round or one, XLA
    # moves what does not change in it.
    return lax.cond(all_in_batch(stable), lambda: found, replaced)


def swept(blocks: Float[Array, "*batch r r n"]) -> tuple[Array, Array, Array]:
    """Return pivots (..., r, n), inverse and largest multiplier (..., n), without pivoting.

    Gauss and Jordan's way, in place: to eliminate p, let R be its row, with 1 at p, divided by the
    pivot, and C its column, with -1 at p; the next A is A without row and column p, minus C R.
    """
    rank = blocks.shape[-2]
    found, multipliers = [], jnp.zeros_like(blocks[..., 0, :])
    together = 3  # columns of a pass; with more it holds more than it saves
    for start in range(0, rank, together):
        stop = min(start + together, rank)
        columns: list[Array] = []
        rows: list[Array] = []

        def left_by(parts: Sequence[Array], p: int, start: int = start) -> list[Array]:
            """Return what these leave when the rows before p are eliminated."""
            return [_without(start + i + 1, p, part) for i, part in enumerate(parts)]

        for p in range(start, stop):
            column, row = (
                _without(start, p, part) for part in (blocks[..., :, p, :], blocks[..., p, :, :])
            )
            column = _updated(column, left_by(columns, p), [other[..., p, :] for other in rows])
            row = _updated(row, left_by(rows, p), [other[..., p, :] for other in columns])
            pivot = column[..., p, :]
            here = _between(p, p + 1, rank)[:, None]
            row = jnp.where(here, 1.0, row) / pivot[..., None, :]
            column, row = _materialise((jnp.where(here, -1.0, column), row))
            multipliers = _larger(multipliers, _without(0, p + 1, column), pivot)
            columns.append(column)
            rows.append(row)
            found.append(pivot)
        kept = ~_between(start, stop, rank)
        rest = jnp.where(kept[:, None, None] & kept[None, :, None], blocks, 0.0)
        pairs = _paired(left_by(columns, stop), left_by(rows, stop))
        blocks, multipliers = _materialise((_updated(rest, *pairs), multipliers))
    return jnp.stack(found, -2), blocks, jnp.max(multipliers, axis=-2)


def _swept_pivots(blocks: Float[Array, "*batch r r n"]) -> tuple[Array, Array]:
    """Return pivots and largest multiplier alone: what is eliminated is left behind."""
    found, largest = [], []
    while blocks.shape[-2]:
        together = min(4, blocks.shape[-2])
        columns: list[Array] = []
        rows: list[Array] = []
        multipliers = jnp.zeros_like(blocks[..., 0, :])
        for p in range(together):
            column, row = blocks[..., :, p, :], blocks[..., p, :, :]
            column = _updated(column, columns, [other[..., p, :] for other in rows])
            row = _updated(row, rows, [other[..., p, :] for other in columns])
            pivot = column[..., p, :]
            column, row = _materialise((column, row / pivot[..., None, :]))
            multipliers = _larger(multipliers, _without(0, p + 1, column), pivot)
            columns.append(column)
            rows.append(row)
            found.append(pivot)
        columns, rows = ([part[..., together:, :] for part in parts] for parts in (columns, rows))
        rest = blocks[..., together:, together:, :]
        largest.append(jnp.max(multipliers, axis=-2))
        blocks = _materialise(_updated(rest, *_paired(columns, rows)))
    return jnp.stack(found, -2), functools.reduce(jnp.maximum, largest)


def _updated(array: Array, left: Sequence[Array], right: Sequence[Array]) -> Array:
    """Subtract the products of vectors (..., m, n) with numbers (..., n), or of either pairs."""
    for one, other in zip(left, right, strict=True):
        array = array - one * (other if other.ndim == one.ndim else other[..., None, :])
    return array


def _paired(columns: Sequence[Array], rows: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    return [part[..., :, None, :] for part in columns], [part[..., None, :, :] for part in rows]


def _without(start: int, stop: int, part: Float[Array, "*batch r n"]) -> Float[Array, "*batch r n"]:
    if start >= stop:
        return part
    return jnp.where(_between(start, stop, part.shape[-2])[:, None], 0.0, part)


def _larger(
    multipliers: Float[Array, "*batch r n"],
    column: Float[Array, "*batch r n"],
    pivot: Float[Array, "*batch n"],
) -> Float[Array, "*batch r n"]:
    """Return the larger of the two; infinite where the pivot is zero."""
    own = jnp.abs(column / pivot[..., None, :])
    own = jnp.where(_is_zero(pivot)[..., None, :], jnp.inf, own)
    return jnp.maximum(multipliers, own)


def _between(start: int, stop: int, size: int) -> Bool[Array, " size"]:
    numbers = jnp.arange(size)
    return (numbers >= start) & (numbers < stop)


def _factors(blocks: Float[Array, "*batch r r n"]) -> tuple[Array, Array, Array]:
    return lax.linalg.lu(jnp.moveaxis(blocks, -1, -3))


def _lapack(blocks: Float[Array, "*batch r r n"]) -> tuple[Array, Array]:
    factors, swaps, permutation = _factors(blocks)
    diagonal = jnp.diagonal(factors, axis1=-2, axis2=-1)
    pivots = jnp.moveaxis(diagonal, -1, -2)
    shift = _without_zeros(pivots) - pivots
    identity = jnp.eye(blocks.shape[-2], dtype=blocks.dtype)
    solvable = factors + jnp.moveaxis(shift, -1, -2)[..., None] * with_rank(identity, factors.ndim)
    solve = partial(lax.linalg.triangular_solve, solvable, left_side=True)
    inverse = solve(solve(identity[permutation], lower=True, unit_diagonal=True), lower=False)
    return _lapack_pivots(factors, swaps), jnp.moveaxis(inverse, -3, -1)


def _lapack_pivots(factors: Array, swaps: Array) -> Array:
    """Return the diagonal, (..., r, n), the sign of the permutation in its first entry."""
    diagonal = jnp.diagonal(factors, axis1=-2, axis2=-1)
    unswapped = lax.broadcasted_iota(swaps.dtype, swaps.shape, swaps.ndim - 1)
    count = jnp.sum(swaps != unswapped, axis=-1)
    parity = jnp.where(count % 2 == 0, 1, -1).astype(diagonal.dtype)
    return jnp.moveaxis(diagonal.at[..., 0].multiply(parity), -1, -2)
