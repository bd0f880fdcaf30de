"""Embeddings as latent variables of the attention process, and as observations of it."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import get_args

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int
from numpyro.infer.reparam import TransformReparam

from probattn import CausalAttention
from probattn.arguments import check_switches, is_positive
from probattn.blocks.promotion import default_promotion
from probattn.models.attention_sites import record_margins
from probattn.models.checks import check_integers, check_symbols
from probattn.models.coupling import Coupling, attention_weights_of, sample_coupling

_EMISSION_SCALE = 2.0  # logits of a token then differ by a few units, for embeddings of order one


@dataclass(frozen=True)
class LatentEmbeddingsConfig:
    """Size of the data, and kind of the process.

    Attributes:
        width: embedding dimensions d.
        coupling: prior of A, see `coupling.sample_coupling`. "bounded" and "repulsive" make every
            conditional a density of mass one; "free" is the paper's and does not.
        bound: c of the bounded context, in units of sigma; for the coupling "bounded" alone.
        sequences: number of sequences N.
        length: tokens T of a sequence, at least 3: the first two have no margin.
        centred: sample the embeddings themselves; otherwise their residuals, from which the
            embeddings are solved for (NumPyro's TransformReparam).
    """

    width: int = 3
    coupling: Coupling = "bounded"
    bound: float = 1.0
    sequences: int = 16
    length: int = 32
    centred: bool = True

    def __post_init__(self) -> None:
        """Refuse sizes and names that make no model."""
        check_integers(self, "latent", width=1, sequences=1, length=3)
        check_switches(self, "latent", "centred")
        if self.coupling not in get_args(Coupling):
            raise ValueError(
                f"latent.coupling is {self.coupling!r}: "
                f"expected one of {', '.join(get_args(Coupling))}"
            )
        if not is_positive(self.bound):
            raise ValueError(f"latent.bound is {self.bound!r}: expected a finite number > 0")

    @property
    def context_bound(self) -> float | None:
        """The bound c of the process, None where the context is unbounded."""
        return self.bound if self.coupling == "bounded" else None


@default_promotion()
def latent_embeddings(
    tokens: Int[Array, "N T"] | None = None,
    *,
    vocabulary_size: int,
    config: LatentEmbeddingsConfig,
) -> None:
    """Model token sequences that latent embeddings emit, in NumPyro.

    x ~ CausalAttention(A, sigma = 1), token_t ~ Categorical(softmax(x_t U + b)). The scale of the
    embeddings is not identified (x -> k x, U -> U / k), so sigma is fixed. Their rotation is not
    either: report what it does not change, see `coupling.sample_coupling`.

    Sample sites: those of the coupling; "emission" (d, V), U, and "emission_bias" (V,), b, each
    summing to zero over the vocabulary; "embeddings" (N, T, d), or "embeddings_base", the
    residuals, if not `config.centred`; "tokens", with one log likelihood per sequence.
    Deterministic sites: those of the coupling, and those of `record_margins`, (N, T). Plate:
    "sequences".

    Args:
        tokens: symbols (N, T); None samples them.
        vocabulary_size: number of symbols V; symbols are 0 .. V - 1.
        config: sizes and coupling.

    Raises:
        ValueError: if vocabulary_size < 2, or the tokens are no symbols or have another shape than
            the configuration says.
    """
    if vocabulary_size < 2:
        raise ValueError(f"vocabulary_size is {vocabulary_size}: expected an integer >= 2")
    shape = config.sequences, config.length
    if tokens is not None and jnp.shape(tokens) != shape:
        raise ValueError(
            f"tokens have shape {jnp.shape(tokens)}: expected (sequences, length) = {shape}"
        )
    if tokens is not None:
        check_symbols("tokens", tokens, vocabulary_size)
    coupling = sample_coupling(config.coupling, config.width, config.context_bound)
    emission = numpyro.sample(
        "emission",
        dist.ZeroSumNormal(_EMISSION_SCALE, (vocabulary_size,)).expand((config.width,)).to_event(1),
    )
    bias = numpyro.sample("emission_bias", dist.ZeroSumNormal(1.0, (vocabulary_size,)))
    process = CausalAttention(
        *attention_weights_of(coupling), 1.0, config.length, bound=config.context_bound
    )
    form = {"embeddings": TransformReparam()}
    with numpyro.plate("sequences", config.sequences):
        with nullcontext() if config.centred else numpyro.handlers.reparam(config=form):
            x = numpyro.sample("embeddings", process)
        logits = x @ emission + bias
        numpyro.sample("tokens", dist.Categorical(logits=logits).to_event(1), obs=tokens)
    record_margins(x, *attention_weights_of(coupling), config.context_bound)


@default_promotion()
def observed_embeddings(
    embeddings: Float[Array, "N T d"] | None = None,
    *,
    config: LatentEmbeddingsConfig,
    unit: float = 1.0,
) -> None:
    """Model embeddings that are observed, such as rows of a trained table, in NumPyro.

    Sample sites: those of the coupling; "scale", sigma ~ LogNormal(log unit, 1); "embeddings"
    (N, T, d). Deterministic sites: as in `latent_embeddings`. Plate: "sequences".

    Args:
        embeddings: (N, T, d); None samples them.
        config: sizes and coupling. Its bound is in the given unit, `centred` has no effect.
        unit: unit of the embeddings, such as their root mean square: c = bound * unit, and the
            prior of A is that of `sample_coupling` divided by unit^2.

    Raises:
        ValueError: if the unit is not positive or the embeddings have another shape than the
            configuration says.
    """
    if not (unit > 0 and math.isfinite(unit)):
        raise ValueError(f"unit is {unit}: expected a finite number > 0")
    shape = config.sequences, config.length, config.width
    if embeddings is not None and jnp.shape(embeddings) != shape:
        raise ValueError(
            f"embeddings have shape {jnp.shape(embeddings)}: "
            f"expected (sequences, length, width) = {shape}"
        )
    coupling = sample_coupling(config.coupling, config.width, config.context_bound, unit=unit)
    scale = numpyro.sample("scale", dist.LogNormal(math.log(unit), 1.0))
    bound = None if config.context_bound is None else config.context_bound * unit
    process = CausalAttention(*attention_weights_of(coupling), scale, config.length, bound=bound)
    with numpyro.plate("sequences", config.sequences):
        x = numpyro.sample("embeddings", process, obs=embeddings)
    record_margins(x, *attention_weights_of(coupling), bound)
