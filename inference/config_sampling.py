"""Configuration of a sampled posterior."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from probattn.arguments import check_switches, is_positive
from probattn.models import LanguageModelConfig, LatentEmbeddingsConfig, ObjectiveConfig
from probattn.models.checks import check_integers
from probattn.text.corpora import DataConfig

SampleMethod = Literal["nuts", "mclmc", "ensemble", "sghmc", "sgld"]
ChainMethod = Literal["parallel", "vectorized"]


SamplePrecision = Literal["float64", "float32"]


_ADJUSTED = ("adjusted mclmc", "adjusted ensemble")
_STOCHASTIC = ("sghmc", "sgld")
_NOT_NUTS = ("mclmc", "ensemble", *_ADJUSTED, *_STOCHASTIC)
_METHODS_OF = {
    "target_accept": ("nuts", *_ADJUSTED),
    "max_tree_depth": ("nuts",),
    "steps": _NOT_NUTS,
    "temperature": _NOT_NUTS,
    "energy_variance": ("mclmc", "ensemble"),
    "step_size": _STOCHASTIC,
    "cyclical": _STOCHASTIC,
    "preconditioned": _STOCHASTIC,
    "full_density": _STOCHASTIC,
    "batch": _STOCHASTIC,
    "friction": ("sghmc",),
}
"""Settings of a sampled posterior that not all methods have."""


@dataclass(frozen=True)
class SampleConfig:
    """How a posterior is sampled.

    Attributes:
        chains: number of chains.
        warmup: iterations of each in which the sampler is adapted; not kept.
        draws: iterations of each that are kept.
        seed: seed of the chains.
        target_accept: acceptance probability that the step size is adapted to, of NUTS and of
            adjusted MCLMC.
        max_tree_depth: an iteration of NUTS takes at most 2^max_tree_depth - 1 leapfrog steps.
        sequences: number of sequences of model.block tokens, for a language model; a latent model
            has latent.sequences.
        chain_method: "parallel", a thread for each chain, for CPUs; or "vectorized", all chains in
            one call, in step with the slowest, for GPUs.
        precision: precision of all numbers.
        method: the sampler. nuts is exact. mclmc and ensemble, whose chains start at a point each,
            have a bias that energy_variance sets; sghmc and sgld take gradients of minibatches and
            have one that step_size sets. See "Which sampler" in docs/operations.md.
        adjusted: let mclmc and ensemble accept or refuse each iteration, so that they have no bias.
        steps: steps of an iteration, of all but nuts; by default 16, or of sghmc and sgld as many
            as take all the data once, if those are more. Adjusted, 2 on average.
        temperature: what the log density is divided by, of all but nuts; 1 is the posterior.
        energy_variance: mean square energy error by step and number that mclmc tunes its step to.
        step_size: of sghmc and sgld, in units of the posterior's scale if preconditioned.
        cyclical: let the steps of an iteration fall from step_size to 0 by a cosine.
        preconditioned: scale every number by its gradients in the warm-up.
        full_density: compute the density of all the data for every draw of sghmc and sgld, in about
            a third of the time of steps that see all the data once. Without it only densities of
            minibatches are known to be positive, and lp is that of the first one.
        batch: sequences of a minibatch, for a language model; other models' plates say theirs.
        friction: of sghmc.
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
    method: SampleMethod = "nuts"
    adjusted: bool = False
    steps: int | None = None
    temperature: float = 1.0
    energy_variance: float = 5e-4
    step_size: float = 0.05
    cyclical: bool = False
    preconditioned: bool = True
    full_density: bool = True
    batch: int = 4
    friction: float = 1.0

    def __post_init__(self) -> None:
        """Refuse numbers that make no sample, and settings of another method."""
        check_integers(
            self,
            "sample",
            chains=1,
            warmup=0,
            draws=1,
            seed=0,
            max_tree_depth=1,
            sequences=1,
            batch=1,
        )
        if self.steps is not None:
            check_integers(self, "sample", steps=1)
        if self.seed >= 2**32:
            raise ValueError(f"sample.seed is {self.seed}: expected an integer below 2^32")
        if not (is_positive(self.target_accept) and self.target_accept < 1):
            raise ValueError(
                f"sample.target_accept is {self.target_accept!r}: expected a number between 0 and 1"
            )
        check_switches(self, "sample", "adjusted", "cyclical", "preconditioned", "full_density")
        for name in ("temperature", "energy_variance", "step_size", "friction"):
            value = getattr(self, name)
            if not is_positive(value):
                raise ValueError(f"sample.{name} is {value!r}: expected a finite number > 0")
        for name, choices in (
            ("chain_method", ChainMethod),
            ("precision", SamplePrecision),
            ("method", SampleMethod),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"sample.{name} is {getattr(self, name)!r}: "
                    f"expected one of {', '.join(get_args(choices))}"
                )
        if self.adjusted and self.method not in ("mclmc", "ensemble"):
            raise ValueError(
                f"sample.adjusted is True with sample.method {self.method}: expected it with mclmc "
                "or ensemble alone; leave it out"
            )
        kind = f"adjusted {self.method}" if self.adjusted else self.method
        for name, methods in _METHODS_OF.items():
            value = getattr(self, name)
            if kind not in methods and value != getattr(type(self), name):
                raise ValueError(
                    f"sample.{name} is {value} with sample.method {kind}, which has none: "
                    f"leave it out, or take one of {', '.join(methods)}"
                )

    @property
    def is_stochastic(self) -> bool:
        """Whether the gradients are those of minibatches."""
        return self.method in _STOCHASTIC


SAMPLED_DATA = DataConfig(tokenizer="frequent:16")
"""Few symbols, since every one has parameters that are sampled."""


SAMPLED_OBJECTIVE = ObjectiveConfig("full")
"""The paper's joint density: the barrier alone is none."""


@dataclass(frozen=True)
class SampleRunConfig:
    """Everything that determines a sampled posterior: of one of two models, and of which text.

    Attributes:
        data: text; sequences are taken from its training part, spread evenly.
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
