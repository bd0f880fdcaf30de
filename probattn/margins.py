"""Margins to instability, support tokens, and the certificate of invertibility.

Position t is stable while its Jacobian block D_t = I_d - C_t W_Q^T / sqrt(r), with
C_t = Cov_{alpha_t}(x_s, k_s), keeps a positive determinant. Its margin says how far it is from
losing it (paper, section 3; Definition 3.1 for support tokens).
"""

import math
from typing import Literal, get_args

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from probattn.attention import attention_covariance, check_arguments, check_weights, geometry
from probattn.log_det import log_det, reduced_blocks, slogdet

MarginKind = Literal["sigma_min", "reduced", "det", "log_det"]

_HIGHEST = lax.Precision.HIGHEST


def stability_margin(
    x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike, kind: MarginKind = "sigma_min"
) -> Float[Array, "*batch T"]:
    """Margin of every position to the boundary where attention stops being invertible.

    Kinds:
        "sigma_min": smallest singular value of D_t, its spectral-norm distance to the nearest
            singular matrix, with a minus sign where det D_t <= 0: a folded position must not look
            safe. At most 1 where d > r, since D_t differs from the identity by rank r.
        "reduced": the same of R_t. Cheaper; it vanishes where "sigma_min" does, but its size
            depends on how A is split into W_Q and W_K.
        "det": det D_t.
        "log_det": log det D_t in nats, -inf where det D_t <= 0.

    In the scalar case d = r = 1 the first three are 1 - a Var_{alpha_t}(x) (paper, Proposition 1).
    The first derivative is exact wherever the smallest singular value is simple; second
    derivatives of the two singular-value kinds are not defined by this function.

    Args:
        x: token embeddings (..., T, d).
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        kind: which margin; name it beside any figure.

    Returns:
        (..., T), without unit except for "log_det" (nats). Always 1 (or 0 nats) at positions 0
        and 1, whose past has no spread.

    Raises:
        ValueError: if the kind is unknown, the shapes do not fit or the arrays are not floating
            point.
    """
    if kind not in get_args(MarginKind):
        raise ValueError(
            f"kind is {kind!r}: expected one of {', '.join(map(repr, get_args(MarginKind)))}"
        )
    if kind == "sigma_min":
        return _smallest_singular_value(*check_arguments(x, w_query, w_key))[0]
    if kind == "reduced":
        return _reduced_margin(reduced_blocks(x, w_query, w_key))
    sign, log_abs = log_det(x, w_query, w_key)
    if kind == "det":
        return sign * jnp.exp(log_abs)
    return jnp.where(sign > 0, log_abs, jnp.full_like(log_abs, -jnp.inf))


def infeasible(x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike) -> Bool[Array, "*batch T"]:
    """Whether each position lies beyond the boundary: R_t has a real eigenvalue <= 0.

    Wider than a non-positive determinant, which an even number of negative eigenvalues hides.

    Args:
        x: token embeddings (..., T, d).
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).

    Returns:
        (..., T); False at positions 0 and 1.

    Raises:
        ValueError: if the shapes do not fit or the arrays are not floating point.
    """
    eigenvalues = jnp.linalg.eigvals(reduced_blocks(x, w_query, w_key))
    return jnp.any((eigenvalues.imag == 0) & (eigenvalues.real <= 0), axis=-1)


def support_tokens(margin: ArrayLike, k: int = 1) -> Int[Array, "*batch k"]:
    """Positions of the k smallest margins, smallest first (paper, Definition 3.1).

    Positions 0 and 1 have no spread in their past and are never support tokens. Ties go to the
    earliest position.

    Args:
        margin: (..., T), of any kind.
        k: how many, 1 <= k <= T - 2.

    Returns:
        (..., k) integer positions >= 2. The sequence's margin is the margin at the first of them.

    Raises:
        ValueError: if T <= 2 or k is out of range.
    """
    margin = jnp.asarray(margin)
    if margin.ndim < 1 or margin.shape[-1] <= 2:
        raise ValueError(
            f"margin has shape {margin.shape}: expected (..., T) with T >= 3, "
            "since positions 0 and 1 are never support tokens"
        )
    if not 1 <= k <= margin.shape[-1] - 2:
        raise ValueError(f"k is {k}: expected 1 <= k <= T - 2 = {margin.shape[-1] - 2}")
    return jnp.argsort(margin[..., 2:], axis=-1, stable=True)[..., :k] + 2


def embedding_margin(
    x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike
) -> Float[Array, "*batch T"]:
    """First-order distance, in embedding space, from every position to the boundary.

    It is |m_t| / ||dm_t/d(x_0 .. x_t)||_F, with m_t the margin "sigma_min": how far the
    embeddings up to t must move, to first order, before position t loses invertibility. It has
    the unit of x and so compares with the standard deviation of a noise on embeddings.

    With u, v the singular vectors of m_t = u^T D_t v and c = W_Q^T v / sqrt(r), the margin is
    u.v - Cov_{alpha_t}(f, g) for the scalars f_s = u.x_s and g_s = c.k_s, whose derivative is a
    combination of u, W_K c, W_K q_t and the W_Q k_s: no pass of autodiff per position is needed.

    Args:
        x: token embeddings (..., T, d).
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).

    Returns:
        (..., T), +inf where the derivative vanishes (positions 0 and 1 among them).

    Raises:
        ValueError: if the shapes do not fit or the arrays are not floating point.
    """
    return both_margins(x, w_query, w_key)[1]


