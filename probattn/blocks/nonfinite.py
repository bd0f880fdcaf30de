"""Tokens that are not finite: where they are, what they reach, and the rest without them."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from probattn.blocks.promotion import with_rank


def after_nonfinite(*arrays: Float[Array, "*batch T m"]) -> Bool[Array, "*batch T"]:
    """Tell which rows come after one that is not finite in any array: they attend to it."""
    lost = [(~_finite(array)).astype(jnp.int32) for array in arrays]
    nonfinite = sum(with_rank(rows, max(each.ndim for each in lost)) for rows in lost)
    return jnp.cumsum(nonfinite, axis=-1) > nonfinite


def zero_nonfinite(array: Float[Array, "*batch T m"]) -> Float[Array, "*batch T m"]:
    """Return the array with zeros for the rows that are not finite."""
    return jnp.where(_finite(array)[..., None], array, jnp.zeros((), array.dtype))


def _finite(array: Float[Array, "*batch T m"]) -> Bool[Array, "*batch T"]:
    return jnp.all(jnp.isfinite(array), axis=-1)
