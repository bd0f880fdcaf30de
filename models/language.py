"""A GPT language model whose embeddings pass through an attention barrier, or are latent."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jaxtyping import Array, Float, Int

from probattn import CausalAttention, coupling, relaxed_barrier, residual
from probattn.arguments import is_positive
from probattn.blocks.promotion import default_promotion
from probattn.models import priors, transformer
from probattn.models.attention_sites import (
    record_coupling,
    record_margins,
    record_table_certificate,
)
from probattn.models.checks import check_integers, check_symbols
from probattn.models.coupling import capped_weights, proper_weights
from probattn.models.decoder.config import Precision
from probattn.models.objective import ObjectiveConfig
from probattn.models.tied_tokens import tied_tokens


@dataclass(frozen=True)
class LanguageModelConfig:
    """Size of the network.

    Attributes:
        layers: number of attention layers, each followed by an MLP.
        heads: attention heads per layer, a divisor of width.
        width: embedding dimensions d.
        block: positions T that the model sees at once, at least 3: the first two have no margin.
        prior_rank: rank r of the separate attention stage that carries the barrier.
        bound: c of that stage's bounded context, see `attention`; None, the paper's, is unbounded.
            It says too how the process of objective "latent" is kept proper.
        spectral_cap: what the certificates of all heads, and of the separate attention stage of
            margin and full, stay below, whatever the parameters; in (0, 1), so that no text can
            fold them. Their matrices are shrunk, see `coupling.capped_weights`. None, the
            paper's, leaves them as they are.
    """

    layers: int = 4
    heads: int = 4
    width: int = 128
    block: int = 64
    prior_rank: int = 16
    bound: float | None = None
    spectral_cap: float | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that make no network."""
        check_integers(self, "model", layers=1, heads=1, width=1, block=3, prior_rank=1)
        if self.bound is not None and not is_positive(self.bound):
            raise ValueError(
                f"model.bound is {self.bound!r}: expected a finite number > 0, or none at all"
            )
        if self.spectral_cap is not None and not (
            is_positive(self.spectral_cap) and self.spectral_cap < 1
        ):
            raise ValueError(
                f"model.spectral_cap is {self.spectral_cap!r}: expected a number between 0 and 1, "
                "or none at all"
            )
        if self.width % self.heads:
            raise ValueError(
                f"model.heads is {self.heads} and model.width {self.width}: "
                "expected heads to divide width"
            )


class AttentionInputs(TypedDict):
    """Arguments of the attention formulas, for one stage: see `attention_stage`."""

    x: Float[Array, "... T d"]
    w_query: Float[Array, "*heads d r"]
    w_key: Float[Array, "*heads d r"]
    bound: float | None


