"""Slow oracle for the mathematics: explicit loops and dense automatic differentiation.

Every function takes one sequence `x` of shape (T, d) and matrices `w_query`, `w_key` of shape
(d, r), and follows the definition rather than the identity that makes the fast code fast: the
Jacobian is differentiated, never assembled; the determinant is d × d, never reduced; singular
values come from the full block. Tests and benchmarks compare the fast code with it. It is not
exported, it does not validate, and it is meant for float64.

With a bound c every function takes the context as phi(x_s), computed from its definition.

The symbols are those of Agarwal et al. (2026), arXiv:2602.22271, with positions counted from 0:
e_t = x_t − mu_t is the residual and D_t = ∂e_t/∂x_t the diagonal block of its Jacobian.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


def weights_of(query, keys):
    """Return the softmax of one query's logits, a list of as many scalars as there are keys."""
    logits = [jnp.dot(query, key) / math.sqrt(query.size) for key in keys]
    largest = functools.reduce(jnp.maximum, logits)
    unnormalised = [jnp.exp(logit - largest) for logit in logits]
    total = sum(unnormalised)
    return [weight / total for weight in unnormalised]


def attention_weights(queries, keys):
    """Return the strictly causal attention weights, one softmax per row.

    Args:
        queries: shape (T, r).
        keys: shape (T, r).

    Returns:
        Shape (T, T); entry (t, s) is alpha_ts for s < t and zero elsewhere.
    """
    queries, keys = list(queries), list(keys)
    zero = jnp.zeros((), queries[0].dtype)
    rows = [jnp.stack([zero] * len(keys))]
    for t in range(1, len(queries)):
        past = weights_of(queries[t], keys[:t])
        rows.append(jnp.stack([*past, *[zero] * (len(keys) - t)]))
    return jnp.stack(rows)


def bounded(x, bound):
    """Return phi(x) = x / sqrt(1 + |x|²/c²) of one vector, or x where the bound is None."""
    return x if bound is None else x / jnp.sqrt(1 + jnp.dot(x, x) / bound**2)


def residual_of(token, past, w_query, w_key, bound=None):
    """Return the residual of one token given its past: e_t = x_t − sum_{s<t} alpha_ts x_s.

    Args:
        token: x_t, shape (d,).
        past: list of the x_s, s < t.
        w_query: shape (d, r).
        w_key: shape (d, r).
        bound: c, or None.

    Returns:
        Shape (d,).
    """
    if not past:
        return token
    past = [bounded(earlier, bound) for earlier in past]
    alpha = weights_of(token @ w_query, [earlier @ w_key for earlier in past])
    return token - sum(weight * earlier for weight, earlier in zip(alpha, past, strict=True))


def residual(x, w_query, w_key, bound=None):
    """Return the residuals e_t of every position, shape (T, d)."""
    tokens = list(x)
    return jnp.stack(
        [residual_of(tokens[t], tokens[:t], w_query, w_key, bound) for t in range(len(tokens))]
    )


def full_jacobian(x, w_query, w_key, bound=None):
    """Return the Jacobian of the map x -> e by forward differentiation, shape (T * d, T * d)."""
    return jax.jacfwd(residual)(x, w_query, w_key, bound).reshape(x.size, x.size)


def log_det_total(x, w_query, w_key, bound=None):
    """Return sign and log|det| of the whole Jacobian, two scalars."""
    return jnp.linalg.slogdet(full_jacobian(x, w_query, w_key, bound))


def jacobian_block(x, w_query, w_key, t, bound=None):
    """Return the block D_t = ∂e_t/∂x_t by forward differentiation, shape (d, d)."""
    tokens = list(x)
    return jax.jacfwd(residual_of)(tokens[t], tokens[:t], w_query, w_key, bound)


def jacobian_blocks(x, w_query, w_key, bound=None):
    """Return every D_t, cut from the diagonal of the whole Jacobian, shape (T, d, d)."""
    length, width = x.shape
    jacobian = full_jacobian(x, w_query, w_key, bound).reshape(length, width, length, width)
    return jnp.stack([jacobian[t, :, t, :] for t in range(length)])


def log_det_at(x, w_query, w_key, t, bound=None):
    """Return sign and log|det D_t| of one position, two scalars."""
    return jnp.linalg.slogdet(jacobian_block(x, w_query, w_key, t, bound))


