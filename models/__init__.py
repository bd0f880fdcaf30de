"""NumPyro models: plain functions that any NumPyro inference takes."""

from probattn.models.language_model import LanguageModelConfig, language_model
from probattn.models.latent_embeddings import (
    LatentEmbeddingsConfig,
    latent_embeddings,
    observed_embeddings,
)
from probattn.models.latent_guide import latent_guide
from probattn.models.objective import ObjectiveConfig

__all__ = [
    "LanguageModelConfig",
    "LatentEmbeddingsConfig",
    "ObjectiveConfig",
    "language_model",
    "latent_embeddings",
    "latent_guide",
    "observed_embeddings",
]
