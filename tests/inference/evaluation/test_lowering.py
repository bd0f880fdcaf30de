"""What an evaluation runs, as programs for accelerators, lowered on any machine."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from probattn.inference.evaluation import attention_stages, generation, post_hoc, scoring
from probattn.inference.evaluation.perturbations import Ascent, Gaussian, Substitution
from probattn.models import LanguageModelConfig, ObjectiveConfig
from probattn.models.language import parameter_shapes
from probattn.models.networks import TransformerNetwork
from probattn.stages.layer import AttentionLayer
from probattn.stages.projections import Rotary
from tests.support.lowering import assert_lowers, shape

VOCABULARY = 7
MODEL = LanguageModelConfig(layers=1, heads=2, width=16, block=8, prior_rank=4)
NOISE = Gaussian(0.5), Ascent(0.5, 1), Substitution(0.1, [1.0] * VOCABULARY)
TOKENS = shape(2, MODEL.block, dtype=jnp.int32)
W = shape(MODEL.width, MODEL.prior_rank)


@pytest.fixture
def parameters():
    with jax.enable_x64(False):
        return parameter_shapes(VOCABULARY, MODEL, ObjectiveConfig("margin"))


@pytest.mark.slow
def test_margins_and_certificates_of_a_stage():
    measure = partial(attention_stages._measure, bound=None)
    assert_lowers(measure, shape(2, MODEL.block, MODEL.width), W, W, None)


@pytest.mark.slow
def test_radii_of_a_stage():
    radii = partial(attention_stages._radii, bound=None)
    assert_lowers(radii, shape(2, MODEL.block, MODEL.width), W, W)


@pytest.mark.slow
def test_margins_of_a_head_with_rotary_positions():
    def measure(x, w_query, w_key, frequencies):
        head = AttentionLayer(w_query[None], w_key[None], rotary=Rotary(frequencies))
        return attention_stages._measure(x, w_query, w_key, head, bound=None)

    assert_lowers(measure, shape(1, MODEL.block, MODEL.width), W, W, shape(MODEL.prior_rank // 2))


def test_what_enters_a_layer(parameters):
    entering = partial(attention_stages._embed, network=TransformerNetwork(MODEL))
    assert_lowers(entering, parameters, TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "noise", [Gaussian(0.5), Ascent(0.5, 1), Substitution(0.1, [1.0] * VOCABULARY)]
)
def test_losses_under_noise(parameters, noise, precision):
    def losses(parameters, inputs, targets):
        network = TransformerNetwork(replace(MODEL, spectral_cap=0.9), precision)
        key = jax.random.key(0)
        return scoring.perturbed_losses(noise, parameters, inputs, targets, key, network=network)

    assert_lowers(losses, parameters, TOKENS, TOKENS)


def test_the_next_token(parameters):
    def drawn(parameters, window):
        scores = generation._last_scores(parameters, window, 3, network=TransformerNetwork(MODEL))
        options = {"greedy": False, "top_k": 3, "symbols": len(scores)}
        return generation._draw(scores, jnp.float32(0.5), jax.random.key(0), **options)

    assert_lowers(drawn, parameters, shape(1, MODEL.block, dtype=jnp.int32))


@pytest.mark.slow
def test_the_objective_of_the_post_hoc_prior():
    objective = partial(post_hoc._value_and_gradient, bound=None, prior_tokens=100.0)
    assert_lowers(objective, (W, W, shape()), shape(2, MODEL.block, MODEL.width))