def both_margins(
    x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike
) -> tuple[Float[Array, "*batch T"], Float[Array, "*batch T"]]:
    """Margin "sigma_min" and embedding margin, from one singular value decomposition.

    Arguments and errors are those of `embedding_margin`.
    """
    x, w_query, w_key = check_arguments(x, w_query, w_key)
    margin, left, right = _smallest_singular_value(x, w_query, w_key)
    root = math.sqrt(w_query.shape[-1])
    values, queries, keys, weights = geometry(x, w_query, w_key)
    queries = queries + jnp.matmul(x[..., :1, :], w_query, precision=_HIGHEST)

    slope = jnp.matmul(right, w_query, precision=_HIGHEST) / root
    f = _centred_under(weights, left, values)
    g = _centred_under(weights, slope, keys)
    covariance = jnp.sum(weights * f * g, axis=-1, keepdims=True)
    by_logit = weights * (f * g - covariance)

    # d m_t / d x_s for s < t: minus the combination of these three vectors with these weights.
    key_side = jnp.swapaxes(w_key, -1, -2)
    vectors = jnp.stack(
        jnp.broadcast_arrays(
            left,
            jnp.matmul(slope, key_side, precision=_HIGHEST),
            jnp.matmul(queries, key_side, precision=_HIGHEST) / root,
        ),
        axis=-2,
    )
    gram = jnp.matmul(vectors, jnp.swapaxes(vectors, -1, -2), precision=_HIGHEST)
    coefficients = jnp.stack([weights * g, weights * f, by_logit], axis=-1)
    past = jnp.einsum(
        "...tsi,...tij,...tsj->...t", coefficients, gram, coefficients, precision=_HIGHEST
    )
    # d m_t / d x_t, through the query only.
    own = jnp.matmul(by_logit, keys, precision=_HIGHEST) / root
    own = jnp.matmul(own, jnp.swapaxes(w_query, -1, -2), precision=_HIGHEST)
    norm = jnp.sqrt(jnp.maximum(past, 0.0) + jnp.sum(own**2, axis=-1))
    return margin, jnp.abs(margin) / norm


def certificate(x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike) -> Float[Array, "*batch T"]:
    """Certificate rho_t of the context x_0 .. x_{t-1}: below 1 it proves position t invertible.

    rho_t = diam{q_s : s < t} diam{k_s : s < t} / (4 sqrt(r)), after W_Q and W_K are balanced by
    the singular value decomposition of A. For unit vectors u, v Gruess' inequality bounds the
    covariance of u.q_s and v.k_s by a quarter of the product of their ranges, so the balanced
    reduced covariance has norm <= rho_t whatever the attention weights are, hence for every x_t.
    If rho_t < 1, then x_t -> e_t is a global diffeomorphism (Hadamard) and the smallest singular
    value of the balanced R_t, though not that of D_t, is at least 1 - rho_t. (Not in the paper.)

    Args:
        x: token embeddings (..., T, d).
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).

    Returns:
        (..., T), without unit; 0 at positions 0 and 1.

    Raises:
        ValueError: if the shapes do not fit or the arrays are not floating point.
    """
    x, w_query, w_key = check_arguments(x, w_query, w_key)
    query_side, key_side = balanced(w_query, w_key)
    values = x - x[..., :1, :]
    spread_q = _past_diameter(jnp.matmul(values, query_side, precision=_HIGHEST))
    spread_k = _past_diameter(jnp.matmul(values, key_side, precision=_HIGHEST))
    return spread_q * spread_k / 4


def balanced(
    w_query: ArrayLike, w_key: ArrayLike
) -> tuple[Float[Array, "*batch d m"], Float[Array, "*batch d m"]]:
    """Balanced factors of the coupling: A = K Q^T with Q^T Q = K^T K diagonal, m = min(d, r).

    Args:
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).

    Returns:
        Q and K, each (..., d, m), from the singular value decomposition of A; the factor
        1 / sqrt(r) of the logits is inside them.

    Raises:
        ValueError: if the shapes do not fit or the arrays are not floating point.
    """
    w_query, w_key = check_weights(w_query, w_key)
    basis_q, core_q = jnp.linalg.qr(w_query)
    basis_k, core_k = jnp.linalg.qr(w_key)
    core = jnp.matmul(core_k, jnp.swapaxes(core_q, -1, -2), precision=_HIGHEST)
    left, sizes, right = jnp.linalg.svd(core / math.sqrt(w_query.shape[-1]), full_matrices=False)
    root = jnp.sqrt(sizes)[..., None, :]
    return (
        jnp.matmul(basis_q, jnp.swapaxes(right, -1, -2) * root, precision=_HIGHEST),
        jnp.matmul(basis_k, left * root, precision=_HIGHEST),
    )


