"""Models of embeddings: their log density term by term, both forms, and what they record."""

from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.handlers import seed, trace
from numpyro.infer.util import log_density
from scipy import stats

from probattn import _reference, certificate, log_det, stability_margin
from probattn.models import LatentEmbeddingsConfig, latent_embeddings, observed_embeddings
from probattn.models.checks import check_symbols
from probattn.models.coupling import attention_weights_of

SYMBOLS = 5
SMALL = LatentEmbeddingsConfig(width=2, sequences=3, length=5)
COUPLINGS = ("bounded", "repulsive", "free")


def latent(config):
    return partial(latent_embeddings, vocabulary_size=SYMBOLS, config=config)


def drawn(model, key=0):
    sites = trace(seed(model, key)).get_trace()
    return {name: site["value"] for name, site in sites.items()}


def attention_log_density(x, matrix, scale, bound):
    """Of all sequences, by the dense Jacobians of the slow oracle."""
    weights = attention_weights_of(jnp.asarray(matrix))
    total = 0.0
    for sequence in np.asarray(x):
        e = _reference.residual(sequence, *weights, bound=bound)
        determinants = np.linalg.det(_reference.jacobian_blocks(sequence, *weights, bound=bound))
        assert np.all(determinants > 0)
        total += stats.norm(0, scale).logpdf(e).sum() + np.log(determinants).sum()
    return total


def coupling_log_prior(kind, sites):
    """Without the constant of the Wishart matrix's Cholesky factor, which SciPy lacks."""
    if kind == "bounded":
        return stats.norm.logpdf(sites["direction"]).sum()
    return stats.norm(0, 1 / np.sqrt(2)).logpdf(sites["free_coupling"]).sum()


@pytest.mark.parametrize("kind", ["bounded", "free"])
def test_log_density_of_the_latent_model_is_the_sum_of_its_terms(kind):
    config = replace(SMALL, coupling=kind)
    sites = drawn(latent(config), key=3)
    tokens = np.asarray(sites["tokens"])
    names = ("direction", "free_coupling", "emission", "emission_bias", "embeddings")
    values = {name: sites[name] for name in names if name in sites}
    found, _ = log_density(latent(config), (tokens,), {}, values)

    x, emission, bias = (np.asarray(sites[n]) for n in ("embeddings", "emission", "emission_bias"))
    logits = x @ emission + bias
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    # A vector that sums to zero has a density on that plane: one dimension less.
    plane = (SYMBOLS - 1) * np.log(2 * np.pi) / 2
    emission_prior = sum(
        -np.sum((row / 2) ** 2) / 2 - plane - (SYMBOLS - 1) * np.log(2) for row in emission
    )
    expected = (
        coupling_log_prior(kind, sites)
        + emission_prior
        - np.sum(bias**2) / 2
        - plane
        + attention_log_density(x, sites["coupling"], 1.0, config.context_bound)
        + np.take_along_axis(log_p, tokens[..., None], -1).sum()
    )
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("kind", COUPLINGS)
def test_both_forms_are_the_same_up_to_the_change_of_variables(kind):
    centred = replace(SMALL, coupling=kind)
    residuals = replace(centred, centred=False)
    sites = drawn(latent(residuals))
    names = [
        name
        for name, site in trace(seed(latent(residuals), 0)).get_trace().items()
        if site["type"] == "sample" and name not in ("tokens", "embeddings_base")
    ]
    shared = {name: sites[name] for name in names}
    arguments = (sites["tokens"],), {}
    one, _ = log_density(latent(centred), *arguments, shared | {"embeddings": sites["embeddings"]})
    other, _ = log_density(
        latent(residuals), *arguments, shared | {"embeddings_base": sites["embeddings_base"]}
    )
    sign, log_abs = log_det(
        sites["embeddings"],
        *attention_weights_of(sites["coupling"]),
        bound=centred.context_bound,
    )
    assert np.all(sign > 0)
    np.testing.assert_allclose(one - other, log_abs.sum(), rtol=1e-9)


@pytest.mark.parametrize("kind", ["bounded", "free"])
def test_a_rotation_of_the_embeddings_changes_nothing(kind):
    config = replace(SMALL, coupling=kind)
    sites = drawn(latent(config), key=3)
    turn = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(2, 2)))[0])
    name = "direction" if kind == "bounded" else "free_coupling"
    values = {n: sites[n] for n in (name, "emission", "emission_bias", "embeddings")}
    turned = values | {
        name: turn.T @ values[name] @ turn,
        "emission": turn.T @ values["emission"],
        "embeddings": values["embeddings"] @ turn,
    }
    (one, before), (other, after) = (
        log_density(latent(config), (sites["tokens"],), {}, v) for v in (values, turned)
    )
    np.testing.assert_allclose(one, other, rtol=1e-11)
    for site in ("coupling_trace", "coupling_norm", "coupling_eigenvalues", "margin"):
        np.testing.assert_allclose(before[site]["value"], after[site]["value"], atol=1e-12)


