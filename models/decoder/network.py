"""The decoder: token ids to logits, and generation with a cache.

Shapes: T positions, d width, H heads of queries, G of keys and values, r their width, V token ids.
The parameters are a tree in the layout of `shapes.py`, of any floating dtype. The stream has that
of the embedding, or float32 if that is wider, and parameters are converted to it as they are used.
Layers are unrolled, as in `transformer.py`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from probattn.models.checks import check_symbols
from probattn.models.decoder import layers
from probattn.models.decoder.config import DecoderConfig, Precision
from probattn.models.decoder.layers import Parameters


class Cache(NamedTuple):
    """Keys and values of the tokens that a network has seen, with room for more.

    Attributes:
        keys: of each layer, (..., S, G, r), for S tokens at the most.
        values: of each layer, likewise.
        length: how many tokens have been seen, ().
    """

    keys: tuple[Float[Array, "*batch S G r"], ...]
    values: tuple[Float[Array, "*batch S G r"], ...]
    length: Int[Array, ""]


def decoder_logits(
    parameters: Parameters, tokens: Int[Array, "*batch T"], config: DecoderConfig
) -> Float[Array, "*batch T V"]:
    """Compute the logits of the token that follows each position.

    Args:
        parameters: a tree in the layout of `parameter_shapes`.
        tokens: token ids (..., T), of at most `config.context` tokens.
        config: the decoder.

    Raises:
        ValueError: if there are more tokens than the context holds, or ids outside the vocabulary.
    """
    x = embed(parameters, tokens, config)
    for layer in range(config.layers):
        x = apply_layer(parameters["layers"][str(layer)], x, config, layer)
    return read_out(parameters, x, config)


def embed(
    parameters: Parameters,
    tokens: Int[Array, "*batch T"],
    config: DecoderConfig,
    *,
    first: int = 0,
) -> Float[Array, "*batch T d"]:
    """Return what enters the stack: embeddings, with their positions where those are a table.

    Args:
        parameters: a tree in the layout of `parameter_shapes`.
        tokens: token ids (..., T).
        config: the decoder.
        first: position of the first of them.

    Raises:
        ValueError: if the positions are more than the context holds, or ids outside the vocabulary.
    """
    _check_length(first + jnp.shape(tokens)[-1], config.context, "context")
    tokens = _checked(tokens, config)
    return _embed(parameters, tokens, first + jnp.arange(tokens.shape[-1]), config)


def apply_layer(
    parameters: Parameters,
    x: Float[Array, "*batch T d"],
    config: DecoderConfig,
    layer: int,
    precision: Precision = "float32",
    kept: Bool[Array, "*batch H T T"] | None = None,
) -> Float[Array, "*batch T d"]:
    """Add one layer's attention and MLP to the stream.

    Args:
        parameters: those of the layer.
        x: the stream in front of it (..., T, d).
        config: the decoder.
        layer: its number, from 0: windows and rotations may differ.
        precision: of the factors of products with weights.
        kept: which tokens (last axis) a head lets each token see, of those that it would see
            anyway; by default all of them. Each token must be left one, such as itself.
    """
    positions = jnp.arange(x.shape[-2])
    n = layers.normalise(parameters["attention_norm"], x, config)
    query, key, value = layers.project(parameters, n, positions, config, layer, precision)
    attended = layers.attend(query, key, value, positions, config, layer, kept)
    return _add(parameters, x, attended, config, precision)


def read_out(
    parameters: Parameters,
    x: Float[Array, "*batch T d"],
    config: DecoderConfig,
    precision: Precision = "float32",
) -> Float[Array, "*batch T V"]:
    """Compute logits from what leaves the stack."""
    x = layers.normalise(parameters["final_norm"], x, config)
    if config.tied:
        table = jnp.asarray(parameters["embedding"]["tokens"])
        z = layers.linear({"weights": table.T}, x, precision=precision)
    else:
        z = layers.linear(parameters["output"], x, precision=precision)
    return layers.soft_cap(z, config.logit_cap)


def init_cache(
    config: DecoderConfig, batch: tuple[int, ...], length: int, dtype: Any = jnp.float32
) -> Cache:
    """Make an empty cache for sequences of at most `length` tokens.

    Args:
        config: the decoder.
        batch: the leading axes of the tokens, () for a single sequence.
        length: tokens that there is room for, at most the context.
        dtype: that of the stream, see the module.

    Raises:
        ValueError: if the length is not from 1 to the context.
    """
    _check_length(length, config.context, "context")
    shape = (*batch, length, config.key_heads, config.head_width)
    # Each array is one of its own, so that a compiled step may be given their memory.
    keys, values = (tuple(jnp.zeros(shape, dtype) for _ in range(config.layers)) for _ in range(2))
    return Cache(keys, values, jnp.zeros((), jnp.int32))


def extend(
    parameters: Parameters, cache: Cache, tokens: Int[Array, "*batch N"], config: DecoderConfig
) -> tuple[Float[Array, "*batch N V"], Cache]:
    """Read N more tokens: compute their logits as `decoder_logits` of the whole sequence does.

    A step of generation reads one token. All shapes are those of the arguments, so a compiled step
    serves every position. Donate the cache to it, `jax.jit(..., donate_argnums=...)`: the step then
    writes into it and copies nothing.

    Args:
        parameters: a tree in the layout of `parameter_shapes`.
        cache: from `init_cache` or from the step before.
        tokens: the tokens that follow those of the cache, (..., N).
        config: the decoder.

    Returns:
        Logits (..., N, V) and the cache with the tokens. The logits are NaN if the cache has no
        room for the tokens: a compiled step cannot raise.

    Raises:
        ValueError: if there is no room for N tokens in an empty cache, or ids are outside the
            vocabulary.
    """
    count, room = jnp.shape(tokens)[-1], cache.keys[0].shape[-3]
    _check_length(count, room, "cache")
    tokens = _checked(tokens, config)
    positions = cache.length + jnp.arange(count, dtype=cache.length.dtype)
    x = _embed(parameters, tokens, positions, config)
    keys, values = [], []
    for layer in range(config.layers):
        own = parameters["layers"][str(layer)]
        n = layers.normalise(own["attention_norm"], x, config)
        query, key, value = layers.project(own, n, positions, config, layer)
        keys.append(_insert(cache.keys[layer], key, cache.length))
        values.append(_insert(cache.values[layer], value, cache.length))
        attended = layers.attend(query, keys[-1], values[-1], positions, config, layer)
        x = _add(own, x, attended, config)
    z = read_out(parameters, x, config)
    z = jnp.where(cache.length + count <= room, z, jnp.nan)
    return z, Cache(tuple(keys), tuple(values), cache.length + count)


def _checked(tokens: Int[Array, "*batch T"], config: DecoderConfig) -> Int[Array, "*batch T"]:
    check_symbols("tokens", tokens, config.vocabulary)  # before JAX traces them
    return jnp.asarray(tokens)


def _embed(
    parameters: Parameters, tokens: Array, positions: Int[Array, " T"], config: DecoderConfig
) -> Array:
    table = jnp.asarray(parameters["embedding"]["tokens"])
    narrow = jnp.finfo(table.dtype).bits < 32
    wide = jnp.dtype(jnp.float32) if narrow else table.dtype
    x = config.embedding_scale * table[tokens].astype(wide)
    if config.rotary is not None:
        return x
    added = jnp.asarray(parameters["embedding"]["positions"])[positions].astype(wide)
    return x + added.reshape((1,) * (x.ndim - 2) + added.shape)


def _add(
    parameters: Parameters,
    x: Array,
    attended: Array,
    config: DecoderConfig,
    precision: Precision = "float32",
) -> Array:
    """Add attention and MLP to the stream."""
    after = x + layers.gather(parameters, attended, config, precision)
    return after + layers.mlp(parameters, x if config.parallel else after, config, precision)


def _insert(cached: Array, new: Array, position: Array) -> Array:
    axis = cached.ndim - 3
    return jax.lax.dynamic_update_slice_in_dim(cached, new.astype(cached.dtype), position, axis)


def _check_length(length: int, most: int, where: str) -> None:
    if not 1 <= length <= most:
        raise ValueError(
            f"there are {length} tokens: expected 1 to {most}, which the {where} has room for"
        )
