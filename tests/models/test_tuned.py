"""Published decoders that are fitted on: density, priors, adapters, and what is refused."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import log_density
from scipy.special import logsumexp
from scipy.stats import norm

from probattn import relaxed_barrier
from probattn.models import ObjectiveConfig, TuningConfig, tuned_decoder
from probattn.models.decoder.attention import attention_layer
from probattn.models.decoder.config import DecoderConfig, RotaryConfig
from probattn.models.decoder.layers import linear
from probattn.models.decoder.network import decoder_logits
from probattn.models.decoder.shapes import leaves, parameter_shapes, with_leaf
from probattn.models.networks import DecoderNetwork
from probattn.models.tuned import (
    changes_at_start,
    moving_leaves,
    sample_changes,
    tuned_numbers,
    tuned_parameters,
)

SIZES = {"vocabulary": 7, "width": 6, "layers": 1, "heads": 2, "key_heads": 1, "head_width": 4}
DECODER = DecoderConfig(
    **SIZES, context=8, hidden=5, rotary=RotaryConfig(), attention_bias=True, tied=True
)
NETWORK = DecoderNetwork(DECODER, 8)
MARGIN = ObjectiveConfig("margin", 0.3, attention="first_layer", delta=0.4)
ADAPTERS = TuningConfig("adapters", 3, 2.0, "query|out", 0.2)
TOTAL = 20  # sequences of the text


def published(seed=0, config=DECODER):
    rng = np.random.default_rng(seed)
    tree = parameter_shapes(config)
    for name, shape in leaves(tree):
        tree = with_leaf(tree, name, jnp.asarray(rng.normal(size=shape) + ("norm" in name)))
    return tree


def moved(start, tuning, seed=1):
    rng = np.random.default_rng(seed)
    sites = changes_at_start(jax.random.key(0), start, DECODER, tuning)
    return {name: value + rng.normal(size=value.shape) / 9 for name, value in sites.items()}


def tokens(seed=2, shape=(3, 7)):
    drawn = np.random.default_rng(seed).integers(0, SIZES["vocabulary"], shape)
    return jnp.asarray(drawn[:, :-1]), jnp.asarray(drawn[:, 1:])


def rms(value):
    return np.sqrt(np.mean(np.asarray(value) ** 2))


def log_likelihood(parameters, inputs, targets):
    """By the formula: tokens, and the barrier of every head of the stage, averaged over heads."""
    logits = decoder_logits(parameters, inputs, DECODER)
    normalised = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    total = jnp.sum(jnp.take_along_axis(normalised, targets[..., None], -1))
    own = parameters["layers"]["0"]
    x = parameters["embedding"]["tokens"][inputs]
    for head in range(DECODER.heads):
        stage = attention_layer(own, DECODER, 0).of_head(head).stage(x)
        total -= 0.3 * jnp.sum(relaxed_barrier(stage, delta=0.4)) / DECODER.heads
    return total


def test_density_and_gradient_are_those_of_the_formula():
    """The prior enters once, centred at the published weights; its gradient is that of L2-SP."""
    start, (inputs, targets) = published(), tokens()
    tuning = TuningConfig(prior_scale=0.2)
    sites = moved(start, tuning)
    model = partial(tuned_decoder, start=start, network=NETWORK, tuning=tuning, objective=MARGIN)
    seeded = numpyro.handlers.seed(partial(model, num_sequences=TOTAL), 0)

    @jax.jit
    def computed(sites):
        def density(sites):
            return log_density(seeded, (inputs, targets), {}, sites)[0]

        def likelihood(sites):
            parameters = tuned_parameters(start, sites, DECODER, tuning)
            return TOTAL / len(inputs) * log_likelihood(parameters, inputs, targets)

        return jax.value_and_grad(density)(sites), jax.value_and_grad(likelihood)(sites)

    (got, gradient), (likelihood, of_likelihood) = computed(sites)
    published_leaves = dict(leaves(start))
    prior = 0.0
    for name, centre in published_leaves.items():
        scale = 0.2 * rms(centre)
        prior += norm.logpdf(sites[name], centre, scale).sum()
        pull = -(np.asarray(sites[name]) - centre) / scale**2
        np.testing.assert_allclose(gradient[name], pull + of_likelihood[name], rtol=1e-9, atol=1e-9)
    assert float(got) == pytest.approx(prior + float(likelihood), rel=1e-12)
    assert gradient.keys() == published_leaves.keys()


def test_what_an_adapter_adds_has_the_prior_of_a_tensor_that_moves():
    start = published()
    with numpyro.handlers.seed(rng_seed=0), numpyro.handlers.trace() as trace:
        sample_changes(start, DECODER, ADAPTERS)
    assert {name: site["value"].shape for name, site in trace.items()} == {
        "layers.0.query.weights.down": (6, 3),
        "layers.0.query.weights.up": (3, 8),
        "layers.0.out.weights.down": (8, 3),
        "layers.0.out.weights.up": (3, 6),
    }
    assert tuned_numbers(DECODER, ADAPTERS) == 18 + 24 + 24 + 18
    for name in ("query", "out"):
        down, up = (
            trace[f"layers.0.{name}.weights.{factor}"]["fn"].variance[0, 0]
            for factor in ("down", "up")
        )
        expected = 0.2 * rms(start["layers"]["0"][name]["weights"])
        assert np.sqrt((2 / 3) ** 2 * 3 * down * up) == pytest.approx(expected, rel=1e-12)


def test_adapters_worked_into_a_matrix_are_the_adapters_applied():
    start = published()
    sites = moved(start, ADAPTERS)
    merged = tuned_parameters(start, sites, DECODER, ADAPTERS)["layers"]["0"]
    x = np.random.default_rng(3).normal(size=(5, 8))
    for name, inputs in (("query", 1), ("out", 2)):
        factors = (sites[f"layers.0.{name}.weights.{factor}"] for factor in ("down", "up"))
        down, up = map(np.asarray, factors)
        rows = x[:, : down.shape[0]]
        weights = np.asarray(start["layers"]["0"][name]["weights"]).reshape(len(down), -1)
        expected = rows @ weights + 2 / 3 * (rows @ down) @ up
        got = linear(
            {"weights": merged[name]["weights"]},
            rows.reshape(5, *merged[name]["weights"].shape[:inputs]),
            inputs=inputs,
        )
        np.testing.assert_allclose(np.reshape(got, (5, -1)), expected, rtol=1e-12, atol=1e-12)
    assert merged["key"]["weights"] is start["layers"]["0"]["key"]["weights"]


@pytest.mark.parametrize("tuning", [ADAPTERS, TuningConfig(), TuningConfig("first_attention")])
def test_a_fit_starts_at_the_published_network(tuning):
    """In JAX's own precision at the least, whatever the weights are stored in."""
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), published())
    sites = changes_at_start(jax.random.key(4), start, DECODER, tuning)
    assert {leaf.dtype for leaf in sites.values()} == {jnp.result_type(float)}
    found = dict(leaves(tuned_parameters(start, sites, DECODER, tuning)))
    for name, leaf in leaves(start):
        np.testing.assert_array_equal(found[name].astype(jnp.float32), leaf.astype(jnp.float32))