def log_det(x, w_query, w_key, bound=None):
    """Return sign and log|det D_t| of every position, each of shape (T,)."""
    sign, log_abs = zip(
        *(log_det_at(x, w_query, w_key, t, bound) for t in range(x.shape[0])), strict=True
    )
    return jnp.stack(sign), jnp.stack(log_abs)


def reduced_block(x, w_query, w_key, t, bound=None):
    """Return R_t = I − Cov_{alpha_t}(q_s, k_s)/sqrt(r), the covariance summed term by term.

    Returns:
        Shape (r, r), the identity at positions 0 and 1.
    """
    rank = w_query.shape[1]
    identity = jnp.eye(rank, dtype=x.dtype)
    if t == 0:
        return identity
    context = [bounded(earlier, bound) for earlier in x[:t]]
    query = x[t] @ w_query
    queries = [earlier @ w_query for earlier in context]
    keys = [earlier @ w_key for earlier in context]
    alpha = weights_of(query, keys)
    mean_query = sum(weight * query for weight, query in zip(alpha, queries, strict=True))
    mean_key = sum(weight * key for weight, key in zip(alpha, keys, strict=True))
    covariance = sum(
        weight * jnp.outer(query - mean_query, key - mean_key)
        for weight, query, key in zip(alpha, queries, keys, strict=True)
    )
    return identity - covariance / math.sqrt(rank)


def reduced_blocks(x, w_query, w_key, bound=None):
    """Return every R_t, shape (T, r, r)."""
    return jnp.stack([reduced_block(x, w_query, w_key, t, bound) for t in range(x.shape[0])])


def relaxed_logarithm(z, delta):
    """Return the relaxed barrier as a function of the determinant z >= −10 delta.

    −log z from delta up, and below it the parabola of the same value and first two derivatives.
    How the fast code caps the growth below −10 delta is its own affair: there is no oracle for it.
    """
    parabola = ((z - 2 * delta) ** 2 / delta**2 - 1) / 2 - jnp.log(delta)
    return jnp.where(z >= delta, -jnp.log(jnp.where(z >= delta, z, delta)), parabola)


def determinant(matrix):
    """Return a determinant by Laplace expansion, for d <= 6 or so.

    Unlike `jnp.linalg.det`, whose derivative is wrong at diag(0, 1), it is a polynomial to
    automatic differentiation too.
    """
    if matrix.shape == (1, 1):
        return matrix[0, 0]
    minors = [jnp.delete(matrix[1:], j, axis=1) for j in range(len(matrix))]
    return sum((-1) ** j * matrix[0, j] * determinant(minor) for j, minor in enumerate(minors))


def relaxed_barrier(x, w_query, w_key, delta=1e-3, bound=None):
    """Return the relaxed log-barrier of every det D_t >= −10 delta, shape (T,)."""
    blocks = [jacobian_block(x, w_query, w_key, t, bound) for t in range(x.shape[0])]
    return jnp.stack([relaxed_logarithm(determinant(block), delta) for block in blocks])


def signed_sigma_min(matrix):
    """Return the smallest singular value, negative where a real eigenvalue is at most zero."""
    sigma_min = jnp.linalg.svd(matrix, compute_uv=False)[-1]
    eigenvalues = jnp.linalg.eigvals(jax.lax.stop_gradient(matrix))
    crossed = jnp.any((eigenvalues.imag == 0) & (eigenvalues.real <= 0))
    return jnp.where(crossed, -sigma_min, sigma_min)


def stability_margin(x, w_query, w_key, kind="sigma_min", bound=None):
    """Return the margin of every position from dense blocks.

    Args:
        x: shape (T, d).
        w_query: shape (d, r).
        w_key: shape (d, r).
        kind: "sigma_min" and "det" and "log_det" of D_t, or "reduced": the signed smallest
            singular value of R_t.
        bound: c, or None.

    Returns:
        Shape (T,).
    """
    margins = []
    for t in range(x.shape[0]):
        if kind == "reduced":
            margins.append(signed_sigma_min(reduced_block(x, w_query, w_key, t, bound)))
            continue
        block = jacobian_block(x, w_query, w_key, t, bound)
        if kind == "sigma_min":
            margins.append(signed_sigma_min(block))
        elif kind == "det":
            margins.append(jnp.linalg.det(block))
        else:
            sign, log_abs = jnp.linalg.slogdet(block)
            margins.append(jnp.where(sign > 0, log_abs, -jnp.inf))
    return jnp.stack(margins)


