"""How far embeddings may move from where they are before a block D_t can be singular.

D' = I - Sigma' A is singular only if (Sigma' - Sigma) H has the eigenvalue 1, where H = A D^-1 is
the coupling amplified by the present attention. With H = K Q^T balanced, the change of the
covariance of f = a.Q^T y and g = a.K^T y is then at least 1 for some unit vector a. Its first order
in the change of the embeddings is computed, and the rest is bounded. The names are those of the
proof in docs/mathematics.md, section 7; every constant bounds something for all unit vectors a at
once.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from probattn.blocks.singular_values import finite_blocks, singular_value_decomposition

_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)

_HALVINGS = 24  # of the interval that holds the radius; its lower end is returned
_SQUARINGS = 4  # an eigenvalue of m is then overestimated by at most m^(1/32)
_NUMBERS = 2**20  # in arrays of positions x past x m x m, at once


class Sides(NamedTuple):
    """A sequence as the coupling A = U S V^T sees it.

    Attributes:
        sizes: S, (m,).
        overlap: V^T U, (m, m).
        queries: V^T y_s, (T, m), of the values y_s.
        keys: U^T y_s, (T, m).
        own: V^T x_t, (T, m), of the embeddings themselves.
    """

    sizes: Float[Array, " m"]
    overlap: Float[Array, "m m"]
    queries: Float[Array, "T m"]
    keys: Float[Array, "T m"]
    own: Float[Array, "T m"]


class _Terms(NamedTuple):
    """Constants of one position. Pairs hold the factor of the past's change and of the query's."""

    condition: Array  # |R| |R^-1|
    spread: Array  # sd f sd g
    slope: Array  # the first order
    coupling: Array  # |A|
    pull: Array  # |A x_t|
    reach: Array  # (T, 2): w_s and |A^T y_s|, for the change of every logit
    logits: Array  # the standard deviation of that change
    size: Array  # |Q| = |K|
    middle: Array  # |Q + K|^2 / 4
    largest: Array  # of the weights
    norm: Array  # of the weights
    third: Array  # h
    third_rest: Array  # |h| under squared logits
    product: Array  # f and g under logits
    mean: Array  # of f and g, first order
    mean_rest: Array
    skew: Array  # the same two of (f - g) / 2
    skew_rest: Array
    own: Array  # f and g in the norm that a change of the past is measured in


def local_radius(
    joint: bool,
    unit: float,
    sides: Sides,
    weights: Float[Array, "T T"],
    rounding: Float[Array, " T"],
) -> Float[Array, " T"]:
    """Return a radius within which no change of x_0 .. x_t makes D_t singular; 0 if none is found.

    Args:
        joint: whether the norm is that of all changes together, or the largest of any token.
        unit: what a sum may err by, relative to its terms.
        sides: one sequence.
        weights: its attention weights, all finite.
        rounding: what the weights may err by, relative to them.
    """
    length, rank = sides.keys.shape
    terms = lax.map(
        lambda row: _terms(joint, sides, *row),
        (weights, sides.own, jnp.arange(length)),
        batch_size=max(1, min(length, _NUMBERS // (length * rank**2))),
    )

    def reached(radius: Float[Array, " T"]) -> Float[Array, " T"]:
        change = (terms.slope + _quadratic(joint, terms, radius) * radius) * radius
        return change * (1 + 4 * unit * terms.condition) + (unit + rounding) * 2 * terms.spread

    # The radius is below these, since the quadratic form grows with it.
    least = _quadratic(joint, terms, jnp.zeros_like(rounding))
    most = jnp.minimum(1 / terms.slope, 1 / jnp.sqrt(least))
    most = jnp.minimum(most, float(jnp.finfo(most.dtype).max) ** 0.25)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        proved = reached(middle) < 1  # not where it is NaN
        return jnp.where(proved, middle, low), jnp.where(proved, high, middle)

    return lax.fori_loop(0, _HALVINGS, halve, (jnp.zeros_like(most), most))[0]


def _terms(
    joint: bool,
    sides: Sides,
    weights: Float[Array, " T"],
    own: Float[Array, " m"],
    position: Int[Array, ""],
) -> _Terms:
    sizes, overlap = sides.sizes, sides.overlap
    queries, keys = (part - _matmul(weights[None, :], part) for part in (sides.queries, sides.keys))
    left, right, amplified, condition = _amplified(sizes, weights, queries, keys)
    f, g = _matmul(queries, right), _matmul(keys, left)
    skew = (f - g) / 2
    cross = _matmul(right.T, _matmul(overlap, left))  # Q^T K
    pulling, logits = sizes * own, keys * sizes[None, :]  # A x_t, and A^T y_s, in U and V
    pull = jnp.linalg.norm(pulling)

    # h = f g less its mean, and the vectors (Q_i g_j + K_i f_j) + h_ij A x_t, made symmetric.
    h = _symmetric(f[:, :, None] * g[:, None, :])
    mean = _einsum("s,sij->ij", weights, h)
    h = h - mean[None]
    both, product = f**2 + g**2, f * g
    squared = amplified[None, :, None] * both[:, None, :] / 2
    squared += jnp.diagonal(cross)[None, :, None] * product[:, None, :]
    squared += cross[None] * f[:, :, None] * g[:, None, :]
    to_pull = _matmul(_matmul(pulling, overlap.T), right)[None, :, None] * g[:, None, :]
    to_pull += _matmul(pulling, left)[None, :, None] * f[:, None, :]
    squared = _symmetric(squared + 2 * h * to_pull) + h**2 * pull**2
    squared += jnp.diag(amplified / 2)[None] * both[:, None, :]
    vectors = jnp.sqrt(jnp.maximum(squared, jnp.zeros_like(squared)))

    past = (jnp.arange(len(weights)) < position).astype(weights.dtype)
    counts = weights**2 if joint else weights
    total = jnp.sum(weights**2)
    others = jnp.sqrt((1 - weights) ** 2 + total - weights**2) if joint else 2 * (1 - weights)
    reach = jnp.stack([others, jnp.linalg.norm(logits, axis=-1)], axis=-1) * past[:, None]

    def over(measure: Array, part: Array) -> Array:
        return jnp.sqrt(_largest(_matmul((measure[:, None] * part).T, part)))

    def under(measure: Array, part: Array) -> Array:
        return jnp.stack([over(measure * reach[:, i] ** 2, part) for i in (0, 1)])

    def in_norm(matrices: Array) -> Array:
        if joint:
            return jnp.sqrt(_einsum("s,sij->ij", counts, matrices**2))
        return _einsum("s,sij->ij", counts, matrices)

    by_logits = jnp.sqrt(_largest(_matmul((weights[:, None] * logits).T, logits)))
    deviation = jnp.sqrt(_einsum("s,sij->ij", weights, h**2))
    first = in_norm(vectors), deviation * by_logits
    slope = _largest(jnp.sqrt(first[0] ** 2 + first[1] ** 2) if joint else first[0] + first[1])

    spread, shared = over(weights, f) * over(weights, g), _largest(mean)
    third_rest = under(weights, f) * under(weights, g) + shared * _matmul(weights, reach**2)
    logit_variance = jnp.minimum(_matmul(weights, reach[:, 0] ** 2), 1.0)
    if joint:
        peak = jnp.linalg.norm(f, axis=-1) * jnp.linalg.norm(g, axis=-1) + jnp.abs(product.sum(-1))
        peak = jnp.max(weights * (peak / 2 + shared))
        flat = (jnp.sqrt(peak) + jnp.sqrt((spread + shared) * total)) ** 2
        third_rest = jnp.stack([jnp.minimum(third_rest[0], flat), third_rest[1]])
        logit_variance = jnp.minimum(jnp.minimum(logit_variance, 0.5), jnp.max(weights))

    def mean_of(part: Array) -> Array:
        slopes = _matmul((weights[:, None] * logits).T, part)
        return jnp.stack([over(counts, part), jnp.sqrt(_largest(_matmul(slopes.T, slopes)))])

    middle = _largest(jnp.diag(amplified) / 2 + _symmetric(cross) / 2)
    return _Terms(
        condition,
        spread,
        slope,
        jnp.max(sizes),
        pull,
        reach,
        jnp.stack([jnp.sqrt(logit_variance), by_logits]),
        jnp.sqrt(jnp.max(amplified)),
        middle,
        jnp.max(weights),
        jnp.sqrt(total),
        _largest(in_norm(jnp.abs(h))),
        jnp.sqrt(third_rest),
        under(counts, f) + under(counts, g),
        mean_of(f) + mean_of(g),
        under(weights, f) + under(weights, g),
        mean_of(skew),
        under(weights, skew),
        over(counts, f) + over(counts, g),
    )


def _amplified(
    sizes: Float[Array, " m"],
    weights: Float[Array, " T"],
    queries: Float[Array, "T m"],
    keys: Float[Array, "T m"],
) -> tuple[Array, Array, Array, Array]:
    """Return K and Q of H = K Q^T in the bases U and V, its singular values, and |R| |R^-1|."""
    roots = jnp.sqrt(sizes)
    covariance = _matmul((weights[:, None] * queries).T, keys) * roots[:, None] * roots[None, :]
    block = jnp.eye(len(sizes), dtype=covariance.dtype) - covariance
    inverse = jnp.linalg.inv(block)
    found, inverse = finite_blocks(inverse)
    left, amplified, right = singular_value_decomposition(inverse * roots[:, None] * roots[None, :])
    size = jnp.sqrt(amplified)
    condition = jnp.linalg.norm(block) * jnp.linalg.norm(inverse)
    condition = jnp.where(found, condition, jnp.full_like(condition, jnp.inf))
    return left * size[None, :], right.T * size[None, :], amplified, condition


def _quadratic(joint: bool, terms: _Terms, radius: Float[Array, " T"]) -> Float[Array, " T"]:
    """Bound the rest of the change over the squared radius; the bound grows with the radius."""
    pull = jnp.stack([terms.pull + terms.coupling * radius, jnp.ones_like(radius)], axis=-1)
    most = terms.reach * pull[:, None, :]
    most = jnp.max(jnp.linalg.norm(most, axis=-1) if joint else jnp.sum(most, axis=-1), axis=-1)
    most = most * radius
    growth, curvature = _exponential(most)
    deviation = terms.logits * pull
    deviation = jnp.linalg.norm(deviation, axis=-1) if joint else jnp.sum(deviation, axis=-1)
    second = curvature * deviation * radius

    past = jnp.array([1, 0], radius.dtype)
    weight = jnp.minimum(terms.norm * jnp.exp(most), 1.0) if joint else jnp.ones_like(radius)
    variance = jnp.minimum(terms.largest * jnp.exp(most), 0.5) if joint else jnp.ones_like(radius)
    mean = (terms.mean + second[:, None] * terms.mean_rest) * pull
    skew = (terms.skew + second[:, None] * terms.skew_rest) * pull
    by_past = growth[:, None] * terms.product * pull + weight[:, None] * mean
    by_past = by_past * terms.size[:, None]
    third = terms.third_rest * pull
    # A quadratic form in the changes of the past and of the query: its entries, or half of them.
    squares = curvature[:, None] * third**2 + skew**2
    squares += (terms.middle * variance + by_past[:, 0])[:, None] * past[None, :]
    product = 2 * (curvature * third[:, 0] * third[:, 1] + skew[:, 0] * skew[:, 1])
    product += by_past[:, 1] + terms.coupling * terms.third
    if joint:
        gap = jnp.hypot(squares[:, 0] - squares[:, 1], product)
        form = (squares[:, 0] + squares[:, 1] + gap) / 2
    else:
        form = squares[:, 0] + squares[:, 1] + product
    return form + second * deviation * terms.size * terms.own


def _exponential(x: Array) -> tuple[Array, Array]:
    """Return upper bounds of (e^x - 1) / x and (e^x - 1 - x) / x^2, x >= 0."""
    small = x < 0.3
    safe = jnp.where(small, jnp.ones_like(x), x)
    less_one = jnp.expm1(safe)
    second = jnp.where(small, 0.5 + x / 6 + x**2 / 22, (less_one - safe) / safe**2)
    return 1 + x * second, second


def _symmetric(matrices: Float[Array, "*batch m m"]) -> Float[Array, "*batch m m"]:
    return (matrices + jnp.swapaxes(matrices, -1, -2)) / 2


def _largest(matrix: Float[Array, "m m"]) -> Float[Array, ""]:
    """Bound the largest |eigenvalue| of a symmetric matrix by a norm of its 16th power."""
    found = jnp.ones((), matrix.dtype)
    for step in range(_SQUARINGS):
        size = jnp.linalg.norm(matrix)
        found = found * size ** (0.5**step)
        matrix = matrix / jnp.where(size > 0, size, jnp.ones_like(size))
        matrix = _matmul(matrix, matrix)
    return found * jnp.linalg.norm(matrix) ** (0.5**_SQUARINGS)
