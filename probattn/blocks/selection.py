"""Which elements of a batch are computed, and one decision for all of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Int


@custom_vmap
def all_in_batch(flags: Bool[Array, "..."]) -> Bool[Array, ""]:
    """Tell whether all flags are set, those of every mapped element included.

    JAX runs both sides of a condition that is mapped. This one stays a single condition.
    """
    return jnp.all(flags)


@all_in_batch.def_vmap
def _all_in_batch_vmap(size: int, batched: list, flags: Array) -> tuple[Array, bool]:
    return all_in_batch(flags), False


def compute_where(
    compute: Callable[[Int[Array, " m"]], Any], done: Bool[Array, "*batch"], at_once: int
) -> Any:
    """Compute what the elements need that are not done; differentiable to any order.

    Args:
        compute: takes the indices of m elements of the flattened batch and returns arrays (m, ...).
        done: the elements that need nothing. The batch holds at least one element.
        at_once: the largest m of a call.

    Returns:
        The arrays of `compute`, (*batch, ...). Elements that are done hold its result or zero.
    """
    # Elements that are not done come first, so that most calls have nothing to do.
    order = jnp.argsort(done.ravel())
    size = min(at_once, order.size)
    parts = -(-order.size // size)
    padded = jnp.concatenate([order, jnp.broadcast_to(order[-1], parts * size - order.size)])

    def part(picked: Int[Array, " m"]) -> Any:
        none = jax.tree.map(
            lambda array: jnp.zeros(array.shape, array.dtype), jax.eval_shape(compute, picked)
        )
        idle = all_in_batch(done.ravel()[picked])
        return lax.cond(idle, lambda: none, lambda: compute(picked))

    found = lax.map(part, padded.reshape(parts, size))
    back = jnp.argsort(order)

    def in_place(array: Array) -> Array:
        rest = array.shape[2:]
        return array.reshape(-1, *rest)[back].reshape(*done.shape, *rest)

    return jax.tree.map(in_place, found)
