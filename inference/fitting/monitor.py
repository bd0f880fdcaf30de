"""What a fit watches of its attention geometry while it runs."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from probattn import coupling, reduced_blocks, stability_margin
from probattn.inference.config import RunConfig
from probattn.inference.runtime.blas_threads import one_blas_thread
from probattn.models.language import attention_stage
from probattn.models.networks import DecoderNetwork
from probattn.models.networks import Parameters as DecoderParameters
from probattn.models.objective import ObjectiveConfig
from probattn.models.transformer import Parameters, embed
from probattn.models.tuned import first_stage

_WINDOWS = 16
_NUMBERS = 2**23  # of all blocks that a report of a decoder makes


class Monitor:
    """Margins, determinants and coupling over a few fixed windows of training text.

    They are those of the stage that the objective trains; objective ce trains none, and the heads
    of the first attention layer stand in, which the kind says.

    Args:
        config: configuration of the run.
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
        """Return metrics of positions >= 2, and of the coupling.

        min_margin and mean_margin, of the kind min_margin_kind; infeasible_fraction; mean_log_det
        in nats over the positions of positive determinant, None if there are none;
        coupling_eigenvalue_min and _max, the extremes of A + A^T, over all heads if there are
        several.
        """
        with one_blas_thread():
            measured = self._measure(parameters, self._inputs)
            found = {name: float(value) for name, value in measured.items()}
        positive = found["positive"]
        return {
            "min_margin": found["min_margin"],
            "min_margin_kind": self._kind,
            "mean_margin": found["mean_margin"],
            "mean_log_det": found["sum_log_det"] / positive if positive else None,
            "infeasible_fraction": found["infeasible_fraction"],
            "coupling_eigenvalue_min": found["coupling_eigenvalue_min"],
            "coupling_eigenvalue_max": found["coupling_eigenvalue_max"],
        }


class DecoderMonitor:
    """The same of the heads of a published decoder's first layer, which have no coupling.

    Args:
        network: the decoder.
        inputs: windows of training text, (windows, T); so many are watched as have room.
    """

    def __init__(self, network: DecoderNetwork, inputs: Int[np.ndarray, "windows T"]) -> None:
        decoder = network.config
        each = decoder.heads * inputs.shape[1] * decoder.head_width**2
        self._inputs = inputs[: max(1, min(_WINDOWS, _NUMBERS // each))]
        self._measure = jax.jit(partial(_measure_heads, network=network))

    def __call__(self, parameters: DecoderParameters) -> dict[str, Any]:
        """Return the metrics of `Monitor`, None for those of a coupling."""
        # No more is handed on than what makes queries and keys of tokens.
        needed = {
            "embedding": parameters["embedding"],
            "layers": {"0": parameters["layers"]["0"]},
        }
        with one_blas_thread():
            measured = self._measure(needed, self._inputs)
            found = {name: float(value) for name, value in measured.items()}
        positive = found.pop("positive")
        total = found.pop("sum_log_det")
        return found | {
            "min_margin_kind": "reduced, first layer",
            "mean_log_det": total / positive if positive else None,
            "coupling_eigenvalue_min": None,
            "coupling_eigenvalue_max": None,
        }


def _measure_heads(
    parameters: DecoderParameters, inputs: jax.Array, *, network: DecoderNetwork
) -> dict[str, jax.Array]:
    x = network.embed(parameters, inputs)
    stage = first_stage(parameters, x, network)
    return _summed(stability_margin(stage, kind="reduced"), reduced_blocks(stage))


def _summed(margin: jax.Array, blocks: jax.Array) -> dict[str, jax.Array]:
    margin = margin[..., 2:]
    # Not by `log_det`, which is made for its derivative and takes seconds to compile.
    sign, log_abs = jnp.linalg.slogdet(blocks[..., 2:, :, :])
    return {
        "min_margin": jnp.min(margin),
        "sum_log_det": jnp.sum(jnp.where(sign > 0, log_abs, 0)),
        "positive": jnp.sum(sign > 0),
        "mean_margin": jnp.mean(margin),
        "infeasible_fraction": jnp.mean(~(margin > 0)),  # the margin's sign is that of `infeasible`
    }


def _measure(
    parameters: Parameters, inputs: jax.Array, *, config: RunConfig, objective: ObjectiveConfig
) -> dict[str, jax.Array]:
    x = embed(parameters, inputs)
    stage = attention_stage(parameters, x, config=config.model, objective=objective)
    matrix = coupling(stage["w_query"], stage["w_key"])
    eigenvalues = jnp.linalg.eigvalsh(matrix + jnp.swapaxes(matrix, -1, -2))
    return _summed(stability_margin(**stage, kind="reduced"), reduced_blocks(**stage)) | {
        "coupling_eigenvalue_min": jnp.min(eigenvalues),
        "coupling_eigenvalue_max": jnp.max(eigenvalues),
    }
