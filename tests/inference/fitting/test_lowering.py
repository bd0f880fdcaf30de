"""What a fit runs, as programs for accelerators, lowered on any machine."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probattn.inference import FitConfig, RunConfig
from probattn.inference.fitting.monitor import _measure
from probattn.models import LanguageModelConfig, ObjectiveConfig
from probattn.models.language import parameter_shapes
from tests.support.lowering import TracedTrainer, assert_lowers, assert_runs_on_accelerators, shape

VOCABULARY = 7
MODEL = LanguageModelConfig(layers=1, heads=2, width=16, block=8, prior_rank=4)
FIT = FitConfig(steps=10, batch=2, warmup=1, eval_every=10, checkpoint_every=10)


def config_of(name, attention="separate", **fit):
    objective = ObjectiveConfig(name, attention=attention)
    return RunConfig(model=MODEL, objective=objective, fit=dataclasses.replace(FIT, **fit))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attention", "fit"),
    [
        ("margin", "separate", {}),
        ("ce", "separate", {}),
        ("margin", "first_layer", {}),
        ("margin", "normalised", {}),
        ("full", "separate", {"precision": "bfloat16", "rematerialise": True}),
        pytest.param("full", "first_layer", {"precision": "bfloat16"}, marks=pytest.mark.nightly),
        pytest.param("full", "normalised", {}, marks=pytest.mark.nightly),
        ("latent", "separate", {}),
        pytest.param("latent", "separate", {"precision": "bfloat16"}, marks=pytest.mark.nightly),
        ("margin", "separate", {"guide": "mean_field"}),
        ("margin", "separate", {"guide": "low_rank"}),
        ("ce", "separate", {"sam_rho": 0.1, "embedding_noise": 0.5}),
    ],
)
def test_a_whole_call_of_steps(name, attention, fit):
    """The minibatch, the loss, its derivative, the optimizer, and the check of the step."""
    with jax.enable_x64(False):
        tokens = jnp.asarray(np.arange(400) % VOCABULARY, jnp.int32)
        trainer = TracedTrainer(config_of(name, attention, **fit), tokens, VOCABULARY)
        assert_runs_on_accelerators(trainer.traced)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["separate", "first_layer", "normalised"])
def test_what_a_fit_watches(attention):
    config = config_of("margin", attention)
    with jax.enable_x64(False):
        parameters = parameter_shapes(VOCABULARY, MODEL, config.objective)

    def measure(parameters, inputs):
        return _measure(parameters, inputs, config=config, objective=config.objective)

    assert_lowers(measure, parameters, shape(2, MODEL.block, dtype=jnp.int32))