def test_what_moves():
    first = moving_leaves(DECODER, TuningConfig("first_attention"))
    names = {"attention_norm.gain"}
    names |= {
        f"{part}.{leaf}" for part in ("query", "key", "value") for leaf in ("weights", "bias")
    }
    assert first.keys() == {f"layers.0.{name}" for name in (*names, "out.weights")}
    assert moving_leaves(DECODER, TuningConfig()) == dict(leaves(parameter_shapes(DECODER)))
    one = TuningConfig("adapters", adapter_matrices=r"layers\.0\.up\.weights")
    assert moving_leaves(DECODER, one) == {"layers.0.up.weights": (6, 5)}


def test_a_tensor_of_zeros_moves_in_its_own_unit():
    start = with_leaf(published(), "layers.0.query.bias", jnp.zeros((2, 4)))
    tuning = TuningConfig("first_attention", prior_scale=0.2)
    with numpyro.handlers.seed(rng_seed=0), numpyro.handlers.trace() as trace:
        sample_changes(start, DECODER, tuning)
    assert trace["layers.0.query.bias"]["fn"].variance[0, 0] == pytest.approx(0.04)


def test_products_in_bfloat16_round_both_factors():
    rng = np.random.default_rng(5)
    x, weights = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 6), (6, 3)))
    got = linear({"weights": weights}, x, precision="bfloat16")
    rounded = (np.asarray(each.astype(jnp.bfloat16), np.float64) for each in (x, weights))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.matmul(*rounded), rtol=1e-5, atol=1e-6)


