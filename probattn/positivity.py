"""Where determinants are positive for sure, at a fraction of the cost of the determinants.

For a unit vector u and any a > 0, four times u^T Cov(q, k) u is the variance of u^T (a q + k / a)
less that of u^T (a q - k / a), so at most the trace of Cov(a q + k / a). With the best a that is
u^T Cov(q, k) u <= (sqrt(tr Cov(q) tr Cov(k)) + tr Cov(q, k)) / 2. Where the right side is below
sqrt(r), the symmetric part of R_t = I - Cov(q, k) / sqrt(r) is positive definite: no eigenvalue of
R_t has a real part <= 0, and their product is positive, since complex ones come in pairs. Not in
the paper.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool

from probattn.arguments import check_arguments
from probattn.blocks.geometry import causal_softmax, projections


def certainly_positive(
    x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike, *, bound: ArrayLike | None = None
) -> Bool[Array, "*batch T"]:
    """Tell where a sufficient condition says det D_t > 0; elsewhere it may be, or not.

    Only traces of covariances are computed, and what rounding may have taken from them is added.

    Args:
        x: token embeddings (..., T, d).
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.

    Returns:
        (..., T), False where a number is not finite.

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point or the bound is
            not positive.
    """
    _, own, queries, keys = projections(*check_arguments(x, w_query, w_key, bound), bound)
    length, rank = keys.shape[-2:]
    pairs = (queries, queries), (keys, keys), (queries, keys)
    products = [jnp.sum(left * right, axis=-1, keepdims=True) for left, right in pairs]
    past = jnp.concatenate([queries, keys, *products], axis=-1)
    means = jnp.matmul(causal_softmax(own, keys), past, precision=lax.Precision.HIGHEST)
    query, key, (query_square, key_square, product) = (
        means[..., :rank],
        means[..., rank:-3],
        jnp.moveaxis(means[..., -3:], -1, 0),
    )
    # A mean of products, a product of means, and weights whose sum is not quite one.
    error = 4 * (length + rank) * float(jnp.finfo(means.dtype).eps)
    size = jnp.sqrt(query_square) * jnp.sqrt(key_square)
    trace = product - jnp.sum(query * key, axis=-1) + error * size
    variances = (
        jnp.maximum(square - jnp.sum(mean**2, axis=-1), 0.0) + error * square
        for mean, square in ((query, query_square), (key, key_square))
    )
    spread = math.prod(jnp.sqrt(variance) for variance in variances)
    return (spread + trace) / 2 < math.sqrt(rank)
