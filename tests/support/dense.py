"""Dense Jacobians of the registry's cases, and what follows from them, in NumPy alone.

Derivatives are complex steps: the definition is evaluated at x + ih for an h so small that its
square vanishes, and the imaginary part over h is the derivative, exact to rounding. Nothing is
compiled. `tests/probattn/test_dense.py` compares all of it with `probattn._reference`, which JAX
differentiates.
"""

import functools
import math
from typing import NamedTuple

import jax
import numpy as np

from tests.support.cases import make

STEP = 2.0**-100  # a power of two, so that dividing by it rounds nothing

# For programs that run once or twice, and whose rounding no test is about.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Dense(NamedTuple):
    """One sequence's residual, its blocks and their derivatives.

    Attributes:
        residual: e_t, (T, d).
        blocks: D_t, (T, d, d), the derivative of e_t by x_t.
        slopes: derivative of the blocks by x, w_query, w_key and the bound; each (T, d, d, ...).
    """

    residual: np.ndarray
    blocks: np.ndarray
    slopes: tuple[np.ndarray, ...]


def weights(x, w_query, w_key, bound=None):
    """Context phi(x_s) and attention weights, from their definition; of complex numbers too."""
    squared = 0 if bound is None else np.sum(x * x, -1, keepdims=True) / bound**2
    context = x / np.sqrt(1 + squared)
    logits = (x @ w_query) @ np.swapaxes(context @ w_key, -1, -2) / math.sqrt(w_query.shape[-1])
    past = np.tri(x.shape[-2], k=-1, dtype=bool)
    largest = np.max(np.where(past, logits.real, -1e300), axis=-1, keepdims=True)
    terms = np.where(past, np.exp(np.where(past, logits - largest, 0)), 0)
    total = terms.sum(-1, keepdims=True)
    return context, terms / np.where(total == 0, 1, total)  # position 0 attends to nothing


def residual(x, w_query, w_key, bound=None):
    """e_t of every position, (..., T, d); of complex numbers too."""
    context, alpha = weights(x, w_query, w_key, bound)
    return x - alpha @ context


def whole_jacobian(x, w_query, w_key, bound=None):
    """Jacobian of the map x -> e of whole sequences, (..., T * d, T * d), from its definition."""
    *leading, length, width = x.shape
    size = length * width
    directions = np.eye(size).reshape(size, *(1 for _ in leading), length, width)
    moved = residual(x + 1j * STEP * directions, w_query, w_key, bound).imag / STEP
    return np.moveaxis(moved.reshape(size, *leading, size), 0, -1)


