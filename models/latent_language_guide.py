"""The guide of latent embeddings: Gaussians around what the tables say of each token.

With objective "latent" the embeddings x of a sequence of tokens y are latent variables:

    model:  x ~ CausalAttention(W_Q, W_K, sigma),  y_{t+1} ~ Categorical(transformer(x_0 .. x_t))
    guide:  x_t ~ Normal(E[y_t] + P_t, s^2 I)

SVI of the pair minimises, per token, the cross-entropy under noise of scale s plus beta times
KL(guide || process). E is also the output matrix of the transformer; P, the positions, the model
does not use, so that its prior is a penalty on the guide alone.
"""

from collections.abc import Callable, Mapping

import numpyro
import numpyro.distributions as dist
from jax.typing import ArrayLike
from jaxtyping import Array, Int
from numpyro.distributions import constraints

from probattn.blocks.promotion import default_promotion
from probattn.models.embedding_noise import embedding_rms
from probattn.models.objective import ObjectiveConfig
from probattn.models.transformer import Parameters, embed


@default_promotion()
def latent_guide(
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"] | None = None,
    *,
    parameters: Callable[..., Mapping[str, Array]],
    objective: ObjectiveConfig,
    num_sequences: int | None = None,
) -> None:
    """Guide `language_model` with objective "latent", in NumPyro.

    Sample sites: those of `parameters`, and "embeddings" (B, T, d), weighted by `objective.beta`
    like the model's. Param site: "guide_scale", s in units of the means' root mean square, if the
    objective learns it. Plate: "sequences".

    Args:
        inputs: symbols (B, T), whose embeddings are drawn.
        targets: not used; those of the model.
        parameters: guide of the model's parameters, such as an AutoDelta of `sample_parameters`;
            called with inputs and targets, it returns their values by site name.
        objective: the model's objective.
        num_sequences: as in `language_model`.
    """
    values = parameters(inputs, targets)
    scale: ArrayLike = objective.guide_scale
    if objective.learn_guide_scale:
        scale = numpyro.param("guide_scale", scale, constraint=constraints.positive)
    size = inputs.shape[0]
    sequences = numpyro.plate("sequences", num_sequences or size, subsample_size=size)
    # The log density of the draw, not the entropy in closed form: for a Gaussian that is
    # reparametrised both have the same gradient (docs/decisions.md).
    with sequences, numpyro.handlers.scale(scale=objective.beta):
        numpyro.sample("embeddings", embedding_guide(values, inputs, scale))


def embedding_guide(
    parameters: Parameters, inputs: Int[Array, "B T"], scale: ArrayLike
) -> dist.Distribution:
    """Sample q(x | tokens): a batch of B sequences (T, d) of independent Gaussians.

    Args:
        parameters: see `transformer.embed`.
        inputs: symbols (B, T).
        scale: standard deviation, in units of the root mean square of the B T means.
    """
    means = embed(parameters, inputs)
    return dist.Normal(means, scale * embedding_rms(means)).to_event(2)
