"""The nearest embeddings at which a position folds, by search.

`certified_radius` proves that none is nearer than some distance; a search finds one, and shows that
the distance is no larger than that.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from probattn.arguments import check_arguments
from probattn.blocks.covariance import centred_covariance, identity_less
from probattn.blocks.geometry import bounded
from probattn.blocks.majorants import majorants
from probattn.blocks.singular_values import last_singular_triple
from probattn.margins import infeasible

_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)

_STEPS = 40
_HALVINGS = 50  # of the straight way to what a start has found
# How far beyond the last point the way is followed: the steps end at the boundary, on either side.
_BEYOND = (1.0, 1 + 1e-6, 1 + 1e-4, 1 + 1e-3, 1.01, 1.03, 1.1, 1.3)


def nearest_fold(
    x: ArrayLike,
    w_query: ArrayLike,
    w_key: ArrayLike,
    *,
    key: ArrayLike,
    position: int = -1,
    bound: ArrayLike | None = None,
    joint: bool = True,
    starts: int = 16,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch n d"]]:
    """Search for the nearest embeddings x_0 to x_t at which det D_t of one position changes sign.

    Sequential quadratic programming on the signed smallest singular value: each step goes to the
    nearest point at which its linearisation vanishes. It starts from x itself, from pairs of tokens
    of the past spread along an attractive direction, with a query that weights both alike, and from
    random points. Of all that is found the nearest is returned. It need not be the nearest there
    is, so the distance is an upper bound; `certified_radius` is a lower one.

    Args:
        x: token embeddings (..., T, d).
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        key: a key of `jax.random` for the starts.
        position: t, of which D_t shall fold; negative ones count from the end.
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.
        joint: whether to measure the Frobenius norm of all changes together, or else the largest
            norm of a token's change.
        starts: how many points to start from, at least 1.

    Returns:
        The distance (...), in the unit of x, and the embeddings x_0 .. x_t that fold, (..., t + 1,
        d). There det D_t is not positive, where double precision is enabled by its arithmetic; the
        embeddings are then rounded to the dtype of x. The distance is 0 where x itself is
        `infeasible`; where nothing is found it is +inf, and where x is not finite NaN, beside x.

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point, the bound is not
            positive, there is no such position or no start.
    """
    x, w_query, w_key = check_arguments(x, w_query, w_key, bound)
    length = x.shape[-2]
    if isinstance(position, bool) or not -length <= position < length:
        raise ValueError(
            f"position is {position!r}: expected an integer from {-length} to {length - 1}"
        )
    if isinstance(starts, bool) or not starts >= 1:
        raise ValueError(f"starts is {starts!r}: expected an integer >= 1")
    x, w_query, w_key = (lax.stop_gradient(array) for array in (x, w_query, w_key))
    x = x[..., : position % length + 1, :]
    leading = jnp.broadcast_shapes(x.shape[:-2], w_query.shape[:-2])
    if x.shape[-2] < 3:  # a past of one token has no spread
        finite = jnp.all(jnp.isfinite(x), axis=(-2, -1))
        distance = jnp.where(finite, jnp.inf, jnp.nan).astype(x.dtype)
        return jnp.broadcast_to(distance, leading), jnp.broadcast_to(x, (*leading, *x.shape[-2:]))
    crossed = infeasible(x, w_query, w_key, bound=bound)[..., -1]
    factors = majorants(w_query, w_key)
    sides = factors.queries, factors.keys

    def flat(array: Array, rank: int) -> Array:
        shape = array.shape[array.ndim - rank :]
        return jnp.broadcast_to(array, (*leading, *shape)).reshape(-1, *shape)

    arrays = flat(x, 2), *(flat(side, 2) for side in sides), flat(crossed, 0)
    keys = jax.random.split(key, len(arrays[0]))
    search = partial(_search, bound=bound, joint=joint, starts=starts)
    distance, found = jax.vmap(search)(keys, *arrays)
    return distance.reshape(leading), found.reshape(*leading, *found.shape[1:])


def _search(
    key: Array,
    x: Float[Array, "n d"],
    query_side: Float[Array, "d m"],
    key_side: Float[Array, "d m"],
    crossed: Array,
    bound: ArrayLike | None,
    joint: bool,
    starts: int,
) -> tuple[Float[Array, ""], Float[Array, "n d"]]:
    finite = jnp.all(jnp.isfinite(x))
    whole = jnp.where(finite, x, jnp.zeros_like(x))
    points = jax.vmap(partial(_start, whole, query_side, key_side, bound))(
        jax.random.split(key, starts), jnp.arange(starts)
    )
    one = partial(_descend, whole, query_side, key_side, bound, joint)
    distances, changes = jax.vmap(one)(points)
    best = jnp.argmin(distances)
    distance, change = distances[best], changes[best]
    distance = jnp.where(crossed, jnp.zeros_like(distance), distance)
    distance = jnp.where(finite, distance, jnp.full_like(distance, jnp.nan))
    moved = finite & ~crossed & jnp.isfinite(distance)
    return distance, jnp.where(moved, x + change, x)


def _signed(
    x: Float[Array, "n d"],
    query_side: Float[Array, "d m"],
    key_side: Float[Array, "d m"],
    bound: ArrayLike | None,
) -> Float[Array, ""]:
    """Return the smallest singular value of the last balanced R_t, with the determinant's sign."""
    block = _last_block(x, query_side, key_side, bound)
    constant = lax.stop_gradient(block)
    left, _, right = last_singular_triple(constant)
    value = _matmul(left, _matmul(block, right))
    return jnp.linalg.slogdet(constant)[0] * value


