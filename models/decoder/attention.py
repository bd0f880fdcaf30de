"""The attention of a decoder's layer as the mathematics takes it."""

import jax.numpy as jnp
from jaxtyping import Array

from probattn.models.decoder.config import DecoderConfig
from probattn.models.decoder.layers import Parameters
from probattn.models.decoder.rotations import frequencies
from probattn.stages.layer import AttentionLayer
from probattn.stages.projections import Norm, NormKind, Rotary


def attention_layer(parameters: Parameters, config: DecoderConfig, layer: int) -> AttentionLayer:
    """Make the attention of a layer, all heads of it, in at least float32.

    Values and output are None where the parameters lack them: the theory's stage needs neither.

    Args:
        parameters: those of the layer.
        config: the decoder.
        layer: its number, from 0: windows and rotations may differ.
    """

    def part(name: str, leaf: str, *axes: int) -> Array | None:
        if leaf not in parameters.get(name, {}):
            return None
        found = jnp.asarray(parameters[name][leaf])
        found = found.astype(jnp.float32) if jnp.finfo(found.dtype).bits < 32 else found
        return jnp.transpose(found, axes) if axes else found

    def needed(name: str, leaf: str, *axes: int) -> Array:
        found = part(name, leaf, *axes)
        assert found is not None  # see `shapes.layer_shapes`
        return found

    def norm(name: str) -> Norm | None:
        if name not in parameters:
            return None
        gain = needed(name, "gain")
        gain = 1 + gain if config.norm == "rms_plus_one" else gain
        kind: NormKind = "layer" if config.norm == "layer" else "rms"
        return Norm(gain, part(name, "bias"), kind, config.norm_eps)

    rotary, window = config.layer_rotary(layer), config.window(layer)
    return AttentionLayer(
        needed("query", "weights", 1, 0, 2),
        needed("key", "weights", 1, 0, 2),
        part("value", "weights", 1, 0, 2),
        part("out", "weights"),
        query_bias=part("query", "bias"),
        key_bias=part("key", "bias"),
        value_bias=part("value", "bias"),
        out_bias=part("out", "bias"),
        norm=norm("attention_norm"),
        query_norm=norm("query_norm"),
        key_norm=norm("key_norm"),
        out_norm=norm("attention_post_norm"),
        rotary=None if rotary is None else _rotary(config, layer),
        scale=config.scale,
        cap=config.attention_cap,
        # The decoder counts a token's own place, the stage does not.
        window=None if window is None else window - 1,
    )


def _rotary(config: DecoderConfig, layer: int) -> Rotary:
    rotary = config.layer_rotary(layer)
    assert rotary is not None
    return Rotary(jnp.asarray(frequencies(rotary, config.head_width), jnp.float32))
