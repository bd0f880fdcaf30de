"""Majorants of the coupling, in whose norms the past's diameter bounds the eigenvalues of Sigma A.

A majorant is a symmetric F >= 0 with F >= (A + A^T) / 2. It is given by a factor G with F = G G^T,
so that the norm of F is the length of the points y_s = G^T x_s. For every eigenvalue of Sigma A,

    Re lambda <= lambda_max(Cov(y)) <= diam(y)^2 / 4,

whatever the weights are under which Sigma and Cov are taken (docs/mathematics.md, section 5).
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from probattn.blocks.promotion import with_rank
from probattn.blocks.singular_values import finite_blocks

_HIGHEST = lax.Precision.HIGHEST
# Of the majorants (a Q + K / a) (a Q + K / a)^T / 4, the values of a that are tried.
_SCALES = (math.sqrt(0.5), 1.0, math.sqrt(2.0))
# Rounding errors of the factors, in units of eps ||W_Q|| ||W_K|| / sqrt(r).
_DECOMPOSITION = 32


class Majorants(NamedTuple):
    """Factors of a coupling A = K Q^T, from which a family of majorants is made; m = min(d, r).

    Attributes:
        queries: Q, (..., d, m).
        keys: K, (..., d, m), balanced: Q^T Q = K^T K is diagonal.
        positive: G, (..., d, m), with G G^T the positive part of (A + A^T) / 2.
        shortfall: (...), what rounding may have taken from all of them: (A + A^T) / 2 is at most
            each majorant plus this multiple of the identity.
    """

    queries: Float[Array, "*batch d m"]
    keys: Float[Array, "*batch d m"]
    positive: Float[Array, "*batch d m"]
    shortfall: Float[Array, "*batch"]


def majorants(w_query: Float[Array, "*batch d r"], w_key: Float[Array, "*batch d r"]) -> Majorants:
    """Factor the coupling of two matrices of one shape, (..., d, r), for `largest_eigenvalue`.

    Differentiable where no eigenvalue of (A + A^T) / 2 is zero but those that its rank makes zero.
    """
    width, rank = w_query.shape[-2:]
    columns, root = min(width, rank), rank**-0.25
    positive = _positive_part(root * w_query, root * w_key, columns)
    # The positive eigenvalues of [[0, A], [A^T, 0]] are the singular values of A.
    zeros = jnp.zeros_like(w_query)
    both = _positive_part(
        jnp.concatenate([zeros, 2 * root * w_query], axis=-2),
        jnp.concatenate([2 * root * w_key, zeros], axis=-2),
        columns,
    )
    keys, queries = jnp.split(both, 2, axis=-2)
    eps = float(jnp.finfo(w_query.dtype).eps)
    size = _frobenius(w_query) * _frobenius(w_key) / math.sqrt(rank)
    return Majorants(queries, keys, positive, _DECOMPOSITION * eps * size)


def projected(values: Float[Array, "*x N d"], factors: Majorants) -> Float[Array, "*batch N 3*m"]:
    """Project points, given relative to one of them, on the three factors of a coupling."""
    sides = jnp.concatenate([factors.queries, factors.keys, factors.positive], axis=-1)
    return jnp.matmul(values, sides, precision=_HIGHEST)


def pair_squares(
    points: Float[Array, "*batch N 3*m"], rows: Float[Array, "*batch M 3*m"]
) -> tuple[Float[Array, "*batch N M"], ...]:
    """Return what the norms of the difference d of every point and every row are made of.

    Args:
        points: projected points, (..., N, 3 m).
        rows: other points, or some of them, (..., M, 3 m).

    Returns:
        |Q^T d|^2, |K^T d|^2, |G^T d|^2 and d^T A d, each (..., N, M).
    """
    of_points, of_rows = (jnp.split(part, 3, axis=-1) for part in (points, rows))

    def products(first: int, second: int) -> Array:
        own = jnp.sum(of_points[first] * of_points[second], axis=-1)[..., :, None]
        other = jnp.sum(of_rows[first] * of_rows[second], axis=-1)[..., None, :]
        mixed = _matmul(of_points[first], _transposed(of_rows[second]))
        return own + other - mixed - _matmul(of_points[second], _transposed(of_rows[first]))

    return products(0, 0), products(1, 1), products(2, 2), products(0, 1)


def largest_squares(
    points: Float[Array, "*batch N 3*m"],
    rows: Float[Array, "*batch M 3*m"],
    kept: Bool[Array, "N M"],
) -> Float[Array, "*batch M n"]:
    """Return the largest squared length of each row's differences to points, in every norm.

    Args:
        points: projected points, (..., N, 3 m).
        rows: some of them, (..., M, 3 m).
        kept: which differences count, (N, M); the others count as zero.

    Returns:
        (..., M, n), for n norms. Rounding errors are relative to the longest of the points.
    """
    return largest_of_squares(pair_squares(points, rows), kept)


def largest_of_squares(
    squares: tuple[Float[Array, "*batch N M"], ...], kept: Bool[Array, "N M"]
) -> Float[Array, "*batch M n"]:
    """Return what `largest_squares` does, from the numbers of `pair_squares`."""
    query, key, positive, mixed = squares
    scaled = [(a**2 * query + key / a**2 + 2 * mixed) / 4 for a in _SCALES]
    kept = with_rank(kept, query.ndim)
    largest = [
        jnp.maximum(jnp.max(jnp.where(kept, each, 0.0), axis=-2), 0.0)
        for each in (query, key, positive, *scaled)
    ]
    return jnp.stack(largest, axis=-1)


def largest_lengths(differences: Float[Array, "N 3*m"]) -> Float[Array, " n"]:
    """Bound the length of differences of points in every norm of `largest_squares`."""
    parts = jnp.split(differences, 3, axis=-1)
    query, key, positive = (jnp.max(jnp.linalg.norm(part, axis=-1)) for part in parts)
    scaled = [(a * query + key / a) / 2 for a in _SCALES]
    return jnp.stack([query, key, positive, *scaled])


def largest_eigenvalue(
    largest: Float[Array, "*batch n"], reach: Float[Array, "*reach"], factors: Majorants
) -> Float[Array, "*batch"]:
    """Bound the real parts of the eigenvalues of Sigma A, for a set of points with any weights.

    This is a quarter of the smallest squared diameter of the set, among those in the norms of the
    family and the product of the diameters of queries and keys. What rounding may have taken from
    points, squared lengths and factors is added; it has no derivative.

    Args:
        largest: the largest `largest_squares` of points of the set, (..., n).
        reach: the largest distance of a point of the set from that one of them which is the
            origin, (...). With a bound, the norms of both points are added to each distance,
            because the points themselves are rounded.
        factors: of A; leading axes broadcast.

    Returns:
        (...). It is below 1 in exact arithmetic if it is below 1, as long as no number over- or
        underflows.
    """
    query, key, *others = jnp.moveaxis(largest, -1, 0)
    least = jnp.min(jnp.stack([_root(query) * _root(key), *others]), axis=0)
    rounded = jnp.min(rounded_squares(largest, reach, factors), axis=-1)
    return least / 4 + lax.stop_gradient((rounded - least) / 4)


def rounded_squares(
    largest: Float[Array, "*batch n"], reach: Float[Array, "*reach"], factors: Majorants
) -> Float[Array, "*batch k"]:
    """Bound the squared diameters of a set in norms whose majorants have no shortfall.

    Args:
        largest: as `largest_eigenvalue` takes it.
        reach: likewise.
        factors: likewise.

    Returns:
        (..., k): the product of the diameters of queries and keys first, then the squared diameter
        for every one of `majorant_roots`. What rounding may have taken from them is added.
    """
    width, rank = factors.queries.shape[-2:]
    eps = float(jnp.finfo(largest.dtype).eps)
    reach = with_rank(reach, largest.ndim - 1)
    # Of a square, four sums of m products. No point is longer than twice the diameter, since the
    # origin is a point, or has one in common with it that makes a pair with both. Of a projected
    # point, a sum of d products of rounded numbers. A pair has two of it.
    square, point = 4 * (4 * rank + 16) * eps, (width + 16) * eps * reach
    of_query, of_key, of_positive = (
        point * with_rank(_frobenius(factor)[..., None], largest.ndim - 1)
        for factor in (factors.queries, factors.keys, factors.positive)
    )

    def widened(squared: Array, rounded: Array, error: Array) -> Array:
        return (_root(squared + square * rounded) + error) ** 2

    query, key, positive, *scaled = jnp.moveaxis(largest, -1, 0)
    wide_query, wide_key = widened(query, query, of_query), widened(key, key, of_key)
    wide = [_root(wide_query) * _root(wide_key), widened(positive, positive, of_positive)]
    for scale, squared in zip(_SCALES, scaled, strict=True):
        # Its terms may cancel each other.
        terms = (scale**2 * query + key / scale**2) / 4
        wide.append(widened(squared, terms, (scale * of_query + of_key / scale) / 2))
    shortfall = with_rank(factors.shortfall[..., None], largest.ndim - 1)
    return jnp.stack(wide, axis=-1) + (shortfall * (2 * reach) ** 2)[..., None]


def majorant_roots(factors: Majorants) -> list[Float[Array, "*batch d m"]]:
    """Return G of every majorant G G^T of the family."""
    scaled = [(scale * factors.queries + factors.keys / scale) / 2 for scale in _SCALES]
    return [factors.positive, *scaled]


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _positive_part(
    queries: Float[Array, "*batch d r"], keys: Float[Array, "*batch d r"], columns: int
) -> Float[Array, "*batch d m"]:
    """Return m columns G with G G^T the positive part of the symmetric part of K Q^T."""
    basis, values = _eigenvectors(queries, keys)
    root = jnp.sqrt(jnp.maximum(values[..., -columns:], 0.0))
    return basis[..., -columns:] * root[..., None, :]


@_positive_part.defjvp
def _positive_part_jvp(
    columns: int, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Differentiate one of the G of which the derivative of G G^T is that of the positive part.

    That derivative has the divided differences of max(lambda, 0) as its factors (Daleckii and
    Krein), none of them large. G itself is unique up to a rotation; this choice of its derivative
    has no differences of eigenvalues, and so none that vanishes where two of them are equal.
    """
    (queries, keys), (queries_dot, keys_dot) = primals, tangents
    basis, values = _eigenvectors(queries, keys)
    kept, top = basis[..., -columns:], values[..., -columns:]
    noise = (
        columns * float(jnp.finfo(values.dtype).eps) * jnp.max(jnp.abs(values), -1, keepdims=True)
    )
    alive = top > noise
    root = jnp.sqrt(jnp.where(alive, top, 1.0))
    # The derivative of (K Q^T + Q K^T) / 2, applied to the eigenvectors.
    change = (
        _matmul(keys_dot, _matmul(_transposed(queries), kept))
        + _matmul(keys, _matmul(_transposed(queries_dot), kept))
        + _matmul(queries_dot, _matmul(_transposed(keys), kept))
        + _matmul(queries, _matmul(_transposed(keys_dot), kept))
    ) / 2
    inside = _matmul(_transposed(basis), change)
    outside = (change - _matmul(basis, inside)) / root[..., None, :]
    row, column = values[..., :, None], root[..., None, :]
    positive = column + jnp.sqrt(jnp.maximum(row, 0.0))
    negative = column + jnp.maximum(-row, 0.0) / column
    inside = inside / jnp.where(row > 0, positive, negative)
    tangent = jnp.where(alive[..., None, :], outside + _matmul(basis, inside), 0.0)
    return _positive_part(queries, keys, columns), tangent


