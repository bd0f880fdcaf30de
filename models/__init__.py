"""NumPyro models: plain functions that any NumPyro inference takes."""

from probattn.models.language_model import LanguageModelConfig, language_model
from probattn.models.objective import ObjectiveConfig

__all__ = ["LanguageModelConfig", "ObjectiveConfig", "language_model"]
