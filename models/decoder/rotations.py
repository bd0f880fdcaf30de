"""Rotary positions."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import NDArray

from probattn.models.decoder.config import RotaryConfig


def frequencies(rotary: RotaryConfig, head_width: int) -> NDArray[np.float64]:
    """Return the angle by which each pair of a query's entries turns per position, (p,)."""
    pairs = rotary.turning(head_width) // 2
    plain = rotary.base ** -(np.arange(pairs) / pairs)
    if rotary.scaling == "none":
        return plain
    if rotary.scaling == "linear":
        return plain / rotary.factor
    # How many waves the original context holds decides what is kept: llama 3.1.
    waves = rotary.original_context * plain / (2 * math.pi)
    low, high = rotary.low_frequency_factor, rotary.high_frequency_factor
    kept = np.clip((waves - low) / (high - low), 0.0, 1.0)
    return kept * plain + (1 - kept) * plain / rotary.factor


def rotate(
    vectors: Float[Array, "*batch T heads r"],
    positions: Int[Array, " T"],
    rotary: RotaryConfig,
) -> Float[Array, "*batch T heads r"]:
    """Turn the queries or keys of all heads by their positions."""
    per_position = frequencies(rotary, vectors.shape[-1]).astype(vectors.dtype)
    pairs = len(per_position)
    angles = positions.astype(vectors.dtype)[:, None] * per_position[None, :]
    shape = (1,) * (vectors.ndim - 3) + (len(positions), 1, pairs)
    cosine, sine = jnp.cos(angles).reshape(shape), jnp.sin(angles).reshape(shape)
    first, second, rest = jnp.split(vectors, [pairs, 2 * pairs], axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine, rest]
    return jnp.concatenate(turned, axis=-1)
