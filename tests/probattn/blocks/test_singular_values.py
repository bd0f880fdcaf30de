"""Smallest singular values where LAPACK's divide and conquer fails on a finite matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.lax.linalg import SvdAlgorithm

import probattn as pa
from probattn.blocks import singular_values

MATRICES = np.random.default_rng(0).normal(size=(3, 4, 6, 6)) / 3
HARD = 1e3  # an entry that marks the matrices on which the first method is made to fail


@pytest.fixture(name="fails")
def fails_fixture(monkeypatch):
    """Divide and conquer, made to return NaN for matrices with a marked entry."""
    svd = lax.linalg.svd

    def failing(matrices, *, algorithm=SvdAlgorithm.DEFAULT, **options):
        found = svd(matrices, algorithm=algorithm, **options)
        if algorithm == SvdAlgorithm.QR:
            return found
        failed = jnp.any(jnp.abs(matrices) >= HARD, axis=(-2, -1))

        def spoil(array):
            return jnp.where(
                failed.reshape(*failed.shape, *[1] * (array.ndim - failed.ndim)), jnp.nan, array
            )

        return jax.tree.map(spoil, found)

    monkeypatch.setattr(lax.linalg, "svd", failing)


@pytest.fixture(name="matrices", params=[[], [(1, 2)], [(0, 0), (2, 3), (1, 1)]])
def matrices_fixture(request):
    """Matrices of which these are hard."""
    matrices = MATRICES.copy()
    for hard in request.param:
        matrices[hard][0, 0] = HARD
    return matrices


def test_a_method_that_fails_is_followed_by_one_that_converges(fails, matrices):
    left, sizes, right = np.linalg.svd(matrices)
    u, size, v = jax.jit(singular_values.last_singular_triple)(matrices)
    np.testing.assert_allclose(size, sizes[..., -1], rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(u * left[..., -1], -1)), 1, rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(v * right[..., -1, :], -1)), 1, rtol=1e-9)
    np.testing.assert_allclose(
        np.einsum("...i,...ij,...j->...", u, matrices, v), sizes[..., -1], rtol=1e-9
    )
    np.testing.assert_allclose(
        singular_values.smallest_singular_value(matrices), sizes[..., -1], rtol=1e-9
    )


def test_the_derivative_is_that_of_the_method_that_converges(fails, matrices):
    def smallest(matrices):
        return jnp.sum(singular_values.smallest_singular_value(matrices))

    left, _, right = np.linalg.svd(matrices)
    expected = left[..., :, -1:] * right[..., -1:, :]  # d s / d M = u v^T
    np.testing.assert_allclose(jax.grad(smallest)(jnp.asarray(matrices)), expected, atol=1e-9)


@pytest.mark.slow
def test_a_whole_decomposition_survives_a_failure(fails, matrices):
    u, s, vt = singular_values.singular_value_decomposition(jnp.asarray(matrices))
    np.testing.assert_allclose(jnp.einsum("...ik,...k,...kj", u, s, vt), matrices, atol=1e-9)


def test_a_matrix_that_is_not_finite_spoils_no_other():
    matrices = MATRICES[0].copy()
    matrices[2, 0, 0] = np.inf
    size = singular_values.smallest_singular_value(matrices)
    expected = np.linalg.svd(MATRICES[0], compute_uv=False)[:, -1]
    np.testing.assert_array_equal(np.isnan(size), [False, False, True, False])
    np.testing.assert_allclose(size[np.isfinite(size)], np.delete(expected, 2), rtol=1e-9)


@pytest.mark.slow
def test_margins_of_a_finite_context_are_numbers_when_a_method_fails(monkeypatch):
    x = np.random.default_rng(1).normal(size=(7, 3))
    w_query, w_key = np.random.default_rng(2).normal(size=(2, 3, 2))
    expected = pa.stability_margin(x, w_query, w_key), pa.certificate(x, w_query, w_key)
    svd = lax.linalg.svd

    def failing(matrices, *, algorithm=SvdAlgorithm.DEFAULT, **options):
        found = svd(matrices, algorithm=algorithm, **options)
        if algorithm == SvdAlgorithm.QR:
            return found
        return jax.tree.map(lambda array: jnp.full_like(array, jnp.nan), found)

    monkeypatch.setattr(lax.linalg, "svd", failing)
    np.testing.assert_allclose(pa.stability_margin(x, w_query, w_key), expected[0], rtol=1e-9)
    np.testing.assert_allclose(pa.certificate(x, w_query, w_key), expected[1], rtol=1e-9)
    assert np.all(np.isfinite(pa.embedding_margin(x, w_query, w_key)[2:]))
