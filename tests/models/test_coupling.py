"""Priors of the coupling: where they put it, that no direction is preferred, and derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.handlers import seed, substitute, trace

from probattn import coupling, is_proper
from probattn.models.coupling import (
    attention_weights_of,
    matrix_sqrt,
    proper_weights,
    sample_coupling,
)

KINDS = ("bounded", "repulsive", "free")
BOUND, COUNT = 0.7, 4000
all_kinds = pytest.mark.parametrize("kind", KINDS)
# One and three dimensions are enough to find a fault; the others are the same code once more.
WIDTHS = [1, 3, *(pytest.param(width, marks=pytest.mark.slow) for width in (2, 4, 5))]


@functools.cache
def sampler(kind, width):
    def one(key, unit):
        model = functools.partial(sample_coupling, kind, width, BOUND, unit=unit)
        sites = trace(seed(model, key)).get_trace()
        return {name: site["value"] for name, site in sites.items()}

    return jax.jit(jax.vmap(one, in_axes=(0, None)))


@functools.cache
def draws(kind, width, unit=1.0):
    """All sites of COUNT draws."""
    sites = sampler(kind, width)(jax.random.split(jax.random.key(0), COUNT), unit)
    return {name: np.asarray(value) for name, value in sites.items()}


@pytest.mark.parametrize("width", WIDTHS)
def test_bounded_has_the_singular_values_that_it_says(width):
    sites = draws("bounded", width)
    before = np.linalg.svd(sites["direction"], compute_uv=False)
    after = np.linalg.svd(sites["coupling"], compute_uv=False)
    np.testing.assert_allclose(after, before / np.sqrt(1 + before**2) / BOUND**2, rtol=1e-10)
    # The same directions: A = B f(B^T B).
    product = np.swapaxes(sites["direction"], -1, -2) @ sites["coupling"]
    np.testing.assert_allclose(product, np.swapaxes(product, -1, -2), atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "width", [3, *(pytest.param(w, marks=pytest.mark.slow) for w in (1, 2, 4))]
)
def test_regimes_are_proper_and_free_is_not(width):
    unbounded, bounded = (
        jax.jit(lambda matrix, c=c: is_proper(*jax.vmap(attention_weights_of)(matrix), bound=c))
        for c in (None, BOUND)
    )
    assert np.all(bounded(draws("bounded", width)["coupling"]))
    assert np.all(unbounded(draws("repulsive", width)["coupling"]))
    assert not np.all(unbounded(draws("free", width)["coupling"]))


def test_repulsive_is_an_antisymmetric_matrix_less_a_wishart():
    sites = draws("repulsive", 3)
    symmetric = sites["repulsion"] @ np.swapaxes(sites["repulsion"], -1, -2)
    matrix, transposed = sites["coupling"], np.swapaxes(sites["coupling"], -1, -2)
    np.testing.assert_allclose((matrix + transposed) / 2, -symmetric, atol=1e-12)
    lower = ((matrix - transposed) / 2)[:, *np.tril_indices(3, -1)]
    np.testing.assert_allclose(lower, sites["rotation"], atol=1e-12)


@all_kinds
def test_deterministic_sites(kind):
    sites = draws(kind, 3)
    matrix = sites["coupling"]
    np.testing.assert_allclose(sites["coupling_trace"], np.trace(matrix, axis1=1, axis2=2))
    np.testing.assert_allclose(sites["coupling_norm"], np.sqrt((matrix**2).sum((1, 2))))
    expected = np.linalg.eigvals(matrix + np.swapaxes(matrix, -1, -2)).real
    np.testing.assert_allclose(sites["coupling_eigenvalues"], np.sort(expected), atol=1e-12)


@all_kinds
def test_prior_prefers_no_direction(kind):
    matrix = draws(kind, 3)["coupling"]
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    turned = turn.T @ matrix @ turn
    for statistic in (np.abs, np.square, lambda a: a[:, :, ::-1] * a):
        one, other = statistic(matrix), statistic(turned)
        error = np.sqrt((one.var(0) + other.var(0)) / len(one))
        assert np.all(np.abs(one.mean(0) - other.mean(0)) < 5 * error + 1e-12)


@all_kinds
def test_unit_scales_the_coupling(kind):
    one, other = draws(kind, 3), draws(kind, 3, unit=0.1)
    np.testing.assert_allclose(other["coupling"], 100 * one["coupling"], rtol=1e-12)


def test_weights_have_the_coupling():
    matrix = jax.random.normal(jax.random.key(0), (4, 4))
    np.testing.assert_allclose(coupling(*attention_weights_of(matrix)), matrix, rtol=1e-12)


def test_square_root_and_its_derivative_at_equal_eigenvalues():
    factor = jax.random.normal(jax.random.key(0), (3, 3))
    matrices = jnp.stack([factor @ factor.T + jnp.eye(3), jnp.eye(3), 4 * jnp.eye(3)])
    step = jax.random.normal(jax.random.key(1), (3, 3))
    step = 1e-6 * (step + step.T)

    @jax.jit
    @jax.vmap
    def both(matrix):
        root, slope = jax.jvp(matrix_sqrt, (matrix,), (step,))
        return root, slope, (matrix_sqrt(matrix + step) - matrix_sqrt(matrix - step)) / 2

    root, slope, difference = both(matrices)
    np.testing.assert_allclose(root @ root, matrices, atol=1e-12)
    np.testing.assert_allclose(root, jnp.swapaxes(root, 1, 2), atol=1e-14)
    np.testing.assert_allclose(slope, difference, atol=1e-15)


@all_kinds
def test_gradient_where_the_factor_vanishes(kind):
    """B = 0, K = 0 and A = 0, where all directions are alike and a map must still be smooth."""
    name = {"bounded": "direction", "repulsive": "rotation", "free": "free_coupling"}[kind]

    def entry(value):
        model = seed(lambda: sample_coupling(kind, 2, 1.0), 0)
        sites = trace(substitute(model, {name: value})).get_trace()
        return jnp.sum(sites["coupling"]["value"] * jnp.arange(4.0).reshape(2, 2))

    zero = jnp.zeros((1,) if kind == "repulsive" else (2, 2))
    gradient = jax.jit(jax.grad(entry))(zero)
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient != 0)


def test_one_dimension_has_no_rotation():
    model = substitute(sample_coupling, {"repulsion": jnp.full((1, 1), 0.5)})
    sites = trace(model).get_trace("repulsive", 1, None)
    assert "rotation" not in sites
    np.testing.assert_allclose(sites["coupling"]["value"], [[-0.25]])


def test_bounded_needs_a_bound():
    with pytest.raises(ValueError, match="bound is None: expected a number > 0"):
        seed(sample_coupling, 0)("bounded", 2, None)


def rectangular(rank, scale, seed=0):
    return scale * jax.random.normal(jax.random.key(seed), (2, 5, rank))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_any_two_matrices_make_a_proper_process(rank):
    """The free coupling of the same two is not, unless they are small."""

    @jax.jit
    @jax.vmap
    def proper(raw):
        made = [
            is_proper(*proper_weights(*raw, bound=bound), bound=bound) for bound in (None, BOUND)
        ]
        return jnp.stack(made), is_proper(*raw)

    made, as_given = proper(jnp.stack([rectangular(rank, scale) for scale in (0.1, 1.0, 30.0)]))
    assert np.all(made), made  # a row for each scale
    assert not np.any(as_given), as_given


def test_bounded_weights_reach_every_coupling_below_the_bound():
    """Solved backwards: V = V' L with L^T L = (I - V'^T V')^-1 for the balanced factors V'."""
    rank, bound = 3, 0.7
    left, right = (np.linalg.qr(matrix)[0] for matrix in np.asarray(rectangular(rank, 1.0)))
    sizes = np.array([0.999, 0.3, 1e-3])
    raw = []
    for basis in (right, left):
        squashed = basis * np.sqrt(sizes)
        inverse = np.linalg.inv(np.eye(rank) - squashed.T @ squashed)
        # L^T L: a Cholesky factor with the order of rows and columns reversed, twice.
        lower = np.linalg.cholesky(inverse[::-1, ::-1])[::-1, ::-1].T
        raw.append(jnp.asarray(squashed @ lower.T))
    got = coupling(*proper_weights(*raw, bound=bound))
    np.testing.assert_allclose(got, (left * sizes) @ right.T / bound**2, rtol=1e-9, atol=1e-12)


def test_repulsive_weights_have_the_symmetric_part_that_they_say():
    raw = rectangular(3, 1.0)
    matrix = np.asarray(coupling(*proper_weights(*raw, bound=None)))
    expected = -2 * raw[0] @ raw[0].T / np.sqrt(3)
    np.testing.assert_allclose(matrix + matrix.T, expected, atol=1e-12)
    assert np.abs(matrix - matrix.T).max() > 0.1