def _smallest_singular_value(
    x: Float[Array, "*batch T d"],
    w_query: Float[Array, "*weights d r"],
    w_key: Float[Array, "*weights d r"],
) -> tuple[Float[Array, "*all T"], Float[Array, "*all T d"], Float[Array, "*all T d"]]:
    """Signed smallest singular value of every D_t and its singular vectors u and v.

    D_t is the identity on everything orthogonal to the columns of W_Q and of C_t, so where
    2r < d the singular values other than 1 are those of D_t within an orthonormal basis of 2r
    directions that hold these columns.
    """
    d, rank = w_query.shape[-2:]
    values, queries, keys, weights = geometry(x, w_query, w_key)
    w_scaled = w_query[..., None, :, :] / math.sqrt(rank)
    covariance = attention_covariance(weights, values, keys)
    reduced = attention_covariance(weights, queries, keys) / math.sqrt(rank)
    sign, _ = slogdet(jnp.eye(rank, dtype=reduced.dtype) - reduced)

    # The basis is a constant of the derivative: differentiating through it is NaN where the past
    # has no spread, and wrong while it has fewer than r + 1 tokens. u^T dD v needs no more.
    low_rank = tuple(
        jnp.broadcast_arrays(lax.stop_gradient(covariance), lax.stop_gradient(w_scaled))
    )
    if 2 * rank < d:
        basis, _ = jnp.linalg.qr(jnp.concatenate(low_rank, axis=-1))
        basis_t = jnp.swapaxes(basis, -1, -2)
        low_rank = tuple(jnp.matmul(basis_t, factor, precision=_HIGHEST) for factor in low_rank)
    product = jnp.matmul(low_rank[0], jnp.swapaxes(low_rank[1], -1, -2), precision=_HIGHEST)
    u, size, v = _last_singular_triple(jnp.eye(product.shape[-1], dtype=x.dtype) - product)
    if 2 * rank < d:
        u = jnp.matmul(basis, u[..., None], precision=_HIGHEST)[..., 0]
        v = jnp.matmul(basis, v[..., None], precision=_HIGHEST)[..., 0]

    change = _bilinear(u, covariance, jnp.squeeze(v[..., None, :] @ w_scaled, -2))
    return _signed(sign, size, -change), u, v


def _reduced_margin(blocks: Float[Array, "*batch T r r"]) -> Float[Array, "*batch T"]:
    sign, _ = slogdet(blocks)
    u, size, v = _last_singular_triple(lax.stop_gradient(blocks))
    return _signed(sign, size, _bilinear(u, blocks, v))


def _last_singular_triple(
    blocks: Float[Array, "*batch m m"],
) -> tuple[Float[Array, "*batch m"], Float[Array, "*batch"], Float[Array, "*batch m"]]:
    left, sizes, right = jnp.linalg.svd(blocks)
    return left[..., :, -1], sizes[..., -1], right[..., -1, :]


def _bilinear(
    u: Float[Array, "*batch m"], matrix: Float[Array, "*batch m n"], v: Float[Array, "*batch n"]
) -> Float[Array, "*batch"]:
    return jnp.einsum("...i,...ij,...j->...", u, matrix, v, precision=_HIGHEST)


def _signed(
    sign: Float[Array, "*batch"], size: Float[Array, "*batch"], linear: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Value `size` with the derivative of `linear`, both negative where the sign is not +1."""
    value = size + (linear - lax.stop_gradient(linear))
    return jnp.where(sign > 0, value, -value)


def _centred_under(
    weights: Float[Array, "*weights T T"],
    directions: Float[Array, "*directions T m"],
    vectors: Float[Array, "*vectors T m"],
) -> Float[Array, "*all T T"]:
    """Scalars a_t . y_s, centred over s under the attention weights of row t."""
    scalars = jnp.matmul(directions, jnp.swapaxes(vectors, -1, -2), precision=_HIGHEST)
    return scalars - jnp.sum(weights * scalars, axis=-1, keepdims=True)


def _past_diameter(points: Float[Array, "*batch T m"]) -> Float[Array, "*batch T"]:
    """Largest distance between two of the points before each position; 0 at positions 0 and 1."""
    rows = jnp.moveaxis(points, -2, 0)

    def farthest_before(position: Array) -> Array:
        distances = jnp.linalg.norm(points - rows[position][..., None, :], axis=-1)
        earlier = jnp.arange(points.shape[-2]) <= position
        return jnp.max(jnp.where(earlier, distances, jnp.zeros_like(distances)), axis=-1)

    # One row of distances at a time: all of them at once would take T^2 m numbers.
    farthest = lax.map(farthest_before, jnp.arange(points.shape[-2]))
    diameter = lax.cummax(farthest, axis=0)
    shifted = jnp.concatenate([jnp.zeros_like(diameter[:1]), diameter[:-1]], axis=0)
    return jnp.moveaxis(shifted, 0, -1)
