"""Random disturbances of the embeddings, as training uses them."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def embedding_rms(x: Float[Array, "*batch d"]) -> Float[Array, ""]:
    """Return the root mean square over all coordinates of x, the unit of relative noise."""
    return jnp.sqrt(jnp.mean(x**2))


def gaussian_noise(
    rng_key: Array, x: Float[Array, "*batch T d"], scale: float
) -> Float[Array, "*batch T d"]:
    """Add Gaussian noise, its standard deviation in units of the root mean square of x.

    The unit is differentiated like everything else: embeddings that grow bring their noise along,
    and no gradient tells them to outgrow it.
    """
    return x + scale * embedding_rms(x) * jax.random.normal(rng_key, x.shape, x.dtype)


def neftune_noise(
    rng_key: Array, x: Float[Array, "*batch T d"], alpha: float
) -> Float[Array, "*batch T d"]:
    """Add alpha / sqrt(T d) times uniform noise on [-1, 1] (NEFTune, Jain et al. 2023).

    Its scale is absolute, as in that paper (arXiv:2310.05914): with embeddings of root mean square
    m it is a relative one of alpha / (m sqrt(3 T d)).
    """
    length, width = x.shape[-2:]
    noise = jax.random.uniform(rng_key, x.shape, x.dtype, minval=-1.0, maxval=1.0)
    return x + alpha / math.sqrt(length * width) * noise


def some_of(
    perturb: Callable[[Array, Array], Array],
    rng_key: Array,
    x: Float[Array, "*batch T d"],
    probability: float,
) -> Float[Array, "*batch T d"]:
    """Perturb each sequence with this probability, and leave the others as they are.

    A network that sees both learns to tell them apart, and pays less for clean text than one that
    sees noise alone.

    Args:
        perturb: function of a random key and x.
        rng_key: random key.
        x: embeddings (..., T, d).
        probability: probability of a sequence to be perturbed.
    """
    noise_key, chosen_key = jax.random.split(rng_key)
    chosen = jax.random.bernoulli(chosen_key, probability, (*x.shape[:-2], 1, 1))
    return jnp.where(chosen, perturb(noise_key, x), x)
