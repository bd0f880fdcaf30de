"""Tokens of a large vocabulary, whose logits are never all in memory, against NumPyro's own."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import log_density

from probattn.models import LanguageModelConfig, language_model, tied_tokens
from probattn.models.tied_tokens import SlicedTokens
from probattn.models.transformer import output_logits
from tests.support.numpy_network import random_parameters, random_tokens

B, T, D, V = 2, 7, 3, 11
WHOLE = B * T * V


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch):
    """Two positions at a time: the last slice is not full."""
    monkeypatch.setattr(tied_tokens, "LARGEST", 2 * B * V)


def inputs(dtype=np.float64):
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
    return jnp.asarray(hidden, dtype), jnp.asarray(table, dtype), rng.integers(0, V, (B, T))


def sliced(hidden, table, value, precision="float32"):
    found = tied_tokens.tied_tokens(hidden, table, precision=precision)
    assert isinstance(found, SlicedTokens)
    return found.log_prob(value)


def plain(hidden, table, value, precision="float32"):
    logits = output_logits(hidden, table, precision)
    return dist.Categorical(logits=logits).to_event(1).log_prob(value)


def weighted(log_prob, precision="float32"):
    """A function of hidden and table with another weight for each sequence, and its gradient."""

    def total(hidden, table, value):
        return jnp.sum(jnp.arange(1, B + 1) * log_prob(hidden, table, value, precision))

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))


def test_density_and_gradient_are_those_of_all_logits_at_once():
    found, expected = (weighted(log_prob)(*inputs()) for log_prob in (sliced, plain))
    for got, true in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, true, rtol=1e-13, atol=1e-14)
    assert sliced(*inputs()).shape == (B,)


@pytest.mark.slow
def test_in_bfloat16_they_are_so_up_to_its_rounding():
    arrays = inputs(np.float32)
    found, expected = (weighted(log_prob, "bfloat16")(*arrays) for log_prob in (sliced, plain))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for got, true in zip(found[1], expected[1], strict=True):
        assert got.dtype == jnp.float32
        # A sum over the slices, of which each is rounded, in place of a sum that is rounded.
        np.testing.assert_allclose(got, true, atol=4 * jnp.finfo(jnp.bfloat16).eps)


def test_no_array_holds_all_logits_or_their_derivative():
    def largest(log_prob):
        text = str(weighted(log_prob).trace(*inputs()).jaxpr)
        shapes = re.findall(r"f64\[([\d,]+)\]", text)
        return max(math.prod(map(int, shape.split(","))) for shape in shapes)

    assert largest(plain) == WHOLE
    assert largest(sliced) < WHOLE / 2


def factors(jaxpr):
    """Return the dtypes of the factors of every product of matrices in a program."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append({str(variable.aval.dtype) for variable in equation.invars})
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            found += factors(inner) if hasattr(inner, "eqns") else []
    return found


def test_the_derivative_in_bfloat16_multiplies_no_wider_numbers():
    found = factors(weighted(sliced, "bfloat16").trace(*inputs(np.float32)).jaxpr.jaxpr)
    # Forward, the same anew in the derivative, and one for each of the two that it is of.
    assert found == [{"bfloat16"}] * 4


def test_draws_are_those_of_all_logits_at_once():
    hidden, table, _ = inputs()
    key = jax.random.key(0)
    whole = dist.Categorical(logits=output_logits(hidden, table)).to_event(1)
    draws = SlicedTokens(hidden, table).sample(key, (3,))
    np.testing.assert_array_equal(draws, whole.sample(key, (3,)))
    found, expected = SlicedTokens(hidden, table).log_prob(draws), whole.log_prob(draws)
    np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_a_symbol_that_there_is_not_is_told():
    hidden, table, value = inputs()
    tokens = SlicedTokens(hidden, table, validate_args=True)
    with pytest.warns(UserWarning, match="Out-of-support"):
        tokens.log_prob(np.full_like(value, V))


@pytest.mark.slow
def test_a_language_model_has_the_same_density_with_them(monkeypatch):
    parameters, tokens, targets = random_parameters(0), random_tokens(0), random_tokens(1)
    layers, width = np.shape(parameters["attention_in"])[:2]
    vocabulary = len(parameters["token_embedding"])
    config = LanguageModelConfig(layers, 1, width, tokens.shape[1], 2)

    def density():
        options = {"vocabulary_size": vocabulary, "config": config}
        found, trace = log_density(
            language_model, (jnp.asarray(tokens), jnp.asarray(targets)), options, parameters
        )
        return found, type(trace["tokens"]["fn"])

    found, kind = density()
    assert kind is SlicedTokens
    monkeypatch.setattr(tied_tokens, "LARGEST", 2**26)
    expected, kind = density()
    assert kind is not SlicedTokens
    assert float(found) == pytest.approx(float(expected), rel=1e-13)
    with numpyro.handlers.seed(rng_seed=0):
        language_model(jnp.asarray(tokens), vocabulary_size=vocabulary, config=config)
