"""Each theorem of the paper as something that runs: what it says, and what was measured.

    python examples/theorems.py

Small cases in float64. Where a result needs a condition, a case that breaks it stands below it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import Predictive
from numpyro.infer.util import log_density

import probattn as pa
from probattn.process import (
    bidirectional_log_prob,
    layered_process,
    marginal_ratio,
    marginal_ratio_monte_carlo,
)

jax.config.update("jax_enable_x64", True)
ONE = jnp.ones((1, 1))


class Row(NamedTuple):
    """A line of the table: what the result says of a number, and the number measured."""

    result: str
    case: str
    expected: str
    measured: float
    error: float = 0.0


def local_results():
    """Check propositions about one position, each against automatic differentiation."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (6, 4))
    w_query, w_key = jax.random.normal(keys[1], (2, 4, 2)) / 4
    scalar, coupling = x[:, :1], 0.4

    jacobian = jax.jacfwd(pa.residual)(scalar, coupling * ONE, ONE)[:, 0, :, 0]
    weights = pa.attention_weights(coupling * scalar, scalar)
    mean = weights @ scalar
    variance = jnp.sum(weights * (scalar.T - mean) ** 2, axis=1)
    error = jnp.abs(jnp.diagonal(jacobian) - (1 - coupling * variance)).max()
    yield Row("Proposition 1", "largest |de_t/dx_t - (1 - a Var)|", "0", float(error))

    jacobian = jax.jacfwd(pa.residual)(x, w_query, w_key)
    dense = jnp.stack([jacobian[t, :, t, :] for t in range(6)])
    blocks = pa.jacobian_blocks(x, w_query, w_key)
    yield Row("Theorem 1", "largest |D_t - autodiff|", "0", float(jnp.abs(dense - blocks).max()))
    # How much a change of the residual e_t alone moves x_t: the inverse of the margin.
    transform = pa.AttentionResidual(w_query, w_key)
    inverse = jax.jacfwd(transform.inv)(transform(x))
    stretch = jnp.linalg.norm(jnp.stack([inverse[t, :, t, :] for t in range(6)]), 2, (1, 2))
    error = jnp.abs(stretch * pa.stability_margin(x, w_query, w_key) - 1).max()
    yield Row("Theorem 1", "largest |dx_t/de_t| margin_t - 1", "0", float(error))
    condition = jnp.linalg.cond(dense).max()
    yield Row("Theorem 1", "largest condition number of D_t", "finite", float(condition))

    alpha = jax.nn.softmax(x[0])
    error = jnp.abs(jax.jacfwd(jax.nn.softmax)(x[0]) - (jnp.diag(alpha) - jnp.outer(alpha, alpha)))
    yield Row("Lemma B.1", "largest |dsoftmax - (diag(p) - p p^T)|", "0", float(error.max()))

    process = pa.CausalAttention(w_query, w_key, 1.0, 6)
    _, whole = jnp.linalg.slogdet(jacobian.reshape(24, 24))
    error = process.log_prob(x) - dist.Normal().log_prob(transform(x)).sum() - whole
    yield Row("Corollary 3.1", "log p - (log Normal(e) + log|det|)", "0", float(jnp.abs(error)))