def _last_block(
    x: Float[Array, "n d"],
    query_side: Float[Array, "d m"],
    key_side: Float[Array, "d m"],
    bound: ArrayLike | None,
) -> Float[Array, "m m"]:
    context = bounded(x[:-1], bound)
    values = context - lax.stop_gradient(context[:1])
    queries, keys = _matmul(values, query_side), _matmul(values, key_side)
    weights = jax.nn.softmax(_matmul(keys, _matmul(x[-1], query_side)))
    return identity_less(centred_covariance(weights[None, :], queries, keys)[0])


def _start(
    x: Float[Array, "n d"],
    query_side: Float[Array, "d m"],
    key_side: Float[Array, "d m"],
    bound: ArrayLike | None,
    key: Array,
    number: Array,
) -> Float[Array, "n d"]:
    """Return x itself, then two spread pairs to every random point."""
    for_noise, for_share, for_pair, for_direction = jax.random.split(key, 4)
    size = jnp.sqrt(jnp.mean(x**2))
    share = jax.random.uniform(for_share, (), x.dtype)
    random = x + share * size * jax.random.normal(for_noise, x.shape, x.dtype)

    coupling = _matmul(key_side, query_side.T)
    sizes, vectors = jnp.linalg.eigh((coupling + coupling.T) / 2)
    # The most attractive direction, or another: D = I - n n^T A / l is singular along n, where l
    # is its eigenvalue and the pair is at +- n / sqrt(l).
    most = jnp.where(jnp.arange(len(sizes)) == len(sizes) - 1, 2.0, 0.0).astype(x.dtype)
    chosen = jnp.argmax(most + jax.random.gumbel(for_direction, sizes.shape, x.dtype))
    direction, attraction = vectors[:, chosen], jnp.maximum(sizes[chosen], 1e-3 * sizes[-1])
    attraction = jnp.where(attraction > 0, attraction, jnp.ones_like(attraction))
    spread = direction / jnp.sqrt(attraction)
    context = bounded(x[:-1], bound)
    logits = _matmul(context, _matmul(coupling, x[-1]))
    logits = jnp.where(number % 3 == 1, jax.nn.log_softmax(logits), jnp.zeros_like(logits))
    order = jnp.argsort(-jnp.maximum(logits, -10.0) - _gumbel(for_pair, logits))
    one, other = order[0], order[1]
    middle = (x[one] + x[other]) / 2
    forward = _matmul(x[one] - x[other], direction) >= 0
    spread = jnp.where(forward, spread, -spread)
    pull = _matmul(coupling.T, spread)
    square = jnp.sum(pull**2)
    own = x[-1] - pull * _matmul(pull, x[-1]) / jnp.where(square > 0, square, 1.0)
    pair = x.at[one].set(middle + spread).at[other].set(middle - spread).at[-1].set(own)
    pair = x + (0.3 + 0.7 * share) * (pair - x)
    return jnp.where(number == 0, x, jnp.where(number % 3 == 0, random, pair))


