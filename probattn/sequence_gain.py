"""The gain of a whole sequence: how far the inverse residual map amplifies a small change.

A margin looks at one token with its past held fixed, at the diagonal blocks D_t of the Jacobian J
of the map x -> e. A change of the residuals also travels from token to token, through the blocks
below the diagonal, and the margins do not see that. (Not in the paper.)
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from probattn.arguments import check_arguments
from probattn.attention import residual
from probattn.blocks.promotion import with_rank
from probattn.blocks.substitution import Factors, factorise, solve_jacobian

_HIGHEST = lax.Precision.HIGHEST
_BASIS = 32  # most directions that are held at a time
_TOGETHER = 4  # directions that are solved for at once, which tells singular values apart
_MOST_CYCLES = 100
_SEED = 0


class SequenceGain(NamedTuple):
    """What `sequence_gain` finds.

    With the unit vectors u and v that belong to the gain g, a change of the residuals by a small
    multiple of v moves the embeddings by g times that multiple of u: J u = v / g.

    Attributes:
        gain: 1 / sigma_min(J), (...).
        embedding_share: share of each token in |u|^2, (..., T): which tokens move.
        residual_share: share of each token in |v|^2, (..., T): whose residuals move them.
        error: some singular value of J^-1 lies within this relative distance of `gain`, apart from
            rounding, (...).
    """

    gain: Float[Array, "*batch"]
    embedding_share: Float[Array, "*batch T"]
    residual_share: Float[Array, "*batch T"]
    error: Float[Array, "*batch"]


def sequence_gain(
    x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike, *, bound: ArrayLike | None = None
) -> SequenceGain:
    """Compute the largest factor by which a small change of all residuals moves the sequence.

    It is 1 / sigma_min(J) for the Jacobian J of the map x -> e of the whole sequence, (T d, T d),
    and at least 1 / min_t sigma_min(D_t), what the margins say. J is never formed: block Lanczos
    iterations with full reorthogonalisation find the largest singular value of J^-1, whose products
    are solutions by substitution, O(T^2 (d + r)) operations each. They start from four fixed random
    vectors, and anew from the four best of 32 vectors, until `error` is below sqrt(eps) / 2
    (7.5e-9 in float64) or 100 times.

    The gain is a lower bound. About `error` squared over the relative gap to the next singular
    value may be missing of it. Rounding adds eps |J| gain, relative, which rounding of the data
    leaves open too. Where several singular values agree, the shares are those of one of their
    vectors, and others may be as large.

    The first derivative is exact where the smallest singular value of J is simple; second
    derivatives are not defined by this function.

    Args:
        x: token embeddings (..., T, d).
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.

    Returns:
        Gain, shares and error; 1 for a single token. The gain is inf where a block D_t is singular,
        and the shares then NaN. All is NaN where a token is not finite.

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point or the bound is
            not positive.
    """
    x, w_query, w_key = check_arguments(x, w_query, w_key, bound)
    dtype = jnp.result_type(x, w_query, w_key)
    rank = max(x.ndim, w_query.ndim)
    x, w_query, w_key = (with_rank(array.astype(dtype), rank) for array in (x, w_query, w_key))
    return _of_batch(x, w_query, w_key, bound)


class _State(NamedTuple):
    """What a cycle of the iteration hands to the next.

    Attributes:
        left: best vectors u, orthonormal (p, T d).
        right: v of the first of them (T d,).
        gain: its singular value.
        error: |J^-1 v - gain u| / gain.
        cycle: how many cycles there were.
    """

    left: Array
    right: Array
    gain: Array
    error: Array
    cycle: Array


@jax.jit  # else every call outside a jitted function would compile the loop anew
def _of_batch(x: Array, w_query: Array, w_key: Array, bound: ArrayLike | None) -> SequenceGain:
    signature = "(t,d),(d,r),(d,r)->(),(t),(t),()"
    of_sequence = jnp.vectorize(partial(_of_sequence, bound), signature=signature)
    return SequenceGain(*of_sequence(x, w_query, w_key))


def _of_sequence(
    bound: ArrayLike | None,
    x: Float[Array, "T d"],
    w_query: Float[Array, "d r"],
    w_key: Float[Array, "d r"],
) -> SequenceGain:
    factors = factorise(*lax.stop_gradient((x, w_query, w_key, bound)))
    known = jnp.all(jnp.isfinite(x)) & jnp.all(jnp.isfinite(factors.reduced))
    regular = known & jnp.all(jnp.isfinite(factors.correction))
    usable = jax.tree.map(lambda part: jnp.where(regular, part, jnp.zeros_like(part)), factors)
    found = _largest(usable._replace(bound=factors.bound))
    u, v = (vector.reshape(x.shape) for vector in (found.left[0], found.right))

    # sigma_min = v . J u, whose derivative is v . dJ u.
    def moved(x: Array) -> Array:
        return residual(x, w_query, w_key, bound=bound)

    linear = jnp.sum(v * jax.jvp(moved, (x,), (u,))[1])
    gain = 1 / (1 / found.gain + (linear - lax.stop_gradient(linear)))
    singular = jnp.where(known, jnp.inf, jnp.nan).astype(x.dtype)
    return SequenceGain(
        jnp.where(regular, gain, singular),
        *(jnp.where(regular, jnp.sum(vector**2, axis=-1), jnp.nan) for vector in (u, v)),
        jnp.where(regular, found.error, jnp.where(known, 0.0, jnp.nan)),
    )


def _largest(factors: Factors) -> _State:
    """Find the largest singular value of J^-1, and its vectors."""
    shape, dtype = factors.x.shape, factors.x.dtype
    size = shape[0] * shape[1]
    # Below that, a basis of the whole space: the first cycle is exact.
    together, blocks = (_TOGETHER, _BASIS // _TOGETHER) if size > _BASIS else (1, size)
    random = jax.random.normal(jax.random.key(_SEED), (1 + blocks, together, size), dtype)
    noise = jnp.finfo(dtype).eps * random[1:]

    def solve(right: Array) -> Array:
        return solve_jacobian(factors, right.reshape(shape)).reshape(size)

    def solve_transposed(right: Array) -> Array:
        (found,) = jax.linear_transpose(solve, right)(right)
        return found

    def put(basis: Array, rows: Array, block: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(basis, rows, block * together, axis=0)

    def cycle(state: _State) -> _State:
        def expand(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            basis, images, rows = carry
            basis, image = put(basis, rows, block), jax.vmap(solve_transposed)(rows)
            new = jax.vmap(solve)(_orthonormal(image))
            # Where the basis has all that J^-1 makes of it, it goes on at random.
            return basis, put(images, image, block), _new_directions(new, basis, noise[block])

        empty = jnp.zeros((blocks * together, size), dtype)
        basis, images, _ = lax.fori_loop(0, blocks, expand, (empty, empty, state.left))
        mixtures, sizes, rights = jnp.linalg.svd(images, full_matrices=False)
        left = jnp.matmul(mixtures[:, :together].T, basis, precision=_HIGHEST)
        gain, right = sizes[0], rights[0]
        error = jnp.linalg.norm(solve(right) / gain - left[0])
        return _State(left, right, gain, error, state.cycle + 1)

    def unfinished(state: _State) -> Array:
        tolerance = jnp.sqrt(jnp.finfo(dtype).eps) / 2
        return (state.error > tolerance) & (state.cycle < _MOST_CYCLES)

    start = _State(
        _orthonormal(random[0]),
        jnp.zeros(size, dtype),
        jnp.zeros((), dtype),
        jnp.full((), jnp.inf, dtype),
        jnp.int32(0),
    )
    return lax.while_loop(unfinished, cycle, start)


def _orthonormal(rows: Float[Array, "p n"]) -> Float[Array, "p n"]:
    return jnp.linalg.qr(rows.T)[0].T


def _new_directions(
    rows: Float[Array, "p n"], basis: Float[Array, "k n"], noise: Float[Array, "p n"]
) -> Float[Array, "p n"]:
    """Return an orthonormal basis of the rows that is orthogonal to a basis."""
    rows = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
    for added in (noise, jnp.zeros_like(noise)):
        within = jnp.matmul(rows, basis.T, precision=_HIGHEST)
        rows = _orthonormal(rows - jnp.matmul(within, basis, precision=_HIGHEST) + added)
    return rows
