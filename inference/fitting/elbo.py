"""The loss of a fit: NumPyro's evidence lower bound, its sites summed in the order of the model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from numpyro.handlers import replay, seed
from numpyro.infer.elbo import ELBO
from numpyro.infer.util import compute_log_probs, log_density


class OrderedELBO(ELBO):
    """Evidence lower bound by one draw from the guide, with no mutable state.

    NumPyro's `Trace_ELBO` sums the sites in the order of a set of strings, another one in every
    process. In a fixed order a seed gives the same loss to the last digit, and the compiled program
    of one process is found in the compilation cache by the next.

    Args:
        exact: whether the divergence of the guide from the priors is computed and not estimated by
            the draw, which takes independent Gaussians in both.
    """

    def __init__(self, *, exact: bool = False) -> None:
        super().__init__(num_particles=1)
        self._exact = exact

    def loss_with_mutable_state(
        self,
        rng_key: Array,
        param_map: dict[str, Array],
        model: Callable,
        guide: Callable,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the negative bound under "loss"; random numbers are those of `Trace_ELBO`."""
        model_key, guide_key = jax.random.split(rng_key)
        guide_log, drawn = log_density(seed(guide, guide_key), args, kwargs, param_map)
        replayed = replay(seed(model, model_key), drawn)
        if not self._exact:
            model_log, _ = log_density(replayed, args, kwargs, param_map)
            return {"loss": guide_log - model_log, "mutable_state": None}
        terms, sites = compute_log_probs(replayed, args, kwargs, param_map)
        loss = sum(
            _divergence(drawn[name], sites[name]) if name in drawn else -term
            for name, term in terms.items()
        )
        return {"loss": loss, "mutable_state": None}


class AccumulatedELBO(OrderedELBO):
    """The same bound of a minibatch whose parts are taken one after the other.

    The bound is the mean of those of the parts, since each counts as the whole text. Value and
    derivative of a part are computed together, and the next one takes its memory.

    Args:
        parts: number of parts, a divisor of the sequences of a minibatch.
        exact: see `OrderedELBO`.
    """

    def __init__(self, parts: int, *, exact: bool = False) -> None:
        super().__init__(exact=exact)
        self._parts = parts

    def loss_with_mutable_state(
        self,
        rng_key: Array,
        param_map: dict[str, Array],
        model: Callable,
        guide: Callable,
        inputs: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        **options: Any,
    ) -> dict[str, Any]:
        """Return the negative bound under "loss"; every part has random numbers of its own."""
        keys = jax.random.split(rng_key, self._parts)
        # Part i has the sequences i, i + parts and so on.
        batches = (
            jnp.swapaxes(each.reshape(-1, self._parts, each.shape[-1]), 0, 1)
            for each in (inputs, targets)
        )
        whole = super().loss_with_mutable_state

        def loss(params: dict[str, Array], part: tuple[Array, ...]) -> Array:
            key, *batch = part
            return whole(key, params, model, guide, *batch, **options)["loss"] / self._parts

        @jax.custom_vjp
        def summed(params: dict[str, Array], parts: tuple[Array, ...]) -> Array:
            return jax.lax.map(lambda part: loss(params, part), parts).sum()

        def forward(params: dict[str, Array], parts: tuple[Array, ...]) -> tuple[Array, Any]:
            def add(found: Any, part: tuple[Array, ...]) -> tuple[Any, None]:
                of_part = jax.value_and_grad(loss)(params, part)
                return jax.tree.map(jnp.add, found, of_part), None

            first = jax.tree.map(lambda leaf: leaf[0], parts)
            shapes = jax.eval_shape(jax.value_and_grad(loss), params, first)
            nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            return jax.lax.scan(add, nothing, parts)[0]

        def backward(gradient: Any, change: Array) -> tuple[Any, None]:
            return jax.tree.map(lambda leaf: change * leaf, gradient), None

        summed.defvjp(forward, backward)
        return {"loss": summed(param_map, (keys, *batches)), "mutable_state": None}


def _divergence(guide: dict[str, Any], prior: dict[str, Any]) -> Array:
    """Return the Kullback-Leibler divergence of a site's independent Gaussians, scaled as it is."""
    ratio = guide["fn"].variance / prior["fn"].variance
    distance = (guide["fn"].mean - prior["fn"].mean) ** 2 / prior["fn"].variance
    scale = 1.0 if prior["scale"] is None else prior["scale"]
    return scale * jnp.sum(ratio + distance - 1 - jnp.log(ratio)) / 2