def diagonal_blocks(jacobian, length):
    """D_t of a whole Jacobian, (..., T, d, d)."""
    *leading, size, _ = jacobian.shape
    parts = jacobian.reshape(*leading, length, size // length, length, size // length)
    return np.stack([parts[..., t, :, t, :] for t in range(length)], axis=-3)


def covariance(alpha, left, right):
    """Covariance under each row of weights, both factors centred at the row's own mean."""
    left, right = (
        part[..., None, :, :] - (alpha @ part)[..., :, None, :] for part in (left, right)
    )
    return np.swapaxes(left, -1, -2) @ (alpha[..., None] * right)


def blocks(x, w_query, w_key, bound=None):
    """I - Cov(phi(x_s), k_s) W_Q^T / sqrt(r), which Theorem 1 says D_t is, (..., T, d, d)."""
    context, alpha = weights(x, w_query, w_key, bound)
    coupled = covariance(alpha, context, context @ w_key)
    rank = w_query.shape[-1]
    transposed = np.swapaxes(w_query, -1, -2)[..., None, :, :]
    return np.eye(x.shape[-1]) - coupled @ transposed / math.sqrt(rank)


def reduced_blocks(x, w_query, w_key, bound=None):
    """R_t = I - Cov(q_s, k_s) / sqrt(r), (..., T, r, r)."""
    context, alpha = weights(x, w_query, w_key, bound)
    rank = w_query.shape[-1]
    coupled = covariance(alpha, context @ w_query, context @ w_key)
    return np.eye(rank) - coupled / math.sqrt(rank)


def last_block(x, w_query, w_key, bound=None):
    """D_t of the last position alone, (..., d, d), for sequences of any length."""
    squared = 0 if bound is None else np.sum(x * x, -1, keepdims=True) / bound**2
    past = (x / np.sqrt(1 + squared))[..., :-1, :]
    keys, rank = past @ w_key, w_query.shape[-1]
    logits = x[..., -1:, :] @ w_query @ np.swapaxes(keys, -1, -2) / math.sqrt(rank)
    alpha = np.exp(logits - logits.real.max(-1, keepdims=True))
    alpha = alpha / alpha.sum(-1, keepdims=True)
    coupled = covariance(alpha, past, keys)[..., 0, :, :]
    return np.eye(x.shape[-1]) - coupled @ np.swapaxes(w_query, -1, -2) / math.sqrt(rank)


def last_log_abs_slope(inputs, number, entries=None):
    """Derivative of log|det D_t| at the last position by entries of one input, all by default."""
    array = inputs[number]
    entries = np.arange(array.size) if entries is None else entries
    real = np.linalg.slogdet(last_block(*inputs))[0]
    slopes = []
    for entry in np.array_split(entries, -(-len(entries) // 64)):
        moved = list(inputs)
        directions = np.zeros((len(entry), array.size))
        directions[np.arange(len(entry)), entry] = STEP
        moved[number] = array + 1j * directions.reshape(-1, *array.shape)
        # log det is log|det| + i angle, and the sign of det(x + ih) is 1 + ih times the slope.
        slopes.append((np.linalg.slogdet(last_block(*moved))[0] / real).imag / STEP)
    return np.concatenate(slopes)


def dense_of(x, w_query, w_key, bound=None):
    """`Dense` of one sequence; the derivative by the bound is zero where there is none."""
    inputs = tuple(np.asarray(array, np.float64) for array in (x, w_query, w_key))
    slopes = []
    for number, array in enumerate((*inputs, np.float64(bound or 0))):
        directions = np.eye(array.size).reshape(array.size, *array.shape)
        if number == 3:
            # A bound for each direction, so that it broadcasts over positions and dimensions.
            moved = None if bound is None else bound + 1j * STEP * directions.reshape(-1, 1, 1)
            found = blocks(*(part[None] for part in inputs), moved)
        else:
            moved = [part[None] for part in inputs]
            moved[number] = array + 1j * STEP * directions
            found = blocks(*moved, bound)
        slope = np.moveaxis(found.imag / STEP, 0, -1)
        slopes.append(slope.reshape(*slope.shape[:-1], *array.shape))
    jacobian = whole_jacobian(*inputs, bound)
    return Dense(residual(*inputs, bound), diagonal_blocks(jacobian, len(x)), tuple(slopes))


@functools.cache
def dense(case, dtype=np.float64, bound=None):
    """`Dense` of a case, whose numbers are first rounded to the dtype."""
    return dense_of(*make(case, dtype), bound)


def flat(parts):
    """Derivatives of T numbers with respect to each input, side by side: shape (T, inputs)."""
    return np.concatenate([np.reshape(part, (len(part), -1)) for part in parts], axis=1)


def sigma_min(found):
    return np.linalg.svd(found.blocks, compute_uv=False)[:, -1]


def signed_sigma_min(matrices):
    sizes = np.linalg.svd(matrices, compute_uv=False)[..., -1]
    return np.where(real_eigenvalue_at_most_zero(matrices), -sizes, sizes)


def log_abs_slopes(found):
    """Derivative of log|det D_t|, tr(D_t^-1 dD_t), by each input; NaN where D_t is singular."""
    inverse = np.full_like(found.blocks, np.nan)
    regular = np.linalg.slogdet(found.blocks)[0] != 0
    inverse[regular] = np.linalg.inv(found.blocks[regular])
    return [np.einsum("tba,tab...->t...", inverse, slope) for slope in found.slopes]


def determinant_slopes(found):
    """Derivative of det D_t by each input, from cofactors: there is one at a singular block."""
    width = found.blocks.shape[-1]
    cofactors = np.ones_like(found.blocks)
    for i, j in np.ndindex(width, width):
        minor = np.delete(np.delete(found.blocks, i, axis=1), j, axis=2)
        cofactors[:, i, j] = (-1) ** (i + j) * np.linalg.det(minor)
    return [np.einsum("tab,tab...->t...", cofactors, slope) for slope in found.slopes]


def margin_slopes(found):
    """Derivative of the signed smallest singular value, where it is simple, by each input."""
    left, _, right = np.linalg.svd(found.blocks)
    sign = np.where(real_eigenvalue_at_most_zero(found.blocks), -1.0, 1.0)
    return [
        np.einsum("t,ta,tb,tab...->t...", sign, left[..., -1], right[..., -1, :], slope)
        for slope in found.slopes
    ]


def real_eigenvalue_at_most_zero(matrices):
    eigenvalues = np.linalg.eigvals(matrices)
    return np.any((np.abs(eigenvalues.imag) < 1e-12) & (eigenvalues.real <= 0), axis=-1)