@pytest.mark.parametrize("kind", COUPLINGS)
def test_recorded_margins_are_those_of_the_public_functions(kind):
    config = replace(SMALL, coupling=kind)
    for sites in (drawn(latent(config)), drawn(partial(observed_embeddings, config=config))):
        weights = attention_weights_of(sites["coupling"])
        stage = (sites["embeddings"], *weights)
        sign, log_abs = log_det(*stage, bound=config.context_bound)
        np.testing.assert_allclose(sites["log_det"], jnp.where(sign > 0, log_abs, -jnp.inf))
        for name, function in (("margin", stability_margin), ("certificate", certificate)):
            np.testing.assert_allclose(sites[name], function(*stage, bound=config.context_bound))


def test_one_log_likelihood_per_sequence_in_a_named_plate():
    sites = trace(seed(latent(SMALL), 0)).get_trace()
    assert sites["sequences"]["type"] == "plate"
    assert sites["tokens"]["fn"].batch_shape == (3,)
    assert sites["embeddings"]["fn"].batch_shape == (3,)
    assert sites["tokens"]["value"].shape == (3, 5)


@pytest.mark.parametrize("kind", ["bounded", "free"])
@pytest.mark.parametrize("unit", [1.0, 0.05])
def test_log_density_of_the_observed_model(kind, unit):
    config = replace(SMALL, coupling=kind)
    sites = drawn(partial(observed_embeddings, config=config, unit=unit), key=5)
    name = "direction" if kind == "bounded" else "free_coupling"
    values = {name: sites[name], "scale": sites["scale"]}
    arguments = (sites["embeddings"],), {"config": config, "unit": unit}
    found, _ = log_density(observed_embeddings, *arguments, values)
    bound = config.bound * unit if kind == "bounded" else None
    expected = (
        coupling_log_prior(kind, sites)
        + stats.lognorm(1.0, scale=unit).logpdf(sites["scale"])
        + attention_log_density(sites["embeddings"], sites["coupling"], sites["scale"], bound)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_another_unit_is_another_name_for_the_same_model():
    """x -> u x, A -> A / u^2, sigma -> u sigma, c -> u c: densities differ by the units alone."""
    unit = 0.05
    sites = drawn(partial(observed_embeddings, config=SMALL))
    one, _ = log_density(
        observed_embeddings,
        (sites["embeddings"],),
        {"config": SMALL},
        {"direction": sites["direction"], "scale": sites["scale"]},
    )
    other, _ = log_density(
        observed_embeddings,
        (unit * sites["embeddings"],),
        {"config": SMALL, "unit": unit},
        {"direction": sites["direction"], "scale": unit * sites["scale"]},
    )
    numbers = sites["embeddings"].size + 1  # and the scale
    np.testing.assert_allclose(other, one - numbers * np.log(unit), rtol=1e-10)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", 0, "latent.width is 0: expected an integer >= 1"),
        ("length", 2, "latent.length is 2: expected an integer >= 3"),
        ("sequences", True, "latent.sequences is True: expected an integer >= 1"),
        ("coupling", "strong", "expected one of repulsive, bounded, free"),
        ("bound", 0.0, "latent.bound is 0.0: expected a finite number > 0"),
        ("bound", np.inf, "latent.bound is inf: expected a finite number > 0"),
        ("bound", None, "latent.bound is None: expected a finite number > 0"),
    ],
)
def test_configurations_that_make_no_model(field, value, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **{field: value})


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match=r"tokens have shape \(2, 5\): expected .* = \(3, 5\)"):
        latent(SMALL)(np.zeros((2, 5), int))
    for library in (np, jnp):
        with pytest.raises(ValueError, match=r"tokens are 0 to 5: expected symbols from 0 to 4"):
            latent(SMALL)(library.arange(15).reshape(3, 5) % 6)
    with pytest.raises(ValueError, match="vocabulary_size is 1: expected an integer >= 2"):
        latent_embeddings(vocabulary_size=1, config=SMALL)
    with pytest.raises(ValueError, match=r"embeddings have shape \(3, 5, 3\): expected .*5, 2"):
        observed_embeddings(np.zeros((3, 5, 3)), config=SMALL)
    with pytest.raises(ValueError, match=r"unit is 0\.0: expected a finite number > 0"):
        observed_embeddings(config=SMALL, unit=0.0)


def test_not_a_number_is_no_symbol():
    with pytest.raises(ValueError, match="tokens are nan to nan: expected symbols from 0 to 2"):
        check_symbols("tokens", np.array([0.0, np.nan]), 3)
