"""Marginals by integration, the non-causal variant and the layered process, by closed forms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro.infer import Predictive
from numpyro.infer.util import log_density

import probattn as pa
from probattn.process import (
    bidirectional_log_prob,
    layered_process,
    marginal_ratio,
    marginal_ratio_monte_carlo,
)

ONE = jnp.ones((1, 1))


def causal(coupling, bound=None):
    @jax.jit
    def log_prob(x):
        length = x.shape[-2]
        return pa.CausalAttention(coupling * ONE, ONE, 1.0, length, bound=bound).log_prob(x)

    return log_prob


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("coupling", "bound"),
    [
        pytest.param(-0.5, None, marks=SLOW),
        pytest.param(-3.0, None, marks=SLOW),
        pytest.param(0.9, 1.0, marks=SLOW),
        (0.24, 2.0),
    ],
)
@pytest.mark.parametrize(
    "x", [pytest.param([[0.5], [-1.5]], marks=SLOW), [[0.5], [-6.0], [4.0]]], ids=len
)
def test_proper_processes_are_consistent(coupling, bound, x):
    ratio = marginal_ratio(causal(coupling, bound), jnp.array(x), -40, 40)
    assert ratio.value == pytest.approx(1, abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("gap", [4.5, pytest.param(6.0, marks=SLOW)])
def test_where_the_map_folds_the_ratio_is_the_conditional_mass(gap):
    x = jnp.array([[-gap / 2], [gap / 2]])
    ratio = marginal_ratio(causal(0.2), x, -40, 40)
    assert ratio.value == pytest.approx(pa.conditional_mass(x, 0.2 * ONE, ONE, 1.0), abs=1e-6)
    assert ratio.value > 1.001


@pytest.mark.slow
def test_monte_carlo_in_the_plane():
    x = 2 * jax.random.normal(jax.random.key(0), (3, 2))
    w_query = jax.random.normal(jax.random.key(1), (2, 2))
    proposal = dist.MultivariateStudentT(5.0, x.mean(0), 4 * jnp.eye(2))

    @jax.jit
    def log_prob(x):
        return pa.CausalAttention(w_query, -w_query, 1.0, x.shape[-2]).log_prob(x)

    ratio = marginal_ratio_monte_carlo(jax.random.key(2), log_prob, x, proposal)
    assert ratio.value == pytest.approx(1, abs=4 * ratio.error)
    assert ratio.error < 0.02
    # Without the log determinant it is not one, and the estimate says so.
    wrong = marginal_ratio_monte_carlo(
        jax.random.key(2),
        jax.jit(lambda x: dist.Normal().log_prob(pa.residual(x, w_query, -w_query)).sum((-2, -1))),
        x,
        proposal,
    )
    assert abs(wrong.value - 1) > 10 * wrong.error


def without_coupling(length):
    """Covariance of the non-causal variant at A = 0: every other token and the origin weigh 1/n."""
    weights = (np.ones((length, length)) - np.eye(length)) / length
    inverse = np.linalg.inv(np.eye(length) - weights)
    return inverse @ inverse.T


@pytest.mark.parametrize("length", [1, pytest.param(2, marks=SLOW), 3])
def test_the_non_causal_variant_without_coupling_is_gaussian(length):
    x = jax.random.normal(jax.random.key(length), (5, length, 2))
    got = jax.jit(bidirectional_log_prob)(x, jnp.zeros((2, 1)), jnp.ones((2, 1)), 1.0)
    normal = scipy.stats.multivariate_normal(cov=without_coupling(length))
    expected = normal.logpdf(x[..., 0]) + normal.logpdf(x[..., 1])
    np.testing.assert_allclose(got, np.reshape(expected, 5), rtol=1e-10)


@pytest.mark.slow
def test_the_non_causal_variant_is_no_process():
    log_prob = jax.jit(
        functools.partial(bidirectional_log_prob, w_query=0 * ONE, w_key=ONE, scale=1.0)
    )
    ratio = marginal_ratio(log_prob, jnp.array([[1.5]]), -40, 40)
    marginal = scipy.stats.norm.pdf(1.5, scale=math.sqrt(20 / 9))
    assert ratio.value == pytest.approx(marginal / scipy.stats.norm.pdf(1.5), rel=1e-7)
    assert ratio.value > 1.2


@pytest.mark.slow
@pytest.mark.parametrize("coupling", [-0.5, pytest.param(-0.1, marks=SLOW)])
def test_causality_is_what_the_non_causal_variant_lacks(coupling):
    """With the same token at the origin, which causal attention may see too."""

    def with_origin(x):
        longer = jnp.concatenate([jnp.zeros_like(x[..., :1, :]), x], axis=-2)
        return causal(coupling)(longer)

    @jax.jit
    def future(x):
        return bidirectional_log_prob(x, coupling * ONE, ONE, 1.0)

    x = jnp.array([[1.5], [-1.0]])
    assert marginal_ratio(with_origin, x, -40, 40).value == pytest.approx(1, abs=1e-7)
    assert abs(marginal_ratio(future, x, -40, 40).value - 1) > 0.1


# The layered process


MAPS = [
    lambda x: x + jnp.tanh(jnp.cumsum(x, axis=-2)),
    lambda x: 0.5 * jnp.sin(x),
]


def layered(length, width=1):
    layered_process(-jnp.eye(width), jnp.eye(width), 0.8, length, MAPS, noise_scale=0.5)


def sites_of(stacked):
    return {f"layer_{n}": stacked[..., n : n + 1] for n in range(3)}


@pytest.mark.slow
def test_the_layered_density_is_that_of_its_conditionals():
    x = jax.random.normal(jax.random.key(0), (3, 4, 2))
    sites = {f"layer_{n}": x[n] for n in range(3)}
    got, _ = log_density(functools.partial(layered, 4, 2), (), {}, sites)
    expected = pa.CausalAttention(-jnp.eye(2), jnp.eye(2), 0.8, 4).log_prob(x[0])
    for n in range(2):
        expected += scipy.stats.norm.logpdf(x[n + 1], MAPS[n](x[n]), 0.5).sum()
    assert got == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.slow
def test_layers_are_drawn_one_from_the_other():
    draws = Predictive(functools.partial(layered, 5), num_samples=2000)(jax.random.key(1))
    assert {name: value.shape for name, value in draws.items()} == {
        f"layer_{n}": (2000, 5, 1) for n in range(3)
    }
    for n in range(2):
        noise = np.asarray(draws[f"layer_{n + 1}"] - jax.vmap(MAPS[n])(draws[f"layer_{n}"]))
        assert scipy.stats.kstest(noise.ravel() / 0.5, "norm").pvalue > 0.01
    residuals = pa.residual(draws["layer_0"], -ONE, ONE)
    assert scipy.stats.kstest(np.ravel(residuals) / 0.8, "norm").pvalue > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("causal_layers", [True, False])
def test_layers_are_consistent_if_they_are_causal(causal_layers):
    """A token of all layers at once is integrated out; a layer that sees the future spoils it."""
    maps = MAPS if causal_layers else [lambda x: x + jnp.sum(x, axis=-2, keepdims=True), MAPS[1]]

    @jax.jit
    def log_prob(stacked):
        def of_one(stacked):
            model = functools.partial(
                layered_process, -ONE, ONE, 0.8, stacked.shape[0], maps, noise_scale=0.5
            )
            with numpyro.validation_enabled(False):
                return log_density(model, (), {}, sites_of(stacked))[0]

        return jnp.vectorize(of_one, signature="(t,d)->()")(stacked)

    stacked = jax.random.normal(jax.random.key(2), (3, 3))
    proposal = dist.MultivariateStudentT(5.0, jnp.zeros(3), 2 * jnp.eye(3))
    ratio = marginal_ratio_monte_carlo(
        jax.random.key(3), log_prob, stacked, proposal, num_samples=200_000
    )
    if causal_layers:
        assert ratio.value == pytest.approx(1, abs=4 * ratio.error)
        assert ratio.error < 0.02
    else:
        assert abs(ratio.value - 1) > 10 * ratio.error


# Bad input


def test_bad_input_to_the_integrals():
    log_prob, x = causal(-0.5), jnp.array([[0.5], [1.0]])
    proposal = dist.Normal().expand((1,)).to_event(1)
    key = jax.random.key(0)
    for call, reason in (
        (lambda: marginal_ratio(log_prob, x[:, 0], -1, 1), r"x has shape \(2,\): expected \(n, 1"),
        (lambda: marginal_ratio(log_prob, x[:0], -1, 1), r"x has shape \(0, 1\)"),
        (lambda: marginal_ratio(log_prob, x, 1, 1), "limits are 1 and 1: expected low < high"),
        (
            lambda: marginal_ratio(causal(0.3), jnp.array([[-4.0], [4.0], [0.0]]), -9, 9),
            "log_prob of x is -inf: expected a sequence of positive density",
        ),
        (
            lambda: marginal_ratio_monte_carlo(key, log_prob, x, dist.Normal()),
            r"proposal event shape \(\): expected \(n, d\) and \(d,\)",
        ),
        (
            lambda: marginal_ratio_monte_carlo(key, log_prob, x, proposal, num_samples=1),
            "num_samples is 1: expected at least 2",
        ),
        (
            lambda: bidirectional_log_prob(jnp.zeros((3, 2)), ONE, ONE, 1.0),
            "expected .* with d = 1",
        ),
    ):
        with pytest.raises(ValueError, match=reason):
            call()


@pytest.mark.slow
def test_an_integral_that_does_not_converge_is_an_error():
    def rough(x):
        return jnp.sin(1e6 * x[..., -1, 0]) * (x.shape[-2] > 1)

    with pytest.raises(RuntimeError, match="did not reach the tolerance 1e-08"):
        marginal_ratio(rough, jnp.array([[0.5]]), -40, 40, tolerance=1e-8)


@pytest.mark.slow
def test_a_conditional_much_narrower_than_the_interval_is_found():
    def narrow(x):
        return pa.CausalAttention(-0.1 * ONE, ONE, 0.01, x.shape[-2]).log_prob(x)

    for x, low, high in (([[0.3], [0.31]], -10, 10), ([[0.0], [0.005]], -50, 60)):
        assert marginal_ratio(narrow, jnp.array(x), low, high).value == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("x", [np.array([[1]]), np.array([[True]])], ids=["integer", "boolean"])
def test_a_sequence_that_is_not_floating_point_is_refused_in_one_line(x):
    proposal = dist.Normal(jnp.zeros(1), 1.0).to_event(1)
    for call in (
        lambda: marginal_ratio(causal(0.2), x, -1, 1),
        lambda: marginal_ratio_monte_carlo(jax.random.key(0), causal(0.2), x, proposal),
    ):
        with pytest.raises(ValueError, match=r"^x has dtype \w+: expected a floating-point dtype$"):
            call()
