"""Tokens that are not finite: where they are, what they reach, and the rest without them."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def finite_rows(array: Float[Array, "*batch T m"]) -> Bool[Array, "*batch T"]:
    """Whether all of a row is finite."""
    return jnp.all(jnp.isfinite(array), axis=-1)


def follows(broken: Bool[Array, "*batch T"]) -> Bool[Array, "*batch T"]:
    """Whether a broken row stands before each."""
    count = broken.astype(jnp.int32)
    return jnp.cumsum(count, axis=-1) > count


def without_broken(array: Float[Array, "*batch T m"]) -> Float[Array, "*batch T m"]:
    """The array with zeros for the rows that are not finite."""
    return jnp.where(finite_rows(array)[..., None], array, jnp.zeros((), array.dtype))
