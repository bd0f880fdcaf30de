"""Total mass of the density formula for one token given its past: one, or more where it folds.

The formula integrates Normal(x - mu(x); 0, sigma^2 I) max(det D(x), 0) over x. By the area formula
that is the expectation, over residuals e, of the number of x with x - mu(x) = e and det D(x) > 0.
The map has degree one: of its preimages of e, one more has a positive determinant than a negative
one. So the mass is 1 + E[number of preimages with a negative determinant]. (Not in the paper.)
"""

import math

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from probattn.arguments import check_arguments
from probattn.quadrature import integrate_cells, quartered

_NEGLIGIBLE = 1e-16  # fraction of the mass that one interval may lack
_TAILS = 9.0  # standard deviations of the residual within which the mass is looked for
_CELL = 2.0  # standard deviations that a residual may change by within a square
_MOST_SQUARES = 2**18


def conditional_mass(
    past: ArrayLike,
    w_query: ArrayLike,
    w_key: ArrayLike,
    scale: float,
    *,
    bound: float | None = None,
    tolerance: float = 1e-6,
) -> float:
    """Integrate the density formula over x_t, given the past; 1 where it is a density.

    In one dimension the integral is exact to rounding: the line is cut where the determinant
    changes sign, and on an interval where it is positive the integral is a difference of normal
    distribution functions. Cuts are found by bisection, led by a bound on how fast the variance
    can change (its logarithm has slope at most |a| times the spread of the past), so that no fold
    is overlooked. In two dimensions it is adaptive cubature, over squares that the same bound
    shows to hold all of the mass and no hidden peak.

    Args:
        past: the tokens before x_t (t, d), d = 1 or 2; t = 0 is allowed.
        w_query: W_Q (d, r).
        w_key: W_K (d, r).
        scale: sigma > 0, in the unit of x.
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.
        tolerance: absolute error aimed at in two dimensions.

    Returns:
        The mass, at least 1 up to the error of the integral.

    Raises:
        ValueError: if the shapes do not fit, d > 2, an argument is not finite, or scale, bound or
            tolerance is not positive.
        RuntimeError: if the integral in two dimensions does not reach the tolerance, or the
            coupling is too sharp for it.
    """
    past = np.asarray(past, dtype=np.float64)
    w_query, w_key = (np.asarray(w, dtype=np.float64) for w in (w_query, w_key))
    if past.ndim != 2 or w_query.ndim != 2 or w_key.ndim != 2:
        raise ValueError(
            f"past has shape {past.shape}, w_query {w_query.shape} and w_key {w_key.shape}: "
            "expected (t, d), (d, r) and (d, r)"
        )
    for name, value in (("scale", scale), ("tolerance", tolerance)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}: expected a finite number > 0")
    check_arguments(past if len(past) else np.zeros((1, past.shape[1])), w_query, w_key, bound)
    if (d := past.shape[1]) not in (1, 2):
        raise ValueError(
            f"past has shape {past.shape}, d = {d}: quadrature is for d = 1 and d = 2; beyond, "
            "compare with a density of known mass by Monte Carlo"
        )
    if not all(np.all(np.isfinite(array)) for array in (past, w_query, w_key)):
        raise ValueError("past, w_query or w_key is not finite: expected finite numbers only")
    if len(past) < 2:
        return 1.0  # no spread, no change of variables
    # In NumPy, whose float64 does not depend on JAX's configuration.
    matrix = w_key @ w_query.T / math.sqrt(w_query.shape[1])
    context = past
    if bound is not None:
        context = past / np.sqrt(1 + np.sum((past / bound) ** 2, axis=1, keepdims=True))
    if d == 1:
        return _mass_on_the_line(context[:, 0], float(matrix[0, 0]), scale)
    return _mass_in_the_plane(context, matrix, scale, tolerance)


def _mass_on_the_line(context: Float[np.ndarray, " t"], a: float, scale: float) -> float:
    low, high = context.min() - _TAILS * scale, context.max() + _TAILS * scale
    steepness = abs(a) * (context.max() - context.min())
    finest = 4 * np.finfo(float).eps * max(abs(low), abs(high))
    edges = np.linspace(low, high, 1001)
    left, right = edges[:-1], edges[1:]
    mass = 0.0
    while len(left):
        middle, half = (left + right) / 2, (right - left) / 2
        # The determinant is 1 - exp(size).
        size = np.full_like(middle, -np.inf)
        if a > 0:
            size = math.log(a) + _log_variance(middle, context, a)
        rising, falling = size + steepness * half < 0, size - steepness * half > 0
        # Undecided, the determinant is within 2 steepness half of zero: where that times the width
        # is negligible the rise is counted, if it is one. (Where the variance only touches 1 / a,
        # intervals down to rounding would be too many.)
        negligible = (4 * steepness * half**2 < _NEGLIGIBLE * scale) | (half < finest)
        decided = rising | falling | negligible
        counted = decided & ~falling
        rise = _distribution(right[counted], context, a, scale)
        rise -= _distribution(left[counted], context, a, scale)
        mass += np.maximum(rise, 0.0).sum()
        left, middle, right = left[~decided], middle[~decided], right[~decided]
        left, right = np.concatenate([left, middle]), np.concatenate([middle, right])
    return float(mass)


