"""The smallest singular value of many blocks at once, estimated: to watch, and never to report.

The spectral norm of R^-1 is 1 / sigma_min(R), and the inverse comes from the elimination that gives
the determinant too. The exact margins are those of `margins`.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from probattn.elimination import Elimination, eliminate
from probattn.log_det import reduced_blocks

_ITERATIONS = 4

_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def margin_estimate(
    x: ArrayLike,
    w_query: ArrayLike,
    w_key: ArrayLike,
    *,
    iterations: int = _ITERATIONS,
    bound: ArrayLike | None = None,
) -> Float[Array, "*batch T"]:
    """Estimate of the margin "reduced" of every position, by power iterations on R_t^-T R_t^-1.

    Only for watching many positions often: it is no certificate, since it errs upwards. In size
    it is never below the smallest singular value sigma of R_t and never above sqrt(r)
    times it, but for rounding, whose relative error is of the order of eps times R_t's condition
    number. Of 4 iterations the median error is at most 3 % and the largest 20 % over the blocks of
    `tests/test_monitoring.py`; it is largest where several singular values are close to the
    smallest. `stability_margin` is exact.

    Args:
        x: token embeddings (..., T, d).
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        iterations: how many, >= 0; each costs two products of the inverse with a vector.
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.

    Returns:
        (..., T), without unit and without a derivative; with a minus sign where det R_t < 0, and 0
        where R_t is singular. 1 at positions 0 and 1.

    Raises:
        ValueError: if iterations is negative, the shapes do not fit, the arrays are not floating
            point or the bound is not positive.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"iterations is {iterations!r}: expected an integer >= 0")
    blocks = lax.stop_gradient(reduced_blocks(x, w_query, w_key, bound=bound))
    return estimated_sigma_min(eliminate(jnp.moveaxis(blocks, -3, -1)), iterations)


def estimated_sigma_min(
    found: Elimination, iterations: int = _ITERATIONS
) -> Float[Array, "*batch n"]:
    """Estimated smallest singular value of every block, with the sign of its determinant.

    Args:
        found: what `eliminate` returns for blocks (..., r, r, n).
        iterations: how many, >= 0.

    Returns:
        (..., n); see `margin_estimate`.
    """
    # One matrix after the other, as batched products want them. Scaled, since of a block a rounding
    # error from singular the squares might overflow.
    inverse = jnp.moveaxis(found.inverse, -1, -3)
    largest = jnp.max(jnp.abs(inverse), axis=(-2, -1))
    inverse = inverse / largest[..., None, None]
    # The longest column is at least 1 / sqrt(r) of the norm, and iterations only add to that.
    image = _longest_column(inverse)
    for _ in range(iterations):
        pulled = _einsum("...ij,...i->...j", inverse, image)
        direction = pulled / jnp.linalg.norm(pulled, axis=-1, keepdims=True)
        image = _einsum("...ij,...j->...i", inverse, direction)
    return found.sign / (jnp.linalg.norm(image, axis=-1) * largest)


def _longest_column(matrices: Float[Array, "*batch n r r"]) -> Float[Array, "*batch n r"]:
    longest = jnp.argmax(jnp.sum(matrices**2, axis=-2), axis=-1)
    return jnp.take_along_axis(matrices, longest[..., None, None], axis=-1)[..., 0]
