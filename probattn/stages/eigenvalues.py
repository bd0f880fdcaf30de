"""Eigenvalues of many small matrices, from operations that every platform has.

JAX finds the eigenvalues of a matrix that is not symmetric by LAPACK, on a CPU. On an NVIDIA GPU it
sends the matrices to the host for a part of the work, and for a TPU it has no method. There the
method of LAPACK is used by hand: Householder reflections to Hessenberg form, then Francis' QR steps
with two shifts at once (Golub and Van Loan 2013, sections 7.4 and 7.5). All matrices take their
steps together, each on the part of it that is not yet found.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array, Float, Int

from probattn.blocks.promotion import default_promotion

_STEPS = 30  # QR steps for every row, after which a matrix counts as not converged, as in LAPACK
_EXCEPTIONAL = 10  # steps on the same part, after which one with other shifts breaks a cycle


class _State(NamedTuple):
    """A matrix in Hessenberg form, of which the eigenvalues after row `end` are found.

    Attributes:
        matrix: (r + 1, r + 1); the last row and column are zero, so that three rows can be read
            from any of the others but the last.
        end: last row of what is left; -1 where nothing is.
        tries: steps since the last eigenvalue was found.
        real: (r,).
        imaginary: (r,).
    """

    matrix: Float[Array, "m m"]
    end: Int[Array, ""]
    tries: Int[Array, ""]
    real: Float[Array, " r"]
    imaginary: Float[Array, " r"]


def eigenvalues(
    blocks: Float[Array, "n r r"],
) -> tuple[Float[Array, "n r"], Float[Array, "n r"]]:
    """Return real and imaginary parts of the eigenvalues of finite matrices, in no set order.

    An eigenvalue is real where its imaginary part is exactly zero. Both parts are NaN for a matrix
    whose eigenvalues are not all found.
    """
    real, imaginary = _eigenvalues.bind(blocks)
    return real, imaginary


@jax.jit
@default_promotion()
def eigenvalues_by_steps(
    blocks: Float[Array, "n r r"],
) -> tuple[Float[Array, "n r"], Float[Array, "n r"]]:
    """Return what `eigenvalues` does, from operations that every platform has."""
    count, rank, _ = blocks.shape
    # A power of two, so that nothing is rounded; products of what is left cannot overflow.
    largest = jnp.max(jnp.abs(blocks), axis=(-2, -1))
    exponent = jnp.where(largest > 0, jnp.frexp(largest)[1], 0)
    scaled = jnp.ldexp(blocks, -exponent[:, None, None])
    matrices = jnp.pad(jax.vmap(_hessenberg)(scaled), ((0, 0), (0, 1), (0, 1)))
    unknown = jnp.full((count, rank), jnp.nan, blocks.dtype)
    state = _State(
        matrices, jnp.full(count, rank - 1), jnp.zeros(count, jnp.int32), unknown, unknown
    )

    def unfinished(carry: tuple[Array, _State]) -> Array:
        number, state = carry
        return (number < _STEPS * rank) & jnp.any(state.end >= 0)

    def body(carry: tuple[Array, _State]) -> tuple[Array, _State]:
        number, state = carry
        return number + 1, jax.vmap(_step)(state)

    _, state = lax.while_loop(unfinished, body, (jnp.int32(0), state))
    found = (state.end < 0)[:, None]

    def unscaled(part: Array) -> Array:
        return jnp.where(found, jnp.ldexp(part, exponent[:, None]), jnp.nan)

    return unscaled(state.real), unscaled(state.imaginary)


def _hessenberg(matrix: Float[Array, "r r"]) -> Float[Array, "r r"]:
    """Return a similar matrix that is zero below the first subdiagonal."""
    rank = len(matrix)
    row = jnp.arange(rank)

    def cleared(k: Array, matrix: Array) -> Array:
        below = row > k
        vector = _reflecting(jnp.where(below, matrix[:, k], 0), k + 1)
        matrix = matrix - 2 * vector[:, None] * _product(vector, matrix)
        matrix = matrix - 2 * _product(matrix, vector)[:, None] * vector
        # What rounding leaves of the entries that the reflection makes zero.
        return matrix.at[:, k].set(jnp.where(row > k + 1, 0, matrix[:, k]))

    return lax.fori_loop(0, max(rank - 2, 0), cleared, matrix)


def _step(state: _State) -> _State:
    """Take one eigenvalue or two from the end where they can be read off, else one QR step."""
    matrix, end, tries, real, imaginary = state
    rank = len(real)
    row = jnp.arange(rank)
    diagonal = jnp.diagonal(matrix)[:rank]
    below = jnp.diagonal(matrix, -1)[: rank - 1]
    size = jnp.abs(diagonal[1:]) + jnp.abs(diagonal[:-1])
    negligible = jnp.abs(below) <= jnp.finfo(matrix.dtype).eps * jnp.where(size == 0, 1, size)
    matrix = matrix.at[row[1:], row[:-1]].set(jnp.where(negligible, 0, below))
    # The last part that is not split: rows start..end.
    first = jnp.concatenate([jnp.ones(1, bool), negligible])
    start = jnp.max(jnp.where(first & (row <= end), row, 0))

    at, before = jnp.maximum(end, 0), jnp.maximum(end - 1, 0)
    x, y = matrix[at, at], matrix[before, before]
    one = start == end
    found = end - start <= 1  # true too where end is -1
    lower, upper, rotation = _pair(y, matrix[before, at], matrix[at, before], x)
    last = row == end
    both = (last | (row == end - 1)) & found & ~one
    real = jnp.where(last & one, x, jnp.where(both, jnp.where(last, lower, upper), real))
    turned = jnp.where(last, -rotation, rotation)
    imaginary = jnp.where(last & one, 0, jnp.where(both, turned, imaginary))

    if rank > 2:  # what has two rows is read off
        w = matrix[at, before] * matrix[before, at]
        other = jnp.abs(matrix[at, before]) + jnp.abs(matrix[before, jnp.maximum(end - 2, 0)])
        # The shifts are the roots of (x - z) (y - z) = w.
        exceptional = (tries % _EXCEPTIONAL) == _EXCEPTIONAL - 1
        x, y = (jnp.where(exceptional, 0.75 * other, shift) for shift in (x, y))
        w = jnp.where(exceptional, -0.4375 * other**2, w)
        sweep = partial(_reflected, start=start, end=jnp.where(found, -1, end))
        column = _first_column(matrix, start, x, y, w)
        matrix = lax.fori_loop(0, rank - 1, partial(sweep, column), matrix)

    end = jnp.where(found, start - 1, end)
    return _State(matrix, jnp.maximum(end, -1), jnp.where(found, 0, tries + 1), real, imaginary)


def _pair(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array, Array]:
    """Return the real parts of both eigenvalues of [[a, b], [c, d]], and their imaginary part."""
    half = (a - d) / 2
    squared = half**2 + b * c
    root = jnp.sqrt(jnp.abs(squared))
    is_real = squared >= 0
    sum_ = half + jnp.where(half < 0, -root, root)
    away = d + sum_
    near = jnp.where(sum_ == 0, away, d - b * c / jnp.where(sum_ == 0, 1, sum_))
    zero = jnp.zeros_like(root)
    middle = d + half
    return (
        jnp.where(is_real, near, middle),
        jnp.where(is_real, away, middle),
        jnp.where(is_real, zero, root),
    )


def _first_column(
    matrix: Float[Array, "m m"], start: Array, x: Array, y: Array, w: Array
) -> Float[Array, " 3"]:
    """Return a multiple of the first column of (x - H) (y - H) - w, from row `start` on."""
    part = lax.dynamic_slice(matrix, (start, start), (3, 3))
    a, c = part[0, 0], part[1, 0]
    x, y = x - a, y - a
    # Divided by c, which is not negligible where this is used: it then overflows nowhere.
    top = (x * y - w) / jnp.where(c == 0, 1, c) + part[0, 1]
    return jnp.stack([top, part[1, 1] - a - x - y, part[2, 1]])


def _reflected(
    column: Float[Array, " 3"],
    k: Int[Array, ""],
    matrix: Float[Array, "m m"],
    *,
    start: Array,
    end: Array,
) -> Float[Array, "m m"]:
    """Take the bulge of a QR step from column k - 1 to k; nothing outside rows start..end."""
    before = jnp.maximum(k - 1, 0)
    bulge = lax.dynamic_slice(matrix, (k, before), (3, 1))[:, 0]
    vector = jnp.where(k == start, column, bulge)
    within = jnp.arange(3) + k <= end
    vector = jnp.where(within & (k >= start) & (k < end), vector, 0)
    vector = _reflecting(vector, 0)
    rows = lax.dynamic_slice_in_dim(matrix, k, 3, axis=0)
    rows = rows - 2 * vector[:, None] * _product(vector, rows)
    inside = (k > start) & (k < end)
    cleared = inside & (jnp.arange(3) > 0)[:, None] & (jnp.arange(len(matrix)) == before)
    matrix = lax.dynamic_update_slice_in_dim(matrix, jnp.where(cleared, 0, rows), k, axis=0)
    columns = lax.dynamic_slice_in_dim(matrix, k, 3, axis=1)
    columns = columns - 2 * _product(columns, vector)[:, None] * vector
    return lax.dynamic_update_slice_in_dim(matrix, columns, k, axis=1)


def _reflecting(vector: Float[Array, " m"], at: int | Array) -> Float[Array, " m"]:
    """Return a unit v for which (I - 2 v v^T) vector is zero but at one place; 0 if that is all."""
    size = jnp.max(jnp.abs(vector))
    scaled = vector / jnp.where(size > 0, size, 1)
    norm = jnp.sqrt(jnp.sum(scaled**2))
    head = scaled[at]
    raised = scaled.at[at].add(jnp.where(head < 0, -norm, norm))
    length = jnp.sqrt(jnp.sum(raised**2))
    return raised / jnp.where(length > 0, length, 1)


def _product(one: Array, other: Array) -> Array:
    return jnp.matmul(one, other, precision=lax.Precision.HIGHEST)


# A primitive, since `lax.platform_dependent` traces every way wherever one of them is taken: a
# program for a CPU would take half a second longer to make.
_eigenvalues = Primitive("probattn_eigenvalues")
_eigenvalues.multiple_results = True


@_eigenvalues.def_impl
def _run(blocks: Array) -> list[Array]:
    with jax.disable_jit(False):
        return jax.jit(_eigenvalues.bind)(blocks)


@_eigenvalues.def_abstract_eval
def _shapes(blocks: Any) -> list[Any]:
    return [blocks.update(shape=blocks.shape[:-1])] * 2


def _mapped(arguments: Sequence[Array], axes: Sequence[int]) -> tuple[list[Array], list[int]]:
    blocks = jnp.moveaxis(arguments[0], axes[0], 0)
    found = _eigenvalues.bind(blocks.reshape(-1, *blocks.shape[2:]))
    return [part.reshape(blocks.shape[:-1]) for part in found], [0, 0]


def _by_lapack(blocks: Float[Array, "n r r"]) -> tuple[Float[Array, "n r"], Float[Array, "n r"]]:
    found = jnp.linalg.eigvals(blocks)
    return found.real, found.imag


batching.primitive_batchers[_eigenvalues] = _mapped
mlir.register_lowering(_eigenvalues, mlir.lower_fun(_by_lapack), platform="cpu")
mlir.register_lowering(_eigenvalues, mlir.lower_fun(eigenvalues_by_steps))
