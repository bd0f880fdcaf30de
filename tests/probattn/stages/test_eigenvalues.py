"""Eigenvalues by steps that every platform has, against LAPACK's and against their definition."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probattn.stages.block_margins import infeasible_blocks
from probattn.stages.eigenvalues import eigenvalues, eigenvalues_by_steps
from tests.support.cases import LARGE_CASES, REGISTERED, make
from tests.support.dense import reduced_blocks

SIZE = 4  # for which it is compiled: smaller blocks get ones on their diagonal


def registered(dtype):
    """The blocks of all registered cases, after rounding to a dtype."""
    blocks = []
    for case in REGISTERED:
        for block in reduced_blocks(*(array.astype(np.float64) for array in make(case, dtype))):
            padded = np.eye(SIZE)
            padded[: len(block), : len(block)] = block
            blocks.append(padded)
    return np.stack(blocks).astype(dtype)


def large(dtype):
    """Blocks of the size that a user trains; some are infeasible."""
    cases = [make(case, np.float64) for case in LARGE_CASES]
    return np.concatenate(
        [reduced_blocks(x, w_query, k * w_key) for x, w_query, w_key in cases for k in (1, 3)]
    ).astype(dtype)


def difficult(dtype, size=SIZE):
    """Blocks with multiple eigenvalues, without eigenvectors, badly scaled, cycled by QR steps."""
    rng = np.random.default_rng(0)
    jordan = np.eye(size, k=1) + 0.5 * np.eye(size)
    basis = np.linalg.qr(rng.normal(size=(20, size, size)))[0]
    graded = 10.0 ** rng.uniform(-6, 6, (20, size, 1))
    return np.concatenate(
        [
            basis @ jordan @ np.swapaxes(basis, -1, -2),
            rng.normal(size=(20, size, size)) * graded,
            np.eye(size)[[rng.permutation(size) for _ in range(20)]],
            [np.roll(np.eye(size), 1, axis=0), np.zeros((size, size)), -np.eye(size)],
            rng.normal(size=(20, size, size)) * 1e30,
            rng.normal(size=(20, size, size)) * 1e-30,
            rng.integers(-1, 2, (20, size, size)),
            np.tril(rng.normal(size=(20, size, size))),
        ]
    ).astype(dtype)


@functools.cache
def found(blocks, dtype):
    """Real and imaginary parts for the blocks that a function returns."""
    return tuple(map(np.asarray, eigenvalues_by_steps(jnp.asarray(blocks(dtype)))))


def crossed(real, imaginary):
    return np.any((imaginary == 0) & (real <= 0), axis=-1)


slow = pytest.mark.slow
every_size = pytest.mark.parametrize(
    ("blocks", "dtype"),
    [
        pytest.param(registered, np.float64, id="registered"),
        pytest.param(registered, np.float32, id="registered_f32", marks=slow),
        pytest.param(large, np.float64, id="large", marks=slow),
        pytest.param(large, np.float32, id="large_f32", marks=slow),
    ],
)


@every_size
def test_the_same_blocks_are_infeasible_as_by_lapack(blocks, dtype):
    real, imaginary = found(blocks, dtype)
    assert real.dtype == imaginary.dtype == dtype
    matrices = blocks(dtype).astype(np.float64)
    sizes = np.linalg.svd(matrices, compute_uv=False)
    known = sizes[:, -1] > 8 * np.finfo(dtype).eps * sizes[:, 0]  # whatever rounding does
    assert np.mean(known) > 0.9
    lapack = np.linalg.eigvals(blocks(dtype))
    expected = crossed(lapack.real, lapack.imag)[known]
    assert 0 < expected.sum() < len(expected)
    np.testing.assert_array_equal(crossed(real, imaginary)[known], expected)


@pytest.mark.parametrize(
    ("blocks", "dtype"),
    [
        pytest.param(registered, np.float64, id="registered"),
        pytest.param(difficult, np.float64, id="difficult", marks=slow),
        pytest.param(difficult, np.float32, id="difficult_f32", marks=slow),
        pytest.param(large, np.float64, id="large", marks=slow),
        pytest.param(large, np.float32, id="large_f32", marks=slow),
    ],
)
def test_each_is_an_eigenvalue_of_a_matrix_a_few_roundings_away(blocks, dtype):
    """Which holds where eigenvalues themselves move by far more, as those without eigenvectors."""
    matrices = blocks(dtype).astype(np.float64)
    real, imaginary = (part.astype(np.float64) for part in found(blocks, dtype))
    norm = np.linalg.norm(matrices, axis=(-2, -1))
    norm = np.where(norm > 0, norm, 1)[:, None]
    matrices, values = matrices / norm[..., None], (real + 1j * imaginary) / norm
    shifted = matrices[:, None] - values[..., None, None] * np.eye(matrices.shape[-1])
    distance = np.linalg.svd(shifted, compute_uv=False)[..., -1]
    rounding = 10 * matrices.shape[-1] * np.finfo(dtype).eps
    assert distance.max() < rounding
    # No eigenvalue twice in place of another: their sum is the trace.
    total = np.abs(values.sum(-1) - np.trace(matrices, axis1=-2, axis2=-1))
    assert total.max() < matrices.shape[-1] * rounding  # |tr E| <= n |E|
    assert np.any(imaginary != 0)


def test_lapack_finds_them_on_a_cpu_and_no_routine_of_the_host_elsewhere():
    traced = jax.jit(infeasible_blocks).trace(jnp.asarray(registered(np.float64)))
    assert "geev" in traced.lower().as_text()
    for platform in ("cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert not re.search(r"custom_call @\w*(eig|ge)", text)


def test_they_are_those_of_each_matrix_wherever_a_function_is_mapped():
    blocks = registered(np.float64)[:6]
    expected = np.linalg.eigvals(blocks).reshape(2, 3, SIZE)
    pairs = jnp.moveaxis(jnp.asarray(blocks).reshape(2, 3, SIZE, SIZE), 0, -1)
    real, imaginary = jax.vmap(eigenvalues, in_axes=-1)(pairs)
    np.testing.assert_allclose(real + 1j * imaginary, expected, rtol=1e-14)
    with jax.disable_jit():
        np.testing.assert_array_equal(eigenvalues(pairs[..., 0])[0], real[0])


def test_what_does_not_converge_is_not_known(monkeypatch):
    monkeypatch.setattr("probattn.stages.eigenvalues._STEPS", 0)
    for part in jax.jit(eigenvalues_by_steps.__wrapped__)(jnp.eye(2)[None]):
        assert np.isnan(part).all()