def _eigenvectors(
    queries: Float[Array, "*batch d r"], keys: Float[Array, "*batch d r"]
) -> tuple[Float[Array, "*batch d p"], Float[Array, "*batch p"]]:
    """Return the eigenvectors of (K Q^T + Q K^T) / 2 in a space that contains its range."""
    basis, core = jnp.linalg.qr(jnp.concatenate([queries, keys], axis=-1))
    core_q, core_k = jnp.split(core, 2, axis=-1)
    product = _matmul(core_k, _transposed(core_q))
    finite, product = finite_blocks((product + _transposed(product)) / 2)
    values, vectors = jnp.linalg.eigh(product, symmetrize_input=False)
    values = jnp.where(finite[..., None], values, jnp.nan)
    return _matmul(basis, vectors), values


def _matmul(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=_HIGHEST)


def _transposed(matrices: Array) -> Array:
    return jnp.swapaxes(matrices, -1, -2)


def _frobenius(matrices: Float[Array, "*batch d m"]) -> Float[Array, "*batch"]:
    return jnp.linalg.norm(lax.stop_gradient(matrices), axis=(-2, -1))


def _root(squared: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Take square roots, whose derivative at zero is zero; NaN stays NaN."""
    spread = squared != 0
    return jnp.where(spread, jnp.sqrt(jnp.where(spread, squared, 1.0)), 0.0)
