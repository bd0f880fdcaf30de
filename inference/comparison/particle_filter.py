"""Next-token predictions of latent embeddings, by a particle filter.

The attention process is causal: its embeddings can be drawn one after the other, each given those
before it, and the tokens seen so far say which of the draws to keep. For a coupling A, an emission
U and its bias b, every particle is a history x_1 .. x_t of the process. At token t

    x_t solves x_t - mu_t(x_t) = e_t with e_t ~ Normal(0, I), given the particle's own past,
    p(y_t | y_1 .. y_{t-1}) is the mean over particles of softmax(x_t U + b),
    and whole histories are resampled with weights p(y_t | x_t).

This is the bootstrap filter (Gordon, Salmond and Smith 1993, IEE Proceedings F 140, 107-113) with
systematic resampling after every token (Doucet and Johansen 2011, Oxford Handbook of Nonlinear
Filtering, 656-704). The product of its predictions over a sequence is an unbiased estimate of the
probability of the sequence; a single prediction is a ratio of such estimates, and its bias falls
like 1 / particles.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import logsumexp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int
from numpyro.handlers import substitute

from probattn.ancestral import solve_token
from probattn.arguments import check_bound
from probattn.blocks.geometry import bounded
from probattn.models import LatentEmbeddingsConfig
from probattn.models.checks import check_symbols
from probattn.models.coupling import attention_weights_of, sample_coupling
from probattn.text.batches import map_batches

PARTICLES = 128  # particles of each sequence

_HIGHEST = lax.Precision.HIGHEST
NUMBERS = 2**18  # numbers that the particles of one call hold: bounds the memory


class FilterError(RuntimeError):
    """A filter that has no particle left."""


class Filtered(NamedTuple):
    """Predictions of token sequences, each token from those before it in its sequence.

    Attributes:
        log_probabilities: log probability of every symbol at every position, in nats, (N, T, V);
            those of the first position are given nothing.
        unconverged: particles at each position whose equation was not solved, and which therefore
            were left out, (N, T).
    """

    log_probabilities: Float[np.ndarray, "N T V"]
    unconverged: Int[np.ndarray, "N T"]


def filter_tokens(
    rng_key: Array,
    tokens: Int[np.ndarray, "N T"],
    coupling: ArrayLike,
    emission: ArrayLike,
    bias: ArrayLike,
    *,
    bound: ArrayLike | None = None,
    particles: int = PARTICLES,
) -> Filtered:
    """Predict every token of sequences from those before it, given parameters of the process.

    A particle whose equation Newton's method does not solve (see `ancestral.solve_residual`) has
    weight zero, and the others stand for all; the result says how many there were.

    Where the process is proper (`probattn.is_proper`) the embeddings follow `CausalAttention` with
    scale 1, and the predictions are those of its density. Where the map folds, as it may under a
    coupling "free", that is no density: an equation may have several solutions, and the simulation
    takes the one that Newton's method finds, of either sign of det D_t. Predictions are then those
    of the process so simulated, which is what the non-centred form of `latent_embeddings` samples,
    and not of `CausalAttention.log_prob`.

    Args:
        rng_key: the noise of sequence n is a function of it and n.
        tokens: symbols (N, T), from 0 to V - 1.
        coupling: A, (d, d).
        emission: U, (d, V).
        bias: b, (V,). The common dtype of the three is that of all numbers.
        bound: c of a bounded context, > 0, in units of sigma; None leaves it unbounded.
        particles: number of particles of each sequence, >= 1.

    Returns:
        The predictions, and what was left out.

    Raises:
        ValueError: if shapes, dtypes or symbols do not fit, or an argument is out of range.
        FilterError: if no particle of a sequence is left at some position, which leaves no
            prediction from there on.
    """
    coupling, emission, bias = _checked(tokens, coupling, emission, bias, particles)
    check_bound(bound)
    weights = attention_weights_of(coupling)
    count, length = tokens.shape
    keys = jax.vmap(partial(jax.random.fold_in, rng_key))(jnp.arange(count))
    of_one = particles * (2 * length * coupling.shape[0] + len(bias))
    log_probabilities, kept = map_batches(
        lambda _, rows: _filter(
            keys[rows], tokens[rows], *weights, emission, bias, bound, particles=particles
        ),
        count,
        max(min(NUMBERS // of_one, count), 1),
    )
    if not kept.all():
        sequence, position = np.argwhere(kept == 0)[0]
        raise FilterError(
            f"sequence {sequence}: none of {particles} particles converged at position {position}; "
            "give a coupling under which the process is proper, or more particles"
        )
    return Filtered(log_probabilities, particles - kept)


def filter_of_draw(
    rng_key: Array,
    tokens: Int[np.ndarray, "N T"],
    draw: Mapping[str, Array],
    config: LatentEmbeddingsConfig,
) -> Filtered:
    """Predict every token of sequences by one draw of a latent model's parameters.

    Args:
        rng_key: see `filter_tokens`, as for errors.
        tokens: the sequences.
        draw: values by sample site, without a draw's axes.
        config: coupling and size of the process.
    """
    of_draw = substitute(sample_coupling, dict(draw))
    coupling = of_draw(config.coupling, config.width, config.context_bound)
    return filter_tokens(
        rng_key,
        tokens,
        coupling.astype(draw["emission"].dtype),
        draw["emission"],
        draw["emission_bias"],
        bound=config.context_bound,
    )


@partial(jax.jit, static_argnames="particles")
def _filter(
    rng_keys: Array,
    tokens: Int[Array, "N T"],
    w_query: Float[Array, "d d"],
    w_key: Float[Array, "d d"],
    emission: Float[Array, "d V"],
    bias: Float[Array, " V"],
    bound: ArrayLike | None,
    *,
    particles: int,
) -> tuple[Float[Array, "N T V"], Int[Array, "N T"]]:
    """Return log probabilities, and how many particles were left at each position."""
    length = tokens.shape[1]
    width, dtype = w_query.shape[0], w_query.dtype
    solve = jax.vmap(solve_token, in_axes=(0, 0, 0, None, None))

    def sequence(rng_key: Array, tokens: Array) -> tuple[Array, Array]:
        def position(carry: tuple[Array, Array], each: tuple) -> tuple[tuple, tuple]:
            values, keys = carry
            t, token, (noise_key, resample_key) = each
            e = jax.random.normal(noise_key, (particles, width), dtype)
            x, converged, _ = solve(e, values, keys, jnp.arange(length) < t, w_query)
            x = jnp.where(converged[:, None], x, 0)  # finite, as what has weight zero must be
            log_p = jax.nn.log_softmax(jnp.matmul(x, emission, precision=_HIGHEST) + bias)
            kept = jnp.sum(converged)
            mean = logsumexp(log_p, axis=0, where=converged[:, None]) - jnp.log(kept.astype(dtype))
            chosen = _systematic(resample_key, log_p[:, token], converged)
            value = bounded(x, bound)
            key = jnp.matmul(value, w_key, precision=_HIGHEST)
            carry = values.at[:, t].set(value)[chosen], keys.at[:, t].set(key)[chosen]
            return carry, (mean, kept)

        start = jnp.zeros((particles, length, width), dtype)
        rng_keys = jax.vmap(jax.random.split)(jax.random.split(rng_key, length))
        steps = jnp.arange(length), tokens, (rng_keys[:, 0], rng_keys[:, 1])
        return lax.scan(position, (start, start), steps)[1]

    return jax.vmap(sequence)(rng_keys, tokens)


def _systematic(
    rng_key: Array, log_weights: Float[Array, " particles"], converged: Bool[Array, " particles"]
) -> Int[Array, " particles"]:
    """Choose the particles that stay, each as often as its part of the weight, rounded."""
    log_weights = jnp.where(converged, log_weights, -jnp.inf)
    cumulated = jnp.cumsum(jax.nn.softmax(log_weights))
    count = len(log_weights)
    points = (jnp.arange(1, count + 1) - jax.random.uniform(rng_key, (), cumulated.dtype)) / count
    chosen = jnp.searchsorted(cumulated, points * cumulated[-1])
    # Rounding of the sum can point at a neighbour of weight zero.
    return jnp.where(converged[chosen], chosen, jnp.argmax(log_weights))


def _checked(
    tokens: Int[np.ndarray, "N T"],
    coupling: ArrayLike,
    emission: ArrayLike,
    bias: ArrayLike,
    particles: int,
) -> tuple[Array, Array, Array]:
    """Return the parameters as arrays of one dtype."""
    arrays = tuple(jnp.asarray(array) for array in (coupling, emission, bias))
    shapes = tuple(array.shape for array in arrays)
    width, size = shapes[1] if len(shapes[1]) == 2 else (0, 0)
    if min(width, size) < 1 or shapes != ((width, width), (width, size), (size,)):
        raise ValueError(
            f"coupling, emission and bias have shapes {shapes[0]}, {shapes[1]} and {shapes[2]}: "
            "expected (d, d), (d, V) and (V,) with the same d and V"
        )
    dtype = jnp.result_type(*arrays)
    if dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"the parameters have dtype {dtype}: expected float32 or float64")
    if np.ndim(tokens) != 2 or np.size(tokens) == 0 or np.asarray(tokens).dtype.kind not in "iu":
        raise ValueError(
            f"tokens have shape {np.shape(tokens)} and dtype {np.asarray(tokens).dtype}: expected "
            "integers (N, T) with N >= 1 and T >= 1"
        )
    check_symbols("tokens", tokens, size)
    if isinstance(particles, bool) or not isinstance(particles, int) or particles < 1:
        raise ValueError(f"particles is {particles!r}: expected an integer >= 1")
    first, second, third = (array.astype(dtype) for array in arrays)
    return first, second, third
