"""The Jacobian of a whole sequence, solved by forward substitution: no block of it is formed.

The Jacobian J of the map x -> e is block lower triangular. Row t of J z, for a change z of the
embeddings, is z_t less the change of mu_t: the attention-weighted mean of the changes of the
values, and what the changes of the logits add. So J z = b is solved token after token, from the
changes of values and keys found so far, in O(T^2 (d + r)) operations.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from probattn.blocks.covariance import attention_covariance, identity_less
from probattn.blocks.geometry import bounded, geometry

_HIGHEST = lax.Precision.HIGHEST


class Factors(NamedTuple):
    """What every solution with the Jacobian of one sequence needs.

    Attributes:
        x: the sequence (T, d).
        w_query: W_Q (d, r).
        w_key: W_K (d, r).
        bound: c, or None.
        centred: values relative to the first token's (T, d).
        queries: q_t / sqrt(r), (T, r).
        means: attention-weighted means of `centred` (T, d).
        weights: attention weights (T, T).
        reduced: R_t transposed (T, r, r).
        correction: turns f W_Q into what D_t^-1 adds to f, by Woodbury's identity (T, r, d). Not
            finite where D_t is singular.
    """

    x: Float[Array, "T d"]
    w_query: Float[Array, "d r"]
    w_key: Float[Array, "d r"]
    bound: ArrayLike | None
    centred: Float[Array, "T d"]
    queries: Float[Array, "T r"]
    means: Float[Array, "T d"]
    weights: Float[Array, "T T"]
    reduced: Float[Array, "T r r"]
    correction: Float[Array, "T r d"]


def factorise(
    x: Float[Array, "T d"],
    w_query: Float[Array, "d r"],
    w_key: Float[Array, "d r"],
    bound: ArrayLike | None,
) -> Factors:
    """Prepare solutions with the Jacobian of one sequence; the arguments are of one dtype."""
    rank = w_query.shape[1]
    centred, _, keys, weights = geometry(x, w_query, w_key, bound)
    queries = jnp.matmul(x, w_query, precision=_HIGHEST) / math.sqrt(rank)
    means = jnp.matmul(weights, centred, precision=_HIGHEST)
    covariance = attention_covariance(weights, keys, centred) / math.sqrt(rank)
    reduced = identity_less(jnp.matmul(covariance, w_query, precision=_HIGHEST))
    correction = jnp.linalg.solve(reduced, covariance)
    return Factors(x, w_query, w_key, bound, centred, queries, means, weights, reduced, correction)


def solve_jacobian(factors: Factors, right: Float[Array, "T d"]) -> Float[Array, "T d"]:
    """Solve J z = right by forward substitution; linear in `right`.

    `jax.linear_transpose` of it solves J^T z = right, by substitution from the last token back.
    """
    weights, queries, means = factors.weights, factors.queries, factors.means

    def position(carry: tuple[Array, Array], t: Array) -> tuple[tuple, Array]:
        value_changes, key_changes = carry
        weight_changes = weights[t] * jnp.matmul(key_changes, queries[t], precision=_HIGHEST)
        mean_change = jnp.matmul(weights[t], value_changes, precision=_HIGHEST) + jnp.matmul(
            weight_changes, factors.centred - means[t][None], precision=_HIGHEST
        )
        known = right[t] + mean_change
        projected = jnp.matmul(known, factors.w_query, precision=_HIGHEST)
        change = known + jnp.matmul(projected, factors.correction[t], precision=_HIGHEST)
        _, value_change = jax.jvp(
            lambda token: bounded(token, factors.bound), (factors.x[t],), (change,)
        )
        key_change = jnp.matmul(value_change, factors.w_key, precision=_HIGHEST)
        carry = value_changes.at[t].set(value_change), key_changes.at[t].set(key_change)
        return carry, change

    start = jnp.zeros_like(right), jnp.zeros((len(right), factors.w_key.shape[1]), right.dtype)
    _, changes = lax.scan(position, start, jnp.arange(len(right)))
    return changes
