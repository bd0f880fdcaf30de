"""NumPyro models: plain functions that any NumPyro inference takes."""

from probattn.models.language import LanguageModelConfig, language_model
from probattn.models.latent import (
    LatentEmbeddingsConfig,
    latent_embeddings,
    observed_embeddings,
)
from probattn.models.latent_language_guide import latent_guide
from probattn.models.objective import ObjectiveConfig
from probattn.models.tuned import TuningConfig, tuned_decoder

__all__ = [
    "LanguageModelConfig",
    "LatentEmbeddingsConfig",
    "ObjectiveConfig",
    "TuningConfig",
    "language_model",
    "latent_embeddings",
    "latent_guide",
    "observed_embeddings",
    "tuned_decoder",
]
