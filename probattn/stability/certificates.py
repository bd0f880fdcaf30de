"""Proofs that a position is invertible, whatever its token is.

The eigenvalues of Sigma_t A, which D_t = I - Sigma_t A subtracts from one, have real parts of at
most rho_t under all attention weights over the past. So below rho_t = 1 the determinant is
positive for every x_t, and x_t -> e_t is a diffeomorphism (docs/mathematics.md, section 5; not in
the paper).
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from probattn.arguments import check_arguments
from probattn.blocks.geometry import bounded
from probattn.blocks.majorants import (
    Majorants,
    largest_eigenvalue,
    largest_squares,
    majorants,
    projected,
)
from probattn.blocks.promotion import with_rank
from probattn.one_program import one_program
from probattn.stability.stage_certificates import stage_certificate
from probattn.stages.stage import AttentionStage, Tokens, checked, checked_arrays

_HIGHEST = lax.Precision.HIGHEST
_ROWS = 64  # of pairs that are held at a time


@one_program()
def certificate(
    x: Tokens,
    w_query: ArrayLike | None = None,
    w_key: ArrayLike | None = None,
    *,
    bound: ArrayLike | None = None,
) -> Float[Array, "*batch T"]:
    """Compute rho_t of the context of position t: below 1 it proves the position invertible.

    For every matrix F = G G^T that is at least (A + A^T) / 2 in the order of symmetric matrices,
    the eigenvalues of Sigma_t A have real parts of at most lambda_max(G^T Sigma_t G), and by
    Popoviciu's inequality this is at most a quarter of the largest squared distance of two of the
    points G^T x_0 .. G^T x_{t-1}. The smallest of these bounds over a few F is rho_t: the positive
    part of (A + A^T) / 2, and (a Q + K / a) (a Q + K / a)^T / 4 for some a, where A = K Q^T is
    balanced by its singular value decomposition. The product of the diameters of Q^T x_s and
    K^T x_s over four is a bound too (Gruess). With a bound c, phi(x_s) takes the place of x_s.

    If rho_t < 1, then x_t -> e_t is a global diffeomorphism (Hadamard), the eigenvalues of D_t have
    real parts of at least 1 - rho_t, and log det D_t >= m log(1 - rho_t) with m = min(d, r), for
    every x_t. A small margin is possible all the same; see `margin_lower_bound`.

    Rounding is towards unproved. To the computed number is added what rounding can have taken from
    it: (d + 16) eps |G| reach of each distance, (16 m + 64) eps of its square, and 32 eps |W_Q|
    |W_K| reach^2 / sqrt(r) of the result. Norms are Frobenius norms, and eps is that of the dtype.
    Reach is the largest distance of the past from x_0; with a bound, |phi(x_s)| + |phi(x_0)| is
    added to each distance. The last term covers LAPACK's decompositions: that is measured and no
    theorem. Overflow and underflow are not accounted for.

    Of an `AttentionStage` the points are (a W_Q^T n_s + c B_t^T k_s / a) / 2. A quarter of their
    smallest squared diameter over three a, or of the product of the two diameters, is rho_t. With a
    cap, any of the keys may be replaced by 0. This takes O(T^3 r) operations, has no derivative,
    and needs B_t to depend on the position alone.

    Args:
        x: token embeddings (..., T, d), or an `AttentionStage` in place of all other arrays.
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.

    Returns:
        (..., T), without unit; 0 at positions 0 and 1, but for what is added for rounding. NaN
        where a token of the past is not finite. The gradient is exact where the largest distance
        and the smallest bound are simple, and no eigenvalue of A + A^T crosses zero.

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point, the bound is not
            positive, or the transforms of a stage depend on tokens.
    """
    if isinstance(x, AttentionStage):
        return stage_certificate(checked(x, w_query, w_key, bound))
    x, w_query, w_key = checked_arrays(x, w_query, w_key, bound)
    factors = majorants(w_query, w_key)
    return largest_eigenvalue(*context_squares(x, factors, bound), factors)


def context_squares(
    x: Float[Array, "*x T d"], factors: Majorants, bound: ArrayLike | None
) -> tuple[Float[Array, "*batch T n"], Float[Array, "*x T"]]:
    """Return largest squares and reach of every past, as `largest_eigenvalue` takes them."""
    values, reach = _past(x, bound)
    return _largest_before(projected(values, factors), largest_squares), reach


@one_program()
def margin_lower_bound(
    x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike, *, bound: ArrayLike | None = None
) -> Float[Array, "*batch T"]:
    """Bound the smallest singular value of D_t from below, for every x_t after a certified past.

    Where rho_t < 1 it is at least 1 / (1 + g / (1 - rho_t)). Here g is a quarter of the product of
    two diameters, that of the past x_0 .. x_{t-1} and that of the points A^T x_s. With a bound c,
    phi(x_s) takes the place of x_s. (docs/mathematics.md, section 5; not in the paper.)

    Rounding lowers the bound, as it raises the certificate: to the diameters is added what it can
    have taken from them, and 8 eps of the result is taken from it.

    Args:
        x: token embeddings (..., T, d).
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.

    Returns:
        (..., T), without unit. 1 at positions 0 and 1, less 8 eps. 0 where nothing is proved: where
        rho_t is not below 1, or a token of the past is not finite. It has no derivative.

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point or the bound is
            not positive.
    """
    x, w_query, w_key = map(lax.stop_gradient, check_arguments(x, w_query, w_key, bound))
    width, rank = w_query.shape[-2:]
    values, reach = _past(x, bound)
    eps = float(jnp.finfo(values.dtype).eps)
    keys = jnp.matmul(values, w_key, precision=_HIGHEST)
    images = jnp.matmul(keys, jnp.swapaxes(w_query, -1, -2), precision=_HIGHEST)
    size = jnp.linalg.norm(w_query, axis=(-2, -1)) * jnp.linalg.norm(w_key, axis=(-2, -1))

    def diameter(points: Array, error: Array) -> Array:
        squared = _largest_before(points, _largest_square)[..., 0]
        length = (1 + (4 * width + 16) * eps) * jnp.sqrt(squared)
        return length + with_rank(reach, length.ndim) * with_rank(error, length.ndim)

    spread = diameter(values, jnp.asarray((width + 16) * eps, values.dtype))
    spread_of_images = diameter(images, ((width + rank + 32) * eps * size)[..., None])
    spread = with_rank(spread, spread_of_images.ndim)
    product = spread * spread_of_images / (4 * math.sqrt(rank))
    rho = certificate(x, w_query, w_key, bound=bound)
    proved = rho < 1
    lower = (1 - 8 * eps) / (1 + product / jnp.where(proved, 1 - rho, 1.0))
    return jnp.where(proved & jnp.isfinite(product), lower, 0.0)


def _past(
    x: Float[Array, "*batch T d"], bound: ArrayLike | None
) -> tuple[Float[Array, "*batch T d"], Float[Array, "*batch T"]]:
    """Return the context relative to x_0, and the reach of the past of every position."""
    context = bounded(x, bound)
    values = context - context[..., :1, :]
    reach = jnp.linalg.norm(lax.stop_gradient(values), axis=-1)
    if bound is not None:
        sizes = jnp.linalg.norm(lax.stop_gradient(context), axis=-1)
        moved = jnp.any(x != x[..., :1, :], axis=-1)
        reach = jnp.where(moved, reach + sizes + sizes[..., :1], reach)
    return values, _before(lax.cummax(reach, axis=reach.ndim - 1), -1)


def _largest_before(
    points: Float[Array, "*batch T k"], squares_of: Callable[[Array, Array, Array], Array]
) -> Float[Array, "*batch T n"]:
    """Return the largest squared distances of two points before each position."""
    length = points.shape[-2]
    tile = min(length, _ROWS)
    padded = jnp.pad(points, [(0, 0)] * (points.ndim - 2) + [(0, -length % tile), (0, 0)])

    def largest_of(start: Array) -> Array:
        rows = lax.dynamic_slice_in_dim(padded, start, tile, axis=-2)
        earlier = jnp.arange(length)[:, None] <= (start + jnp.arange(tile))[None, :]
        return squares_of(points, rows, earlier)

    # A tile of rows at a time: all pairs at once would take T^2 numbers for every norm.
    tiles = lax.map(largest_of, jnp.arange(0, length, tile))
    rows = jnp.moveaxis(tiles, 0, -3).reshape(*padded.shape[:-1], tiles.shape[-1])
    return _before(lax.cummax(rows[..., :length, :], axis=points.ndim - 2), -2)


def _largest_square(
    points: Float[Array, "*batch N d"], rows: Float[Array, "*batch M d"], kept: Bool[Array, "N M"]
) -> Float[Array, "*batch M 1"]:
    """Return the largest squared distance of each row from points, as `largest_squares` does."""
    own, other = (jnp.sum(part**2, axis=-1) for part in (points, rows))
    mixed = jnp.matmul(points, jnp.swapaxes(rows, -1, -2), precision=_HIGHEST)
    squares = own[..., :, None] + other[..., None, :] - 2 * mixed
    squares = jnp.where(with_rank(kept, squares.ndim), squares, 0.0)
    return jnp.maximum(jnp.max(squares, axis=-2), 0.0)[..., None]


def _before(running: Array, axis: int) -> Array:
    """Shift by one position: of the tokens before each, and zero at the first."""
    first, last = (lax.slice_in_dim(running, *ends, axis=axis) for ends in ((0, 1), (0, -1)))
    return jnp.concatenate([jnp.zeros_like(first), last], axis=axis)
