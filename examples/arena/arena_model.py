"""The model of the arena: the network of the library, with what practitioners add to it.

The network is written as a published decoder, so that all methods are measured by the same code.
Methods of the library itself are `language_model`; this model has those that the library lacks.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.nn import logsumexp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from probattn.blocks.promotion import default_promotion
from probattn.models.decoder import layers
from probattn.models.decoder.config import DecoderConfig
from probattn.models.language import LanguageModelConfig, sample_parameters
from probattn.models.networks import DecoderNetwork
from probattn.models.objective import ObjectiveConfig
from probattn.models.tied_tokens import tied_tokens
from probattn.models.transformer_decoder import as_decoder

Variant = Literal["plain", "sigma_reparam", "qk_norm", "z_loss", "jacobian", "dropout"]
"""What is added to the plain network, with a strength that is an argument of the compiled step.

"plain" adds nothing. "sigma_reparam" divides every matrix of the layers by its spectral norm and
multiplies it by a learned number (arXiv:2303.06296). "qk_norm" puts a LayerNorm on the queries and
keys of every head (arXiv:2302.05442), whose gains start at the strength. "z_loss" adds strength *
mean of (log Z)^2 to the loss, with Z the softmax's denominator (arXiv:2309.14322). "jacobian" adds
strength * |J|^2 / T, with J the derivative of the output of the first layer's attention, of a
whole sequence of T tokens, by its normalised input. "dropout" drops entries of the embeddings and
of what each attention and MLP adds, with probability strength.
"""

Parameters = Mapping[str, Array]

_MATRICES = 6  # of a layer: query, key, value, out, and two of the MLP
_SQUARINGS = 10


@default_promotion()
def arena_model(
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"] | None = None,
    *,
    vocabulary_size: int,
    config: LanguageModelConfig,
    variant: Variant = "plain",
    strength: ArrayLike = 0.0,
    num_sequences: int | None = None,
) -> None:
    """Model token sequences, in NumPyro; see `probattn.models.language.language_model`.

    Sample sites: those of `sample_arena_parameters`, and "tokens". Factor site: "penalty". The
    plain variant is `language_model` with objective "ce".

    Args:
        inputs: symbols (B, T).
        targets: the symbol that follows each input; None samples them.
        vocabulary_size: number of symbols.
        config: size of the network.
        variant: what is added to it.
        strength: of the variant.
        num_sequences: as in `language_model`.
    """
    parameters = sample_arena_parameters(vocabulary_size, config, variant)
    network, tree = decoder_of(parameters, config, variant)
    rate = strength if variant == "dropout" else None
    sequences = inputs.shape[0]
    with numpyro.plate("sequences", num_sequences or sequences, subsample_size=sequences):
        x = network.embed(tree, inputs)
        if variant == "jacobian":
            squares = _attention_gain(tree["layers"]["0"], x, network.config)
            numpyro.factor("penalty", -strength * squares)
        hidden = _through(tree, _dropped(x, rate), network.config, rate)
        tokens = tied_tokens(hidden, tree["embedding"]["tokens"])
        if variant == "z_loss":
            log_z = logsumexp(tokens.base_dist.logits, axis=-1)
            numpyro.factor("penalty", -strength * jnp.sum(log_z**2, axis=-1))
        numpyro.sample("tokens", tokens, obs=targets)


def sample_arena_parameters(
    vocabulary_size: int, config: LanguageModelConfig, variant: Variant
) -> dict[str, Array]:
    """Sample the parameters of the network, and gains (layers, ...) that the variant adds."""
    parameters = sample_parameters(vocabulary_size, config, ObjectiveConfig("ce"))
    for name, shape in _gains(config, variant).items():
        prior = dist.Normal(1.0, 3.0).expand(shape).to_event(len(shape))
        parameters[name] = numpyro.sample(name, prior)
    return parameters


def start_of_variant(
    parameters: Parameters, config: LanguageModelConfig, variant: Variant, strength: ArrayLike
) -> dict[str, Array]:
    """Add the gains that a fit starts from to the parameters of the plain network.

    With sigma_reparam they are the spectral norms, so that the network starts as the plain one.
    """
    found = dict(parameters)
    for name, shape in _gains(config, variant).items():
        if variant == "sigma_reparam":
            norms = [spectral_norm(part) for part in _matrices(parameters)]
            found[name] = jnp.stack(norms, axis=-1)
        else:
            found[name] = jnp.full(shape, strength)
    return found


def decoder_of(
    parameters: Parameters, config: LanguageModelConfig, variant: Variant
) -> tuple[DecoderNetwork, dict[str, Any]]:
    """Return the network that runs, as a decoder, and its parameters."""
    if variant == "sigma_reparam":
        parameters = _reparametrised(parameters)
    decoder, tree = as_decoder(parameters, config)
    if variant == "qk_norm":
        decoder = replace(decoder, query_norm=True)
        for layer, own in tree["layers"].items():
            for name in ("query", "key"):
                gain = parameters[f"{name}_gain"][int(layer)]
                own[f"{name}_norm"] = {"gain": gain, "bias": jnp.zeros_like(gain)}
    return DecoderNetwork(decoder, config.block), tree


def spectral_norm(matrices: Float[Array, "*batch m n"]) -> Float[Array, "*batch"]:
    """Return the largest singular value, with its derivative u^T dW v.

    The right singular vector v is found by a power iteration, of 2^10 steps by repeated squaring.
    """
    constant = jax.lax.stop_gradient(matrices)
    power = jnp.swapaxes(constant, -1, -2) @ constant
    for _ in range(_SQUARINGS):
        power = power / jnp.max(jnp.abs(power), axis=(-2, -1), keepdims=True)
        power = power @ power
    largest = jnp.argmax(jnp.linalg.norm(power, axis=-2), axis=-1)
    v = jnp.take_along_axis(power, largest[..., None, None], axis=-1)[..., 0]
    v = v / jnp.linalg.norm(v, axis=-1, keepdims=True)
    return jnp.linalg.norm(jnp.einsum("...mn,...n->...m", matrices, v), axis=-1)


def _gains(config: LanguageModelConfig, variant: Variant) -> dict[str, tuple[int, ...]]:
    if variant == "sigma_reparam":
        return {"spectral_gain": (config.layers, _MATRICES)}
    if variant == "qk_norm":
        shape = config.layers, config.width // config.heads
        return {"query_gain": shape, "key_gain": shape}
    return {}


def _matrices(parameters: Parameters) -> list[Float[Array, "layers m n"]]:
    """Return query, key, value, out and the two matrices of the MLP, of all layers."""
    projections = jnp.split(parameters["attention_in"], 3, axis=-1)
    return [*projections, *(parameters[n] for n in ("attention_out", "mlp_in", "mlp_out"))]


def _reparametrised(parameters: Parameters) -> Parameters:
    parts = [
        matrix * (parameters["spectral_gain"][:, number] / spectral_norm(matrix))[:, None, None]
        for number, matrix in enumerate(_matrices(parameters))
    ]
    joined = jnp.concatenate(parts[:3], axis=-1)
    names = ("attention_in", "attention_out", "mlp_in", "mlp_out")
    return {**parameters, **dict(zip(names, [joined, *parts[3:]], strict=True))}


def _through(
    tree: Mapping[str, Any], x: Float[Array, "B T d"], config: DecoderConfig, rate: ArrayLike | None
) -> Float[Array, "B T d"]:
    """Return what the output reads; entries of what a layer's parts add are dropped at the rate."""
    for layer in range(config.layers):
        own = tree["layers"][str(layer)]
        n = layers.normalise(own["attention_norm"], x, config)
        x = x + _dropped(_attention(own, n, config, layer), rate)
        x = x + _dropped(layers.mlp(own, x, config), rate)
    return layers.normalise(tree["final_norm"], x, config)


def _attention(
    own: Mapping[str, Any], n: Float[Array, "B T d"], config: DecoderConfig, layer: int
) -> Float[Array, "B T d"]:
    positions = jnp.arange(n.shape[-2])
    projected = layers.project(own, n, positions, config, layer)
    return layers.gather(own, layers.attend(*projected, positions, config, layer), config)


def _attention_gain(
    own: Mapping[str, Any], x: Float[Array, "B T d"], config: DecoderConfig
) -> Float[Array, " B"]:
    """Estimate |J|^2 of each sequence, by |J^T v|^2 of one Gaussian v (Hutchinson)."""
    n = layers.normalise(own["attention_norm"], x, config)
    out, pull = jax.vjp(lambda n: _attention(own, n, config, 0), n)
    [found] = pull(jax.random.normal(numpyro.prng_key(), out.shape, out.dtype))
    return jnp.sum(found**2, axis=(-2, -1))


def _dropped(x: Float[Array, "*batch d"], rate: ArrayLike | None) -> Float[Array, "*batch d"]:
    if rate is None:
        return x
    kept = jax.random.bernoulli(numpyro.prng_key(), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0.0)
