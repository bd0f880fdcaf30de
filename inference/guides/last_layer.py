"""Last-layer Laplace: a Gaussian over the output's table alone, around a MAP.

The network ties its output to the table of embeddings. Here the last layer is that table in its
role on the output, by which the final features x_t give logits W x_t: in its role on the input it
stays what it is, as everything else does. A draw is thus one of the model whose output has a table
of its own. Draws that moved both roles would move the features too, of whose curvature this
approximation knows nothing (Kristiadi et al. 2020, arXiv:2002.10118; Daxberger et al. 2021,
arXiv:2106.14806). The gain of the final norm stays as well: W times a gain is another W.

The centre is the table that was fitted, so the mean of the draws is the MAP. It is the mode of both
roles together, and of the output's alone only nearly.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Int

from probattn.inference.guides.laplace import text_batches
from probattn.inference.runtime.progress import progress_bar
from probattn.models import LanguageModelConfig, transformer
from probattn.models.priors import sample_output_table, site_priors

_MOST_TOKENS = 2**17  # of a text, in its Hessian


class LastLayer(NamedTuple):
    """A Gaussian over the output's table, its numbers row by row.

    Attributes:
        mean: its mean, (V, d).
        factor: lower Cholesky factor of its precision, (V d, V d).
    """

    mean: Float[Array, "V d"]
    factor: Float[Array, "n n"]


def last_layer(
    config: LanguageModelConfig,
    parameters: Mapping[str, Float[Array, "..."]],
    tokens: Int[np.ndarray, " N"],
    *,
    progress: bool = False,
) -> LastLayer:
    """Approximate the posterior of the output's table, given all other parameters and a text.

    Its precision is that of the prior plus the Hessian of the cross-entropy of the whole text in
    W, see `table_hessian`.

    Args:
        config: size of the network.
        parameters: those of the network, in float64.
        tokens: the training text, (N,), N > block.
        progress: show a progress bar.
    """
    table = jnp.asarray(parameters["token_embedding"])
    prior = site_priors(partial(sample_output_table, *table.shape))["output_embedding"]
    precision = table_hessian(config, parameters, tokens, progress=progress)
    precision[np.diag_indices_from(precision)] += 1 / np.ravel(prior.variance)
    return LastLayer(table, jnp.linalg.cholesky(precision))


def draw_table(rng_key: Array, posterior: LastLayer) -> dict[str, Float[Array, "V d"]]:
    """Draw the output's table, as site "output_embedding"."""
    mean, factor = posterior
    noise = jax.random.normal(rng_key, (mean.size,), mean.dtype)
    change = solve_triangular(factor, noise, lower=True, trans=1)
    return {"output_embedding": mean + change.reshape(mean.shape)}


def table_hessian(
    config: LanguageModelConfig,
    parameters: Mapping[str, Float[Array, "..."]],
    tokens: Int[np.ndarray, " N"],
    *,
    progress: bool = False,
) -> Float[np.ndarray, "n n"]:
    """Compute the Hessian of a text's cross-entropy in the output's table, row by row (V d, V d).

    It is that of a multinomial logistic regression on the final features x_t with probabilities
    p_t, the sum over t of (diag(p_t) - p_t p_t^T) (x) x_t x_t^T, which is positive semidefinite.
    Of a long text it is that of 131,072 tokens, in blocks spread evenly over it, and counts as much
    as the whole: each token takes (V d)^2 multiplications. Some two thousand are taken at a time,
    see `text_batches`. Arguments: see `last_layer`.
    """

    @jax.jit
    def read_out(
        parameters: Mapping[str, Array], inputs: Int[Array, "B T"]
    ) -> tuple[Float[Array, "n d"], Float[Array, "n V"]]:
        x = transformer.hidden(
            parameters,
            transformer.embed(parameters, inputs),
            heads=config.heads,
            cap=config.spectral_cap,
        )
        chances = jax.nn.softmax(transformer.output_logits(x, parameters["token_embedding"]))
        return x.reshape(-1, x.shape[-1]), chances.reshape(-1, chances.shape[-1])

    symbols, width = parameters["token_embedding"].shape
    size = symbols * width
    hessian, same_symbol = np.zeros((size, size)), np.zeros((size, width))
    blocks, _, weights = text_batches(tokens, config.block, most_tokens=_MOST_TOKENS)
    with progress_bar("Hessian", total=len(blocks), unit="batch", visible=progress) as bar:
        for inputs, weight in zip(blocks, weights, strict=True):
            x, chances = map(np.asarray, read_out(parameters, inputs))
            root = np.sqrt(np.repeat(weight, config.block))[:, None]
            rows = ((root * chances)[:, :, None] * x[:, None, :]).reshape(-1, size)
            hessian -= rows.T @ rows  # of a matrix and itself, which takes half the work
            same_symbol += rows.T @ (root * x)
            bar.update(1)
    for first in range(0, size, width):
        own = slice(first, first + width)
        hessian[own, own] += same_symbol[own]
    return hessian