def _gumbel(key: Array, like: Array) -> Array:
    return jax.random.gumbel(key, like.shape, like.dtype)


def _descend(
    x: Float[Array, "n d"],
    query_side: Float[Array, "d m"],
    key_side: Float[Array, "d m"],
    bound: ArrayLike | None,
    joint: bool,
    start: Float[Array, "n d"],
) -> tuple[Float[Array, ""], Float[Array, "n d"]]:
    """Return how far from x the sign changes on the way that a start leads to, and the change."""
    tiny = float(jnp.finfo(x.dtype).tiny)
    length = jnp.sqrt(jnp.mean(jnp.sum(x**2, axis=-1)))

    def margin(change: Array) -> Array:
        return _signed(x + change, query_side, key_side, bound)

    def step(carry: tuple, number: Array) -> tuple[tuple, None]:
        change, best, nearest = carry
        value, slope = jax.value_and_grad(margin)(change)
        distance = _size(change, joint)
        better = (value <= 0) & (distance < best)
        best, nearest = jnp.where(better, distance, best), jnp.where(better, change, nearest)
        # The smallest change at which the linearisation vanishes.
        target = jnp.sum(slope * change) - value
        sizes = jnp.linalg.norm(slope, axis=-1, keepdims=True)
        if joint:
            wanted = slope * (target / jnp.maximum(jnp.sum(slope**2), tiny))
        else:
            wanted = slope / jnp.maximum(sizes, tiny) * (target / jnp.maximum(jnp.sum(sizes), tiny))
        move = wanted - change
        # Whole steps first; shorter ones then end what goes to and fro.
        third = (3 * number // _STEPS).astype(x.dtype)
        longest = jnp.maximum(length, distance) * jnp.where(third == 0, 0.7, 0.3).astype(x.dtype)
        share = longest / jnp.maximum(jnp.sqrt(jnp.sum(move**2)), tiny)
        move = move * jnp.minimum(share, jnp.exp2(-third))
        move = jnp.where(jnp.all(jnp.isfinite(move)), move, jnp.zeros_like(move))
        return (change + move, best, nearest), None

    none = jnp.full((), jnp.inf, x.dtype)
    carry = start - x, none, jnp.zeros_like(x)
    (change, best, nearest), _ = lax.scan(step, carry, jnp.arange(_STEPS))

    # In double precision, where it is enabled: does the sign change, and where first?
    wide = jnp.zeros((), jax.dtypes.canonicalize_dtype(jnp.float64)).dtype
    sides = query_side.astype(wide), key_side.astype(wide)
    exact = x.astype(wide)

    def beyond(change: Array) -> Array:
        return _signed(exact + change, *sides, bound) <= 0

    change, nearest = change.astype(wide), nearest.astype(wide)
    factors = jnp.array(_BEYOND, wide)
    found = lax.map(lambda factor: beyond(factor * change), factors)
    last = change * factors[jnp.argmax(found)]
    last_size = jnp.where(jnp.any(found), _size(last, joint), jnp.inf)
    kept = jnp.isfinite(best) & beyond(nearest)
    nearest_size = jnp.where(kept, _size(nearest, joint), jnp.inf)
    reached = jnp.where(nearest_size < last_size, nearest, last)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        over = beyond(middle * reached)
        return jnp.where(over, low, middle), jnp.where(over, middle, high)

    ends = jnp.zeros((), wide), jnp.ones((), wide)
    reached = reached * lax.fori_loop(0, _HALVINGS, halve, ends)[1]
    reached_size = jnp.where(
        jnp.isfinite(jnp.minimum(nearest_size, last_size)), _size(reached, joint), jnp.inf
    )
    return reached_size.astype(x.dtype), reached.astype(x.dtype)


def _size(change: Float[Array, "n d"], joint: bool) -> Float[Array, ""]:
    sizes = jnp.linalg.norm(change, axis=-1)
    return jnp.linalg.norm(sizes) if joint else jnp.max(sizes)
