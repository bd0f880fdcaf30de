"""Margins to instability, and support tokens.

Position t has the Jacobian block D_t = I_d - C_t W_Q^T / sqrt(r), with C_t = Cov_{alpha_t}(x_s,
k_s). It is feasible where D_t has no real eigenvalue <= 0: then no matrix on the straight way from
the identity to D_t is singular. The margin says how far D_t is from a singular matrix, and is
negative where t is infeasible (paper, section 3; Definition 3.1 for support tokens).

A feasible position has det D_t > 0, but not the other way round: a second negative eigenvalue makes
the determinant positive again. The sign of `log_det` and the domain of the density
(`CausalAttention.log_prob`) are those of the determinant, as in the paper.
"""

import math
from typing import Literal, get_args

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from probattn.blocks.geometry import bounded
from probattn.blocks.nonfinite import zero_nonfinite
from probattn.blocks.promotion import with_rank
from probattn.blocks.singular_values import smallest_singular_value
from probattn.log_determinants import log_det, reduced_blocks
from probattn.one_program import one_program
from probattn.stages.block_margins import infeasible_blocks, smallest_singular_value_of
from probattn.stages.stage import (
    AttentionStage,
    Tokens,
    by_head,
    checked,
    checked_arrays,
    prepared,
    refuse_stage,
)

MarginKind = Literal["sigma_min", "reduced", "det", "log_det"]

_HIGHEST = lax.Precision.HIGHEST


@one_program("kind")
def stability_margin(
    x: Tokens,
    w_query: ArrayLike | None = None,
    w_key: ArrayLike | None = None,
    kind: MarginKind = "sigma_min",
    *,
    bound: ArrayLike | None = None,
) -> Float[Array, "*batch T"]:
    """Compute every position's margin to the boundary where attention is no longer invertible.

    Kinds:
        "sigma_min": smallest singular value of D_t, its spectral-norm distance to the nearest
            singular matrix, with a minus sign where the position is `infeasible`: it must not look
            safe. At most 1 where d > r, since D_t differs from the identity by rank r.
        "reduced": the same of R_t. Cheaper; it vanishes where "sigma_min" does and has its sign,
            but its size depends on how A is split into W_Q and W_K.
        "det": det D_t, which is positive too where an even number of eigenvalues is negative.
        "log_det": log det D_t in nats, -inf where det D_t <= 0.

    In the scalar case d = r = 1 the first three are 1 - a Var_{alpha_t}(x) (paper, Proposition 1).
    The first two change sign only where they vanish, or where two complex eigenvalues of D_t meet
    on the negative axis, which no singular block marks.
    The first derivative is exact wherever the smallest singular value is simple; second
    derivatives of the two singular-value kinds are not defined by this function.

    Args:
        x: token embeddings (..., T, d), or an `AttentionStage` in place of all other arrays.
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        kind: which margin; name it beside any figure.
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.

    Returns:
        (..., T), without unit except for "log_det" (nats). Always 1 (or 0 nats) at positions 0
        and 1, whose past has no spread. NaN where a token of the past is not finite.

    Raises:
        ValueError: if the kind is unknown, the shapes do not fit, the arrays are not floating point
            or the bound is not positive.
    """
    if kind not in get_args(MarginKind):
        raise ValueError(
            f"kind is {kind!r}: expected one of {', '.join(map(repr, get_args(MarginKind)))}"
        )
    if kind == "sigma_min":
        if isinstance(x, AttentionStage):
            stage = checked(x, w_query, w_key, bound)
            return by_head(
                lambda head: smallest_singular_value_of(*prepared(head), of_head=True)[0], stage
            )
        return smallest_singular_value_of(*prepared(x, w_query, w_key, bound))[0]
    if kind == "reduced":
        return _reduced_margin(reduced_blocks(x, w_query, w_key, bound=bound))
    sign, log_abs = log_det(x, w_query, w_key, bound=bound)
    if kind == "det":
        return sign * jnp.exp(log_abs)
    return jnp.where(sign <= 0, jnp.full_like(log_abs, -jnp.inf), log_abs)


