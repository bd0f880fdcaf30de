"""What only few elements of a batch need, computed for those alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from probattn.unanimous import unanimous


def of_unsettled(
    compute: Callable[[Int[Array, " m"]], Any], settled: Bool[Array, "*batch"], at_once: int
) -> Any:
    """What `compute` finds of the elements that are not settled; differentiable to any order.

    Args:
        compute: of the indices of m elements of the flattened batch; its arrays are (m,).
        settled: which elements need nothing, at least one element in all.
        at_once: of how many it is called at a time, at most.

    Returns:
        Its arrays, (*batch,). Of settled elements perhaps what it finds, perhaps zero.
    """
    # Those that are not settled come first, so that most of the parts have nothing to do.
    order = jnp.argsort(settled.ravel())
    size = min(at_once, order.size)
    parts = -(-order.size // size)
    padded = jnp.concatenate([order, jnp.broadcast_to(order[-1], parts * size - order.size)])

    def part(picked: Int[Array, " m"]) -> Any:
        none = jax.tree.map(
            lambda array: jnp.zeros(array.shape, array.dtype), jax.eval_shape(compute, picked)
        )
        idle = unanimous(settled.ravel()[picked])
        return lax.cond(idle, lambda: none, lambda: compute(picked))

    found = lax.map(part, padded.reshape(parts, size))
    back = jnp.argsort(order)
    return jax.tree.map(lambda array: array.ravel()[back].reshape(settled.shape), found)
