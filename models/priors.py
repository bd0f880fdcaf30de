"""Priors on the parameters of the language model.

Weights are Normal around zero, three times as wide as the draw that a deep network would start
from: 1 / sqrt(fan-in), which keeps activations of order one, and narrower by sqrt(2 layers) for
the two projections that write into the residual stream, so that its variance does not depend on
depth (Radford et al. 2019). Priors as narrow as the start itself cost 0.09 nats per character on
Tiny Shakespeare. Gains of the norms are Normal(1, 0.1). NumPyro's default start, the median of 15
draws from the prior, is about a third as wide as the prior too, but takes seconds to compile.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

WIDTH = 3.0  # width of the priors, in units of the start
# Start of each of the two tables whose sum enters the stack. The logits are tied to the first: at
# width 128 they start with a standard deviation of about a half.
EMBEDDING_START = 0.05
GAIN_SCALE = 0.1


def attention_prior(width: int, rank: int) -> dist.Distribution:
    """Return the prior of each of W_Q and W_K (width, rank) of a separate attention stage."""
    return _normal((width, rank), scale=1 / math.sqrt(width))


def sample_attention_stage(width: int, rank: int) -> dict[str, Array]:
    """Sample sites w_query and w_key (width, rank) of a separate attention stage."""
    prior = attention_prior(width, rank)
    return {name: numpyro.sample(name, prior) for name in ("w_query", "w_key")}


def sample_process_scale() -> dict[str, Array]:
    """Sample site log_residual_scale, log sigma of the attention process of latent embeddings.

    Its median is the root mean square of the embeddings that a fit starts from.
    """
    prior = dist.Normal(math.log(math.sqrt(2) * EMBEDDING_START), 1.0)
    return {"log_residual_scale": numpyro.sample("log_residual_scale", prior)}


def sample_transformer(
    *, vocabulary_size: int, layers: int, width: int, block: int
) -> dict[str, Array]:
    """Sample sites of the network's parameters, those of the layers stacked in plate "layers".

    Returns:
        token_embedding (vocabulary, width), position_embedding (block, width), final_norm
        (width,), and with a leading axis of layers: attention_norm (width,), attention_in
        (width, 3 width) in the order query, key, value, attention_out (width, width), mlp_norm
        (width,), mlp_in (width, 4 width), mlp_out (4 width, width).
    """
    fan_in = WIDTH / math.sqrt(width)
    embedding = WIDTH * EMBEDDING_START
    into_stream = 1 / math.sqrt(2 * layers)
    single = {
        "token_embedding": _normal((vocabulary_size, width), scale=embedding),
        "position_embedding": _normal((block, width), scale=embedding),
        "final_norm": _normal((width,), location=1.0, scale=GAIN_SCALE),
    }
    per_layer = {
        "attention_norm": _normal((width,), location=1.0, scale=GAIN_SCALE),
        "attention_in": _normal((width, 3 * width), scale=fan_in),
        "attention_out": _normal((width, width), scale=fan_in * into_stream),
        "mlp_norm": _normal((width,), location=1.0, scale=GAIN_SCALE),
        "mlp_in": _normal((width, 4 * width), scale=fan_in),
        "mlp_out": _normal((4 * width, width), scale=fan_in / 2 * into_stream),
    }
    parameters = {name: numpyro.sample(name, prior) for name, prior in single.items()}
    with numpyro.plate("layers", layers):
        parameters |= {name: numpyro.sample(name, prior) for name, prior in per_layer.items()}
    return parameters


def sample_output_table(vocabulary_size: int, width: int) -> dict[str, Array]:
    """Sample site output_embedding (vocabulary, width), a table of the output's own.

    Its prior is that of token_embedding, in whose place it stands there.
    """
    prior = _normal((vocabulary_size, width), scale=WIDTH * EMBEDDING_START)
    return {"output_embedding": numpyro.sample("output_embedding", prior)}


def site_priors(parameters: Callable[[], object]) -> dict[str, dist.Distribution]:
    """Return the priors of a NumPyro model of sample sites alone, by site name."""
    with numpyro.handlers.trace() as trace, numpyro.handlers.seed(rng_seed=0):
        parameters()
    return {name: site["fn"] for name, site in trace.items() if site["type"] == "sample"}


def starting_point(rng_key: Array, parameters: Callable[[], dict[str, Array]]) -> dict[str, Array]:
    """Draw the start of a fit, a third as wide as the priors of its parameters.

    Args:
        rng_key: key of the draw.
        parameters: a NumPyro model of sample sites alone, all of them Normal.
    """
    priors = site_priors(parameters)
    means, unravel = ravel_pytree({name: prior.mean for name, prior in priors.items()})
    deviations, _ = ravel_pytree({name: jnp.sqrt(prior.variance) for name, prior in priors.items()})
    # One draw for all sites: XLA compiles a generator anew for every shape.
    noise = jax.random.normal(rng_key, means.shape, means.dtype)
    return dict(unravel(means + deviations / WIDTH * noise))


def _normal(shape: tuple[int, ...], *, location: float = 0.0, scale: float) -> dist.Distribution:
    return dist.Normal(location, scale).expand(shape).to_event(len(shape))