def _distribution(
    x: Float[np.ndarray, " n"], context: Float[np.ndarray, " t"], a: float, scale: float
) -> Float[np.ndarray, " n"]:
    mean, _ = _moments(x, context, a)
    from scipy.special import ndtr

    return ndtr((x - mean) / scale)


def _moments(
    x: Float[np.ndarray, " n"], context: Float[np.ndarray, " t"], a: float
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return mean and variance of the context under the attention of each token x."""
    weights = _softmax(a * x[:, None] * context)
    mean = weights @ context
    return mean, np.sum(weights * (context - mean[:, None]) ** 2, axis=1)


def _log_variance(
    x: Float[np.ndarray, " n"], context: Float[np.ndarray, " t"], a: float
) -> Float[np.ndarray, " n"]:
    """Return the logarithm of the variance of the context under the attention of each token x.

    Where weights underflow it is an upper bound: the mean square distance from the token of largest
    weight is no smaller than the variance.
    """
    _, variance = _moments(x, context, a)
    lost = variance <= 1e-280 * np.ptp(context) ** 2
    with np.errstate(divide="ignore"):
        found = np.log(variance)
        logits = a * x[lost, None] * context
        top = np.argmax(logits, axis=1)
        terms = logits - logits.max(axis=1, keepdims=True)
        terms += 2 * np.log(np.abs(context - context[top, None]))
    found[lost] = np.max(terms, axis=1) + math.log(len(context))
    return found


def _mass_in_the_plane(
    context: Float[np.ndarray, "t 2"],
    matrix: Float[np.ndarray, "2 2"],
    scale: float,
    tolerance: float,
) -> float:
    def density(x: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, " n"]:
        weights = _softmax(x @ matrix.T @ context.T)
        mean = weights @ context
        centred = context - mean[:, None, :]
        covariance = np.einsum("ns,nsi,nsj->nij", weights, centred, centred)
        determinant = np.linalg.det(np.eye(2) - covariance @ matrix)
        squared = np.sum((x - mean) ** 2, axis=1) / scale**2
        return np.maximum(determinant, 0.0) * np.exp(-squared / 2) / (2 * math.pi * scale**2)

    mass = integrate_cells(density, *_cells(context, matrix, scale), tolerance=tolerance)
    if mass < 1 - 2 * tolerance:
        raise RuntimeError(
            f"the integral came out as {mass:g}, and the mass is 1 at least: ask for a smaller "
            f"tolerance than {tolerance:g}"
        )
    return mass


def _cells(
    context: Float[np.ndarray, "t 2"], matrix: Float[np.ndarray, "2 2"], scale: float
) -> tuple[Float[np.ndarray, "cells 2"], Float[np.ndarray, " cells"]]:
    """Return squares that hold every peak: outside of them x - mu(x) is beyond the tails.

    The derivative of mu is Cov(x) A. A step of length s changes the logarithm of every weight's
    ratio to any other by at most |A| times the spread times s, and Cov by no more than that factor.
    So within a square mu moves by at most |A| |Cov(centre)| exp(|A| spread s) s.
    """
    spread = math.hypot(*np.ptp(context, axis=0))
    strength = float(np.linalg.norm(matrix, 2))
    low, high = context.min(0) - _TAILS * scale, context.max(0) + _TAILS * scale
    centres, halves = ((low + high) / 2)[None], np.array([np.max(high - low) / 2])
    found: list[tuple[np.ndarray, np.ndarray]] = []
    while len(centres):
        if len(centres) > _MOST_SQUARES:
            raise RuntimeError(
                f"the coupling {strength:.4g} is too sharp for scale {scale:g} and tokens "
                f"{spread:.4g} apart: more places than can be looked at may hold mass"
            )
        weights = _softmax(centres @ matrix.T @ context.T)
        mean = weights @ context
        variance = np.sum(weights[..., None] * (context - mean[:, None, :]) ** 2, axis=(1, 2))
        variance = np.maximum(variance, 1e-300 * spread**2)  # weights may have underflowed
        reach = math.sqrt(2) * halves
        with np.errstate(over="ignore"):
            moves = (1 + strength * np.exp(strength * spread * reach) * variance) * reach
        near = np.linalg.norm(centres - mean, axis=1) - moves < _TAILS * scale
        small = moves < _CELL * scale
        found.append((centres[near & small], halves[near & small]))
        centres, halves = quartered(centres[near & ~small], halves[near & ~small])
    whole = [np.concatenate(parts) for parts in zip(*found, strict=True)]
    return whole[0], whole[1]


def _softmax(logits: Float[np.ndarray, "n t"]) -> Float[np.ndarray, "n t"]:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)