def test_tokens_are_predicted_by_tied_and_other_outputs():
    config = DecoderConfig(**SIZES, context=8, hidden=5, logit_cap=2.0)
    for each in (config, DecoderConfig(**SIZES, context=8, hidden=5), DECODER):
        parameters, (inputs, targets) = published(config=each), tokens()
        network = DecoderNetwork(each, 8)
        x = network.embed(parameters, inputs)
        got = network.tokens(parameters, x, rematerialise=True).log_prob(targets)
        logits = np.asarray(decoder_logits(parameters, inputs, each))
        chosen = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
        expected = (chosen - logsumexp(logits, axis=-1)).sum(-1)
        np.testing.assert_allclose(got, expected, rtol=1e-9)


@pytest.mark.slow
def test_samplers_take_the_adapters():
    start, (inputs, targets) = published(), tokens()
    model = partial(tuned_decoder, start=start, network=NETWORK, tuning=ADAPTERS)
    mcmc = MCMC(NUTS(model, max_tree_depth=1), num_warmup=2, num_samples=3, progress_bar=False)
    mcmc.run(jax.random.key(6), inputs, targets)
    draws = mcmc.get_samples()
    assert draws["layers.0.query.weights.up"].shape == (3, 3, 8)
    assert all(np.isfinite(value).all() for value in draws.values())


REFUSED = {
    "objective full": ({"objective": ObjectiveConfig("full")}, "objective.name is full"),
    "a stage beside": (
        {"objective": ObjectiveConfig("margin")},
        "objective.attention is separate of a published model: expected first_layer",
    ),
    "too long": ({"inputs": jnp.zeros((1, 9), int)}, "inputs have shape (1, 9)"),
    "other targets": ({"targets": jnp.zeros((1, 2), int)}, "targets have shape (1, 2)"),
    "no token": ({"targets": jnp.full((3, 6), 7)}, "targets are 7 to 7"),
    "too few": ({"num_sequences": 2}, "num_sequences is 2: expected an integer, at least the 3"),
    "no matrix": (
        {"tuning": TuningConfig("adapters", adapter_matrices="mlp")},
        "fit.adapter_matrices is 'mlp', the name of no matrix: expected some of query, key, value",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_model_refuses(case):
    changes, line = REFUSED[case]
    inputs, targets = tokens()
    given = {"inputs": inputs, "targets": targets, "start": published(), "network": NETWORK}
    with pytest.raises(ValueError, match=re.escape(line)), numpyro.handlers.seed(rng_seed=0):
        tuned_decoder(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"trainable": "some"}, "fit.trainable is 'some': expected one of all, first_attention"),
        ({"adapter_rank": 0}, "fit.adapter_rank is 0: expected an integer >= 1"),
        ({"adapter_scale": -1.0}, "fit.adapter_scale is -1.0: expected a finite number > 0"),
        ({"prior_scale": 0.0}, "prior.scale is 0.0: expected a finite number > 0"),
        ({"adapter_matrices": "("}, "fit.adapter_matrices is '(': expected a regular expression"),
    ],
)
def test_a_configuration_refuses(changes, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        TuningConfig(**changes)
