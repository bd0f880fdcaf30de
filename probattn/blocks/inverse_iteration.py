"""Smallest singular triples of many blocks D = [[M, 0], [-B, I]] at once.

LAPACK decomposes block by block, and finds all singular values for the sake of one. Here all blocks
are iterated together, and nothing is larger than M. Let N = M^-1 and t = 1 - s^2 for a singular
value s. The upper part y of its left vector solves S(t) y = y / s^2, where S(t) is the symmetric
matrix N^T (I + B^T B / t) N. The smallest s belongs to the largest eigenvalue of S. Chebyshev
filters find its vector roughly, and inverse iteration does the rest, with shifts closer and closer.

A triple is accepted if three things are shown. No singular value lies below the last shift, by the
signs of the pivots; no other is as near to it; and |D v - s u| and |D^T u - s v| are rounding
errors. The other blocks are left to LAPACK: those that are nearly singular, and those whose
smallest values nearly coincide.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from probattn.blocks.elimination import product, swept
from probattn.blocks.promotion import default_promotion
from probattn.blocks.selection import compute_where
from probattn.blocks.singular_values import last_singular_triple

FEW = 2**14  # numbers of all blocks that are not worth the compilation of two ways

_FILTERS, _DEGREE = 3, 8
_WIDTH = 0.8  # of what a filter suppresses, relative to the largest eigenvalue
# Shifts by bytes of a number: distances below s^2, relative to that of s^2 from 0 and 1. The last
# is far above the rounding of S, and so small that a correction reaches the working precision.
_SHIFTS = {4: (2.0**-4, 2.0**-6, 2.0**-12), 8: (2.0**-4, 2.0**-6, 2.0**-12, 2.0**-26)}
_SOLVES = 4  # with each shift
_CORRECTIONS = {4: 1, 8: 2}
_RESIDUAL = 8.0  # rounding errors of |D| that a residual may have
# Blocks that LAPACK decomposes at once: mostly they are few.
_DECOMPOSED, _DECOMPOSED_ELSEWHERE = 4, 2**10

# XLA would else compute a matrix anew for every vector that it multiplies.
_materialise = lax.optimization_barrier


class Triple(NamedTuple):
    """A singular value of D and its vectors: size = left^T D right.

    Attributes:
        left: (..., k + m).
        size: (...).
        right: (..., k + m).
    """

    left: Float[Array, "*batch d"]
    size: Float[Array, "*batch"]
    right: Float[Array, "*batch d"]


class _Blocks(NamedTuple):
    """What the steps need of the blocks, which lie along the last axis of all but one array.

    Attributes:
        top: M.
        below: B, which is only multiplied by vectors.
        inverse: N.
        plain: N^T N, the part of S that t does not change.
        divided: N^T B^T B N, the part that is divided by t.
    """

    top: Float[Array, "k k n"]
    below: Float[Array, "n m k"]
    inverse: Float[Array, "k k n"]
    plain: Float[Array, "k k n"]
    divided: Float[Array, "k k n"]


class _Root(NamedTuple):
    """The s^2 at which y^T S(t) y = 1 / s^2 for a vector y, and t; t is 1 where B has no rows."""

    squared: Float[Array, " n"]
    rest: Float[Array, " n"]


@default_promotion()
def smallest_triple(
    top: Float[Array, "*batch k k"],
    below: Float[Array, "*batch m k"],
    squared: Float[Array, "*batch k k"] | None = None,
) -> Triple:
    """Return the smallest singular triple of every block [[top, 0], [-below, I]].

    It is that of LAPACK up to rounding and, where the value is simple, the sign of both vectors. It
    has no derivative.

    Args:
        top: M.
        below: B; m may be zero.
        squared: B^T B, or None. Where it is given, products are taken block by block: they take a
            fifth of the time on a CPU, and round otherwise.

    Returns:
        The triples; NaN where a block is not finite.
    """
    *batch, under, size = below.shape
    count = math.prod(batch)
    top, below = top.reshape(count, size, size), below.reshape(count, under, size)
    if top.size + below.size <= FEW:
        found = _by_lapack(top, below)
    else:
        if squared is not None:
            squared = squared.reshape(count, size, size)
        found, settled = _iterated(top, below, squared)
        at_once = _DECOMPOSED if jax.default_backend() == "cpu" else _DECOMPOSED_ELSEWHERE

        def others(picked: Int[Array, " some"]) -> Triple:
            return _by_lapack(top[picked], below[picked])

        found = _chosen(settled, found, compute_where(others, settled, at_once))
    return Triple(*(array.reshape(*batch, *array.shape[1:]) for array in found))


def _chosen(condition: Bool[Array, " n"], one: Triple, other: Triple) -> Triple:
    return Triple(
        *(
            jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b)
            for a, b in zip(one, other, strict=True)
        )
    )


def _by_lapack(top: Float[Array, "n k k"], below: Float[Array, "n m k"]) -> Triple:
    under, size = below.shape[-2:]
    if under > size:  # D is the identity on what is orthogonal to the columns of B
        basis, below = jnp.linalg.qr(below)
    height = min(under, size)
    identity = jnp.eye(size + height, height, -size, top.dtype)
    columns = jnp.concatenate([top, -below], axis=-2)
    identity = jnp.broadcast_to(identity, (len(top), *identity.shape))
    blocks = jnp.concatenate([columns, identity], axis=-1)
    left, value, right = last_singular_triple(blocks)
    if under > size:
        left, right = (
            jnp.concatenate([part[:, :size], _each("nij,nj->ni", basis, part[:, size:])], axis=-1)
            for part in (left, right)
        )
    return Triple(left, value, right)


@jax.jit
def _iterated(
    top: Float[Array, "n k k"],
    below: Float[Array, "n m k"],
    squared: Float[Array, "n k k"] | None = None,
) -> tuple[Triple, Bool[Array, " n"]]:
    """Return triples, and which of them are proved."""
    identity = jnp.eye(top.shape[-1], dtype=top.dtype)
    finite = jnp.all(jnp.isfinite(top), (-2, -1)) & jnp.all(jnp.isfinite(below), (-2, -1))
    top = jnp.where(finite[:, None, None], top, identity)
    below = jnp.where(finite[:, None, None], below, 0)
    if squared is not None:
        squared = jnp.where(finite[:, None, None], squared, 0)
    trivial = jnp.all(top == identity, (-2, -1)) & jnp.all(below == 0, (-2, -1))  # a past of one

    blocks = _prepared(top, below, squared)
    vector, solve, proved = _inverse_iterated(blocks, _filtered(blocks))
    for _ in range(_CORRECTIONS[top.dtype.itemsize]):
        vector = _corrected(blocks, vector, solve)
    found, small = _completed(blocks, vector)

    first = jnp.zeros_like(found.left).at[:, 0].set(1)
    found = _chosen(trivial, Triple(first, jnp.ones_like(found.size), first), found)
    unknown = Triple(*(jnp.full_like(array, jnp.nan) for array in found))
    return _chosen(finite, found, unknown), trivial | (proved & small)


def _prepared(
    top: Float[Array, "n k k"],
    below: Float[Array, "n m k"],
    given: Float[Array, "n k k"] | None = None,
) -> _Blocks:
    squared = _each("nmk,nml->nkl", below, below) if given is None else given
    top, last = _materialise(tuple(jnp.moveaxis(part, 0, -1) for part in (top, squared)))
    # Without pivoting: corrections make up for lost digits, and the residuals show if they do not.
    _, inverse, _ = swept(top)
    if given is None:
        transposed = _materialise(jnp.swapaxes(inverse, 0, 1))
        plain = _materialise(product(transposed, inverse))
        divided = _materialise(product(transposed, _materialise(product(last, inverse))))
    else:
        first = _materialise(jnp.moveaxis(inverse, -1, 0))
        halves = _materialise(_each("nij,njl->nil", squared, first))
        both = _each("nik,nil->nkl", first, first), _each("nik,nil->nkl", first, halves)
        plain, divided = _materialise(tuple(jnp.moveaxis(part, 0, -1) for part in both))
    return _Blocks(top, below, inverse, plain, divided)


def _filtered(blocks: _Blocks) -> Float[Array, "k n"]:
    """Return vectors in which the largest eigenvalues of S prevail."""
    size, _, count = blocks.plain.shape
    # Some vector that is orthogonal to no eigenvector unless by accident.
    start = jnp.sin(1 + jnp.arange(size, dtype=blocks.plain.dtype) ** 2)
    start = jnp.broadcast_to(start[:, None], (size, count))

    def filtered(_: int, vector: Array) -> Array:
        matrix = _materialise(_symmetric(blocks, _root(blocks, vector).rest))
        # Bounds of the eigenvalues from their mean and variance (Wolkowicz and Styan 1980).
        mean = jnp.trace(matrix) / size
        variance = jnp.sum(matrix**2, (0, 1)) / size - mean**2
        spread = jnp.sqrt(jnp.maximum(variance, 0))
        lower = jnp.maximum(mean - spread * math.sqrt(size - 1), 0)
        upper = mean + spread / math.sqrt(max(size - 1, 1))
        upper = jnp.maximum(upper, _dot(vector, _times(matrix, vector)))
        half = _WIDTH * (upper - lower) / 2

        def step(_: int, pair: tuple[Array, Array]) -> tuple[Array, Array]:
            before, now = pair
            after = 2 / half * (_times(matrix, now) - (lower + half) * now) - before
            scale = 1 / jnp.max(jnp.abs(after), axis=0)
            return _materialise((scale * now, scale * after))

        first = (_times(matrix, vector) - (lower + half) * vector) / half
        _, found = lax.fori_loop(1, _DEGREE, step, (vector, first))
        found = _normalised(found)
        # Where all eigenvalues are the same there is nothing to suppress.
        return jnp.where(jnp.all(jnp.isfinite(found), axis=0), found, vector)

    return lax.fori_loop(0, _FILTERS, filtered, _normalised(start))


def _inverse_iterated(
    blocks: _Blocks, vector: Float[Array, "k n"]
) -> tuple[Float[Array, "k n"], Float[Array, "k k n"], Bool[Array, " n"]]:
    """Return the vectors, (I / (1 - t) - S(t))^-1 at the last shift, and what that proves."""
    size, _, count = blocks.plain.shape
    shifts = jnp.asarray(_SHIFTS[vector.dtype.itemsize], vector.dtype)
    identity = jnp.eye(size, dtype=vector.dtype)[:, :, None]

    def closer(number: int, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        vector = state[0]
        squared, rest = _root(blocks, vector)
        shift = shifts[number]
        matrix = _symmetric(blocks, rest * (1 + shift * squared))
        shifted = _materialise(identity / (squared * (1 - shift * rest)) - matrix)
        # Without pivoting: what the proof is for is positive definite.
        pivots, solve, _ = swept(shifted)
        solved = lax.fori_loop(
            0, _SOLVES, lambda _, v: _materialise(_normalised(_times(solve, v))), vector
        )
        own = _dot(solved, _times(solve, solved))
        others = jnp.sum(solve**2, (0, 1)) - own**2
        return solved, solve, jnp.all(pivots > 0, axis=0) & (others < own**2 / 4)

    start = (vector, jnp.zeros_like(blocks.plain), jnp.zeros(count, bool))
    return lax.fori_loop(0, len(shifts), closer, start)


def _corrected(
    blocks: _Blocks, vector: Float[Array, "k n"], solve: Float[Array, "k k n"]
) -> Float[Array, "k n"]:
    """Return the vectors after a step of Neumaier's residual inverse iteration."""
    squared, right, lower = _right(blocks, vector)
    residual = _transposed(blocks, vector, jnp.sqrt(squared) * lower) - jnp.sqrt(squared) * right
    change = _times(solve, _times(jnp.swapaxes(blocks.inverse, 0, 1), residual))
    return _normalised(vector - change / squared)


