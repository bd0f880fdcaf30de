"""Weights rounded to few bits, as people do to make a network small."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from probattn.models.decoder.layers import Parameters
from probattn.models.decoder.shapes import leaves, with_leaf

GROUP = 64  # weights that share a step


def round_weights(
    parameters: Parameters, bits: int, *, group: int = GROUP, only: Sequence[str] = ("",)
) -> Mapping[str, Any]:
    """Round the matrices of a decoder to few bits; norms, biases and positions stay as they are.

    Of each output the weights of `group` inputs that follow each other share a step, the largest
    modulus among them over 2^(bits - 1) - 1, and are rounded to whole multiples of it. The rows of
    the embedding are rounded in the same way. Nothing is made up for, so this is what rounding
    alone does.

    Args:
        parameters: a tree in the layout of `parameter_shapes`.
        bits: bits of a weight, >= 2; 2 bits leave -1, 0 and 1 times the step.
        group: inputs that share a step, >= 1.
        only: beginnings of the names of what is rounded, such as `embedding` or `layers.0.`; by
            default everything.

    Returns:
        The tree with the rounded matrices, in the dtypes that they had.

    Raises:
        ValueError: if there are less than 2 bits, or groups of less than one weight.
    """
    if bits < 2 or group < 1:
        raise ValueError(
            f"bits is {bits} and group {group}: expected bits >= 2, for the values -1, 0 and 1, "
            "and group >= 1"
        )
    rounded = dict(parameters)
    for name, leaf in leaves(parameters):
        is_table = name == "embedding.tokens"
        if not (is_table or name.endswith(".weights")) or not name.startswith(tuple(only)):
            continue
        leaf = jnp.asarray(leaf)
        inputs = leaf.shape[:-1] if name.endswith(".out.weights") else leaf.shape[:1]
        by_output = leaf.T if is_table else leaf.reshape(math.prod(inputs), -1)
        found = _rounded(by_output, bits, group)
        rounded = with_leaf(rounded, name, found.T if is_table else found.reshape(leaf.shape))
    return rounded


def _rounded(weights: Float[Array, "inputs outputs"], bits: int, group: int) -> Array:
    inputs = len(weights)
    size = min(group, inputs)
    wide = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    padded = jnp.pad(wide, ((0, -inputs % size), (0, 0))).reshape(-1, size, weights.shape[1])
    step = jnp.max(jnp.abs(padded), axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    found = step * jnp.round(padded / jnp.where(step > 0, step, 1))
    return found.reshape(-1, weights.shape[1])[:inputs].astype(weights.dtype)
