"""How far embeddings may move before a position can fold: a radius that is proved.

The largest of several bounds is returned (docs/mathematics.md, section 7). Those of this file hold
whatever the attention weights are: with A the coupling and F = G G^T >= (A + A^T) / 2, D_t is not
singular while G^T y_s has a variance below 1 in every direction, and the variance is at most a
quarter of a squared diameter. The bound of `blocks.local_radius` begins at the present weights.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from probattn.arguments import check_arguments
from probattn.blocks.geometry import bounded, geometry
from probattn.blocks.local_radius import Sides, local_radius
from probattn.blocks.majorants import Majorants, majorant_roots, majorants, rounded_squares
from probattn.blocks.nonfinite import zero_nonfinite
from probattn.blocks.promotion import with_rank
from probattn.margins import infeasible
from probattn.stability.certificates import context_squares
from probattn.stability.proper import never_folds

_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)

_ROUNDING = 8.0  # rounding errors that each term of a sum may add


def certified_radius(
    x: ArrayLike,
    w_query: ArrayLike,
    w_key: ArrayLike,
    *,
    bound: ArrayLike | None = None,
    joint: bool = True,
) -> Float[Array, "*batch T"]:
    """Compute a distance within which no change of x_0 to x_t makes D_t singular, by proof.

    The query x_t moves too. `nearest_fold` searches for the boundary from the other side, and
    `embedding_margin` is the first-order guess, which proves nothing.

    Args:
        x: token embeddings (..., T, d).
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.
        joint: whether the radius bounds the Frobenius norm of all changes together, or else the
            norm of each token's change.

    Returns:
        (..., T), in the unit of x. It is +inf at positions 0 and 1, and where no context can fold:
        where W_K is -W_Q, or where `is_proper` says so with no rounding forgiven. Other couplings
        that repel have a radius of about 1 / sqrt(delta), delta being the rounding in `is_proper`.
        It is 0 where the position is `infeasible` or nothing is proved, and NaN where the token or
        one of its past is not finite. A sum of n numbers is taken to err by 8 n rounding errors, so
        in float32 the radius is smaller by about 1e-3 of itself, and by more near the boundary.
        Weights that underflow are taken as the smallest normal number. It has no derivative.

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point or the bound is
            not positive.
    """
    x, w_query, w_key = check_arguments(x, w_query, w_key, bound)
    x, w_query, w_key = (lax.stop_gradient(array) for array in (x, w_query, w_key))
    precision = float(jnp.finfo(x.dtype).eps)
    unit = _ROUNDING * precision * (sum(x.shape[-2:]) + w_query.shape[-1])
    values, _, keys, weights = geometry(x, w_query, w_key, bound)
    factors = majorants(w_query, w_key)
    own = jnp.linalg.norm(_matmul(zero_nonfinite(x), w_query), axis=-1)
    # A product of query and key errs by rounding errors of their lengths.
    products = own * _longest_before(keys) / math.sqrt(w_query.shape[-1])

    leading = jnp.broadcast_shapes(x.shape[:-2], w_query.shape[:-2])
    arrays = (zero_nonfinite(x), values, weights, products, factors.queries, factors.keys)
    ranks = (2, 2, 2, 1, 2, 2)
    found = jax.vmap(partial(_of_sequence, joint, unit))(
        *(_flat(array, rank, leading) for array, rank in zip(arrays, ranks, strict=True))
    ).reshape(*leading, x.shape[-2])
    squared = rounded_squares(*context_squares(x, factors, bound), factors)
    found = jnp.maximum(found, _for_any_weights(joint, squared, factors))
    found = found * (1 - unit)
    if bound is not None:  # values err by a rounding error of phi
        lost = 4 * precision * math.sqrt(x.shape[-2]) * _longest_before(bounded(x, bound))
        found = jnp.maximum(found - with_rank(lost, found.ndim), jnp.zeros_like(found))
    first = with_rank(jnp.arange(x.shape[-2]) < 2, found.ndim)
    never = never_folds(w_query, w_key, bound)
    certain = with_rank(never[..., None], found.ndim) | first
    found = jnp.where(certain, jnp.full_like(found, jnp.inf), found)
    crossed = infeasible(x, w_query, w_key, bound=bound)
    found = jnp.where(crossed, jnp.zeros_like(found), found)
    return jnp.where(jnp.any(jnp.isnan(weights), axis=-1), jnp.full_like(found, jnp.nan), found)


def _flat(array: Array, rank: int, leading: tuple[int, ...]) -> Array:
    """Give an array all leading axes, joined in one."""
    shape = array.shape[array.ndim - rank :]
    return jnp.broadcast_to(array, (*leading, *shape)).reshape(-1, *shape)


def _longest_before(vectors: Float[Array, "*batch T m"]) -> Float[Array, "*batch T"]:
    sizes = jnp.linalg.norm(zero_nonfinite(vectors), axis=-1)
    return lax.cummax(sizes, axis=sizes.ndim - 1)


def _of_sequence(
    joint: bool,
    unit: float,
    x: Float[Array, "T d"],
    values: Float[Array, "T d"],
    weights: Float[Array, "T T"],
    products: Float[Array, " T"],
    query_side: Float[Array, "d m"],
    key_side: Float[Array, "d m"],
) -> Float[Array, " T"]:
    roots = jnp.linalg.norm(query_side, axis=0)
    divisors = jnp.where(roots > 0, roots, jnp.ones_like(roots))[None, :]
    right, left = query_side / divisors, key_side / divisors
    sides = Sides(
        roots**2,
        _matmul(right.T, left),
        _matmul(values, right),
        _matmul(values, left),
        _matmul(x, right),
    )
    weights = jnp.where(jnp.isnan(weights), jnp.zeros_like(weights), weights)
    return local_radius(joint, unit, sides, weights, unit * products)


def _for_any_weights(
    joint: bool, squared: Float[Array, "*batch T k"], factors: Majorants
) -> Float[Array, "*batch T"]:
    """Return the radius from variances that are at most a quarter of a squared diameter."""
    sizes = [
        jnp.linalg.norm(root, ord=2, axis=(-2, -1)) ** 2 + factors.shortfall
        for root in majorant_roots(factors)
    ]
    longest = jnp.sqrt(jnp.stack(sizes, axis=-1))[..., None, :]
    left = 1 - jnp.sqrt(squared[..., 1:]) / 2
    found = left * (math.sqrt(2) if joint else 1.0) / with_rank(longest, left.ndim)
    return jnp.max(jnp.maximum(found, jnp.zeros_like(found)), axis=-1)