@one_program()
def infeasible(
    x: Tokens,
    w_query: ArrayLike | None = None,
    w_key: ArrayLike | None = None,
    *,
    bound: ArrayLike | None = None,
) -> Bool[Array, "*batch T"]:
    """Tell which positions lie beyond the boundary: D_t has a real eigenvalue <= 0.

    R_t then has it too. This is the sign of the margins "sigma_min" and "reduced". It is wider than
    a determinant <= 0, which an even number of negative eigenvalues hides. An eigenvalue of R_t
    counts as real if its imaginary part is at most sqrt(r eps) times the Frobenius norm of R_t.

    Args:
        x: token embeddings (..., T, d), or an `AttentionStage` in place of all other arrays.
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.

    Returns:
        (..., T); False at positions 0 and 1; True where R_t is not finite or its eigenvalues do
        not converge, since nothing is then known to be inside.

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point or the bound is
            not positive.
    """
    return infeasible_blocks(reduced_blocks(x, w_query, w_key, bound=bound))


def support_tokens(margin: ArrayLike, k: int = 1) -> Int[Array, "*batch k"]:
    """Find the positions of the k smallest margins, smallest first (paper, Definition 3.1).

    Positions 0 and 1 have no spread in their past and are never support tokens. Ties go to the
    earliest position. A margin that is NaN comes first, since nothing is known to be smaller.

    Args:
        margin: (..., T), of any kind.
        k: how many, 1 <= k <= T - 2.

    Returns:
        (..., k) integer positions >= 2. The sequence's margin is the margin at the first of them.

    Raises:
        ValueError: if T <= 2, or k is no integer or out of range.
    """
    margin = jnp.asarray(margin)
    if margin.ndim < 1 or margin.shape[-1] <= 2:
        raise ValueError(
            f"margin has shape {margin.shape}: expected (..., T) with T >= 3, "
            "since positions 0 and 1 are never support tokens"
        )
    most = margin.shape[-1] - 2
    if isinstance(k, bool) or not hasattr(k, "__index__") or not 1 <= k <= most:
        raise ValueError(f"k is {k!r}: expected an integer, 1 <= k <= T - 2 = {most}")
    inner = margin[..., 2:]
    inner = jnp.where(jnp.isnan(inner), -jnp.inf, inner)
    return jnp.argsort(inner, axis=-1, stable=True)[..., :k] + 2


@one_program()
def embedding_margin(
    x: Tokens,
    w_query: ArrayLike | None = None,
    w_key: ArrayLike | None = None,
    *,
    bound: ArrayLike | None = None,
) -> Float[Array, "*batch T"]:
    """Compute every position's first-order embedding margin, an estimate and no safe radius.

    It is |m_t| / ||dm_t/d(x_0 .. x_t)||_F, with m_t the margin "sigma_min": the distance in
    embedding space to the boundary, were the margin linear. The boundary itself is mostly nearer:
    of 90 random contexts in which an attack on the embeddings reached it, it was nearer in 96 %, at
    0.70 of this number in the median and at 0.09 of it in the worst. It has the unit of x, as the
    standard deviation of a noise on embeddings has.

    With u, v the singular vectors of m_t = u^T D_t v and c = W_Q^T v / sqrt(r), the margin is
    u.v - Cov_{alpha_t}(f, g) for the scalars f_s = u.x_s and g_s = c.k_s, whose derivative is a
    combination of u, W_K c, W_K q_t and the W_Q k_s: no pass of autodiff per position is needed.
    Its own first derivative is exact where the smallest singular value is simple. It takes all
    singular values of D_t, which are many where d is large.

    Args:
        x: token embeddings (..., T, d).
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.

    Returns:
        (..., T), +inf where the derivative vanishes (positions 0 and 1 among them); not signed.

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point, the bound is not
            positive, or an `AttentionStage` is given: it does not hold all derivatives.
    """
    return both_margins(x, w_query, w_key, bound=bound)[1]


