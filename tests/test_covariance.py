"""Covariances under attention weights, against their definition in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probattn.attention import attention_weights
from probattn.covariance import attention_covariance, reduced_covariance

pytestmark = pytest.mark.usefixtures("strict_promotion")
LENGTHS = pytest.mark.parametrize("length", [1, 2, 7, 64, 65, 130])
BOTH = pytest.mark.parametrize("covariance", [attention_covariance, reduced_covariance])
SCALES = pytest.mark.parametrize("scale", [0.3, 1.0, 30.0])  # the last is centred row by row


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


@BOTH
@SCALES
@LENGTHS
def test_matches_definition(covariance, length, scale):
    arguments = inputs(length, scale)
    expected = definition(*arguments)
    np.testing.assert_allclose(covariance(*arguments), expected, atol=1e-12 * scale**2)
    np.testing.assert_array_equal(covariance(*arguments)[:2], 0 * expected[:2])


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0, 10.0, 30.0, 300.0])
def test_single_precision_keeps_the_digits_of_the_reduced_block(scale):
    """Relative to an entry of one: what the determinant of I − Cov / √r sees."""
    arguments = inputs(40, scale, np.float32, rank=4)
    got, expected = np.asarray(reduced_covariance(*arguments)), definition(*arguments)
    assert np.all(np.abs(got - expected) / 2 <= 1e-5 * np.maximum(1, np.abs(expected) / 2))


def test_second_moments_would_not():
    """So the test above sees which side is taken."""
    weights, queries, keys = inputs(40, 10.0, np.float32, rank=4)
    moments = np.einsum("ts,sa,sb->tab", weights, queries, keys)
    means = np.einsum("ta,tb->tab", weights @ queries, weights @ keys)
    assert np.abs(moments - means - definition(weights, queries, keys)).max() / 2 > 2e-5


@SCALES
@pytest.mark.parametrize("length", [7, 65])
def test_derivative_matches_that_of_the_definition(length, scale):
    arguments = inputs(length, scale)
    direction = np.random.default_rng(1).standard_normal((length, 3, 3))

    def defined(weights, queries, keys):
        left, right = queries - (weights @ queries)[:, None], keys - (weights @ keys)[:, None]
        return jnp.einsum("ts,tsa,tsb,tab->", weights, left, right, direction)

    def got(*arguments):
        return jnp.vdot(reduced_covariance(*arguments), direction)

    expected = jax.grad(defined, (0, 1, 2))(*arguments)
    found = jax.jit(jax.grad(got, (0, 1, 2)))(*arguments)
    # The weights of a row sum to one: a derivative is one up to a number for each row.
    weights = arguments[0]
    along = [np.where(weights > 0, part[0], 0) for part in (found, expected)]
    along = [np.where(weights > 0, part - (weights * part).sum(1)[:, None], 0) for part in along]
    for one, other in zip((along[0], *found[1:]), (along[1], *expected[1:]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-11 * scale**2 * np.abs(other).max())


@SCALES
@pytest.mark.parametrize("in_axes", [(0, 0, 0), (0, None, 0), (None, 1, None)])
def test_mapped_is_a_larger_batch_with_one_condition(in_axes, scale):
    arguments = inputs(7, scale)
    batched = [
        array if axis is None else np.stack([array, array[::-1] * 1.0], axis=axis)
        for array, axis in zip(arguments, in_axes, strict=True)
    ]
    mapped = jax.vmap(reduced_covariance, in_axes)
    for number in range(2):
        own = [
            array if axis is None else np.take(array, number, axis)
            for array, axis in zip(batched, in_axes, strict=True)
        ]
        np.testing.assert_allclose(
            mapped(*batched)[number], reduced_covariance(*own), atol=1e-12 * scale**2
        )
    assert " cond[" in str(jax.make_jaxpr(mapped)(*batched))
