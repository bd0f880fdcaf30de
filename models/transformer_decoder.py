"""The network of `transformer` as a setting of the decoder."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from probattn.models.decoder.config import DecoderConfig
from probattn.models.language import LanguageModelConfig
from probattn.models.transformer import Parameters, capped


def as_decoder(
    parameters: Parameters, config: LanguageModelConfig
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Return the decoder that computes the same logits, and its parameters.

    It is a GPT-2 whose biases are zero. A spectral cap is worked into the matrices.

    Args:
        parameters: those of the network, see `transformer`.
        config: its size.
    """
    parameters = capped(parameters, heads=config.heads, cap=config.spectral_cap)
    table, positions = parameters["token_embedding"], parameters["position_embedding"]
    decoder = DecoderConfig(
        vocabulary=len(table),
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        key_heads=config.heads,
        head_width=config.width // config.heads,
        context=len(positions),
        hidden=parameters["mlp_in"].shape[-1],
        norm="layer",
        norm_bias=True,
        norm_eps=1e-5,
        rotary=None,
        attention_bias=True,
        out_bias=True,
        mlp_bias=True,
        activation="gelu_tanh",
        gated=False,
        tied=True,
    )
    layers = {str(layer): _layer(parameters, decoder, layer) for layer in range(config.layers)}
    return decoder, {
        "embedding": {"tokens": table, "positions": positions},
        "layers": layers,
        "final_norm": _norm(parameters["final_norm"]),
    }


def _layer(parameters: Parameters, decoder: DecoderConfig, layer: int) -> dict[str, Any]:
    heads, width = decoder.heads, decoder.head_width
    projections = jnp.split(jnp.asarray(parameters["attention_in"][layer]), 3, axis=-1)
    tree: dict[str, Any] = {
        name: _linear(weights.reshape(-1, heads, width), (heads, width))
        for name, weights in zip(("query", "key", "value"), projections, strict=True)
    }
    out = jnp.asarray(parameters["attention_out"][layer]).reshape(heads, width, -1)
    return tree | {
        "attention_norm": _norm(parameters["attention_norm"][layer]),
        "out": _linear(out, out.shape[-1:]),
        "mlp_norm": _norm(parameters["mlp_norm"][layer]),
        "up": _linear(parameters["mlp_in"][layer], (decoder.hidden,)),
        "down": _linear(parameters["mlp_out"][layer], (decoder.width,)),
    }


def _norm(gain: Array) -> dict[str, Array]:
    return {"gain": gain, "bias": jnp.zeros_like(gain)}


def _linear(weights: Array, bias: tuple[int, ...]) -> dict[str, Array]:
    return {"weights": weights, "bias": jnp.zeros(bias, weights.dtype)}
