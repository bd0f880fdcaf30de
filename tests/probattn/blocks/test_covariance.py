"""Covariances under attention weights, against their definition in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probattn.attention import attention_weights
from probattn.blocks.covariance import attention_covariance

pytestmark = pytest.mark.usefixtures("strict_promotion")
LENGTHS = pytest.mark.parametrize("length", [1, 2, 7, 64, 65, 130])
SCALES = pytest.mark.parametrize("scale", [0.3, 30.0])


def inputs(length, scale=1.0, dtype=np.float64, leading=(), rank=3):
    rng = np.random.default_rng(length)
    queries, keys = (
        scale * rng.standard_normal((*leading, length, rank)).astype(dtype) for _ in range(2)
    )
    weights = np.asarray(attention_weights(queries, keys))
    return weights, queries - queries[..., :1, :], keys - keys[..., :1, :]


def definition(weights, queries, keys):
    found = np.zeros((*weights.shape[:-1], queries.shape[-1], keys.shape[-1]))
    for where in np.ndindex(weights.shape[:-1]):
        alpha = weights[where].astype(np.float64)
        left, right = (array[where[:-1]].astype(np.float64) for array in (queries, keys))
        left, right = left - alpha @ left, right - alpha @ right
        found[where] = left.T @ (alpha[:, None] * right)
    return found


@SCALES
@LENGTHS
def test_matches_definition(length, scale):
    arguments = inputs(length, scale)
    expected = definition(*arguments)
    found = attention_covariance(*arguments)
    np.testing.assert_allclose(found, expected, atol=1e-12 * scale**2)
    np.testing.assert_array_equal(found[:2], 0 * expected[:2])


@SCALES
@pytest.mark.parametrize("length", [7, 65])
def test_derivative_matches_that_of_the_definition(length, scale):
    arguments = inputs(length, scale)
    direction = np.random.default_rng(1).standard_normal((length, 3, 3))

    def defined(weights, queries, keys):
        left, right = queries - (weights @ queries)[:, None], keys - (weights @ keys)[:, None]
        return jnp.einsum("ts,tsa,tsb,tab->", weights, left, right, direction)

    def got(*arguments):
        return jnp.vdot(attention_covariance(*arguments), direction)

    expected = jax.grad(defined, (0, 1, 2))(*arguments)
    found = jax.jit(jax.grad(got, (0, 1, 2)))(*arguments)
    # The weights of a row sum to one: a derivative is one up to a number for each row.
    weights = arguments[0]
    along = [np.where(weights > 0, part[0], 0) for part in (found, expected)]
    along = [np.where(weights > 0, part - (weights * part).sum(1)[:, None], 0) for part in along]
    for one, other in zip((along[0], *found[1:]), (along[1], *expected[1:]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-11 * scale**2 * np.abs(other).max())