def consistency():
    """Check Theorem 2 and Proposition 2: the marginal of n + 1 tokens over the density of n."""

    def causal(coupling):
        return lambda x: pa.CausalAttention(coupling * ONE, ONE, 1.0, x.shape[-2]).log_prob(x)

    for given in ([[0.5], [-1.5]], [[0.5], [-1.5], [2.0]]):
        ratio = marginal_ratio(causal(-0.5), jnp.array(given), -30, 30)
        yield Row("Theorem 2", f"d = 1, n = {len(given)}, a = -0.5, quadrature", "1", *ratio)
    for gap in (4.5, 5.0, 6.0, 8.0):
        x = jnp.array([[-gap / 2], [gap / 2]])
        mass = pa.conditional_mass(x, 0.2 * ONE, ONE, 1.0)
        # Given the past the ratio is the conditional mass: here the density of x itself is exact.
        ratio = marginal_ratio(causal(0.2), x, -30, 30)
        expected = "1" if mass < 1 + 1e-9 else f"{mass:.4f} (folds)"
        yield Row("Theorem 2", f"d = 1, n = 2, a = +0.2, |x_1 - x_2| = {gap}", expected, *ratio)

    keys = jax.random.split(jax.random.key(1), 3)
    x = 2 * jax.random.normal(keys[0], (3, 2))
    w_query = jax.random.normal(keys[1], (2, 2))
    proposal = dist.MultivariateStudentT(5.0, x.mean(0), 4 * jnp.eye(2))

    def plane(x):
        return pa.CausalAttention(w_query, -w_query, 1.0, x.shape[-2]).log_prob(x)

    ratio = marginal_ratio_monte_carlo(keys[2], plane, x, proposal)
    yield Row("Theorem 2", "d = 2, n = 3, repulsive, Monte Carlo", "1", *ratio)

    def with_origin(x):
        longer = jnp.concatenate([jnp.zeros_like(x[..., :1, :]), x], axis=-2)
        return causal(-0.5)(longer) - dist.Normal().log_prob(0.0)

    future = partial(bidirectional_log_prob, w_query=-0.5 * ONE, w_key=ONE, scale=1.0)
    x = jnp.array([[1.5], [-1.0]])
    ratio = marginal_ratio(with_origin, x, -30, 30)
    yield Row("Proposition 2", "n = 2, a = -0.5, causal, with an origin", "1", *ratio)
    yield Row("Proposition 2", "the same, non-causal", "not 1", *marginal_ratio(future, x, -30, 30))


def layers():
    """Check Theorem 3, Proposition 3 and Corollary 6.1: the process through several layers."""
    keys = jax.random.split(jax.random.key(2), 4)
    length, matrices = 4, jax.random.normal(keys[0], (2, 1, 1))
    w_query, w_key = -ONE, ONE
    maps = [
        lambda x, w=w: x + jnp.tanh(jnp.cumsum(x, axis=-2) @ w)  # causal: a running sum
        for w in matrices
    ]

    def model(length):
        layered_process(w_query, w_key, 1.0, length, maps, noise_scale=0.5)

    def log_prob(stacked):
        """Return the density of (x^(0), x^(1), x^(2)), a token of all layers being one row."""

        def of_one(stacked):
            sites = {f"layer_{n}": stacked[:, n : n + 1] for n in range(3)}
            with numpyro.validation_enabled(False):
                return log_density(model, (stacked.shape[0],), {}, sites)[0]

        return jnp.vectorize(of_one, signature="(t,d)->()")(stacked)

    draws = Predictive(partial(model, length), num_samples=1)(keys[1])
    stacked = jnp.concatenate([draws[f"layer_{n}"][0] for n in range(3)], axis=-1)
    proposal = dist.MultivariateStudentT(5.0, stacked.mean(0), 2 * jnp.eye(3))
    ratio = marginal_ratio_monte_carlo(
        keys[2], log_prob, stacked[:-1], proposal, num_samples=200_000
    )
    yield Row("Theorem 3", "3 layers, n = 3, Monte Carlo", "1", *ratio)

    def noises(stacked):
        residuals = [pa.residual(stacked[0], w_query, w_key)]
        return jnp.stack(residuals + [stacked[n + 1] - maps[n](stacked[n]) for n in range(2)])

    by_layer = jnp.moveaxis(stacked, -1, 0)[..., None]
    jacobian = jax.jacfwd(noises)(by_layer)
    given_previous = jacobian[1, :, 0, 1, :, 0]
    error = jnp.abs(given_previous - jnp.eye(length)).max()
    yield Row("Proposition 3", "|d noise_1 / d x^(1) - I| given x^(0)", "0", float(error))
    _, whole = jnp.linalg.slogdet(jacobian.reshape(3 * length, 3 * length))
    _, first = pa.log_det(by_layer[0], w_query, w_key)
    error = abs(whole - first.sum())
    yield Row("Corollary 6.1", "log|det| of all layers - that of layer 0", "0", float(error))


def table():
    """Return all rows."""
    return [*local_results(), *consistency(), *layers()]


if __name__ == "__main__":
    rows = table()
    print(f"{'result':15s} {'case':47s} {'expected':16s} measured")
    for row in rows:
        error = f" +- {row.error:.1g}" if row.error else ""
        print(f"{row.result:15s} {row.case:47s} {row.expected:16s} {row.measured:.6g}{error}")
