"""How far embeddings may move from where they are before a block D_t can be singular.

D' = I - Sigma' A is singular only if (Sigma' - Sigma) H has the eigenvalue 1, where H = A D^-1 is
the coupling amplified by the present attention. With H = K Q^T balanced, the change of the
covariance of f = a.Q^T y and g = a.K^T y is then at least 1 for some unit vector a. Its first order
in the change of the embeddings is computed, and the rest is bounded. The names are those of the
proof in docs/mathematics.md, section 7; every constant bounds something for all unit vectors a at
once.
"""

import math
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from probattn.blocks.singular_values import finite_blocks, singular_value_decomposition

_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)

_HALVINGS = 14  # of the interval that holds the radius; its lower end is returned
# An eigenvalue of m is overestimated by at most m^(1 / 2^(squarings + 1)): that of the first order,
# and those of the rest, of which roots are taken.
_SQUARINGS, _SQUARINGS_OF_REST = 4, 2
_NUMBERS = 2**18  # in arrays of positions x past x m x m, at once


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
    tiny = float(jnp.finfo(weights.dtype).tiny)
    terms = lax.map(
        lambda row: _terms(joint, sides, *row),
        (weights, rounding, sides.own, jnp.arange(length)),
        batch_size=max(1, min(length, _NUMBERS // (length * rank**2))),
    )

    def reached(radius: Float[Array, " T"]) -> Float[Array, " T"]:
        quadratic, shift = _quadratic(joint, terms, radius)
        change = (terms.slope + quadratic * radius) * radius
        change = change * (1 + 4 * unit * terms.condition) * jnp.exp(4 * rounding)
        found = change + (unit + rounding) * 2 * terms.spread
        # Underflow loses sqrt(tiny) at most, which grows by e^shift: docs/mathematics.md, 7.
        return jnp.where(shift < -math.log(tiny) / 4, found, jnp.full_like(found, jnp.inf))

    # The radius is below these, since the quadratic form grows with it.
    least, _ = _quadratic(joint, terms, jnp.zeros_like(rounding))
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
    rounding: Float[Array, ""],
    own: Float[Array, " m"],
    position: Int[Array, ""],
) -> _Terms:
    sizes, overlap = sides.sizes, sides.overlap
    past = (jnp.arange(len(weights)) < position).astype(weights.dtype)
    # A weight that has underflowed grows with a change as any other. So does its square.
    tiny = float(jnp.finfo(weights.dtype).tiny)
    weights = jnp.maximum(weights, tiny) * past
    squares = jnp.maximum(weights, math.sqrt(tiny)) ** 2 * past
    queries, keys = (part - _matmul(weights[None, :], part) for part in (sides.queries, sides.keys))
    left, right, amplified, condition = _amplified(sizes, weights, queries, keys)
    f, g = _matmul(queries, right), _matmul(keys, left)
    cross = _matmul(right.T, _matmul(overlap, left))  # Q^T K
    pulling, logits = sizes * own, keys * sizes[None, :]  # A x_t, and A^T y_s, in U and V
    pull = jnp.linalg.norm(pulling)
    mean = _symmetric(_matmul((weights[:, None] * f).T, g))

    counts = squares if joint else weights
    total = jnp.sum(squares)
    others = jnp.sqrt((1 - weights) ** 2 + total - squares) if joint else 2 * (1 - weights)
    reach = jnp.stack([others, jnp.linalg.norm(logits, axis=-1)], axis=-1) * past[:, None]

    to_pull = _matmul(_matmul(pulling, overlap.T), right), _matmul(pulling, left)
    vectors, h = _quadratic_forms(f, g, mean, amplified, cross, to_pull, pull)
    squared = h**2
    if not joint:
        vectors, h = jnp.sqrt(vectors), jnp.abs(h)
    # XLA would else compute every entry anew for each of the sums.
    vectors, h, squared = lax.optimization_barrier((vectors, h, squared))

    def summed(measure: Array, forms: Array) -> Array:
        return _matmul(measure[None, :], forms.reshape(len(forms), -1)).reshape(mean.shape)

    deviation = jnp.sqrt(summed(weights, squared))
    of_vectors = summed(counts, vectors)
    of_h = jnp.sqrt(summed(counts, squared)) if joint else summed(counts, h)

    # Second moments of f, g and (f - g) / 2 under every measure, and with the logits.
    parts = jnp.stack([f, g, (f - g) / 2])
    measures = jnp.stack([weights, weights * reach[:, 0] ** 2, weights * reach[:, 1] ** 2])
    if joint:
        on_squares = [squares, squares * reach[:, 0] ** 2, squares * reach[:, 1] ** 2]
        measures = jnp.concatenate([measures, jnp.stack(on_squares)])
    weighted = measures.T[None, :, :, None] * parts[:, :, None, :]
    rows = jnp.swapaxes(weighted.reshape(*parts.shape[:2], -1), -1, -2)
    moments = _matmul(rows, parts).reshape(-1, *mean.shape)
    slopes = _matmul((weights[:, None] * logits).T[None], parts)
    by_logits = _matmul((weights[:, None] * logits).T, logits)
    middle = jnp.diag(amplified) / 2 + _symmetric(cross) / 2
    several = jnp.stack([by_logits, mean, of_h, middle])
    largest = _largest(
        jnp.concatenate([moments, _matmul(jnp.swapaxes(slopes, -1, -2), slopes), several]),
        _SQUARINGS_OF_REST,
    )
    variances, slopes, others = jnp.split(largest, [len(moments), len(moments) + 3])
    deviations = jnp.sqrt(variances.reshape(3, -1))
    by_logits, (shared, third, middle) = jnp.sqrt(others[0]), others[1:]
    of_all, counted = deviations[:, :3], deviations[:, -3:]
    spread = of_all[0, 0] * of_all[1, 0]
    # What the error of the weights does to sums whose terms have both signs.
    third, shared = third + rounding * spread, shared + rounding * spread
    slopes = jnp.sqrt(slopes) + rounding * by_logits * of_all[:, 0]

    deviation = deviation * by_logits
    first = jnp.sqrt(of_vectors + deviation**2) if joint else of_vectors + deviation
    third_rest = of_all[0, 1:] * of_all[1, 1:] + shared * _matmul(weights, reach**2)
    logit_variance = jnp.minimum(_matmul(weights, reach[:, 0] ** 2), 1.0)
    if joint:
        product = jnp.sum(f * g, axis=-1)
        peak = jnp.linalg.norm(f, axis=-1) * jnp.linalg.norm(g, axis=-1) + jnp.abs(product)
        peak = jnp.max(weights * (peak / 2 + shared))
        flat = (jnp.sqrt(peak) + jnp.sqrt((spread + shared) * total)) ** 2
        third_rest = jnp.stack([jnp.minimum(third_rest[0], flat), third_rest[1]])
        logit_variance = jnp.minimum(jnp.minimum(logit_variance, 0.5), jnp.max(weights))
    means = jnp.stack([counted[:, 0], slopes], axis=-1)
    return _Terms(
        condition,
        spread,
        _largest(first[None], _SQUARINGS)[0] + rounding * spread * (pull + by_logits),
        jnp.max(sizes),
        pull,
        reach,
        jnp.stack([jnp.sqrt(logit_variance), by_logits]),
        jnp.sqrt(jnp.max(amplified)),
        middle,
        jnp.max(weights),
        jnp.sqrt(total),
        third,
        jnp.sqrt(third_rest),
        counted[0, 1:] + counted[1, 1:],
        means[0] + means[1],
        of_all[0, 1:] + of_all[1, 1:],
        means[2],
        of_all[2, 1:],
    )


def _quadratic_forms(
    f: Float[Array, "T m"],
    g: Float[Array, "T m"],
    mean: Float[Array, "m m"],
    amplified: Float[Array, " m"],
    cross: Float[Array, "m m"],
    to_pull: tuple[Float[Array, " m"], Float[Array, " m"]],
    pull: Float[Array, ""],
) -> tuple[Float[Array, "T m m"], Float[Array, "T m m"]]:
    """Return the coefficients of each token's first order: squared lengths of vectors, and h.

    The vector of i and j is (Q_i g_j + K_i f_j) + h_ij A x_t, made symmetric.

    Args:
        f: (Q a).y_s for the unit vectors a = e_1 .. e_m.
        g: (K a).y_s, likewise.
        mean: symmetric part of the mean of f_i g_j.
        amplified: squared lengths of Q_i, and of K_i.
        cross: Q_i.K_j.
        to_pull: Q_i.A x_t and K_i.A x_t.
        pull: |A x_t|.
    """
    f_i, f_j, g_i, g_j = f[:, :, None], f[:, None, :], g[:, :, None], g[:, None, :]
    both, product, own = f**2 + g**2, f * g, jnp.diagonal(cross)
    h = (f_i * g_j + g_i * f_j) / 2 - mean[None]
    squared = (amplified[None, :, None] * both[:, None, :]) / 4
    squared += (amplified[None, None, :] * both[:, :, None]) / 4
    squared += (
        own[None, :, None] * product[:, None, :] + product[:, :, None] * own[None, None, :]
    ) / 2
    squared += (cross[None] * f_i * g_j + cross.T[None] * g_i * f_j) / 2
    query, key = to_pull
    along = query[None, :, None] * g_j + key[None, :, None] * f_j
    along += query[None, None, :] * g_i + key[None, None, :] * f_i
    squared += h * along + h**2 * pull**2 + jnp.diag(amplified / 2)[None] * both[:, None, :]
    return jnp.maximum(squared, jnp.zeros_like(squared)), h


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


def _quadratic(joint: bool, terms: _Terms, radius: Float[Array, " T"]) -> tuple[Array, Array]:
    """Bound the rest of the change over the squared radius, and the shift of every logit.

    Both bounds grow with the radius.
    """
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
    return form, most


def _exponential(x: Array) -> tuple[Array, Array]:
    """Return upper bounds of (e^x - 1) / x and (e^x - 1 - x) / x^2, x >= 0."""
    small = x < 0.3
    safe = jnp.where(small, jnp.ones_like(x), x)
    less_one = jnp.expm1(safe)
    second = jnp.where(small, 0.5 + x / 6 + x**2 / 22, (less_one - safe) / safe**2)
    return 1 + x * second, second


def _symmetric(matrices: Float[Array, "*batch m m"]) -> Float[Array, "*batch m m"]:
    return (matrices + jnp.swapaxes(matrices, -1, -2)) / 2


def _largest(matrices: Float[Array, "k m m"], squarings: int) -> Float[Array, " k"]:
    """Bound the largest |eigenvalue| of symmetric matrices by norms of their powers."""
    # A norm squares the entries, which loses those below the root of the smallest number.
    found = jnp.max(jnp.abs(matrices), axis=(-2, -1))
    matrices = matrices / jnp.where(found > 0, found, jnp.ones_like(found))[..., None, None]
    for step in range(squarings):
        size = jnp.linalg.norm(matrices, axis=(-2, -1))
        found = found * size ** (0.5**step)
        matrices = matrices / jnp.where(size > 0, size, jnp.ones_like(size))[..., None, None]
        matrices = _matmul(matrices, matrices)
    return found * jnp.linalg.norm(matrices, axis=(-2, -1)) ** (0.5**squarings)
