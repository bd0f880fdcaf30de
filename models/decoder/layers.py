"""The parts of a decoder's layer: norms, projections, attention, MLP."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from probattn.models.decoder.config import DecoderConfig, Precision
from probattn.models.decoder.rotations import rotate

Parameters = Mapping[str, Any]
"""A tree of dictionaries of arrays, in the layout of `shapes.py`."""


def normalise(
    parameters: Parameters, x: Float[Array, "*batch m"], config: DecoderConfig
) -> Float[Array, "*batch m"]:
    """Apply a norm of the configuration's kind."""
    if config.norm == "layer":
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    unit = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + config.norm_eps)
    gain = _like(parameters["gain"], x)
    result = unit * (1 + gain if config.norm == "rms_plus_one" else gain)
    return result + _like(parameters["bias"], x) if config.norm_bias else result


def project(
    parameters: Parameters,
    n: Float[Array, "*batch T d"],
    positions: Int[Array, " T"],
    config: DecoderConfig,
    layer: int,
    precision: Precision = "float32",
) -> tuple[
    Float[Array, "*batch T H r"], Float[Array, "*batch T G r"], Float[Array, "*batch T G r"]
]:
    """Make queries, keys and values of normalised tokens: bias, norm and rotation included."""
    query, key, value = (
        linear(parameters[name], n, precision=precision) for name in ("query", "key", "value")
    )
    if config.query_norm:
        query = normalise(parameters["query_norm"], query, config)
        key = normalise(parameters["key_norm"], key, config)
    rotary = config.layer_rotary(layer)
    if rotary is not None:
        query, key = rotate(query, positions, rotary), rotate(key, positions, rotary)
    return query, key, value


def attend(
    query: Float[Array, "*batch T H r"],
    key: Float[Array, "*batch S G r"],
    value: Float[Array, "*batch S G r"],
    positions: Int[Array, " T"],
    config: DecoderConfig,
    layer: int,
    kept: Bool[Array, "*batch H T S"] | None = None,
) -> Float[Array, "*batch T H r"]:
    """Gather the values of every token's past and its own; keys have the positions 0, 1, ...

    Where `kept` is given and False, a head does not see the token.
    """
    groups, length = key.shape[-2], key.shape[-3]
    grouped = query.reshape(*query.shape[:-2], groups, -1, query.shape[-1])
    scores = config.scale * jnp.einsum("...tghr,...sgr->...ghts", grouped, key)
    scores = soft_cap(scores, config.attention_cap)
    own, other = positions[:, None], jnp.arange(length, dtype=positions.dtype)[None, :]
    visible = other <= own
    window = config.window(layer)
    if window is not None:
        visible &= other > own - window
    visible = visible.reshape((1,) * (scores.ndim - 2) + visible.shape)
    if kept is not None:
        visible &= kept.reshape(scores.shape)
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("...ghts,...sgr->...tghr", weights, value).reshape(query.shape)


def gather(
    parameters: Parameters,
    attended: Float[Array, "*batch T H r"],
    config: DecoderConfig,
    precision: Precision = "float32",
) -> Float[Array, "*batch T d"]:
    """Return what a layer's attention adds to the stream."""
    added = linear(parameters["out"], attended, inputs=2, precision=precision)
    return _post_norm(parameters, "attention_post_norm", added, config)


def mlp(
    parameters: Parameters,
    x: Float[Array, "*batch d"],
    config: DecoderConfig,
    precision: Precision = "float32",
) -> Float[Array, "*batch d"]:
    """Return what a layer's MLP adds to the stream."""
    n = normalise(parameters["mlp_norm"], x, config)
    up = linear(parameters["up"], n, precision=precision)
    if config.gated:
        gate = linear(parameters["gate"], n, precision=precision)
        hidden = _activated(gate, config) * up
    else:
        hidden = _activated(up, config)
    added = linear(parameters["down"], hidden, precision=precision)
    return _post_norm(parameters, "mlp_post_norm", added, config)


def linear(
    parameters: Parameters,
    x: Float[Array, "..."],
    *,
    inputs: int = 1,
    precision: Precision = "float32",
) -> Array:
    """Multiply the last axes of x, as many as `inputs`, by weights, and add the bias if any.

    In bfloat16 both factors are rounded, and products are summed in the dtype of x.
    """
    narrow = jnp.bfloat16 if precision == "bfloat16" else x.dtype
    weights = jnp.asarray(parameters["weights"]).astype(narrow)
    product = jnp.tensordot(x.astype(narrow), weights, inputs, preferred_element_type=x.dtype)
    if "bias" not in parameters:
        return product
    return product + _like(parameters["bias"], product)


def soft_cap(z: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Return cap * tanh(z / cap), or z without a cap."""
    return z if cap is None else cap * jnp.tanh(z / cap)


def _post_norm(parameters: Parameters, name: str, x: Array, config: DecoderConfig) -> Array:
    return normalise(parameters[name], x, config) if config.post_norms else x


def _activated(x: Array, config: DecoderConfig) -> Array:
    if config.activation == "silu":
        return jax.nn.silu(x)
    return jax.nn.gelu(x, approximate=config.activation == "gelu_tanh")


def _like(parameter: Any, x: Array) -> Array:
    """Return a vector in the rank and dtype of what it is combined with."""
    parameter = jnp.asarray(parameter).astype(x.dtype)
    return parameter.reshape((1,) * (x.ndim - parameter.ndim) + parameter.shape)
