"""Draws of a posterior, the model that they are of, and what the model says of each draw."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probattn.inference.config_sampling import SampleConfig
from probattn.inference.pages.notebook import facts_in_notebook


@dataclass(frozen=True, eq=False)
class PosteriorResult:
    """Draws of a posterior, and the model that they are of.

    Attributes:
        method: how they were made: a method of SampleConfig, or the name of a guide.
        draws: values by sample site, (chains, draws, ...).
        model: the NumPyro model.
        model_args: its arguments.
        model_kwargs: its keyword arguments.
        statistics: what the sampler says of each draw, (chains, draws): diverging, n_steps, lp (log
            density in nats, up to a constant) and step_size; of nuts and of adjusted chains
            acceptance_rate too, and of nuts energy; of mclmc and ensemble that are not adjusted
            energy_variance and length. Empty for a guide. Of all but nuts, diverging says that the
            iteration would have left the region of positive density, and n_steps counts gradients.
        seconds: time of sampling in all sessions together, without compiling; NaN if unknown.
        config: how the sampler was run; None for a guide.
    """

    method: str
    draws: Mapping[str, np.ndarray]
    model: Callable
    model_args: tuple = ()
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    statistics: Mapping[str, np.ndarray] = field(default_factory=dict)
    seconds: float = math.nan
    config: SampleConfig | None = None

    def __repr__(self) -> str:
        """Name the sites and the size of the draws, and not the draws."""
        chains, draws = self.shape
        return (
            f"PosteriorResult(method={self.label!r}, chains={chains}, draws={draws}, "
            f"divergences={self.divergences}, sites={list(self.draws)})"
        )

    def _repr_html_(self) -> str:
        chains, draws = self.shape
        facts: dict[str, object] = {"chains": chains, "draws of each": draws}
        if "diverging" in self.statistics:
            facts["divergences"] = self.divergences
        if not math.isnan(self.seconds):
            facts["seconds of sampling"] = self.seconds
        for name, value in self.draws.items():
            facts[f"site {name}"] = f"{value.shape[2:]}, {value.dtype}"
        return facts_in_notebook(f"Posterior by {self.label}", facts)

    @property
    def shape(self) -> tuple[int, int]:
        """Chains, and draws of each."""
        chains, draws = next(iter(self.draws.values())).shape[:2]
        return chains, draws

    @property
    def temperature(self) -> float:
        """What the log density was divided by; 1 where the draws are of the posterior."""
        return 1.0 if self.config is None else self.config.temperature

    @property
    def label(self) -> str:
        """The method, with its temperature where the draws are not of the posterior."""
        warm = self.temperature != 1
        return f"{self.method} at temperature {self.temperature:g}" if warm else self.method

    @property
    def precision(self) -> str:
        """Of the draws: "float32" or "float64"; if all are whole numbers, JAX's default."""
        kinds = [value.dtype for value in self.draws.values()]
        return str(next((kind for kind in kinds if kind.kind == "f"), jnp.result_type(float)))

    @property
    def divergences(self) -> int:
        """How many draws end a trajectory that diverged, or an iteration that was refused."""
        return int(np.sum(self.statistics.get("diverging", 0)))


def in_own_precision(result: PosteriorResult) -> PosteriorResult:
    """Return the result with the arrays among the model's arguments in the precision of its draws.

    JAX warns where an array of 64 bits meets a program of 32. JAX's arrays remain JAX's: a model
    may index them by what JAX traces, and NumPy's take no such index.
    """
    with jax.enable_x64(result.precision == "float64"):
        floating = np.dtype(result.precision)

        def of(leaf: Any) -> Any:
            if not isinstance(leaf, jax.Array | np.ndarray):
                return leaf
            as_array = jnp.asarray if isinstance(leaf, jax.Array) else np.asarray
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                return as_array(leaf, floating)
            if jnp.issubdtype(leaf.dtype, jnp.integer):
                return as_array(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype))
            return leaf

        args, kwargs = jax.tree.map(of, (tuple(result.model_args), dict(result.model_kwargs)))
    return replace(result, model_args=args, model_kwargs=kwargs)
