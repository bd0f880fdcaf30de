"""What a fit watches of its attention geometry while it runs."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from probattn import infeasible, stability_margin
from probattn.inference.config import RunConfig
from probattn.models.language_model import attention_stage
from probattn.models.objective import ObjectiveConfig
from probattn.models.transformer import Parameters, embed

_WINDOWS = 16


class Monitor:
    """Smallest reduced margin and infeasible fraction over a few fixed windows of training text.

    They are those of the stage that the objective trains; objective ce trains none, and the heads
    of the first attention layer stand in, which the kind says.

    Args:
        config: of the run.
        inputs: windows of training text, (windows, T); the first few are watched.
    """

    def __init__(self, config: RunConfig, inputs: Int[np.ndarray, "windows T"]) -> None:
        objective = config.objective
        if objective.name == "ce":
            objective = ObjectiveConfig("margin", attention="first_layer")
        self._inputs = inputs[:_WINDOWS]
        self._kind = f"reduced, {objective.attention.replace('_', ' ')}"
        self._measure = jax.jit(partial(_measure, config=config, objective=objective))

    def __call__(self, parameters: Parameters) -> dict[str, Any]:
        """Metrics min_margin, min_margin_kind and infeasible_fraction."""
        margin, outside = self._measure(parameters, self._inputs)
        return {
            "min_margin": float(margin),
            "min_margin_kind": self._kind,
            "infeasible_fraction": float(outside),
        }


def _measure(
    parameters: Parameters, inputs: jax.Array, *, config: RunConfig, objective: ObjectiveConfig
) -> tuple[jax.Array, jax.Array]:
    x = embed(parameters, inputs)
    stage = attention_stage(parameters, x, config=config.model, objective=objective)
    margin = stability_margin(**stage, kind="reduced")
    return jnp.min(margin[..., 2:]), jnp.mean(infeasible(**stage)[..., 2:])
