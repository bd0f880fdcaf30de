"""Leave-one-out of latent models against quadrature over the embeddings and over the coupling."""

import functools

import jax
import numpy as np
import pytest
import xarray as xr
from scipy.special import log_softmax, logsumexp

from probattn.inference.comparison import particle_filter
from probattn.inference.comparison.marginal import (
    REPEATS,
    marginal_leave_one_out,
    marginal_log_likelihood,
)
from probattn.inference.export.diagnostics import leave_one_out
from probattn.models import LatentEmbeddingsConfig
from tests.support.scalar_process import BIAS, EMISSION, of_three_tokens

CONFIG = LatentEmbeddingsConfig(width=1, coupling="repulsive", sequences=6, length=3)
TOKENS = np.array([[0, 0, 0], [0, 1, 2], [2, 2, 2], [0, 0, 1], [2, 0, 2], [1, 1, 0]])
ROOTS = np.linspace(0.05, 3.0, 24)  # of minus the coupling


def likelihoods(roots=ROOTS):
    """Probability of every sequence under every coupling, by quadrature: (roots, 6)."""
    joint = np.array([of_three_tokens(-(root**2), None) for root in roots])
    return joint[:, *TOKENS.T]


def draws_of(roots):
    """Draws of four chains in which only the coupling varies."""
    shape = (4, len(roots) // 4)
    return {
        "repulsion": np.reshape(roots, (*shape, 1, 1)),
        "emission": np.broadcast_to(EMISSION, (*shape, *EMISSION.shape)),
        "emission_bias": np.broadcast_to(BIAS, (*shape, *BIAS.shape)),
        "embeddings": np.zeros((*shape, *TOKENS.shape, 1)),
    }


@pytest.mark.slow
def test_the_likelihood_is_that_of_quadrature():
    with jax.enable_x64(True):
        found = marginal_log_likelihood(draws_of(ROOTS), TOKENS, CONFIG, seed=1)
    assert found.shape == (REPEATS, 4, 6, 6)
    expected = np.log(likelihoods()).reshape(4, 6, 6)
    error = found.std(0, ddof=1).mean() / np.sqrt(REPEATS)
    apart = (found.mean(0) - expected) / error
    assert abs(apart.mean()) < 4 / np.sqrt(apart.size)
    assert apart.std() < 1.5  # errors of a sequence differ, and are few


@pytest.mark.slow
def test_every_draw_has_its_own_parameters():
    """Without an emission the likelihood is a product of the bias's probabilities."""
    bias = np.random.default_rng(0).normal(size=(4, 6, 3))
    draws = draws_of(ROOTS) | {"emission": np.zeros((4, 6, 1, 3)), "emission_bias": bias}
    with jax.enable_x64(True):
        found = marginal_log_likelihood(draws, TOKENS, CONFIG)
    expected = log_softmax(bias, axis=-1)[..., TOKENS].sum(-1)
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-12)


@pytest.mark.slow
def test_leaving_out_a_sequence_is_as_by_quadrature():
    """Draws of the exact posterior under a flat prior on a grid of couplings."""
    each = likelihoods()
    posterior = each.prod(1) / each.prod(1).sum()
    generator = np.random.default_rng(0)
    roots = generator.choice(ROOTS, 128, p=posterior)
    without = each.prod(1)[:, None] / each  # likelihood of the others
    expected = np.log((without * each).sum(0) / without.sum(0)).sum()
    with jax.enable_x64(True):
        found = marginal_leave_one_out(draws_of(roots), TOKENS, CONFIG, seed=2)
    assert found.pareto_k < 0.7
    sampled = generator.choice(ROOTS, (400, 128), p=posterior)
    index = np.searchsorted(ROOTS, sampled)
    of_draws = -np.log(np.mean(1 / each[index], axis=1)).sum(1)  # the error of so few draws
    assert abs(found.elpd_loo - expected) < 3 * np.hypot(
        found.elpd_loo_filter_error, of_draws.std()
    )
    assert 0 < found.elpd_loo_filter_error < found.elpd_loo_se


@pytest.mark.slow
def test_the_bias_of_few_particles_is_taken_off(monkeypatch):
    """Of 120 sequences and 32 draws, whose likelihoods are known by quadrature."""
    few = functools.partial(particle_filter.filter_tokens, particles=8)
    monkeypatch.setattr(particle_filter, "filter_tokens", few)
    roots, tokens = np.linspace(0.05, 3.0, 32), np.tile(TOKENS, (20, 1))
    exact = elpd(np.tile(np.log(likelihoods(roots)), 20).reshape(4, 8, -1))
    plain, errors, told = [], [], []
    for seed in range(3):
        repeated = marginal_log_likelihood(draws_of(roots), tokens, CONFIG, seed=seed)
        plain.append(elpd(logsumexp(repeated, axis=0) - np.log(REPEATS)) - exact)
        found = marginal_leave_one_out(draws_of(roots), tokens, CONFIG, seed=seed)
        errors.append(found.elpd_loo - exact)
        told.append(found.elpd_loo_filter_error)
    # Without the correction it is too low, by far more than the particles' noise ...
    assert max(plain) < -5
    assert np.ptp(plain) < 3
    # ... and with it as near as it says.
    assert abs(np.mean(errors)) < 1
    assert np.all(np.abs(errors) < 3 * np.array(told))
    assert max(told) < 3


def elpd(log_likelihood):
    """Of a likelihood that is taken as it is."""
    tokens = xr.Dataset({"tokens": (("chain", "draw", "sequence"), log_likelihood)})
    return leave_one_out(
        xr.DataTree.from_dict({"posterior": tokens, "log_likelihood": tokens})
    ).elpd_loo


def test_a_free_coupling_has_none():
    free = LatentEmbeddingsConfig(width=1, coupling="free", sequences=6, length=3)
    assert marginal_leave_one_out(draws_of(ROOTS), TOKENS, free) is None
