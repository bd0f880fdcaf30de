"""Sums over positions, whose derivative comes with their value."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probattn as pa
from probattn.blocks import determinants
from tests.support.dense import dense_of, flat, log_abs_slopes, quick_jit
from tests.support.few_inputs import INPUTS, LONG, SHORT, defined, differences, inputs

pytestmark = pytest.mark.usefixtures("strict_promotion")
WEIGHTS = np.array([1.0, -2.0, 0.5])  # of the sequences, so that none can hide another's error


@pytest.fixture(autouse=True)
def two_ways(monkeypatch):
    """However few the numbers are."""
    monkeypatch.setattr(determinants, "FEW", 0)


def log_det_sum(x, w_query, w_key):
    return pa.log_det(x, w_query, w_key, summed=True)[1]


def barrier_sum(x, w_query, w_key):
    return pa.relaxed_barrier(x, w_query, w_key, summed=True)


def sequences(length, scales=(SHORT, LONG, SHORT)):
    """Of these scales, in one batch: some are centred, at some positions, and some are not."""
    x, w_query, w_key = inputs(length)
    rng = np.random.default_rng(1)
    x = np.stack([scale * rng.standard_normal(x.shape) for scale in scales])
    return jnp.asarray(x), w_query, w_key


def test_value_and_derivative_match_the_definition():
    """Of more positions than are taken at once."""

    def total(function, *arguments):
        return jnp.vdot(function(*arguments), WEIGHTS)

    def expected(x, w_query, w_key):
        return jnp.sum(jax.vmap(defined, (0, None, None))(x, w_query, w_key), axis=-1)

    arguments = sequences(90)
    got, true = (
        quick_jit(partial(jax.value_and_grad(total, (1, 2, 3)), function))(*arguments)
        for function in (log_det_sum, expected)
    )
    np.testing.assert_allclose(got[0], true[0], rtol=1e-9)
    for one, other in zip(got[1], true[1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-8 * np.abs(other).max())


@pytest.mark.parametrize(
    "function", [pa.log_det, pytest.param(pa.relaxed_barrier, marks=pytest.mark.slow)]
)
def test_it_is_the_sum_of_the_positions(function):
    """Sums and signs, at tokens so long that products overflow, and at one that is not finite."""
    x, w_query, w_key = sequences(9)
    x = x.at[0, 5].multiply(1e200).at[2, 6].set(jnp.nan)

    def of(summed):
        both = function(x, w_query, w_key, summed=summed)
        return both if isinstance(both, tuple) else (jnp.zeros(()), both)

    (signs, each), (signs_of_sum, total) = quick_jit(lambda: (of(summed=False), of(summed=True)))()
    np.testing.assert_array_equal(signs_of_sum, signs)
    np.testing.assert_allclose(total, each.sum(-1), rtol=1e-12)
    assert np.isnan(total).tolist() == [False, False, True]


@pytest.mark.slow
def test_second_derivative():
    """Forward mode over reverse mode."""
    x, w_query, w_key = sequences(5, (SHORT, 12.0))

    def total(function, *arguments):
        return jnp.vdot(function(*arguments), WEIGHTS[:2])

    arguments = x, w_query, w_key
    got = quick_jit(jax.hessian(partial(total, log_det_sum), INPUTS))(*arguments)
    sizes = np.cumsum([array.size for array in arguments])[:-1]

    def gradient(point):
        x, *weights = (
            part.reshape(array.shape)
            for part, array in zip(np.split(point, sizes), arguments, strict=True)
        )
        slopes = [flat(log_abs_slopes(dense_of(one, *weights))[:3]).sum(0) for one in x]
        of_x = [
            weight * own[: one.size] for weight, own, one in zip(WEIGHTS, slopes, x, strict=False)
        ]
        of_weights = [
            weight * own[one.size :] for weight, own, one in zip(WEIGHTS, slopes, x, strict=False)
        ]
        return np.concatenate([*of_x, sum(of_weights)])

    point = np.concatenate([np.ravel(array) for array in arguments])
    rows = np.split(differences(gradient, point), sizes)
    for row, own in zip(got, rows, strict=True):
        for one, other in zip(row, np.split(own, sizes, axis=1), strict=True):
            expected = other.reshape(one.shape)
            np.testing.assert_allclose(one, expected, atol=1e-7 * np.abs(other).max())


@pytest.mark.slow
def test_singular_position_spoils_no_other_sequence():
    """The barrier's gradient at a determinant of zero, next to a sequence inside."""
    x = np.array([[[-4.0], [4.0], [0.0]], [[-1.0], [1.0], [0.0]]])
    w_query, w_key = np.full((1, 1), 1 / 16), np.ones((1, 1))
    of = quick_jit(jax.value_and_grad(lambda x: jnp.sum(barrier_sum(x, w_query, w_key))))
    value, gradient = of(x)
    assert np.all(np.isfinite(gradient))
    alone, own = of(x[1:])
    np.testing.assert_allclose(gradient[1:], own, rtol=1e-12)
    singular = pa.relaxed_barrier(x[0], w_query, w_key)[2]
    np.testing.assert_allclose(value, alone + singular, rtol=1e-12)


@pytest.mark.slow
def test_nothing_is_computed_twice():
    """There are fewer products of matrices than where every position has its own derivative."""

    def products(function):
        program = jax.make_jaxpr(jax.value_and_grad(lambda x: jnp.sum(function(x, w, w))))(x)
        return str(program).count("dot_general")

    x, w = jnp.zeros((200, 4)), jnp.ones((4, 3))
    each = products(lambda *arguments: pa.log_det(*arguments)[1])
    assert products(log_det_sum) < each


@pytest.mark.slow
@pytest.mark.parametrize("summed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sequences_that_are_taken_in_turns(summed, monkeypatch):
    """Value and derivative of two heads, of which not all sequences are formed at once."""
    length, rank = 9, 3
    monkeypatch.setattr(determinants, "AT_ONCE", 2 * length * rank**2)
    rng = np.random.default_rng(0)
    x = 0.3 * rng.standard_normal((4, 1, length, 4))
    w_query, w_key = rng.standard_normal((2, 2, 4, rank))

    def total(x, w_query, w_key):
        return jnp.sum(pa.log_det(x, w_query, w_key, summed=summed)[1])

    assert "scan[" in str(jax.make_jaxpr(total)(x, w_query, w_key))
    value, gradients = quick_jit(jax.value_and_grad(total, INPUTS))(x, w_query, w_key)
    expected, slopes = 0.0, [np.zeros_like(part) for part in (x, w_query, w_key)]
    for number, head in np.ndindex(4, 2):
        found = dense_of(x[number, 0], w_query[head], w_key[head])
        expected += np.linalg.slogdet(found.blocks)[1].sum()
        own = [part.sum(0) for part in log_abs_slopes(found)]
        for slope, where, part in zip(slopes, ((number, 0), head, head), own, strict=False):
            slope[where] += part
    np.testing.assert_allclose(value, expected, rtol=1e-11)
    for one, other in zip(gradients, slopes, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