def embedding_margin(x, w_query, w_key, bound=None):
    """Return every position's first-order distance to the boundary, by differentiation.

    Valid where the smallest singular value of D_t is simple.

    Returns:
        |margin_t| / ||∂ margin_t / ∂x||, shape (T,); +inf where the gradient is exactly zero.
    """
    distances = []
    for t in range(x.shape[0]):

        def margin_at(x, t=t):
            return signed_sigma_min(jacobian_block(x, w_query, w_key, t, bound))

        margin, gradient = jax.value_and_grad(margin_at)(x)
        slope = jnp.sqrt(jnp.sum(gradient**2))
        distances.append(jnp.where(slope > 0, jnp.abs(margin) / slope, jnp.inf))
    return jnp.stack(distances)


def balanced(w_query, w_key):
    """Return the matrices with the same coupling A whose Gram matrices are equal and diagonal.

    With A = P S Qᵀ, its singular value decomposition, and r' = min(d, r):
    W_K = P S^½ r'^¼ and W_Q = Q S^½ r'^¼, so that W_K W_Qᵀ/sqrt(r') = A again.

    Returns:
        (w_query, w_key), NumPy, each of shape (d, r').
    """
    width, rank = w_query.shape
    left, values, right = np.linalg.svd(np.asarray(w_key) @ np.asarray(w_query).T / math.sqrt(rank))
    kept = min(width, rank)
    root = np.sqrt(values[:kept]) * kept**0.25
    return right[:kept].T * root, left[:, :kept] * root


def majorants(w_query, w_key):
    """Return the matrices F >= (A + Aᵀ)/2 of which the certificate takes the best.

    Returns:
        A list of (d, d) arrays, NumPy: the positive part of (A + Aᵀ)/2, and of the balanced
        factors A = K Qᵀ the matrices (a Q + K/a)(a Q + K/a)ᵀ/4 with a² = 1/2, 1 and 2.
    """
    query, key = balanced(w_query, w_key)
    root = query.shape[1] ** 0.25
    query, key = query / root, key / root
    values, vectors = np.linalg.eigh((key @ query.T + query @ key.T) / 2)
    sums = [math.sqrt(square) * query + key / math.sqrt(square) for square in (0.5, 1.0, 2.0)]
    return [(vectors * np.maximum(values, 0)) @ vectors.T, *(each @ each.T / 4 for each in sums)]


def certificate(x, w_query, w_key, bound=None):
    """Return rho_t by loops over all pairs of tokens.

    It is a quarter of the smallest squared diameter of the past, in the norm of one of the
    `majorants`, or of the product of the diameters of balanced queries and keys (Grüss).

    Returns:
        Shape (T,), NumPy; zero at positions 0 and 1.
    """
    norms = majorants(w_query, w_key)
    w_query, w_key = balanced(w_query, w_key)
    context = np.stack([bounded(token, bound) for token in x])
    queries, keys = context @ w_query, context @ w_key
    rho = np.zeros(len(queries))
    for t in range(len(queries)):
        query_diameter = key_diameter = 0.0
        squared = np.zeros(len(norms))
        for s in range(t):
            for u in range(s):
                query_distance = np.linalg.norm(queries[s] - queries[u])
                key_distance = np.linalg.norm(keys[s] - keys[u])
                query_diameter = max(query_diameter, query_distance)
                key_diameter = max(key_diameter, key_distance)
                apart = context[s] - context[u]
                squared = np.maximum(squared, [apart @ norm @ apart for norm in norms])
        product = query_diameter * key_diameter / math.sqrt(w_query.shape[1])
        rho[t] = min(product, *squared) / 4
    return rho


def margin_lower_bound(x, w_query, w_key, bound=None):
    """Return the lower bound of the smallest singular value of D_t that rho_t implies.

    Returns:
        1/(1 + diam{x_s} diam{Aᵀ x_s}/(4 (1 - rho_t))), shape (T,), NumPy; zero where rho_t >= 1.
    """
    rho = certificate(x, w_query, w_key, bound)
    context = np.stack([bounded(token, bound) for token in x])
    images = context @ np.asarray(w_key) @ np.asarray(w_query).T / math.sqrt(w_query.shape[1])
    lower = np.zeros(len(rho))
    for t in np.flatnonzero(rho < 1):
        diameters = [
            max((np.linalg.norm(a - b) for a in points[:t] for b in points[:t]), default=0.0)
            for points in (context, images)
        ]
        lower[t] = 1 / (1 + diameters[0] * diameters[1] / (4 * (1 - rho[t])))
    return lower
