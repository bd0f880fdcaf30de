"""What an evaluation runs, as programs for accelerators, lowered on any machine."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from probattn.inference.evaluation import attention_stages, generation, post_hoc, scoring
from probattn.inference.evaluation.perturbations import Ascent, Gaussian, Substitution
from probattn.models import LanguageModelConfig, ObjectiveConfig
from probattn.models.language import parameter_shapes
from tests.support.lowering import lowered, shape

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
@pytest.mark.parametrize("measure", [attention_stages._measure, attention_stages._radii])
@pytest.mark.parametrize("input", ["embeddings", "first_layer"])
def test_margins_certificates_and_radii_of_a_stage(parameters, measure, input):
    fixed = partial(measure, input=input, heads=MODEL.heads, bound=None)
    lowered(fixed, parameters, TOKENS, W, W)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "noise", [Gaussian(0.5), Ascent(0.5, 1), Substitution(0.1, [1.0] * VOCABULARY)]
)
def test_losses_under_noise(parameters, noise, precision):
    def losses(parameters, inputs, targets):
        key = jax.random.key(0)
        options = {"heads": MODEL.heads, "cap": 0.9, "precision": precision}
        return scoring._losses(noise, parameters, inputs, targets, key, **options)

    lowered(losses, parameters, TOKENS, TOKENS)


def test_the_next_token(parameters):
    def drawn(parameters, window):
        options = {"heads": MODEL.heads, "cap": None, "greedy": False, "top_k": 3}
        key = jax.random.key(0)
        return generation._next_token(parameters, window, 3, jnp.float32(0.5), key, **options)

    lowered(drawn, parameters, shape(1, MODEL.block, dtype=jnp.int32))


@pytest.mark.slow
def test_the_objective_of_the_post_hoc_prior():
    objective = partial(post_hoc._value_and_gradient, bound=None, prior_tokens=100.0)
    lowered(objective, (W, W, shape()), shape(2, MODEL.block, MODEL.width))
