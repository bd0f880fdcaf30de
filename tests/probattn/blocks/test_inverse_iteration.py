"""Smallest singular triples of many blocks against LAPACK's in float64, block by block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probattn as pa
from probattn.blocks import inverse_iteration
from probattn.blocks.inverse_iteration import smallest_triple
from tests.support.cases import Case, make
from tests.support.dense import dense, signed_sigma_min

COUNT = 40  # blocks of each family
SHAPES = [(3, 5), (4, 4), (6, 2), (5, 0), (1, 3)]  # k and m


def joined(top, below):
    """The blocks [[M, 0], [-B, I]]."""
    size, under = top.shape[-1], below.shape[-2]
    blocks = np.zeros((len(top), size + under, size + under))
    blocks[:] = np.eye(size + under)
    blocks[:, :size, :size] = top
    blocks[:, size:, :size] = -below
    return blocks


def with_values(values, size, seed):
    """Matrices of these singular values, (COUNT, size) or (size,)."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((COUNT, size, size)))[0] for _ in range(2))
    return left * np.broadcast_to(values, (COUNT, size))[:, None] @ np.swapaxes(right, 1, 2)


def families(size, under):
    """Blocks by what is hard about them: pairs of M and B."""
    rng = np.random.default_rng(size + 10 * under)
    noise = rng.standard_normal((COUNT, size, size)) / np.sqrt(size)
    below = rng.standard_normal((COUNT, under, size)) / np.sqrt(size)
    spread = np.linspace(0.3, 2, size)
    near = spread.copy()
    near[: min(size, 2)] = 0.3, *[0.3 * (1 + 1e-9)][: size - 1]
    tiny = spread.copy()
    tiny[0] = 1e-12
    singular = np.eye(size) + 0.5 * noise
    singular[:, -1] = 0
    return {
        "random": (np.eye(size) + 0.5 * noise, below),
        "weak": (np.eye(size) + 1e-3 * noise, 1e-3 * below),
        "nearly equal": (with_values(near, size, 1), 0 * below),
        "tiny": (with_values(tiny, size, 2), below),
        "singular": (singular, below),
        "orthogonal": (with_values(np.ones(size), size, 3), 0 * below),
        "identity": (np.eye(size) + 0 * noise, 0 * below),
        "zero": (0 * noise, below),
        "huge": (1e8 * noise, 1e8 * below),
        "small": (1e-8 * noise, 1e-8 * below),
        "steep": (np.eye(size) + noise, 1e3 * below),
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(("size", "under"), SHAPES)
def test_triples_are_those_of_lapack(monkeypatch, size, under, dtype):
    monkeypatch.setattr(inverse_iteration, "FEW", 0)
    hard = families(size, under)
    top, below = (np.concatenate(parts).astype(dtype) for parts in zip(*hard.values(), strict=True))
    found = jax.jit(lambda top, below: smallest_triple(top, below))(top, below)
    left, value, right = (np.asarray(array, np.float64) for array in found)
    blocks = joined(top.astype(np.float64), below.astype(np.float64))
    others, values, _ = np.linalg.svd(blocks)
    rounding = 16 * np.finfo(dtype).eps * values[:, 0]
    names = np.repeat(list(hard), COUNT)
    wrong = np.abs(value - values[:, -1]) > rounding
    assert not wrong.any(), set(names[wrong])
    for vectors in (left, right):
        np.testing.assert_allclose(
            np.linalg.norm(vectors, axis=1), 1, rtol=64 * np.finfo(dtype).eps
        )
    for image, vector in (
        (np.einsum("nij,nj->ni", blocks, right), left),
        (np.einsum("nji,nj->ni", blocks, left), right),
    ):
        far = np.linalg.norm(image - value[:, None] * vector, axis=1) > rounding
        assert not far.any(), set(names[far])
    if size + under > 1:
        # As far from LAPACK's as the gap to the next value allows.
        other = others[..., -1]
        across = np.minimum(*(np.linalg.norm(left - sign * other, axis=1) for sign in (1, -1)))
        gap = values[:, -2] - values[:, -1]
        turned = across * gap > 4 * rounding
        assert not turned.any(), set(names[turned])


@functools.cache
def random_blocks(count=1000, size=4, under=3):
    rng = np.random.default_rng(7)
    top = np.eye(size) + 0.5 * rng.standard_normal((count, size, size)) / np.sqrt(size)
    return top, 0.5 * rng.standard_normal((count, under, size))


@pytest.mark.slow
def test_lapack_decomposes_few_blocks_and_those_that_need_it(monkeypatch):
    called = []
    decompose = inverse_iteration._by_lapack

    def counting(top, below):
        jax.debug.callback(lambda top: called.append(len(top)), top)
        return decompose(top, below)

    monkeypatch.setattr(inverse_iteration, "_by_lapack", counting)
    top, below = random_blocks()
    jax.block_until_ready(smallest_triple(jnp.asarray(top), jnp.asarray(below)))
    jax.effects_barrier()
    assert sum(called) < 0.05 * len(top)
    called.clear()
    top = top.copy()
    top[::50, 0] = 0  # singular
    found = smallest_triple(jnp.asarray(top), jnp.asarray(below))
    jax.effects_barrier()
    assert sum(called) >= 20
    expected = np.linalg.svd(joined(top, below), compute_uv=False)[:, -1]
    np.testing.assert_allclose(found.size, expected, atol=1e-13)


@pytest.mark.slow
def test_a_block_that_is_not_finite_spoils_no_other():
    top, below = (part.copy() for part in random_blocks())
    top[3, 0, 0], below[5, 1, 1], top[7] = np.nan, np.inf, -np.inf
    found = smallest_triple(jnp.asarray(top), jnp.asarray(below))
    whole = smallest_triple(*map(jnp.asarray, random_blocks()))
    for got, expected in zip(found, whole, strict=True):
        np.testing.assert_array_equal(np.isnan(got[np.array([3, 5, 7])]), True)
        rest = np.delete(np.arange(len(top)), [3, 5, 7])
        np.testing.assert_allclose(got[rest], expected[rest], atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        (80, 5, 2),
        (80, 2, 4),
        *(pytest.param(s, marks=pytest.mark.nightly) for s in ((80, 4, 1), (80, 3, 3))),
    ],
)
def test_margins_of_long_contexts_are_those_of_dense_blocks(monkeypatch, shape):
    """Margins, their derivatives and embedding margins, mapped and not."""
    monkeypatch.setattr(inverse_iteration, "FEW", 0)
    cases = [Case("random", *shape, seed=3), Case("attractive", *shape, seed=4, kind="attractive")]
    inputs = [np.stack(part) for part in zip(*map(make, cases), strict=True)]
    found = np.asarray(pa.stability_margin(*inputs))
    distance = np.asarray(pa.embedding_margin(*inputs))
    mapped = np.asarray(jax.jit(jax.vmap(pa.stability_margin))(*inputs))
    for number, case in enumerate(cases):
        true = signed_sigma_min(dense(case).blocks)
        np.testing.assert_allclose(found[number], true, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(mapped[number], true, rtol=1e-9, atol=1e-11)
    np.testing.assert_array_equal(found[:, :2], 1)
    assert np.all(np.isposinf(distance[:, :2]))
    x, *weights = map(jnp.asarray, inputs)
    position = 40
    gradient = jax.grad(lambda x: jnp.sum(pa.stability_margin(x, *weights)[:, position]))(x)
    slope = np.linalg.norm(np.asarray(gradient), axis=(1, 2))
    np.testing.assert_allclose(distance[:, position], np.abs(found[:, position]) / slope, rtol=1e-7)
    step = 1e-6 * gradient
    change = pa.stability_margin(x + step, *weights) - pa.stability_margin(x - step, *weights)
    np.testing.assert_allclose(change[:, position], 2e-6 * slope**2, rtol=1e-5)