@one_program()
def both_margins(
    x: Tokens,
    w_query: ArrayLike | None = None,
    w_key: ArrayLike | None = None,
    *,
    bound: ArrayLike | None = None,
) -> tuple[Float[Array, "*batch T"], Float[Array, "*batch T"]]:
    """Compute margin "sigma_min" and first-order embedding margin, from one triple of each block.

    Arguments and errors are those of `embedding_margin`.
    """
    x = refuse_stage(
        "embedding_margin",
        x,
        why="it needs the derivatives of keys and of B_t, which a stage does not hold; use "
        "stability_margin, or give x, w_query and w_key",
    )
    x, w_query, w_key = checked_arrays(x, w_query, w_key, bound)
    start, _ = prepared(x, w_query, w_key, bound)
    margin, left, right = smallest_singular_value_of(start, w_query, moving=True)
    root = math.sqrt(w_query.shape[-1])
    values, keys, weights = start.values, start.keys, start.weights
    queries = jnp.matmul(x, w_query, precision=_HIGHEST)

    slope = jnp.matmul(right, w_query, precision=_HIGHEST) / root
    f = _centred_under(weights, left, values)
    g = _centred_under(weights, slope, keys)
    covariance = jnp.sum(weights * f * g, axis=-1, keepdims=True)
    # Not f * g first, which may overflow at tokens of weight zero.
    by_logit = weights * f * g - weights * covariance

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
        "...tsi,...tij,...tsj->...ts", coefficients, gram, coefficients, precision=_HIGHEST
    )
    if bound is not None:
        context = zero_nonfinite(bounded(x, bound))
        past = _through_bound(past, coefficients, vectors, context, bound)
    # d m_t / d x_t, through the query only.
    own = jnp.matmul(by_logit, keys, precision=_HIGHEST) / root
    own = jnp.matmul(own, jnp.swapaxes(w_query, -1, -2), precision=_HIGHEST)
    squared = jnp.maximum(past, 0.0).sum(-1) + jnp.sum(own**2, axis=-1)
    moved = squared != 0
    # The derivative of an infinite quotient would be NaN, also where it is masked.
    norm = jnp.sqrt(jnp.where(moved, squared, 1.0))
    return margin, jnp.where(moved, jnp.abs(margin) / norm, jnp.inf)


def _reduced_margin(blocks: Float[Array, "*batch T r r"]) -> Float[Array, "*batch T"]:
    # Without the vectors it takes half the time; JAX finds them for the derivative alone.
    size = smallest_singular_value(blocks)
    return jnp.where(infeasible_blocks(blocks), -size, size)


def _centred_under(
    weights: Float[Array, "*weights T T"],
    directions: Float[Array, "*directions T m"],
    vectors: Float[Array, "*vectors T m"],
) -> Float[Array, "*all T T"]:
    """Return scalars a_t . y_s, centred over s under the attention weights of row t."""
    scalars = jnp.matmul(directions, jnp.swapaxes(vectors, -1, -2), precision=_HIGHEST)
    return scalars - jnp.sum(weights * scalars, axis=-1, keepdims=True)


def _through_bound(
    squared: Float[Array, "*batch T T"],
    coefficients: Float[Array, "*batch T T i"],
    vectors: Float[Array, "*batch T i d"],
    context: Float[Array, "*context T d"],
    bound: ArrayLike,
) -> Float[Array, "*batch T T"]:
    """Return |J_s g_ts|^2 of the derivatives g_ts = sum_i c_tsi v_ti, from |g_ts|^2.

    The Jacobian of phi at x_s is J_s = f_s (I - y_s y_s^T / c^2), with y_s = phi(x_s) and f_s^2 =
    1 - |y_s|^2 / c^2.
    """
    along = jnp.einsum("...tid,...sd->...tsi", vectors, context, precision=_HIGHEST)
    along = jnp.sum(coefficients * along, axis=-1)
    inverse = 1 / jnp.asarray(bound, squared.dtype) ** 2
    filled = inverse * with_rank(jnp.sum(context**2, axis=-1)[..., None, :], squared.ndim)
    return (1 - filled) * (squared - inverse * (2 - filled) * along**2)
