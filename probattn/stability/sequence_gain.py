"""How far the inverse of the residual map amplifies a small change of a whole sequence.

The margins look at one token at a time, at the diagonal blocks of the map's Jacobian. The blocks
below them count too. (Not in the paper.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from probattn.arguments import check_arguments
from probattn.attention import residual
from probattn.blocks.largest_gain import largest_of_inverse
from probattn.blocks.promotion import with_rank
from probattn.blocks.substitution import factorise


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
    return _gain_of_batch(x, w_query, w_key, bound)


@jax.jit  # else every call outside a jitted function would compile the loop anew
def _gain_of_batch(x: Array, w_query: Array, w_key: Array, bound: ArrayLike | None) -> SequenceGain:
    def of_sequence(x: Array, w_query: Array, w_key: Array) -> tuple[Array, ...]:
        known = lax.stop_gradient((x, w_query, w_key, bound))
        gain, u, v, error = largest_of_inverse(factorise(*known))

        def moved(x: Array) -> Array:
            return residual(x, w_query, w_key, bound=bound)

        # sigma_min = v . J u, whose derivative is v . dJ u.
        linear = jnp.sum(v * jax.jvp(moved, (x,), (u,))[1])
        change = jnp.where(jnp.isfinite(gain), linear - lax.stop_gradient(linear), 0.0)
        shares = [jnp.sum(vector**2, axis=-1) for vector in (u, v)]
        return 1 / (1 / gain + change), *shares, error

    signature = "(t,d),(d,r),(d,r)->(),(t),(t),()"
    return SequenceGain(*jnp.vectorize(of_sequence, signature=signature)(x, w_query, w_key))
