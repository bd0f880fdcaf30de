"""Priors of the coupling: where they put it, that no direction is preferred, and derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.handlers import seed, substitute, trace
from scipy import stats

from probattn import coupling, is_proper
from probattn.models.coupling import (
    attention_weights_of,
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
def test_bounded_is_the_identity_less_a_wishart_and_an_antisymmetric_matrix(width):
    sites = draws("bounded", width)
    wishart = sites["repulsion"] @ np.swapaxes(sites["repulsion"], -1, -2) * width / (width + 1)
    matrix = BOUND**2 * sites["coupling"]
    transposed = np.swapaxes(matrix, -1, -2)
    np.testing.assert_allclose((matrix + transposed) / 2, np.eye(width) - wishart, atol=1e-12)
    lower = ((matrix - transposed) / 2)[:, *np.tril_indices(width, -1)]
    drawn = sites.get("rotation", np.zeros((COUNT, 0)))  # one dimension has none
    np.testing.assert_allclose(lower, drawn / np.sqrt(width + 1), atol=1e-12)


@pytest.mark.parametrize("width", WIDTHS)
def test_bounded_entries_have_mean_zero_and_one_variance_and_are_uncorrelated(width):
    """Within five standard errors of 4000 draws; fourth moments are below 50 variances squared."""
    entries = BOUND**2 * draws("bounded", width)["coupling"].reshape(COUNT, -1)
    variance = 2 / (width + 1)
    assert np.all(np.abs(entries.mean(0)) < 5 * np.sqrt(variance / COUNT))
    expected = variance * np.eye(width**2)
    products = entries[:, :, None] * entries[:, None, :]
    error = products.std(0) / np.sqrt(COUNT)
    assert np.all(np.abs(products.mean(0) - expected) < 5 * error)


def test_bounded_prior_has_the_density_that_it_says():
    """Of S, exp((d + 1) c^2 tr(S) / 2): then 1 - c^2 a is exponential where d = 1."""
    a = BOUND**2 * draws("bounded", 1)["coupling"].ravel()
    assert stats.kstest(1 - a, stats.expon.cdf).pvalue > 0.001
    # In two dimensions log density less that of "repulsion" is the log Jacobian of L -> S, which
    # is 2 log l_11 + log l_22 up to a constant.
    lower = np.array([[0.8, 0.0], [-0.3, 0.5]])
    other = np.array([[1.4, 0.0], [0.9, 0.2]])

    def of(factor):
        model = substitute(seed(sample_coupling, 0), {"repulsion": jnp.asarray(factor)})
        sites = trace(model).get_trace("bounded", 2, BOUND)
        site = sites["repulsion"]
        jacobian = 2 * np.log(factor[0, 0]) + np.log(factor[1, 1])
        matrix = sites["coupling"]["value"]
        return site["fn"].log_prob(site["value"]) - jacobian, 3 * BOUND**2 * np.trace(matrix) / 2

    (one, trace_of_one), (two, trace_of_two) = of(lower), of(other)
    np.testing.assert_allclose(one - two, trace_of_one - trace_of_two, rtol=1e-9)


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


@all_kinds
def test_gradient_where_the_factor_vanishes(kind):
    """K = 0 and A = 0, where all directions are alike and a map must still be smooth."""
    name = "free_coupling" if kind == "free" else "rotation"

    def entry(value):
        model = seed(lambda: sample_coupling(kind, 2, 1.0), 0)
        sites = trace(substitute(model, {name: value})).get_trace()
        return jnp.sum(sites["coupling"]["value"] * jnp.arange(4.0).reshape(2, 2))

    zero = jnp.zeros((2, 2) if kind == "free" else (1,))
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


def attenuated(w_query, w_key):
    """c^2 A of `proper_weights` by an eigendecomposition of the whole matrix S."""
    raw = np.asarray(w_key) @ np.asarray(w_query).T
    values, vectors = np.linalg.eigh((raw + raw.T) / 2)
    root = (vectors / np.sqrt(1 + (values + np.sqrt(values**2 + 4)) / 2)) @ vectors.T
    return root @ raw @ root


def bounded_coupling(w_query, w_key):
    return coupling(*proper_weights(w_query, w_key, bound=BOUND))


NAMED_PAIRS = {
    "generic": lambda a, b: (a, b),
    "large": lambda a, b: (30 * a, 30 * b),
    "repulsive": lambda a, b: (a, -a),
    "equal eigenvalues": lambda a, b: (jnp.eye(*a.shape), jnp.eye(*a.shape)),
    "zero": lambda a, b: (0 * a, 0 * b),
    "no keys": lambda a, b: (a, 0 * b),
    "repeated column": lambda a, b: (a.at[:, -1].set(a[:, 0]), b),
}


@functools.cache
def of_bounded_weights(shape):
    """A; the slope of a scalar of A along a step; the change of its gradient, in two ways."""
    scalar_of = np.random.default_rng(0).standard_normal((shape[0], shape[0]))

    def scalar(pair):
        return jnp.sum(scalar_of * bounded_coupling(*pair))

    def along(pair, step):
        return jax.jvp(scalar, (pair,), (step,))[1]

    @jax.jit
    def evaluate(pair, step):
        gradient = jax.grad(scalar)(pair)
        forward = jax.jvp(jax.grad(scalar), (pair,), (step,))[1]
        return bounded_coupling(*pair), gradient, forward, jax.grad(along)(pair, step)

    return scalar_of, evaluate


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (6, 2), (3, 5)], ids=str)
def test_derivatives_of_bounded_weights_wherever_a_decomposition_has_none(shape):
    """First by central differences of the whole matrix, second by those of the gradient."""
    scalar_of, evaluate = of_bounded_weights(shape)
    a, b, *step = np.random.default_rng(1).standard_normal((4, *shape))
    step = tuple(map(jnp.asarray, step))
    for name, make_pair in NAMED_PAIRS.items():
        pair = make_pair(jnp.asarray(a), jnp.asarray(b))
        got, gradient, forward, reverse = evaluate(pair, step)
        size = 1 + float(np.abs(got).max())
        expected = attenuated(*pair) / BOUND**2
        np.testing.assert_allclose(got, expected, atol=1e-13 * size, err_msg=name)
        h = 1e-5 * (1 + max(float(jnp.abs(part).max()) for part in pair))
        ahead, behind = (
            tuple(x + sign * h * dx for x, dx in zip(pair, step, strict=True)) for sign in (1, -1)
        )
        slope = np.sum(scalar_of * (attenuated(*ahead) - attenuated(*behind))) / (2 * h * BOUND**2)
        found = sum(np.vdot(g, dx) for g, dx in zip(gradient, step, strict=True))
        np.testing.assert_allclose(found, slope, rtol=1e-6, atol=1e-7, err_msg=name)
        differences = [
            (one - other) / (2 * h)
            for one, other in zip(evaluate(ahead, step)[1], evaluate(behind, step)[1], strict=True)
        ]
        for change in (forward, reverse):
            size = max(float(np.abs(part).max()) for part in (*differences, np.ones(1)))
            np.testing.assert_allclose(change, differences, atol=1e-5 * size, err_msg=name)


@pytest.mark.parametrize("top", [0.999, 0.5, 0.1])
def test_bounded_weights_reach_every_coupling_below_the_threshold(top):
    """Solved backwards: t^2 = (1 - x) / (2 - x) for an eigenvalue x of c^2 (A + A^T) / 2."""
    rank, rng = 3, np.random.default_rng(0)
    left, right = rng.standard_normal((2, 5, rank))
    right += left @ (10 * np.array([[0, 1, 2], [-1, 0, 3], [-2, -3, 0]]))
    wanted = left @ right.T
    values = np.linalg.eigvalsh((wanted + wanted.T) / 2)
    wanted *= top / values[-1]
    values, vectors = np.linalg.eigh((wanted + wanted.T) / 2)
    assert np.linalg.norm(wanted, 2) > 2 * top  # which the norm alone would refuse
    back = (vectors / np.sqrt((1 - values) / (2 - values))) @ vectors.T
    outer, sizes, inner = np.linalg.svd(back @ wanted @ back)
    w_key, w_query = outer[:, :rank] * sizes[:rank], inner[:rank].T
    got = bounded_coupling(jnp.asarray(w_query), jnp.asarray(w_key))
    np.testing.assert_allclose(got, wanted / BOUND**2, rtol=1e-7, atol=1e-9)


def test_repulsive_weights_have_the_symmetric_part_that_they_say():
    raw = rectangular(3, 1.0)
    matrix = np.asarray(coupling(*proper_weights(*raw, bound=None)))
    expected = -2 * raw[0] @ raw[0].T / np.sqrt(3)
    np.testing.assert_allclose(matrix + matrix.T, expected, atol=1e-12)
    assert np.abs(matrix - matrix.T).max() > 0.1
