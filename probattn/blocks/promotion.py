"""Ranks and dtypes where a user has forbidden JAX to promote them.

The mathematics runs under `jax_numpy_rank_promotion="raise"` and
`jax_numpy_dtype_promotion="strict"`. NumPyro and optax do not.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


def with_rank(array: Shaped[Array, "..."], rank: int) -> Shaped[Array, "..."]:
    """Return an array with axes of length 1 put in front, up to that many axes."""
    return jnp.expand_dims(array, tuple(range(rank - array.ndim)))


@contextmanager
def default_promotion() -> Iterator[None]:
    """Promote dtypes and ranks as JAX does by default, whatever the user has set.

    For what calls NumPyro or optax, or has its matrices along the last axis; as a context, or as a
    decorator. Where the user has set nothing, nothing is compiled anew for it.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
