"""The largest singular value of the inverse of a sequence's Jacobian, by block Lanczos iterations.

The Jacobian is never formed: the products with its inverse are solutions by substitution.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from probattn.blocks.substitution import Factors, solve_jacobian

_HIGHEST = lax.Precision.HIGHEST
_BASIS = 32  # most directions that are held at a time
_TOGETHER = 4  # directions that are solved for at once, which tells singular values apart
_MOST_CYCLES = 100
_SEED = 0


class Largest(NamedTuple):
    """What `largest_of_inverse` finds: J^-1 v = gain u.

    Attributes:
        gain: inf where a block D_t is singular, NaN where a number is not finite.
        left: u (T, d); NaN where the gain is not finite.
        right: v (T, d), likewise.
        error: |J^-1 v - gain u| / gain.
    """

    gain: Float[Array, ""]
    left: Float[Array, "T d"]
    right: Float[Array, "T d"]
    error: Float[Array, ""]


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


def largest_of_inverse(factors: Factors) -> Largest:
    """Find the largest singular value of J^-1, and its vectors."""
    x = factors.x
    known = jnp.all(jnp.isfinite(x)) & jnp.all(jnp.isfinite(factors.reduced))
    regular = known & jnp.all(jnp.isfinite(factors.correction))
    usable = jax.tree.map(lambda part: jnp.where(regular, part, jnp.zeros_like(part)), factors)
    found = _iterated(usable._replace(bound=factors.bound))
    u, v = (
        jnp.where(regular, vector.reshape(x.shape), jnp.nan)
        for vector in (found.left[0], found.right)
    )
    gain = jnp.where(regular, found.gain, jnp.where(known, jnp.inf, jnp.nan).astype(x.dtype))
    error = jnp.where(regular, found.error, jnp.where(known, 0.0, jnp.nan).astype(x.dtype))
    return Largest(gain, u, v, error)


def _iterated(factors: Factors) -> _State:
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