@default_promotion()
def language_model(
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"] | None = None,
    *,
    vocabulary_size: int,
    config: LanguageModelConfig,
    objective: ObjectiveConfig | None = None,
    num_sequences: int | None = None,
    minibatch: int | None = None,
    precision: Precision = "float32",
    rematerialise: bool = False,
    margins: bool = False,
    own_output: bool = False,
    perturb: Callable[[Float[Array, "B T d"]], Float[Array, "B T d"]] | None = None,
) -> None:
    """Model token sequences, in NumPyro: priors, attention factor, transformer, tokens.

    Sample sites: the parameters (see `priors`), then "tokens" with one log likelihood per
    sequence. Factor sites: "attention_barrier" and "attention_residual", minus the weighted
    relaxed barrier and squared residual of each sequence. Plates: "layers" and "sequences". With
    objective "latent" there is no factor, but the sample site "embeddings" (B, T, d), of which
    `latent_guide` is the guide.

    Args:
        inputs: symbols (B, T), T <= config.block; objective "latent" takes their shape alone.
        targets: the symbol that follows each input, (B, T); None samples them.
        vocabulary_size: number of symbols V; symbols are 0 .. V - 1.
        config: size of the network.
        objective: which terms to add to the likelihood; by default the likelihood alone ("ce").
        num_sequences: sequences in the whole training set, of which the B given are a random
            minibatch; by default B. With minibatches of a text of N tokens it is N // T, so that
            the prior counts once. NumPyro's utilities then want the model seeded, since the plate
            draws indices, although none is used.
        minibatch: let the plate take so many of the B given, at random, for samplers that draw its
            rows themselves; num_sequences is then B.
        precision: precision of the network's matrix products. The barrier is float32 at least.
        rematerialise: see `transformer.logits`.
        margins: record the deterministic sites of `attention_sites` for the objective's attention
            stage: margins (B, T), or (B, heads, T) of the first layer, and its couplings.
        own_output: give the output a table of its own, the sample site "output_embedding", in place
            of the table of embeddings; draws of the guide last_layer are of that model.
        perturb: function from the embeddings to the network's input, such as noise to add; the
            factors are those of the embeddings themselves.

    Raises:
        ValueError: if inputs are not (B, T) with T <= config.block, targets differ in shape,
            either holds what is no symbol, num_sequences is no integer or smaller than B, minibatch
            is none from 1 to B, or the precision is unknown.
    """
    objective = ObjectiveConfig("ce") if objective is None else objective
    _check(inputs, targets, vocabulary_size, config)
    sequences = inputs.shape[0]
    if num_sequences is None:
        num_sequences = sequences
    if not isinstance(num_sequences, int | np.integer) or num_sequences < sequences:
        raise ValueError(
            f"num_sequences is {num_sequences!r}: expected an integer, at least the {sequences} of "
            "the minibatch"
        )
    if minibatch is not None and not (
        isinstance(minibatch, int | np.integer) and 1 <= minibatch <= sequences == num_sequences
    ):
        raise ValueError(
            f"minibatch is {minibatch!r} of {sequences} sequences, with num_sequences "
            f"{num_sequences}: expected an integer from 1 to {sequences}, and no num_sequences"
        )
    parameters = sample_parameters(vocabulary_size, config, objective)
    if own_output:
        parameters |= priors.sample_output_table(vocabulary_size, config.width)
    size = sequences if minibatch is None else minibatch
    with numpyro.plate("sequences", num_sequences, subsample_size=size) as rows:
        if minibatch is not None:
            inputs = jnp.asarray(inputs)[rows]
            targets = None if targets is None else jnp.asarray(targets)[rows]
        if objective.name == "latent":
            with numpyro.handlers.scale(scale=objective.beta):
                x = numpyro.sample(
                    "embeddings", latent_process(parameters, inputs.shape[1], config=config)
                )
        else:
            x = transformer.embed(parameters, inputs)
        if objective.name != "ce":
            stage = attention_stage(parameters, x, config=config, objective=objective)
            if objective.has_barrier:
                barrier, energy = _attention_terms(stage, objective)
                barrier_weight, residual_weight = objective.weights
                numpyro.factor("attention_barrier", -barrier_weight * barrier)
                if residual_weight:
                    numpyro.factor("attention_residual", -residual_weight * energy)
            if margins:
                record_coupling(coupling(stage["w_query"], stage["w_key"]))
                record_margins(**stage)
                if objective.name != "latent":
                    _record_all_texts(parameters, vocabulary_size, config, objective)
        if perturb is not None:
            x = perturb(x)
        hidden = transformer.hidden(
            parameters,
            x,
            heads=config.heads,
            cap=config.spectral_cap,
            precision=precision,
            rematerialise=rematerialise,
        )
        tokens = tied_tokens(hidden, transformer.output_table(parameters), precision=precision)
        numpyro.sample("tokens", tokens, obs=targets)


def sample_parameters(
    vocabulary_size: int, config: LanguageModelConfig, objective: ObjectiveConfig
) -> dict[str, Array]:
    """Sample the parameters of `language_model`: all that a guide has to match."""
    parameters = priors.sample_transformer(
        vocabulary_size=vocabulary_size,
        layers=config.layers,
        width=config.width,
        block=config.block,
    )
    if objective.trains_attention_prior:
        parameters |= priors.sample_attention_stage(config.width, config.prior_rank)
    if objective.name == "latent":
        parameters |= priors.sample_process_scale()
    return parameters


