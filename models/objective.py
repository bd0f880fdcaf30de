"""What a language model is fitted to: cross-entropy, and an attention barrier or process."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from probattn.arguments import check_switches, is_non_negative, is_positive

ObjectiveName = Literal["ce", "margin", "full", "latent"]
AttentionPlacement = Literal["separate", "first_layer", "normalised"]

_OF_BARRIER = ("residual_scale", "delta", "attention", "one_sided")
_OF_LATENT = ("beta", "guide_scale", "learn_guide_scale")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Terms added to the cross-entropy of the tokens, per token.

    The fitted objective is CE + barrier_weight * mean of the relaxed log-barrier + residual_weight
    * mean of ||e_t||^2 / (2 residual_scale^2) - log prior / (number of training tokens); that of
    "latent" is E_q[CE] + beta * KL(q || attention process) - log prior / (number of tokens).

    Attributes:
        name: "ce" leaves both terms out; "margin" adds the barrier; "full" adds barrier and
            residual, which is the attention log density up to a constant. "latent" makes the
            embeddings latent variables of a proper attention process, drawn from a guide q
            around the looked-up ones: see `latent_guide`.
        barrier_weight: weight of the barrier; by default 0.05 for margin (the paper's) and 1 for
            full.
        residual_weight: weight of the residual; by default 0 for margin and 1 for full.
        residual_scale: standard deviation sigma of the residual, in the unit of the
            attention stage's input, see `attention`. Fixed: learned, it collapses together with the
            embeddings. Not of "latent", whose density is normalised: there sigma is a parameter of
            the model.
        delta: determinant below which the barrier is relaxed.
        attention: "separate" puts barrier and residual on an attention stage of its own, with its
            own W_Q and W_K; "first_layer" on the heads of the first attention layer, averaged
            over them; "normalised" on a stage of its own whose input is every embedding divided by
            its root mean square, so that embeddings which only grow change nothing.
        one_sided: whether the barrier is counted only where it is positive, at determinants
            below one: it then keeps off the boundary, and rewards nothing beyond.
        beta: weight of the KL divergence of "latent", > 0. At 1 the objective bounds the evidence.
        guide_scale: standard deviation of the guide of "latent", in units of the root mean square
            of its means, > 0; what the fit starts from where it is learned.
        learn_guide_scale: whether the guide's standard deviation is fitted too.
    """

    name: ObjectiveName = "margin"
    barrier_weight: float | None = None
    residual_weight: float | None = None
    residual_scale: float = 1.0
    delta: float = 1e-3
    attention: AttentionPlacement = "separate"
    one_sided: bool = False
    beta: float = 1.0
    guide_scale: float = 0.5
    learn_guide_scale: bool = False

    def __post_init__(self) -> None:
        """Refuse names and numbers that make no objective."""
        for field, choices in (
            ("name", get_args(ObjectiveName)),
            ("attention", get_args(AttentionPlacement)),
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
            if not is_non_negative(weight):
                raise ValueError(f"objective.{field} is {weight!r}: expected a finite number >= 0")
            if not self.has_barrier and weight > 0:
                raise ValueError(
                    f"objective.{field} is {weight} with objective {self.name}, which has no such "
                    "term: expected 0, or another objective.name"
                )
        for field in ("residual_scale", "delta", "beta", "guide_scale"):
            value = getattr(self, field)
            if not is_positive(value):
                raise ValueError(f"objective.{field} is {value!r}: expected a finite number > 0")
        check_switches(self, "objective", "one_sided", "learn_guide_scale")
        self._check_use(_OF_BARRIER, self.has_barrier, "margin or full")
        self._check_use(_OF_LATENT, self.name == "latent", "latent")

    def _check_use(self, names: tuple[str, ...], used: bool, by: str) -> None:
        """Refuse a setting that the named objective does not use."""
        defaults = {field.name: field.default for field in fields(self)}
        for name in names:
            value, default = getattr(self, name), defaults[name]
            if not used and value != default:
                raise ValueError(
                    f"objective.{name} is {value!r} with objective {self.name}, which has no use "
                    f"for it: expected the default, {default!r}, or objective.name {by}"
                )

    @property
    def weights(self) -> tuple[float, float]:
        """Weights of barrier and residual: those given, or those that the name implies."""
        implied = {"margin": (0.05, 0.0), "full": (1.0, 1.0)}
        barrier, residual = implied.get(self.name, (0.0, 0.0))
        return (
            barrier if self.barrier_weight is None else self.barrier_weight,
            residual if self.residual_weight is None else self.residual_weight,
        )

    @property
    def has_barrier(self) -> bool:
        """Whether barrier and residual are terms of the objective."""
        return self.name in ("margin", "full")

    @property
    def trains_attention_prior(self) -> bool:
        """Whether an attention stage of its own, with W_Q and W_K, is part of the model."""
        return self.name != "ce" and self.attention != "first_layer"
