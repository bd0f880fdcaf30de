"""Configuration of a fit: frozen dataclasses, read from and written to TOML."""

import typing
from dataclasses import dataclass, field, replace
from typing import Literal, Self

from probattn.arguments import check_switches, is_non_negative, is_positive
from probattn.models import LanguageModelConfig, ObjectiveConfig
from probattn.models.checks import check_integers
from probattn.models.decoder.config import Precision
from probattn.text.corpora import DataConfig

GuideName = Literal["map", "laplace", "mean_field", "low_rank", "ivon", "last_layer"]


MOST_REPORTS = 20_000
"""Of a fit: they are read in one go."""


@dataclass(frozen=True)
class FitConfig:
    """How a model is fitted.

    Attributes:
        steps: optimizer steps.
        batch: sequences in a minibatch.
        learning_rate: peak of the learning rate, after a linear warm-up and before a cosine decay
            to a tenth of it.
        warmup: steps of the linear warm-up, fewer than steps; by default a tenth of the steps, but
            at most 100.
        seed: seed of the initial parameters and the minibatches.
        eval_every: steps between reports on training and validation text, of which a fit has at
            most 20,000.
        checkpoint_every: steps between checkpoints to resume from.
        precision: precision of the network's matrix products; the determinant is always float32.
        guide: family that approximates the posterior: map is a point; laplace a Gaussian at that
            point, of the curvature there; last_layer the same for the output's table alone, of a
            model whose output has one of its own; mean_field independent Gaussians; ivon the same,
            by an optimizer that learns their precisions (Shen et al. 2024); low_rank a Gaussian
            whose covariance is diagonal plus low-rank.
        hessian_init: curvature h_0 that ivon starts from, of the loss in nats per token, > 0: every
            standard deviation starts at 1 / sqrt(N (h_0 + delta)) for N tokens and a prior of
            precision N delta. Only of ivon, as is the next.
        hessian_decay: decay beta_2 of that curvature from step to step, between 0 and 1; by default
            1 - 10 / steps, but at least 0.9. The learning rate of ivon is a fraction of Newton's
            step.
        weight_decay: decoupled weight decay (AdamW) of all matrices, per unit of the learning
            rate, on top of the priors.
        embedding_noise: standard deviation of Gaussian noise on what enters the network in
            training, in units of the embeddings' root mean square.
        neftune_alpha: NEFTune's uniform noise in its place, alpha / sqrt(block * width) times
            uniform on [-1, 1], in the embedding's own unit (Jain et al. 2023).
        noise_probability: probability of noise for each sequence; the others are fitted clean.
        sam_rho: radius of sharpness-aware minimisation (Foret et al. 2021): the gradient is that at
            the point this far uphill, of the same minibatch and noise, which doubles the work.
            These five change what is fitted, and are for the guide map alone.
        evaluation_tokens: at most so many tokens of the validation text are scored at the end, in
            windows spread evenly over it; by default all.
        rematerialise: whether the derivative computes each layer anew from its input instead of
            keeping what the layer computed: less memory, and about a third more work.
        gradient_accumulation: parts that a minibatch is taken in, one after the other, a divisor of
            `batch`: the gradient is that of all of it, and the memory that of a part.
    """

    steps: int = 2000
    batch: int = 12
    learning_rate: float = 3e-3
    warmup: int | None = None
    seed: int = 0
    eval_every: int = 250
    checkpoint_every: int = 500
    precision: Precision = "float32"
    guide: GuideName = "map"
    weight_decay: float = 0.0
    embedding_noise: float = 0.0
    neftune_alpha: float = 0.0
    noise_probability: float = 1.0
    sam_rho: float = 0.0
    hessian_init: float = 0.1
    hessian_decay: float | None = None
    evaluation_tokens: int | None = None
    rematerialise: bool = False
    gradient_accumulation: int = 1

    def __post_init__(self) -> None:
        """Refuse numbers that make no fit."""
        check_integers(self, "fit", steps=1, batch=1, eval_every=1, checkpoint_every=1)
        check_integers(self, "fit", seed=None)
        for name, least in (("warmup", None), ("evaluation_tokens", 1)):
            if getattr(self, name) is not None:
                check_integers(self, "fit", **{name: least})
        if self.steps // self.eval_every > MOST_REPORTS:
            raise ValueError(
                f"fit.eval_every is {self.eval_every} and fit.steps {self.steps}, which makes "
                f"{self.steps // self.eval_every} reports: expected at most {MOST_REPORTS}"
            )
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"fit.warmup is {self.warmup} and fit.steps {self.steps}: "
                "expected 0 <= warmup < steps"
            )
        rate = self.learning_rate
        if not (isinstance(rate, int | float) and is_positive(rate)):
            raise ValueError(f"fit.learning_rate is {rate!r}: expected a finite number > 0")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"fit.seed is {self.seed}: expected an integer from 0 to 2^32 - 1")
        for name, choices in (("precision", Precision), ("guide", GuideName)):
            if getattr(self, name) not in typing.get_args(choices):
                raise ValueError(
                    f"fit.{name} is {getattr(self, name)!r}: "
                    f"expected one of {', '.join(typing.get_args(choices))}"
                )
        check_switches(self, "fit", "rematerialise")
        self._check_regularisers()
        self._check_ivon()
        self._check_accumulation()

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up: those given, or by default as many as suit the steps."""
        return min(self.steps // 10, 100) if self.warmup is None else self.warmup

    @property
    def ivon_decay(self) -> float:
        """Decay of the curvature of ivon: that given, or by default one that suits the steps."""
        if self.hessian_decay is None:
            return max(0.9, 1 - 10 / self.steps)
        return self.hessian_decay

    def resolved(self) -> Self:
        """Return the same with each default that depends on other fields as a value."""
        decay = self.ivon_decay if self.guide == "ivon" else None
        return replace(self, warmup=self.warmup_steps, hessian_decay=decay)

    def _check_ivon(self) -> None:
        curvature, decay = self.hessian_init, self.hessian_decay
        if not (isinstance(curvature, int | float) and is_positive(curvature)):
            raise ValueError(f"fit.hessian_init is {curvature!r}: expected a finite number > 0")
        if decay is not None and not (
            isinstance(decay, int | float) and is_positive(decay) and decay < 1
        ):
            raise ValueError(f"fit.hessian_decay is {decay!r}: expected a number between 0 and 1")
        for name in ("hessian_init", "hessian_decay"):
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if value != default and self.guide != "ivon":
                raise ValueError(
                    f"fit.{name} is {value} with the guide {self.guide}, which has no use for it: "
                    f"expected the default, {default}, or fit.guide ivon"
                )

    def _check_accumulation(self) -> None:
        check_integers(self, "fit", gradient_accumulation=1)
        parts = self.gradient_accumulation
        if self.batch % parts:
            raise ValueError(
                f"fit.gradient_accumulation is {parts} and fit.batch {self.batch}: expected a "
                "divisor, so that all parts of a minibatch are alike"
            )
        if parts > 1 and (self.embedding_noise > 0 or self.neftune_alpha > 0):
            raise ValueError(
                f"fit.gradient_accumulation is {parts} with noise on the embeddings, which is "
                "drawn for a whole minibatch: expected 1, or no noise"
            )

    def _check_regularisers(self) -> None:
        for name in ("weight_decay", "embedding_noise", "neftune_alpha", "sam_rho"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and is_non_negative(value)):
                raise ValueError(f"fit.{name} is {value!r}: expected a finite number >= 0")
            if value > 0 and self.guide != "map":
                raise ValueError(
                    f"fit.{name} is {value} with the guide {self.guide}, which approximates a "
                    "posterior that it has no part in: expected 0, or fit.guide map"
                )
        if self.embedding_noise > 0 and self.neftune_alpha > 0:
            raise ValueError(
                f"fit.embedding_noise is {self.embedding_noise} and fit.neftune_alpha "
                f"{self.neftune_alpha}: expected one kind of noise, the other 0"
            )
        share = self.noise_probability
        if not (isinstance(share, int | float) and is_positive(share) and share <= 1):
            raise ValueError(f"fit.noise_probability is {share!r}: expected a number in (0, 1]")
        if share < 1 and self.embedding_noise == self.neftune_alpha == 0:
            raise ValueError(
                f"fit.noise_probability is {share} without a noise: expected 1, or "
                "fit.embedding_noise or fit.neftune_alpha > 0"
            )


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a fitted model.

    Attributes:
        data: text to fit and to validate on.
        model: size of the network.
        objective: what is fitted.
        fit: how it is fitted.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        """Refuse settings of a fit or a model that the objective does not use."""
        objective = self.objective
        normalised = objective.trains_attention_prior and objective.attention == "normalised"
        if self.model.bound is not None and normalised:
            raise ValueError(
                f"model.bound is {self.model.bound} with objective.attention normalised, whose "
                "tokens are bounded already, by sqrt(model.width): expected none"
            )
        if self.objective.name != "latent":
            return
        if self.fit.guide != "map":
            raise ValueError(
                f"fit.guide is {self.fit.guide} with objective latent, which approximates the "
                "embeddings and takes a point for the parameters: expected map"
            )
        for name in ("embedding_noise", "neftune_alpha"):
            if (value := getattr(self.fit, name)) > 0:
                raise ValueError(
                    f"fit.{name} is {value} with objective latent, whose guide draws the "
                    "embeddings: expected 0; objective.guide_scale is its noise"
                )

    def resolved(self) -> Self:
        """Return the same configuration with each default that depends on other fields as a value.

        A run keeps it, so that a later version with another default goes on in the same way.
        """
        return replace(self, fit=self.fit.resolved())
