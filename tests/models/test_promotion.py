"""Models where the user has forbidden JAX to promote dtypes and ranks."""

import jax
import jax.numpy as jnp
import pytest
from numpyro import handlers

from probattn.models import (
    LanguageModelConfig,
    LatentEmbeddingsConfig,
    ObjectiveConfig,
    language_model,
    latent_embeddings,
    observed_embeddings,
)
from probattn.models.language import sample_parameters
from probattn.models.latent_language_guide import latent_guide

pytestmark = pytest.mark.usefixtures("strict_promotion", "strict_ranks")

CONFIG = LanguageModelConfig(layers=1, heads=2, width=4, block=5, prior_rank=2)
LATENT = LatentEmbeddingsConfig(width=2, sequences=3, length=4)


def traced(model, *arguments, **options):
    """Sites of a model, found without computing anything."""
    found = {}

    def run(key):
        found.update(handlers.trace(handlers.seed(model, key)).get_trace(*arguments, **options))

    jax.eval_shape(run, jax.random.key(0))
    return found


@pytest.mark.parametrize("name", ["ce", "margin", "full", "latent"])
def test_the_language_model_and_its_guide_can_be_traced(name):
    objective, inputs = ObjectiveConfig(name), jnp.zeros((2, 5), jnp.int32)
    options = {"vocabulary_size": 7, "config": CONFIG, "objective": objective}
    sites = traced(language_model, inputs, margins=name != "ce", **options)
    assert sites["tokens"]["value"].shape == (2, 5)
    if name == "latent":

        def parameters(inputs, targets):
            return sample_parameters(7, CONFIG, objective)

        guide = traced(latent_guide, inputs, parameters=parameters, objective=objective)
        assert guide["embeddings"]["value"].shape == (2, 5, 4)


@pytest.mark.parametrize("coupling", ["bounded", "repulsive", "free"])
@pytest.mark.parametrize("centred", [True, False])
def test_latent_embeddings_can_be_traced(coupling, centred):
    config = LatentEmbeddingsConfig(**{**vars(LATENT), "coupling": coupling, "centred": centred})
    sites = traced(latent_embeddings, vocabulary_size=5, config=config)
    assert sites["tokens"]["value"].shape == (3, 4)
    assert sites["margin"]["value"].shape == (3, 4)


def test_observed_embeddings_can_be_traced():
    sites = traced(observed_embeddings, config=LATENT)
    assert sites["embeddings"]["value"].shape == (3, 4, 2)
