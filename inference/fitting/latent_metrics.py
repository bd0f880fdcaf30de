"""What a fit of objective latent reports beside its cross-entropy at the guide's mean."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from probattn.inference.config import RunConfig
from probattn.inference.evaluation.perturbations import Gaussian
from probattn.inference.evaluation.scoring import Scorer
from probattn.models import LanguageModelConfig
from probattn.models.language import latent_process
from probattn.models.latent_language_guide import embedding_guide
from probattn.models.transformer import Parameters

_WINDOWS = 64  # windows of each text for the divergence


def latent_metrics(
    config: RunConfig,
    scorers: Mapping[str, Scorer],
    parameters: Parameters,
    guide_params: Mapping[str, Array],
) -> dict[str, float]:
    """Measure cross-entropies with embeddings drawn from the guide, KL divergence, both scales.

    Every report draws the same noise, so that two reports differ by their parameters alone.

    Args:
        config: configuration of the run.
        scorers: scorers of texts, by the prefix of their metrics.
        parameters: parameters of the network and the process, by site name.
        guide_params: the guide's own, with "guide_scale" where it is learned.

    Returns:
        By prefix "sampled_cross_entropy", nats per token, and "kl", KL(guide || process) in nats
        per token, not weighted; "guide_scale", s in units of the embeddings' root mean square, and
        "residual_scale", sigma of the process in the embedding's unit. Nothing, if the objective
        is another one.
    """
    if config.objective.name != "latent":
        return {}
    scale = float(guide_params.get("guide_scale", config.objective.guide_scale))
    key = jax.random.key(config.fit.seed)
    found = {}
    for prefix, scorer in scorers.items():
        noise = scale * scorer.embedding_rms(parameters)
        sampled = scorer.score(parameters, Gaussian(noise), rng_key=key)
        stride = -(-len(scorer.inputs) // _WINDOWS)
        inputs = jnp.asarray(scorer.inputs[::stride])
        divergence = _divergence(parameters, inputs, scale, key, config=config.model)
        found[f"{prefix}sampled_cross_entropy"] = sampled.cross_entropy
        found[f"{prefix}kl"] = float(divergence)
    sigma = float(jnp.exp(parameters["log_residual_scale"]))
    return found | {"guide_scale": scale, "residual_scale": sigma}


@partial(jax.jit, static_argnames=("config",))
def _divergence(
    parameters: Parameters,
    inputs: Int[Array, "B T"],
    scale: Float[Array, ""],
    rng_key: Array,
    *,
    config: LanguageModelConfig,
) -> Float[Array, ""]:
    """Estimate KL(guide || process) per token, by one draw of every sequence."""
    guide = embedding_guide(parameters, inputs, scale)
    process = latent_process(parameters, inputs.shape[1], config=config)
    x = guide.sample(rng_key)
    return jnp.mean(guide.log_prob(x) - process.log_prob(x)) / inputs.shape[1]
