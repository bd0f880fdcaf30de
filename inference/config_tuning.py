"""Configuration of a fit that begins with a published model."""

from dataclasses import dataclass, field, replace
from typing import Self

from probattn.inference.config import FitConfig
from probattn.models import ObjectiveConfig, TuningConfig
from probattn.models.tuned import Trainable, check_tuned_objective
from probattn.text.corpora import TextConfig

TUNED_OBJECTIVE = ObjectiveConfig("margin", attention="first_layer")
"""What is fitted by default: the heads to be kept from folding are those that the model has."""


@dataclass(frozen=True)
class BaseConfig:
    """The run that a fit began with.

    Attributes:
        run: its directory.
        sha256: checksum of its model.
        block: tokens that are read at once.
    """

    run: str = ""
    sha256: str = ""
    block: int = 0


@dataclass(frozen=True)
class PriorConfig:
    """Priors of what moves.

    Attributes:
        scale: standard deviation of every tensor's change, in units of the tensor's root mean
            square, > 0: see `TuningConfig.prior_scale`.
    """

    scale: float = 0.1


@dataclass(frozen=True)
class TuneFitConfig(FitConfig):
    """How a published model is fine-tuned: see `FitConfig`, and what moves.

    Attributes:
        trainable: `all` parameters, `first_attention` (the attention of the first layer), or
            `adapters` of low rank. What does not move has no state in the optimizer.
        adapter_rank: rank k of the adapters.
        adapter_scale: a of the adapters (a / k) U V, > 0.
        adapter_matrices: regular expression for the matrices that have one: all of the name of a
            projection (query, key, value, out, gate, up, down) or of a parameter.
    """

    steps: int = 200
    batch: int = 4
    learning_rate: float = 1e-4
    eval_every: int = 50
    checkpoint_every: int = 100
    trainable: Trainable = "all"
    adapter_rank: int = 8
    adapter_scale: float = 16.0
    adapter_matrices: str = "query|value"

    def __post_init__(self) -> None:
        """Refuse numbers that make no fit of a published model."""
        super().__post_init__()
        if self.guide != "map":
            raise ValueError(
                f"fit.guide is {self.guide} of a published model: expected map; other guides take "
                "`tuned_decoder`, which is a NumPyro model"
            )
        if self.weight_decay:
            raise ValueError(
                f"fit.weight_decay is {self.weight_decay} of a published model, whose priors are "
                "centred at its weights and not at zero: expected 0, and prior.scale"
            )


@dataclass(frozen=True)
class TuneConfig:
    """Everything that determines a fit of a published model, beside the model itself.

    Attributes:
        data: text to fit and to validate on.
        base: the run of the published model, which `fit` fills in.
        prior: how far priors let the model move.
        objective: what is fitted: ce, or margin on the heads of the first layer.
        fit: how it is fitted.
    """

    data: TextConfig = field(default_factory=TextConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    objective: ObjectiveConfig = TUNED_OBJECTIVE
    fit: TuneFitConfig = field(default_factory=TuneFitConfig)

    def __post_init__(self) -> None:
        """Refuse an objective that is not one of published models, and priors that are none."""
        check_tuned_objective(self.objective)
        _ = self.tuning

    @property
    def tuning(self) -> TuningConfig:
        """What moves, and its priors."""
        fit = self.fit
        return TuningConfig(
            fit.trainable,
            fit.adapter_rank,
            fit.adapter_scale,
            fit.adapter_matrices,
            self.prior.scale,
        )

    def resolved(self) -> Self:
        """Return the same configuration with each default that depends on other fields as a value.

        See `RunConfig.resolved`.
        """
        return replace(self, fit=self.fit.resolved())
