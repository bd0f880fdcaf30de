"""Models of embeddings: their log density term by term, both forms, and what they record."""

import functools
from dataclasses import replace
from functools import partial

import jax
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

SYMBOLS, WIDTH = 5, 2
SMALL = LatentEmbeddingsConfig(width=WIDTH, sequences=3, length=5)
RNG = np.random.default_rng(3)
TOKENS = RNG.integers(0, SYMBOLS, (SMALL.sequences, SMALL.length))
X = RNG.normal(size=(SMALL.sequences, SMALL.length, WIDTH))
EMISSION = {
    "emission": RNG.normal(size=(WIDTH, SYMBOLS)),
    "emission_bias": RNG.normal(size=SYMBOLS),
}
EMISSION = {name: value - value.mean(-1, keepdims=True) for name, value in EMISSION.items()}
# Strong enough to matter, and so weak that every determinant at X is positive.
TURNED = {"repulsion": np.array([[0.8, 0.0], [0.3, 0.5]]), "rotation": np.array([0.7])}
COUPLINGS = {
    "bounded": TURNED,
    "repulsive": TURNED,
    "free": {"free_coupling": 0.3 * RNG.normal(size=(WIDTH, WIDTH))},
}
RECORDED = ("coupling", "coupling_trace", "coupling_norm", "coupling_eigenvalues")
RECORDED += ("log_det", "margin", "certificate")


def latent(config):
    return partial(latent_embeddings, vocabulary_size=SYMBOLS, config=config)


def bound_of(kind, unit=1.0):
    return SMALL.bound * unit if kind == "bounded" else None


@functools.cache
def latent_density(kind):
    """The joint log density at any values, and the deterministic sites that it records."""
    model = latent(replace(SMALL, coupling=kind))

    @jax.jit
    def evaluate(values):
        density, sites = log_density(model, (TOKENS,), {}, values)
        return density, {name: sites[name]["value"] for name in RECORDED}

    return evaluate


@functools.cache
def observed_density(kind, unit):
    """The same of observed embeddings in a given unit."""
    config = replace(SMALL, coupling=kind)

    @jax.jit
    def evaluate(x, values):
        options = {"config": config, "unit": unit}
        density, sites = log_density(observed_embeddings, (x,), options, values)
        return density, {name: sites[name]["value"] for name in RECORDED}

    return evaluate


@jax.jit
def oracle(x, matrix, bound):
    """Residuals and dense Jacobians of all sequences, by the slow oracle."""
    weights = attention_weights_of(matrix)
    return jax.vmap(
        lambda sequence: (
            _reference.residual(sequence, *weights, bound=bound),
            _reference.jacobian_blocks(sequence, *weights, bound=bound),
        )
    )(x)


def attention_log_density(x, matrix, scale, bound):
    """Of all sequences, by the dense Jacobians of the slow oracle."""
    e, blocks = oracle(x, matrix, bound)
    determinants = np.linalg.det(blocks)
    assert np.all(determinants > 0)
    return stats.norm(0, scale).logpdf(e).sum() + np.log(determinants).sum()


def coupling_log_prior(kind, values=None):
    """With the Jacobian of L -> L L^T in two dimensions, 4 l_11^2 l_22."""
    values = COUPLINGS[kind] if values is None else values
    if kind == "free":
        return stats.norm(0, 1 / np.sqrt(2)).logpdf(values["free_coupling"]).sum()
    factor = values["repulsion"]
    wishart = stats.wishart(df=WIDTH + 1, scale=np.eye(WIDTH) / WIDTH)
    jacobian = np.log(4) + 2 * np.log(factor[0, 0]) + np.log(factor[1, 1])
    return (
        wishart.logpdf(factor @ factor.T) + jacobian + stats.norm.logpdf(values["rotation"]).sum()
    )


def turned_coupling(kind, turn):
    """The sites of turn^T A turn, with turn a rotation or a reflection of two dimensions."""
    values = COUPLINGS[kind]
    if kind == "free":
        return {"free_coupling": turn.T @ values["free_coupling"] @ turn}
    factor = turn.T @ values["repulsion"]
    return {
        "repulsion": np.linalg.cholesky(factor @ factor.T),
        "rotation": np.linalg.det(turn) * values["rotation"],
    }


