"""What a fit has to know of a model: the project's own networks, and published decoders.

A subject gives the NumPyro model of a minibatch, its parameter sites alone, where they start, and
where the determinants that its barrier is about are positive. Numbers that no fit changes, such as
published weights, are a tree that programs take as an argument: as constants they would be copied.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Bool, Int

from probattn.log_determinants import log_det
from probattn.models import priors, transformer
from probattn.models.decoder.config import Precision
from probattn.models.language import (
    AttentionInputs,
    LanguageModelConfig,
    attention_stage,
    language_model,
    sample_parameters,
)
from probattn.models.networks import DecoderNetwork
from probattn.models.objective import ObjectiveConfig
from probattn.models.tuned import (
    TuningConfig,
    changes_at_start,
    first_stage,
    sample_changes,
    tuned_decoder,
    tuned_parameters,
)
from probattn.positivity import certainly_positive

Sites = Mapping[str, Array]


@dataclass(frozen=True)
class LanguageSubject:
    """The model `language_model`, which has no fixed numbers.

    Attributes:
        vocabulary_size: number of symbols.
        config: size of the network.
        objective: what is fitted.
        precision: see `language_model`.
        rematerialise: likewise.
    """

    vocabulary_size: int
    config: LanguageModelConfig
    objective: ObjectiveConfig
    precision: Precision = "float32"
    rematerialise: bool = False

    @property
    def block(self) -> int:
        """Positions of a sequence."""
        return self.config.block

    def sample_sites(self, fixed: Mapping[str, Any]) -> dict[str, Array]:
        """Sample the sites of the parameters."""
        return sample_parameters(self.vocabulary_size, self.config, self.objective)

    def draw(self, rng_key: Array) -> dict[str, Array]:
        """Draw all of the start that is random."""
        parameters = partial(self.sample_sites, {})
        return jax.jit(partial(priors.starting_point, parameters=parameters))(rng_key)

    def start(self, drawn: Any, fixed: Mapping[str, Any]) -> dict[str, Array]:
        """Return the values that the sites start from."""
        return dict(drawn)

    def model(self, inputs: Array, targets: Array, *, num_sequences: int, **options: Any) -> None:
        """Model a minibatch; the options are those of `options`, and a perturbation."""
        language_model(
            inputs,
            targets,
            vocabulary_size=self.vocabulary_size,
            config=self.config,
            objective=self.objective,
            num_sequences=num_sequences,
            precision=self.precision,
            rematerialise=self.rematerialise,
            **options,
        )

    def options(self, fixed: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of `model` that the fixed numbers are."""
        return {}

    def certainly_inside(
        self, sites: Sites, fixed: Mapping[str, Any], inputs: Int[Array, "B T"]
    ) -> Bool[Array, "*batch T"]:
        """Tell by a cheap sufficient condition where determinants are positive."""
        return certainly_positive(**self._stage(sites, inputs))

    def inside(
        self, sites: Sites, fixed: Mapping[str, Any], inputs: Int[Array, "B T"]
    ) -> Bool[Array, "*batch T"]:
        """Tell where determinants are positive."""
        return log_det(**self._stage(sites, inputs))[0] > 0

    def _stage(self, sites: Sites, inputs: Int[Array, "B T"]) -> AttentionInputs:
        x = transformer.embed(sites, inputs)
        return attention_stage(sites, x, config=self.config, objective=self.objective)


@dataclass(frozen=True)
class DecoderSubject:
    """The model `tuned_decoder`; its fixed numbers are the published parameters.

    Attributes:
        network: the decoder.
        tuning: what moves, and its priors.
        objective: what is fitted.
        rematerialise: see `tuned_decoder`.
    """

    network: DecoderNetwork
    tuning: TuningConfig
    objective: ObjectiveConfig
    rematerialise: bool = False

    certainly_inside = None  # of heads as they are no condition is cheaper than `inside`

    @property
    def block(self) -> int:
        """Positions of a sequence."""
        return self.network.block

    def sample_sites(self, fixed: Mapping[str, Any]) -> dict[str, Array]:
        """Sample the sites of what moves."""
        return sample_changes(fixed, self.network.config, self.tuning)

    def draw(self, rng_key: Array) -> Array:
        """Return the key itself: what is drawn depends on the fixed numbers' dtypes."""
        return rng_key

    def start(self, drawn: Any, fixed: Mapping[str, Any]) -> dict[str, Array]:
        """Return the values that the sites start from."""
        return changes_at_start(drawn, fixed, self.network.config, self.tuning)

    def model(self, inputs: Array, targets: Array, *, num_sequences: int, **options: Any) -> None:
        """Model a minibatch; the options are those of `options`, and a perturbation."""
        tuned_decoder(
            inputs,
            targets,
            network=self.network,
            tuning=self.tuning,
            objective=self.objective,
            num_sequences=num_sequences,
            rematerialise=self.rematerialise,
            **options,
        )

    def options(self, fixed: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of `model` that the fixed numbers are."""
        return {"start": fixed}

    def inside(
        self, sites: Sites, fixed: Mapping[str, Any], inputs: Int[Array, "B T"]
    ) -> Bool[Array, "*batch T"]:
        """Tell where determinants are positive."""
        parameters = tuned_parameters(fixed, sites, self.network.config, self.tuning)
        x = self.network.embed(parameters, inputs)
        return log_det(first_stage(parameters, x, self.network))[0] > 0


Subject = LanguageSubject | DecoderSubject
"""What a fit takes."""
