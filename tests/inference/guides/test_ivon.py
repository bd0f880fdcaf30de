"""IVON: the paper's equations in plain NumPy, and the optimum that it converges to."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import SVI

from probattn.inference.fitting.elbo import OrderedELBO
from probattn.inference.fitting.optimizers import OptaxOptimizer
from probattn.inference.guides.guides import init_params, make_guide
from probattn.inference.guides.ivon import ivon, ivon_priors, ivon_scales
from probattn.models.priors import site_priors

ROWS = 40
MEANS, WIDTHS = np.array([0.5, 0.0, -1.0, 2.0]), np.array([0.3, 0.3, 2.0, 2.0])
SURE = 5.0  # standard errors of a Monte Carlo estimate


def weights():
    """Two sites whose priors have other means and widths, one of them in a plate."""
    first = numpyro.sample("first", dist.Normal(MEANS[:2], 0.3).to_event(1))
    with numpyro.plate("layers", 2):
        second = numpyro.sample("second", dist.Normal(jnp.asarray(MEANS[2:]), 2.0))
    return jnp.concatenate([first, second])


def inputs_of(kind):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(ROWS, 4)) @ np.array(
        [[1.0, 0.6, 0, 0], [0, 1, 0.5, 0], [0, 0, 1, 0.8], [0, 0, 0, 1]]
    )
    noise = rng.normal(size=ROWS)
    score = x @ np.array([1.0, -1.0, 0.5, 1.0])
    return x, score + noise if kind == "linear" else (score + noise > 0).astype(float)


def model(kind, x, y):
    score = x @ weights()
    family = dist.Normal(score, 1.0) if kind == "linear" else dist.Bernoulli(logits=score)
    with numpyro.plate("rows", ROWS):
        numpyro.sample("y", family, obs=y)


def svi_of(kind, *, rate, beta2, hessian_init):
    """SVI of the mean loss, as a fit makes it, and its first state."""
    x, y = inputs_of(kind)
    start = {"first": jnp.zeros(2), "second": jnp.zeros(2)}
    guide = make_guide("ivon", weights, start)
    init_params(guide)  # sets its prototype up
    priors = ivon_priors(site_priors(weights), ROWS)
    optimizer = OptaxOptimizer(ivon(rate, lambda: priors, numbers=ROWS, beta2=beta2))
    scaled = (numpyro.handlers.scale(each, 1 / ROWS) for each in (partial(model, kind), guide))
    svi = SVI(*scaled, optimizer, OrderedELBO(exact=True))
    widths = ivon_scales(priors, ROWS, hessian_init)
    return svi, guide, lambda key: svi.init(key, x, y, init_params=widths), (x, y)


def flat(sites, part=""):
    return np.concatenate([np.asarray(sites[name + part]) for name in ("first", "second")])


def test_steps_are_those_of_the_paper():
    """Algorithm 1 in float64, of a logistic regression, with the same noise."""
    beta1, beta2, h0, rates = 0.9, 0.95, 0.2, np.linspace(0.3, 0.1, 25)
    svi, guide, init, (x, y) = svi_of(
        "logistic", rate=lambda step: jnp.asarray(rates)[step], beta2=beta2, hessian_init=h0
    )
    state = init(jax.random.key(3))
    update = jax.jit(svi.update)
    delta = 1 / (ROWS * WIDTHS**2)
    m, h, g = np.zeros(4), np.full(4, h0), np.zeros(4)
    for step, rate in enumerate(rates, 1):
        params = svi.get_params(state)
        sigma = 1 / np.sqrt(ROWS * (h + delta))
        np.testing.assert_allclose(flat(params, "_auto_loc"), m, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(flat(params, "_auto_scale"), sigma, rtol=1e-9)
        guide_key = jax.random.split(jax.random.split(state.rng_key)[1])[1]
        drawn = trace(substitute(seed(guide, guide_key), params)).get_trace()
        theta = flat({name: drawn[name]["value"] for name in ("first", "second")})
        gradient = x.T @ (1 / (1 + np.exp(-x @ theta)) - y) / ROWS
        curvature = gradient * (theta - m) / sigma**2
        g = beta1 * g + (1 - beta1) * gradient
        correction = (1 - beta2) ** 2 * (h - curvature) ** 2 / (h + delta) / 2
        h = beta2 * h + (1 - beta2) * curvature + correction
        m = m - rate * (g / (1 - beta1**step) + delta * (m - MEANS)) / (h + delta)
        state, _ = update(state, x, y)
    assert np.abs(m).max() > 0.3
    assert np.abs(np.log(h / h0)).max() > 0.3


@pytest.mark.slow
def test_a_conjugate_posterior_is_met():
    """Linear regression: the posterior's mean, and variances 1 / diag of its precision.

    Means over 64 chains at once, within Monte Carlo error; the paper's second-order term adds up
    to 2 (1 - beta2) of the precision.
    """
    beta2, chains, steps = 0.998, 64, 6000
    svi, _, init, (x, y) = svi_of("linear", rate=lambda _: 0.02, beta2=beta2, hessian_init=0.3)

    @jax.jit
    @jax.vmap
    def chain(key):
        def step(state, _):
            state, _ = svi.update(state, x, y)
            params = svi.get_params(state)
            return state, (params, jax.tree.map(lambda scale: scale**-2, params))

        _, (params, precisions) = jax.lax.scan(step, init(key), length=steps)
        later = jax.tree.map(lambda leaf: leaf[steps // 2 :].mean(0), (params, precisions))
        return tuple(
            jnp.concatenate([of[name] for name in names])
            for of, names in (
                (later[0], ("first_auto_loc", "second_auto_loc")),
                (later[1], ("first_auto_scale", "second_auto_scale")),
            )
        )

    means, precisions = map(np.asarray, chain(jax.random.split(jax.random.key(0), chains)))
    precision = x.T @ x + np.diag(WIDTHS**-2.0)
    expected = np.linalg.solve(precision, x.T @ y + MEANS / WIDTHS**2)
    error = means.std(0) / np.sqrt(chains)
    np.testing.assert_array_less(np.abs(means.mean(0) - expected), SURE * error)
    assert (error < 0.05 / np.sqrt(np.diag(precision))).all()
    diagonal, error = np.diag(precision), precisions.std(0) / np.sqrt(chains)
    bias = 2 * (1 - beta2) * diagonal
    np.testing.assert_array_less(np.abs(precisions.mean(0) - diagonal), SURE * error + bias)
    assert (error < 0.01 * diagonal).all()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e6])
def test_a_precision_is_at_least_halved(size):
    """Whatever the gradients; the precision that is left may be halved again, and never crosses."""
    priors = ivon_priors(site_priors(weights), ROWS)
    optimizer = ivon(lambda _: 0.1, lambda: priors, numbers=ROWS, beta2=0.5)
    names = [f"{site}_auto_{part}" for site in ("first", "second") for part in ("loc", "scale")]
    params = {name: jnp.zeros(2) for name in names}
    state = optimizer.init(params)
    rng = np.random.default_rng(0)
    for _ in range(100):
        gradients = {name: jnp.asarray(size * rng.normal(size=2)) for name in names}
        updates, state = optimizer.update(gradients, state, params)
        for site in ("first", "second"):
            ratio = np.exp(-2 * np.asarray(updates[f"{site}_auto_scale"]))
            assert (ratio >= 0.5 - 1e-12).all()
            assert np.isfinite(ratio).all()
            assert np.isfinite(updates[f"{site}_auto_loc"]).all()


def test_a_prior_that_is_not_gaussian_is_refused():
    sites = {"a": dist.Normal(0, 1), "b": dist.Laplace(0, 1).expand((2,)).to_event(1)}
    with pytest.raises(ValueError, match=r"^the prior of b is Laplace: expected a Normal one, "):
        ivon_priors(sites, 10)


def test_the_exact_bound_is_the_estimate_with_a_computed_divergence():
    """Per token: of one draw, both differ in the log density ratio of guide and priors alone."""
    svi, guide, init, (x, y) = svi_of("linear", rate=lambda _: 0.1, beta2=0.9, hessian_init=0.3)
    params = svi.get_params(init(jax.random.key(0)))
    key = jax.random.key(5)
    exact, estimate = (
        OrderedELBO(exact=flag).loss(key, params, svi.model, svi.guide, x, y)
        for flag in (True, False)
    )
    drawn = trace(substitute(seed(guide, jax.random.split(key)[1]), params)).get_trace()
    priors, difference = site_priors(weights), 0.0
    for name in ("first", "second"):
        own, value = dist.Normal(params[f"{name}_auto_loc"], params[f"{name}_auto_scale"]), drawn
        base = dist.Normal(priors[name].mean, jnp.sqrt(priors[name].variance))
        ratio = own.log_prob(value[name]["value"]) - base.log_prob(value[name]["value"])
        difference += float(jnp.sum(dist.kl_divergence(own, base) - ratio)) / ROWS
    assert abs(difference) > 1e-3
    assert float(exact - estimate) == pytest.approx(difference, abs=1e-10)