@pytest.mark.parametrize("kind", ["bounded", pytest.param("free", marks=pytest.mark.slow)])
def test_log_density_of_the_latent_model_is_the_sum_of_its_terms(kind):
    found, recorded = latent_density(kind)(COUPLINGS[kind] | EMISSION | {"embeddings": X})
    emission, bias = EMISSION.values()
    logits = X @ emission + bias
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    # A vector that sums to zero has a density on that plane: one dimension less.
    plane = (SYMBOLS - 1) * np.log(2 * np.pi) / 2
    emission_prior = sum(
        -np.sum((row / 2) ** 2) / 2 - plane - (SYMBOLS - 1) * np.log(2) for row in emission
    )
    expected = (
        coupling_log_prior(kind)
        + emission_prior
        - np.sum(bias**2) / 2
        - plane
        + attention_log_density(X, recorded["coupling"], 1.0, bound_of(kind))
        + np.take_along_axis(log_p, TOKENS[..., None], -1).sum()
    )
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["bounded", *(pytest.param(k, marks=pytest.mark.slow) for k in ("repulsive", "free"))]
)
def test_both_forms_are_the_same_up_to_the_change_of_variables(kind):
    shared = COUPLINGS[kind] | EMISSION
    residuals = latent(replace(SMALL, coupling=kind, centred=False))

    @jax.jit
    def density(values):
        found, sites = log_density(residuals, (TOKENS,), {}, values)
        return found, sites["embeddings"]["value"]

    other, x = density(shared | {"embeddings_base": X})
    assert np.abs(x - X)[:, 1:].max() > 0.1
    one, recorded = latent_density(kind)(shared | {"embeddings": x})
    _, blocks = oracle(x, recorded["coupling"], bound_of(kind))
    sign, log_abs = np.linalg.slogdet(blocks)
    assert np.all(sign > 0)
    np.testing.assert_allclose(one - other, log_abs.sum(), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bounded", "free"])
def test_a_rotation_of_the_embeddings_changes_nothing(kind):
    """The density of A is invariant; that of L less so, by the Jacobian of L -> L L^T."""
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 2)))[0]
    values = EMISSION | COUPLINGS[kind] | {"embeddings": X}
    turned = turned_coupling(kind, turn) | {
        "emission": turn.T @ values["emission"],
        "emission_bias": values["emission_bias"],
        "embeddings": X @ turn,
    }
    (one, before), (other, after) = (latent_density(kind)(v) for v in (values, turned))
    one, other = (
        found - coupling_log_prior(kind, each) for found, each in ((one, values), (other, turned))
    )
    np.testing.assert_allclose(one, other, rtol=1e-11)
    for site in ("coupling_trace", "coupling_norm", "coupling_eigenvalues", "margin"):
        np.testing.assert_allclose(before[site], after[site], atol=1e-12)


@functools.cache
def public_margins(bound):
    @jax.jit
    def evaluate(x, matrix):
        stage = (x, *attention_weights_of(matrix))
        sign, log_abs = log_det(*stage, bound=bound)
        return {
            "log_det": jnp.where(sign > 0, log_abs, -jnp.inf),
            "margin": stability_margin(*stage, bound=bound),
            "certificate": certificate(*stage, bound=bound),
        }

    return evaluate


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUPLINGS)
def test_recorded_margins_are_those_of_the_public_functions(kind):
    _, of_latent = latent_density(kind)(COUPLINGS[kind] | EMISSION | {"embeddings": X})
    found = [of_latent]
    if kind != "repulsive":
        found.append(observed_density(kind, 1.0)(X, COUPLINGS[kind] | {"scale": 1.5})[1])
    for recorded in found:
        expected = public_margins(bound_of(kind))(X, recorded["coupling"])
        for name, value in expected.items():
            np.testing.assert_allclose(recorded[name], value, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("bounded", "latent"),
        ("repulsive", "residuals"),
        ("free", "observed"),
        *(
            pytest.param(kind, form, marks=pytest.mark.nightly)
            for kind, form in (
                *(("bounded", "residuals"), ("bounded", "observed"), ("repulsive", "latent")),
                *(("repulsive", "observed"), ("free", "latent"), ("free", "residuals")),
            )
        ),
    ],
)
def test_draws_of_the_prior_record_their_margins(kind, form):
    config = replace(SMALL, coupling=kind, centred=form != "residuals")
    model = partial(observed_embeddings, config=config) if form == "observed" else latent(config)

    @jax.jit
    def draw(key):
        sites = trace(seed(model, key)).get_trace()
        return {name: sites[name]["value"] for name in (*RECORDED, "embeddings")}

    sites = draw(jax.random.key(0))
    expected = public_margins(bound_of(kind))(sites["embeddings"], sites["coupling"])
    for name, value in expected.items():
        np.testing.assert_allclose(sites[name], value, err_msg=name)


def test_one_log_likelihood_per_sequence_in_a_named_plate():
    sites = {}
    jax.eval_shape(lambda: sites.update(trace(seed(latent(SMALL), 0)).get_trace()))
    assert sites["sequences"]["type"] == "plate"
    assert sites["tokens"]["fn"].batch_shape == (3,)
    assert sites["embeddings"]["fn"].batch_shape == (3,)
    assert sites["tokens"]["value"].shape == (3, 5)


@pytest.mark.parametrize("kind", ["bounded", pytest.param("free", marks=pytest.mark.slow)])
@pytest.mark.parametrize("unit", [pytest.param(1.0, marks=pytest.mark.slow), 0.05])
def test_log_density_of_the_observed_model(kind, unit):
    x, scale = unit * X, 1.5 * unit
    found, recorded = observed_density(kind, unit)(x, COUPLINGS[kind] | {"scale": scale})
    expected = (
        coupling_log_prior(kind)
        + stats.lognorm(1.0, scale=unit).logpdf(scale)
        + attention_log_density(x, recorded["coupling"], scale, bound_of(kind, unit))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.slow
def test_another_unit_is_another_name_for_the_same_model():
    """x -> u x, A -> A / u^2, sigma -> u sigma, c -> u c: densities differ by the units alone."""
    unit = 0.05
    one, other = (
        observed_density("bounded", u)(u * X, COUPLINGS["bounded"] | {"scale": 1.5 * u})[0]
        for u in (1.0, unit)
    )
    numbers = X.size + 1  # and the scale
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
