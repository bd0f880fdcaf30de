"""Tokens and projections of one sequence, and log|det| from the definition."""

import jax.numpy as jnp
import numpy as np

import probattn as pa

INPUTS = (0, 1, 2)
SHORT, LONG = 0.3, 30.0  # scales at which all products of queries and keys are short, or few are


def inputs(length, scale=1.0, dtype=np.float64, width=3, rank=3, seed=0):
    rng = np.random.default_rng(seed)
    x = scale * rng.standard_normal((length, width))
    w_query, w_key = rng.standard_normal((2, width, rank)) / np.sqrt(width)
    return tuple(jnp.asarray(array, dtype) for array in (x, w_query, w_key))


def differences(gradient, point, step=1e-4):
    """Derivative of a gradient at a flat point, by differences of fourth order."""
    rows = []
    for direction in np.eye(len(point)):
        near, far = (
            gradient(point + size * direction) - gradient(point - size * direction)
            for size in (step, 2 * step)
        )
        rows.append((8 * near - far) / (12 * step))
    return np.array(rows)


def defined(x, w_query, w_key):
    """log|det R_t| from the definition of a covariance."""
    queries, keys = x @ w_query, x @ w_key
    return jnp.linalg.slogdet(reduced_blocks(pa.attention_weights(queries, keys), queries, keys))[1]


def reduced_blocks(weights, queries, keys):
    left, right = (part - (weights @ part)[:, None] for part in (queries, keys))
    covariance = jnp.einsum("ts,tsa,tsb->tab", weights, left, right)
    rank = keys.shape[1]
    return jnp.eye(rank) - covariance / np.sqrt(rank)
