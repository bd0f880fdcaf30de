"""Configuration of a sampled posterior: frozen dataclasses beside those of a fit."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from probattn.corpora import DataConfig
from probattn.models import LanguageModelConfig, LatentEmbeddingsConfig, ObjectiveConfig
from probattn.models.checks import check_integers

ChainMethod = Literal["parallel", "vectorized"]
SamplePrecision = Literal["float64", "float32"]


@dataclass(frozen=True)
class SampleConfig:
    """How a posterior is sampled.

    Attributes:
        chains: number of chains.
        warmup: iterations of each in which step size and mass matrix are adapted; not kept.
        draws: iterations of each that are kept.
        seed: of the chains.
        target_accept: acceptance probability that the step size is adapted to.
        max_tree_depth: an iteration takes at most 2^max_tree_depth - 1 leapfrog steps.
        sequences: of model.block tokens, for a language model; a latent model has
            latent.sequences.
        chain_method: "parallel", a thread for each chain, for CPUs; or "vectorized", all chains in
            one call, in step with the slowest, for GPUs.
        precision: of all numbers.
    """

    chains: int = 4
    warmup: int = 1000
    draws: int = 1000
    seed: int = 0
    target_accept: float = 0.8
    max_tree_depth: int = 10
    sequences: int = 16
    chain_method: ChainMethod = "parallel"
    precision: SamplePrecision = "float64"

    def __post_init__(self) -> None:
        """Refuse numbers that make no sample."""
        check_integers(
            self, "sample", chains=1, warmup=0, draws=1, seed=0, max_tree_depth=1, sequences=1
        )
        if self.seed >= 2**32:
            raise ValueError(f"sample.seed is {self.seed}: expected an integer below 2^32")
        if not 0 < self.target_accept < 1:
            raise ValueError(
                f"sample.target_accept is {self.target_accept}: expected a number between 0 and 1"
            )
        for name, choices in (("chain_method", ChainMethod), ("precision", SamplePrecision)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"sample.{name} is {getattr(self, name)!r}: "
                    f"expected one of {', '.join(get_args(choices))}"
                )


SAMPLED_DATA = DataConfig(tokenizer="frequent:16")
"""Few symbols, since every one has parameters that are sampled."""
SAMPLED_OBJECTIVE = ObjectiveConfig("full")
"""The paper's joint density: the barrier alone is none."""


@dataclass(frozen=True)
class SampleRunConfig:
    """Everything that determines a sampled posterior: of one of two models, and of which text.

    Attributes:
        data: which text; sequences are taken from its training part, spread evenly.
        sample: how the posterior is sampled.
        latent: the model `latent_embeddings`, and how much text; None for a language model.
        model: the model `language_model`; None for latent embeddings.
        objective: its objective, likewise.
    """

    data: DataConfig = SAMPLED_DATA
    sample: SampleConfig = field(default_factory=SampleConfig)
    latent: LatentEmbeddingsConfig | None = None
    model: LanguageModelConfig | None = None
    objective: ObjectiveConfig | None = None

    def __post_init__(self) -> None:
        """Refuse none or both of the two models."""
        language = self.model is not None and self.objective is not None
        if (self.latent is None) != language or (self.model is None) != (self.objective is None):
            raise ValueError("expected either the table latent, or both tables model and objective")
        if self.objective is not None and self.objective.name == "latent":
            raise ValueError(
                "objective.name is latent, whose embeddings belong to the sequences of a fit: "
                "expected ce, margin or full, or the model latent"
            )