def _right(blocks: _Blocks, vector: Float[Array, "k n"]) -> tuple[Array, Array, Array]:
    """Return s^2 and both parts of the right vector, M^-1 y s and B M^-1 y s / t."""
    half = _times(blocks.inverse, vector)
    half = half + _times(blocks.inverse, vector - _times(blocks.top, half))
    lower = _each("nmk,kn->mn", blocks.below, half)
    squared, rest = _root_of(blocks, _dot(half, half), _dot(lower, lower))
    return squared, jnp.sqrt(squared) * half, jnp.sqrt(squared) / rest * lower


def _completed(blocks: _Blocks, vector: Float[Array, "k n"]) -> tuple[Triple, Bool[Array, " n"]]:
    """Return the triples that belong to the vectors, and which have residuals of rounding."""
    squared, upper, lower = _right(blocks, vector)
    left = _unit(vector, jnp.sqrt(squared) * lower)
    right = _unit(upper, lower)
    forward = (
        _times(blocks.top, right[0]),
        right[1] - _each("nmk,kn->mn", blocks.below, right[0]),
    )
    backward = _transposed(blocks, *left), left[1]
    size = _dot(left[0], forward[0]) + _dot(left[1], forward[1])
    worst = jnp.maximum(_distance(forward, left, size), _distance(backward, right, size))
    under = len(left[1])
    squares = jnp.sum(blocks.top**2, (0, 1)) + jnp.sum(blocks.below**2, (1, 2)) + under
    rounding = jnp.finfo(size.dtype).eps * jnp.sqrt(squares / (len(vector) + under))
    joined = (jnp.concatenate(parts).T for parts in (left, right))
    return Triple(next(joined), size, next(joined)), worst <= _RESIDUAL * rounding


