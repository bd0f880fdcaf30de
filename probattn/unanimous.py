"""One decision for a whole batch, `vmap` included."""

import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool


@custom_vmap
def unanimous(flags: Bool[Array, "..."]) -> Bool[Array, ""]:
    """Whether all flags are set, also those of the other elements where this is mapped.

    JAX runs both sides of a condition that is mapped; this one stays a single condition.
    """
    return jnp.all(flags)


@unanimous.def_vmap
def _unanimous_vmap(size: int, batched: list, flags: Array) -> tuple[Array, bool]:
    return unanimous(flags), False
