"""Points that maximise the density of observed embeddings with its barrier weighted by lambda."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpyro.distributions import biject_to
from numpyro.handlers import seed, substitute, trace
from scipy.optimize import minimize

from probattn import residual
from probattn.models.coupling import attention_weights_of

STARTS = 5  # draws of the prior
AGREES = 1e-6  # nats by which the best end exceeds others that count as the same
_FLAT = 1e-6  # norm of the gradient, in nats per unit of a free coordinate, at which a search rests


class Parts(NamedTuple):
    """Terms of the log density of A, sigma and the embeddings, in nats.

    Attributes:
        residual: the sum of log Normal(e_t; 0, sigma^2 I).
        barrier: the sum of log det D_t.
        prior: the log prior density of A's entries and of sigma, up to a constant.
    """

    residual: Any
    barrier: Any
    prior: Any


class Maximum(NamedTuple):
    """Where a search ended.

    Attributes:
        values: of the model's sample sites.
        objective: what was maximised, in nats.
        gradient_norm: norm of its gradient, in nats per unit of the free coordinates.
        agreeing: how many of the starts ended as high as this, the best of them, to AGREES.
        starts: how many there were.
    """

    values: dict[str, np.ndarray]
    objective: float
    gradient_norm: float
    agreeing: int
    starts: int


def density_parts(model: Callable, values: Mapping[str, Any], x: jax.Array) -> Parts:
    """Split the log density of the model `observed_embeddings` into its three terms.

    A mode depends on the coordinates. These are the entries of A and sigma itself, whatever sites
    the model samples: the density of "repulsion", a Cholesky factor L, has the Jacobian determinant
    of L L^T as a factor, proportional to L_11^d L_22^(d-1) ... L_dd, which is taken out again.

    Args:
        model: `observed_embeddings` with its configuration.
        values: values of its sample sites.
        x: the embeddings (N, T, d).
    """
    sites = trace(substitute(model, dict(values))).get_trace(x)
    joint = jnp.sum(sites["embeddings"]["fn"].log_prob(x))
    barrier = jnp.sum(sites["log_det"]["value"])
    prior = sum(jnp.sum(sites[name]["fn"].log_prob(value)) for name, value in values.items())
    if "repulsion" in values:
        diagonal = jnp.diagonal(values["repulsion"])
        prior = prior - jnp.sum(jnp.arange(len(diagonal), 0, -1) * jnp.log(diagonal))
    return Parts(joint - barrier, barrier, prior)


class WeightedDensity:
    """The log density with its barrier weighted, over free coordinates of the sample sites."""

    def __init__(self, model: Callable, x: jax.Array) -> None:
        self._model, self._x = model, x
        self._supports: dict[str, Any] = {}
        # Compiled, the draws cost no margins, which the model records too.
        self._drawn = jax.jit(self._latent)
        drawn = self._drawn(jax.random.key(0), x)
        self._transforms = {name: biject_to(self._supports[name]) for name in drawn}
        _, self._unravel = ravel_pytree(self._free(drawn))
        # The embeddings are arguments, so that a compiled program serves every data set.
        self._values = jax.jit(jax.value_and_grad(self._negative))

    def maximise(self, barrier: float, residual: float, *, starts: int = STARTS) -> Maximum:
        """Maximise residual * the residual's term + barrier * the barrier's + the log prior.

        By BFGS from draws of the prior. A step to where a determinant is not positive has no
        density and is shortened.
        """
        weights = jnp.array([barrier, residual])
        ends = [
            minimize(
                self._evaluated,
                self._start(number, weights),
                args=(weights,),
                jac=True,
                method="BFGS",
                options={"gtol": _FLAT, "norm": 2, "maxiter": 1000},
            )
            for number in range(starts)
        ]
        best = min(ends, key=lambda end: end.fun)
        return Maximum(
            {name: np.asarray(value) for name, value in self._sites(best.x).items()},
            -float(best.fun),
            float(np.linalg.norm(best.jac)),
            sum(end.fun - best.fun <= AGREES for end in ends),
            starts,
        )

    def _evaluated(self, at: np.ndarray, weights: jax.Array) -> tuple[float, np.ndarray]:
        value, gradient = self._values(at, weights, self._x)
        return float(value), np.asarray(gradient)

    def _negative(self, at, weights, x):
        parts = density_parts(self._model, self._sites(at), x)
        # A weight of zero takes the term out, even where it is infinite.
        terms = jnp.stack([parts.barrier, parts.residual])
        return -(jnp.sum(jnp.where(weights == 0, 0.0, weights * terms)) + parts.prior)

    def _sites(self, at):
        free = self._unravel(jnp.asarray(at))
        return {name: self._transforms[name](value) for name, value in free.items()}

    def _free(self, values):
        return {name: self._transforms[name].inv(value) for name, value in values.items()}

    def _latent(self, key, x):
        drawn = {}
        for name, site in trace(seed(self._model, key)).get_trace(x).items():
            if site["type"] == "sample" and not site["is_observed"]:
                drawn[name], self._supports[name] = site["value"], site["fn"].support
        return drawn

    def _start(self, number: int, weights: jax.Array) -> np.ndarray:
        drawn = self._drawn(jax.random.key(number), self._x)
        for shrink in 0.5 ** np.arange(20):
            values = dict(drawn)
            if "free_coupling" in values:  # towards A = 0, which is feasible
                values["free_coupling"] = values["free_coupling"] * shrink
            start = np.asarray(ravel_pytree(self._free(values))[0])
            if np.isfinite(self._evaluated(start, weights)[0]):
                return start
        raise ValueError(f"start {number} of a search found no coupling of positive density")


def residual_scale(coupling: np.ndarray, x: jax.Array, bound: float | None) -> float:
    """Return the root mean square of the residuals under a coupling, which is sigma's best value.

    For points that are found without the residual, and so have no sigma of their own.
    """
    weights = attention_weights_of(jnp.asarray(coupling))
    return float(jnp.sqrt(jnp.mean(residual(x, *weights, bound=bound) ** 2)))
