"""What a language model is fitted to: cross-entropy, and the attention barrier and residual."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

ObjectiveName = Literal["ce", "margin", "full"]
AttentionStage = Literal["separate", "first_layer"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """Terms added to the cross-entropy of the tokens, per token.

    The fitted objective is CE + barrier_weight * mean of the relaxed log-barrier + residual_weight
    * mean of ||e_t||^2 / (2 residual_scale^2) - log prior / (number of training tokens).

    Attributes:
        name: "ce" leaves both terms out; "margin" adds the barrier; "full" adds barrier and
            residual, which is the attention log density up to a constant.
        barrier_weight: weight of the barrier; by default 0.05 for margin (the paper's) and 1 for
            full.
        residual_weight: weight of the residual; by default 0 for margin and 1 for full.
        residual_scale: standard deviation sigma of the residual, in units of the embedding. Fixed:
            learned, it collapses together with the embeddings.
        delta: determinant below which the barrier is relaxed.
        attention: "separate" puts barrier and residual on an attention stage of its own, with its
            own W_Q and W_K; "first_layer" on the heads of the first attention layer, averaged
            over them.
    """

    name: ObjectiveName = "margin"
    barrier_weight: float | None = None
    residual_weight: float | None = None
    residual_scale: float = 1.0
    delta: float = 1e-3
    attention: AttentionStage = "separate"

    def __post_init__(self) -> None:
        """Refuse names and numbers that make no objective."""
        for field, choices in (
            ("name", get_args(ObjectiveName)),
            ("attention", get_args(AttentionStage)),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"objective.{field} is {getattr(self, field)!r}: "
                    f"expected one of {', '.join(choices)}"
                )
        for field in ("barrier_weight", "residual_weight"):
            weight = getattr(self, field)
            if weight is None:
                continue
            if not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(f"objective.{field} is {weight}: expected a finite number >= 0")
            if self.name == "ce" and weight > 0:
                raise ValueError(
                    f"objective.{field} is {weight} with objective ce, which has no such term: "
                    "expected 0, or another objective.name"
                )
        for field in ("residual_scale", "delta"):
            value = getattr(self, field)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"objective.{field} is {value}: expected a finite number > 0")

    @property
    def weights(self) -> tuple[float, float]:
        """Weights of barrier and residual: those given, or those that the name implies."""
        barrier, residual = {"ce": (0.0, 0.0), "margin": (0.05, 0.0), "full": (1.0, 1.0)}[self.name]
        return (
            barrier if self.barrier_weight is None else self.barrier_weight,
            residual if self.residual_weight is None else self.residual_weight,
        )

    @property
    def trains_attention_prior(self) -> bool:
        """Whether a separate attention stage, with its own W_Q and W_K, is part of the model."""
        return self.name != "ce" and self.attention == "separate"
