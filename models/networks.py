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
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int

from probattn.models import transformer
from probattn.models.decoder import layers
from probattn.models.decoder import network as decoder
from probattn.models.decoder.config import DecoderConfig, Precision
from probattn.models.language import LanguageModelConfig
from probattn.models.tied_tokens import tied_tokens

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
        block: tokens of a text that are read at once; with the prefix at most its context.
        precision: precision of the products with weights.
        prefix: ids that the decoder reads before the tokens of each window, such as that of <s>.
            They are seen by all tokens, and are neither predicted nor measured.
    """

    config: DecoderConfig
    block: int
    precision: Precision = "float32"
    prefix: tuple[int, ...] = ()

    @property
    def adds_positions(self) -> bool:
        """Whether `embed` adds a table of positions; rotary positions turn queries and keys."""
        return self.config.rotary is None

    def embed(self, parameters: Parameters, tokens: Int[Array, "B T"]) -> Float[Array, "B T d"]:
        """Return what enters the stack: embeddings, with positions where those are added."""
        return decoder.embed(parameters, tokens, self.config, first=len(self.prefix))

    def read_with_prefix(
        self, parameters: Parameters, x: Float[Array, "B T d"]
    ) -> Float[Array, "B P+T d"]:
        """Return what enters the stack with the P rows of the prefix before it."""
        if not self.prefix:
            return x
        before = decoder.embed(parameters, jnp.asarray(self.prefix), self.config)
        before = jnp.broadcast_to(before.astype(x.dtype), (*x.shape[:-2], *before.shape))
        return jnp.concatenate([before, x], axis=-2)

    def tables(self, parameters: Parameters) -> tuple[Array, Array | None]:
        """Return the same, None for the positions where there is no table of them."""
        table = self.config.embedding_scale * jnp.asarray(parameters["embedding"]["tokens"]).astype(
            jnp.float32
        )
        positions = parameters["embedding"].get("positions")
        first = len(self.prefix)
        return table, None if positions is None else positions[first : first + self.block]

    def logits(self, parameters: Parameters, x: Float[Array, "B T d"]) -> Float[Array, "B T V"]:
        """Compute the logits of the symbol that follows each position."""
        return decoder.read_out(
            parameters, self._through(parameters, x), self.config, self.precision
        )

    def tokens(
        self, parameters: Parameters, x: Float[Array, "B T d"], *, rematerialise: bool = False
    ) -> dist.Distribution:
        """Return the distribution of the token that follows each position, an event per sequence.

        Args:
            parameters: a tree in the layout of `decoder.shapes`.
            x: what enters the stack.
            rematerialise: whether the derivative computes each layer anew from its input.
        """
        config, x = self.config, self._through(parameters, x, rematerialise=rematerialise)
        if config.logit_cap is not None:  # of which slices of the table know nothing
            logits = decoder.read_out(parameters, x, config, self.precision)
            return dist.Categorical(logits=logits).to_event(1)
        x = layers.normalise(parameters["final_norm"], x, config)
        if config.tied:
            table = jnp.asarray(parameters["embedding"]["tokens"])
        else:
            table = jnp.asarray(parameters["output"]["weights"]).T
        return tied_tokens(x, table.astype(x.dtype), precision=self.precision)

    def stream(
        self, parameters: Parameters, x: Float[Array, "B T d"], layer: int
    ) -> Float[Array, "B P+T d"]:
        """Return what enters a layer, the prefix first; each layer before it is its own program."""
        x = self.read_with_prefix(parameters, x)
        for before in range(layer):
            x = _apply_layer(parameters["layers"][str(before)], x, config=self.config, layer=before)
        return x

    def _through(self, parameters: Parameters, x: Array, *, rematerialise: bool = False) -> Array:
        x = self.read_with_prefix(parameters, x)
        apply = decoder.apply_layer
        if rematerialise:
            apply = jax.checkpoint(apply, static_argnums=(2, 3, 4))
        for layer in range(self.config.layers):
            own = parameters["layers"][str(layer)]
            x = apply(own, x, self.config, layer, self.precision)
        return x[..., len(self.prefix) :, :]


@partial(jax.jit, static_argnames=("config", "layer"))
def _apply_layer(
    parameters: Parameters, x: Float[Array, "B T d"], *, config: DecoderConfig, layer: int
) -> Float[Array, "B T d"]:
    return decoder.apply_layer(parameters, x, config, layer)


Network = TransformerNetwork | DecoderNetwork
"""What evaluations take."""