def _symmetric(blocks: _Blocks, rest: Float[Array, " n"]) -> Float[Array, "k k n"]:
    return blocks.plain + blocks.divided / rest


def _root(blocks: _Blocks, vector: Float[Array, "k n"]) -> _Root:
    plain, divided = (_dot(vector, _times(part, vector)) for part in (blocks.plain, blocks.divided))
    return _root_of(blocks, plain, divided)


def _root_of(blocks: _Blocks, plain: Float[Array, " n"], divided: Float[Array, " n"]) -> _Root:
    """Solve plain + divided / t = 1 / (1 - t), without cancellation near either end."""
    if blocks.below.shape[1] == 0:
        return _Root(1 / plain, jnp.ones_like(plain))
    linear = plain - 1 - divided
    root = jnp.sqrt(linear**2 + 4 * plain * divided)
    rest = jnp.where(linear > 0, (root + linear) / (2 * plain), 2 * divided / (root - linear))
    return _Root(2 / (plain + divided + 1 + root), rest)


def _transposed(
    blocks: _Blocks, upper: Float[Array, "k n"], lower: Float[Array, "m n"]
) -> Float[Array, "k n"]:
    """Return M^T upper - B^T lower."""
    own = _times(jnp.swapaxes(blocks.top, 0, 1), upper)
    return own - _each("nmk,mn->kn", blocks.below, lower)


def _times(matrices: Float[Array, "i j n"], vectors: Float[Array, "j n"]) -> Float[Array, "i n"]:
    return _materialise(product(matrices, vectors[:, None])[:, 0])


def _each(subscripts: str, one: Array, other: Array) -> Array:
    return jnp.einsum(subscripts, one, other, precision=lax.Precision.HIGHEST)


def _dot(one: Float[Array, "i n"], other: Float[Array, "i n"]) -> Float[Array, " n"]:
    return jnp.sum(one * other, axis=0)


def _normalised(vectors: Float[Array, "i n"]) -> Float[Array, "i n"]:
    return vectors / jnp.sqrt(_dot(vectors, vectors))


def _unit(upper: Float[Array, "i n"], lower: Float[Array, "j n"]) -> tuple[Array, Array]:
    norm = jnp.sqrt(_dot(upper, upper) + _dot(lower, lower))
    return upper / norm, lower / norm


def _distance(
    image: tuple[Array, Array], vector: tuple[Array, Array], size: Float[Array, " n"]
) -> Float[Array, " n"]:
    """Return |image - size vector|, both in two parts."""
    parts = [one - size * other for one, other in zip(image, vector, strict=True)]
    return jnp.sqrt(sum(_dot(part, part) for part in parts))
