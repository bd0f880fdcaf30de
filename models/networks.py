"""One face for the networks that read a text: the project's own, and published decoders.

What is measured of a network is measured at what enters its stack and its layers. So a network here
is a hashable value with functions of a parameter tree, and a compiled program is made for each.
Shapes: B sequences, T positions, d width, V symbols.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from probattn.models import transformer
from probattn.models.decoder import network as decoder
from probattn.models.decoder.config import DecoderConfig
from probattn.models.language import LanguageModelConfig
from probattn.models.transformer import Precision

Parameters = Mapping[str, Any]
"""A dictionary of arrays, or of a decoder a tree in the layout of `decoder.shapes`."""


@dataclass(frozen=True)
class TransformerNetwork:
    """The network of `language_model`, see `transformer`.

    Attributes:
        config: its size.
        precision: precision of the matrix products.
    """

    config: LanguageModelConfig
    precision: Precision = "float32"

    @property
    def block(self) -> int:
        """Positions that are read at once."""
        return self.config.block

    @property
    def adds_positions(self) -> bool:
        """Whether `embed` adds a table of positions: it always does."""
        return True

    def embed(self, parameters: Parameters, tokens: Int[Array, "B T"]) -> Float[Array, "B T d"]:
        """Return what enters the stack: embeddings, with positions where those are added."""
        return transformer.embed(parameters, tokens)

    def tables(self, parameters: Parameters) -> tuple[Array, Array | None]:
        """Return the tables whose rows `embed` adds: of symbols (V, d), of positions (block, d)."""
        return parameters["token_embedding"], parameters["position_embedding"]

    def logits(self, parameters: Parameters, x: Float[Array, "B T d"]) -> Float[Array, "B T V"]:
        """Compute the logits of the symbol that follows each position."""
        return transformer.logits(
            parameters,
            x,
            heads=self.config.heads,
            cap=self.config.spectral_cap,
            precision=self.precision,
        )

    def stream(
        self, parameters: Parameters, x: Float[Array, "B T d"], layer: int
    ) -> Float[Array, "B T d"]:
        """Return what enters a layer, counted from 0, of what enters the stack (B, T, d)."""
        return transformer.stream(
            parameters, x, layer, heads=self.config.heads, cap=self.config.spectral_cap
        )


@dataclass(frozen=True)
class DecoderNetwork:
    """A published decoder, of which at most `block` tokens are read at once.

    Attributes:
        config: the decoder.
        block: positions that are read at once, at most its context.
    """

    config: DecoderConfig
    block: int

    @property
    def adds_positions(self) -> bool:
        """Whether `embed` adds a table of positions; rotary positions turn queries and keys."""
        return self.config.rotary is None

    def embed(self, parameters: Parameters, tokens: Int[Array, "B T"]) -> Float[Array, "B T d"]:
        """Return what enters the stack: embeddings, with positions where those are added."""
        return decoder.embed(parameters, tokens, self.config)

    def tables(self, parameters: Parameters) -> tuple[Array, Array | None]:
        """Return the same, None for the positions where there is no table of them."""
        table = self.config.embedding_scale * jnp.asarray(parameters["embedding"]["tokens"]).astype(
            jnp.float32
        )
        positions = parameters["embedding"].get("positions")
        return table, None if positions is None else positions[: self.block]

    def logits(self, parameters: Parameters, x: Float[Array, "B T d"]) -> Float[Array, "B T V"]:
        """Compute the logits of the symbol that follows each position."""
        for layer in range(self.config.layers):
            x = decoder.apply_layer(parameters["layers"][str(layer)], x, self.config, layer)
        return decoder.read_out(parameters, x, self.config)

    def stream(
        self, parameters: Parameters, x: Float[Array, "B T d"], layer: int
    ) -> Float[Array, "B T d"]:
        """Return what enters a layer; each layer before it is a program of its own."""
        for before in range(layer):
            x = _apply_layer(parameters["layers"][str(before)], x, config=self.config, layer=before)
        return x


@partial(jax.jit, static_argnames=("config", "layer"))
def _apply_layer(
    parameters: Parameters, x: Float[Array, "B T d"], *, config: DecoderConfig, layer: int
) -> Float[Array, "B T d"]:
    return decoder.apply_layer(parameters, x, config, layer)


Network = TransformerNetwork | DecoderNetwork
"""What evaluations take."""