def parameter_shapes(
    vocabulary_size: int, config: LanguageModelConfig, objective: ObjectiveConfig
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of every parameter of `language_model`, by site name."""

    def draw() -> dict[str, Array]:
        with numpyro.handlers.seed(rng_seed=0):
            return sample_parameters(vocabulary_size, config, objective)

    return jax.eval_shape(draw)


def attention_stage(
    parameters: transformer.Parameters,
    x: Float[Array, "B T d"],
    *,
    config: LanguageModelConfig,
    objective: ObjectiveConfig,
) -> AttentionInputs:
    """Return the objective's arguments for the attention formulas, by name.

    For a separate stage x is (B, T, d), divided by the root mean square of each token's if it is
    the normalised one, and the matrices are (d, r); for the first layer x is its normalised input
    (B, 1, T, d) and the matrices are (heads, d, d / heads).
    """
    if objective.attention == "first_layer":
        normalised, w_query, w_key = transformer.attention_inputs(
            parameters, x, heads=config.heads, cap=config.spectral_cap
        )
        return {"x": normalised[:, None], "w_query": w_query, "w_key": w_key, "bound": None}
    w_query, w_key = parameters["w_query"], parameters["w_key"]
    if objective.name == "latent":
        w_query, w_key = proper_weights(w_query, w_key, bound=config.bound)
    elif config.spectral_cap is not None:
        reach = _reach(parameters, config=config, objective=objective)
        w_query, w_key = capped_weights(w_query, w_key, reach=reach, cap=config.spectral_cap)
    if objective.attention == "normalised":
        x = transformer.rms_normalised(x)
    return {"x": x, "w_query": w_query, "w_key": w_key, "bound": config.bound}


def _reach(
    parameters: transformer.Parameters, *, config: LanguageModelConfig, objective: ObjectiveConfig
) -> Float[Array, ""]:
    """Bound half of the distance of any two tokens that a text shows to the separate stage."""
    tables = [jnp.asarray(parameters[f"{name}_embedding"]) for name in ("token", "position")]
    if objective.attention == "normalised":
        return jnp.asarray(math.sqrt(config.width), tables[0].dtype)

    def radius(table: Float[Array, "N d"]) -> Float[Array, ""]:
        largest = jnp.max(jnp.sum((table - jnp.mean(table, axis=0, keepdims=True)) ** 2, axis=-1))
        return jnp.sqrt(largest + jnp.finfo(table.dtype).tiny)  # equal rows have a derivative

    reach = radius(tables[0]) + radius(tables[1])
    return reach if config.bound is None else jnp.minimum(reach, config.bound)


def latent_process(
    parameters: transformer.Parameters, length: int, *, config: LanguageModelConfig
) -> CausalAttention:
    """Return the attention process of the embeddings of objective "latent", `length` long.

    It is proper whatever the parameters, up to rounding: repulsive, or of a bounded context where
    the configuration gives a bound; see `coupling.proper_weights`.
    """
    weights = proper_weights(parameters["w_query"], parameters["w_key"], bound=config.bound)
    scale = jnp.exp(parameters["log_residual_scale"])
    return CausalAttention(*weights, scale, length, bound=config.bound)


def _record_all_texts(
    parameters: dict[str, Array],
    vocabulary_size: int,
    config: LanguageModelConfig,
    objective: ObjectiveConfig,
) -> None:
    """Record what is proved of the stage for all texts: each symbol at each position but the last.

    The last token of a block is in no past.
    """
    length = config.block - 1
    symbols = jnp.repeat(jnp.arange(vocabulary_size)[:, None], length, axis=1)
    x = transformer.embed(parameters, symbols)
    stage = attention_stage(parameters, x, config=config, objective=objective)
    table = stage["x"].reshape(-1, config.width)
    position = jnp.tile(jnp.arange(length), vocabulary_size)
    record_table_certificate(table, stage["w_query"], stage["w_key"], stage["bound"], position)


def _attention_terms(
    stage: AttentionInputs, objective: ObjectiveConfig
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Return barrier and ||e_t||^2 / (2 sigma^2), summed over positions, averaged over heads."""
    if objective.one_sided:
        barrier = jnp.maximum(relaxed_barrier(**stage, delta=objective.delta), 0).sum(-1)
    else:
        barrier = relaxed_barrier(**stage, delta=objective.delta, summed=True)
    scaled = residual(**stage) / objective.residual_scale
    energy = jnp.sum(scaled**2, axis=(-2, -1)) / 2  # dead code, and compiled away, if not used
    heads = tuple(range(1, barrier.ndim))
    return barrier.mean(heads), energy.mean(heads)


def _check(
    inputs: Array, targets: Array | None, vocabulary_size: int, config: LanguageModelConfig
) -> None:
    if inputs.ndim != 2 or inputs.shape[0] < 1 or not 1 <= inputs.shape[1] <= config.block:
        raise ValueError(
            f"inputs have shape {inputs.shape}: expected (B, T) with B >= 1 and 1 <= T <= block = "
            f"{config.block}"
        )
    if targets is not None and targets.shape != inputs.shape:
        raise ValueError(
            f"targets have shape {targets.shape}: expected that of inputs, {inputs.shape}"
        )
    for name, symbols in (("inputs", inputs), ("targets", targets)):
        if symbols is not None:
            check_symbols(name, symbols, vocabulary_size)
