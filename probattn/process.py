"""Attention as a stochastic process: its marginals, its layers, and what breaks without causality.

A family of densities of sequences, one for every length, is a process if integrating the last
token out of the density of n + 1 tokens leaves that of n (Kolmogorov consistency; paper, Theorem
2). The functions here carry that integral out for any log density, so that consistency is
measured and not assumed.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from probattn.arguments import check_arguments, floating
from probattn.blocks.promotion import default_promotion
from probattn.distributions import CausalAttention
from probattn.quadrature import integrate

_PIECES = 400  # pieces of an interval; the rule looks at each

LogProb = Callable[[Array], Array]


class Ratio(NamedTuple):
    """Marginal of n + 1 tokens over the density of the first n: 1 for a consistent process.

    Attributes:
        value: the ratio.
        error: the quadrature's estimate of its error, or the standard error of the Monte Carlo.
    """

    value: float
    error: float


def marginal_ratio(
    log_prob: LogProb, x: ArrayLike, low: float, high: float, *, tolerance: float | None = None
) -> Ratio:
    """Integrate the last token out by adaptive quadrature, in one dimension.

    Args:
        log_prob: log density of sequences of any length, (..., T, 1) -> (...).
        x: the first n tokens (n, 1), n >= 1, of positive density.
        low: lower limit of the integral over token n + 1.
        high: its upper limit.
        tolerance: relative error aimed at; by default the square root of the machine epsilon,
            1.5e-8 in float64 and 3.5e-4 in float32.

    What is narrower than about 1 / 8,000 of the interval may be overlooked.

    Raises:
        ValueError: if x is not (n, 1) or not floating point, the limits are not in order or x has
            density zero.
        RuntimeError: if the integral does not reach the tolerance.
    """
    x = floating("x", x)
    if x.ndim != 2 or x.shape[0] < 1 or x.shape[1] != 1:
        raise ValueError(f"x has shape {x.shape}: expected (n, 1) with n >= 1")
    if not low < high:
        raise ValueError(f"the limits are {low} and {high}: expected low < high")
    own = _log_prob_of(log_prob, x)
    longer = jax.jit(lambda last: jnp.exp(log_prob(_appended(x, last)) - own))

    def conditional(last: np.ndarray) -> np.ndarray:
        return np.asarray(longer(jnp.asarray(last, x.dtype)))

    if tolerance is None:
        tolerance = math.sqrt(jnp.finfo(x.dtype).eps)
    edges = np.linspace(low, high, _PIECES + 1)
    return Ratio(*integrate(conditional, edges, tolerance=tolerance))


@default_promotion()
def marginal_ratio_monte_carlo(
    rng_key: Array,
    log_prob: LogProb,
    x: ArrayLike,
    proposal: dist.Distribution,
    *,
    num_samples: int = 100_000,
) -> Ratio:
    """Integrate the last token out by importance sampling, in any dimension.

    Args:
        rng_key: key of the draws.
        log_prob: log density of sequences of any length, (..., T, d) -> (...).
        x: the first n tokens (n, d), n >= 1, of positive density.
        proposal: distribution of token n + 1 with event shape (d,), of heavier tails than the
            conditional: else the standard error is no bound on the error.
        num_samples: draws from the proposal, at least 2.

    Raises:
        ValueError: if the shapes do not fit, x is not floating point, num_samples is too small or
            x has density zero.
    """
    x = floating("x", x)
    if x.ndim != 2 or proposal.event_shape != x.shape[1:]:
        raise ValueError(
            f"x has shape {x.shape} and the proposal event shape {proposal.event_shape}: "
            "expected (n, d) and (d,)"
        )
    if num_samples < 2:
        raise ValueError(f"num_samples is {num_samples}: expected at least 2")
    last = proposal.sample(rng_key, (num_samples,))
    own = _log_prob_of(log_prob, x)
    weights = jnp.exp(log_prob(_appended(x, last)) - own - proposal.log_prob(last))
    error = jnp.std(weights, ddof=1) / jnp.sqrt(num_samples)
    return Ratio(float(jnp.mean(weights)), float(error))


@default_promotion()
def bidirectional_log_prob(
    x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike, scale: ArrayLike
) -> Float[Array, "*batch"]:
    """Evaluate the same formula with attention to the future (paper, Proposition 2).

    Every token attends to every other token and to one at the origin, without which the residuals
    of two tokens would depend on their difference alone. The Jacobian is no longer triangular; its
    determinant is that of the whole, dense matrix. A causal process to compare it with is
    `CausalAttention` on sequences whose first token is the origin.

    Args:
        x: token embeddings (..., T, d), for small T d.
        w_query: W_Q (d, r).
        w_key: W_K (d, r).
        scale: sigma > 0.

    Returns:
        (...), -inf where the determinant is not positive.

    Raises:
        ValueError: if the shapes do not fit or the arrays are not floating point.
    """
    x, w_query, w_key = check_arguments(x, w_query, w_key, None)

    def residual(x: Array) -> Array:
        keys = jnp.concatenate([jnp.zeros_like(x[:1]), x])
        logits = (x @ w_query) @ (keys @ w_key).T / jnp.sqrt(w_key.shape[-1])
        itself = jnp.eye(len(x), len(x) + 1, k=1, dtype=bool)
        weights = jax.nn.softmax(jnp.where(itself, -jnp.inf, logits), axis=-1)
        return x - weights @ keys

    def of_one(x: Array) -> Array:
        sign, log_abs = jnp.linalg.slogdet(jax.jacfwd(residual)(x).reshape(x.size, x.size))
        noise = dist.Normal(0.0, scale).log_prob(residual(x)).sum()
        return jnp.where(sign > 0, noise + log_abs, -jnp.inf)

    return jnp.vectorize(of_one, signature="(t,d)->()")(x)


@default_promotion()
def layered_process(
    w_query: ArrayLike,
    w_key: ArrayLike,
    scale: ArrayLike,
    length: int,
    layers: Sequence[Callable[[Array], Array]],
    *,
    noise_scale: ArrayLike = 1.0,
    bound: ArrayLike | None = None,
) -> Array:
    """Model the transformer as a process over all its layers (paper, Theorem 3), in NumPyro.

    x^(0) ~ CausalAttention and x^(l+1)_t = F_l(x^(l)_0 .. x^(l)_t) + Normal(0, noise_scale^2).
    Given layer l the map from x^(l+1) to its noise is a shift: its Jacobian is the identity, and
    the log-determinant of the whole is that of layer 0 (Proposition 3, Corollary 6.1). Sample
    sites: "layer_0", "layer_1", ..., each (length, d).

    Args:
        w_query: W_Q (d, r) of layer 0.
        w_key: W_K (d, r) of layer 0.
        scale: sigma of layer 0.
        length: tokens T.
        layers: the maps F_l, (T, d) -> (T, d), causal: row t of the result depends on rows 0 .. t
            alone. The process is consistent only if they are.
        noise_scale: standard deviation of the noise of every further layer.
        bound: c of a bounded context of layer 0, or None.

    Returns:
        The last layer.
    """
    x = numpyro.sample("layer_0", CausalAttention(w_query, w_key, scale, length, bound=bound))
    for number, layer in enumerate(layers, start=1):
        noise = dist.Normal(layer(x), noise_scale).to_event(2)
        x = numpyro.sample(f"layer_{number}", noise)
    return x


def _log_prob_of(log_prob: LogProb, x: Array) -> float:
    own = float(log_prob(x))
    if not np.isfinite(own):
        raise ValueError(f"log_prob of x is {own}: expected a sequence of positive density")
    return own


def _appended(x: Float[Array, "n d"], last: Float[Array, "m d"]) -> Float[Array, "m n_1 d"]:
    repeated = jnp.broadcast_to(x, (len(last), *x.shape))
    return jnp.concatenate([repeated, last[:, None, :].astype(x.dtype)], axis=1)
