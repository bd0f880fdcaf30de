"""The inverse of the residual map: the sequence whose residuals are given, token after token.

Token t solves x_t = mu_t(x_t) + e_t, with its past solved already: ancestral sampling, where the
residuals are noise. Newton's method uses the exact Jacobian block D_t through its reduced form,
and a step that does not bring x_t - mu_t(x_t) closer to e_t is halved; the next one starts from
twice the fraction that did. Where x_t -> e_t is a diffeomorphism (see `proper`) the only point at
which no step helps is the solution.

How far the inverse amplifies a small change is the gain of the sequence. (Not in the paper.)
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from probattn.arguments import check_arguments
from probattn.attention import residual
from probattn.blocks.covariance import identity_less
from probattn.blocks.geometry import bounded
from probattn.blocks.largest_gain import largest_of_inverse
from probattn.blocks.promotion import with_rank
from probattn.blocks.substitution import factorise, solve_jacobian

_HIGHEST = lax.Precision.HIGHEST
_MOST_TRIALS = 1000  # antisymmetric couplings of norm 10 need up to 460, of norm 20 up to 800
_DECREASE = 1e-4  # relative decrease of the residual's error that a whole step must bring (Armijo)


class AncestralSolution(NamedTuple):
    """What `solve_residual` finds.

    Attributes:
        x: the sequence, (..., T, d); NaN from the first position on that has not converged.
        converged: whether each position solves its equation to rounding, (..., T).
        trials: steps that each position tried, (..., T).
    """

    x: Float[Array, "*batch T d"]
    converged: Bool[Array, "*batch T"]
    trials: Int[Array, "*batch T"]

    @property
    def unconverged(self) -> Int[Array, ""]:
        """How many positions have not converged, in all sequences together."""
        return jnp.sum(~self.converged)


def solve_residual(
    e: ArrayLike, w_query: ArrayLike, w_key: ArrayLike, *, bound: ArrayLike | None = None
) -> AncestralSolution:
    """Solve residual(x) = e for x, one position after the other.

    Exact to rounding where the process is proper, unless attention is so sharp that the 1000 trials
    of a position do not reach the solution: for unit noise and antisymmetric A, all sequences of
    20 tokens in the plane were solved at ||A|| <= 20, and 2 in 1000 were not at ||A|| = 50, where
    logits reach thousands. Where the map folds there may be several solutions, of which this finds
    one, or none that the iteration settles on. `converged` tells. The derivative of x is that of
    the implicit function, in forward and reverse mode and to any order: no iteration is
    differentiated.

    Args:
        e: residuals (..., T, d).
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point or the bound is
            not positive.
    """
    e, w_query, w_key = check_arguments(e, w_query, w_key, bound)
    dtype = jnp.result_type(e, w_query, w_key)
    rank = max(e.ndim, w_query.ndim)
    e, w_query, w_key = (with_rank(array.astype(dtype), rank) for array in (e, w_query, w_key))

    def sequence(e: Array, w_query: Array, w_key: Array) -> AncestralSolution:
        known = lax.stop_gradient((e, w_query, w_key, bound))
        x, converged, trials = _solve_sequence(*known)
        return AncestralSolution(_implicit(x, e, w_query, w_key, bound), converged, trials)

    signature = "(t,d),(d,r),(d,r)->(t,d),(t),(t)"
    return AncestralSolution(*jnp.vectorize(sequence, signature=signature)(e, w_query, w_key))


class TokenSolution(NamedTuple):
    """What `solve_token` finds.

    Attributes:
        x: the token (d,), of no meaning unless converged.
        converged: whether it solves its equation to rounding.
        trials: steps that were tried.
    """

    x: Float[Array, " d"]
    converged: Bool[Array, ""]
    trials: Int[Array, ""]


class _Iterate(NamedTuple):
    """State of Newton's method for one token.

    Attributes:
        x: the token (d,).
        step: Newton's step from it (d,).
        error: largest entry of x - mu(x) - e.
        goal: error that counts as solved.
        rounding: error below which there is nothing left to gain.
        fraction: fraction of the step that is tried next.
        refused: whether the last trial brought no decrease.
        trials: how many were tried.
    """

    x: Array
    step: Array
    error: Array
    goal: Array
    rounding: Array
    fraction: Array
    refused: Array
    trials: Array

    @property
    def unfinished(self) -> Array:
        solved = (self.error <= self.rounding) | (
            (self.error <= self.goal) & self.refused  # rounding spoils the last steps
        )
        # A step lost in rounding stays so when halved: on a fold, most of the trials are spared.
        moves = jnp.any(self.x + self.fraction * self.step != self.x)
        return ~solved & moves & (self.trials < _MOST_TRIALS) & jnp.isfinite(self.error)


def solve_token(
    e: Float[Array, " d"],
    values: Float[Array, "T d"],
    keys: Float[Array, "T r"],
    past: Bool[Array, " T"],
    w_query: Float[Array, "d r"],
) -> TokenSolution:
    """Solve x - mu(x) = e for one token given its past, without a derivative.

    For callers that draw token after token; it is what `solve_residual` does at each position.

    Args:
        e: residual of the token (d,).
        values: values of all tokens, phi(x_s), (T, d).
        keys: their keys, phi(x_s) W_K, (T, r).
        past: which of them are its past, (T,); the others must be finite.
        w_query: W_Q, (d, r).
    """

    def iterate(x: Array) -> _Iterate:
        return _iterate(x, e, values, keys, past, w_query)

    def trial(state: _Iterate) -> _Iterate:
        new = iterate(state.x + state.fraction * state.step)
        better = new.error <= (1 - _DECREASE * state.fraction) * state.error
        kept = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, state)
        # Where a short step was needed the next is mostly short too: a whole one wastes trials.
        fraction = jnp.where(better, jnp.minimum(2 * state.fraction, 1), state.fraction / 2)
        return kept._replace(fraction=fraction, refused=~better, trials=state.trials + 1)

    _, mean, _ = _attend(e, values, keys, past, w_query)
    last = lax.while_loop(lambda state: state.unfinished, trial, iterate(e + mean))
    converged = (last.error <= last.goal) & jnp.isfinite(last.goal)
    return TokenSolution(last.x, converged, last.trials)


def _solve_sequence(
    e: Float[Array, "T d"],
    w_query: Float[Array, "d r"],
    w_key: Float[Array, "d r"],
    bound: ArrayLike | None,
) -> tuple[Float[Array, "T d"], Bool[Array, " T"], Int[Array, " T"]]:
    length, rank = e.shape[0], w_query.shape[1]

    def position(carry: tuple[Array, Array, Array], t: Array) -> tuple[tuple, tuple]:
        values, keys, failed = carry
        past = jnp.arange(length) < t

        token = solve_token(e[t], values, keys, past, w_query)
        converged = token.converged & ~failed
        x = jnp.where(converged, token.x, jnp.nan)
        value = bounded(x, bound)
        carry = (
            values.at[t].set(value),
            keys.at[t].set(jnp.matmul(value, w_key, precision=_HIGHEST)),
            ~converged,
        )
        return carry, (x, converged, token.trials)

    start = jnp.zeros_like(e), jnp.zeros((length, rank), e.dtype), jnp.bool_(False)
    _, (x, converged, trials) = lax.scan(position, start, jnp.arange(length))
    return x, converged, trials


def _iterate(
    x: Array, e: Array, values: Array, keys: Array, past: Array, w_query: Array
) -> _Iterate:
    """Take a step of Newton's at x, and tell how far x is from solving its equation."""
    weights, mean, query = _attend(x, values, keys, past, w_query)
    difference = x - mean - e
    rank = keys.shape[1]
    weighted = weights[:, None] * keys
    covariance = jnp.matmul(weighted.T, values - mean[None], precision=_HIGHEST) / math.sqrt(rank)
    # D = I - W_Q C for row vectors, with C = Cov(k, v) / sqrt(r); by Woodbury's identity
    # D^-1 = I + W_Q (I - C W_Q)^-1 C.
    reduced = identity_less(jnp.matmul(covariance, w_query, precision=_HIGHEST))
    projected = jnp.matmul(difference, w_query, precision=_HIGHEST)
    inner = jnp.linalg.solve(reduced.T, projected)
    step = -(difference + jnp.matmul(inner, covariance, precision=_HIGHEST))

    eps = jnp.finfo(x.dtype).eps
    # Largest entries, and not Euclidean norms, whose squares overflow and underflow.
    size = jnp.max(jnp.abs(e)) + jnp.max(jnp.abs(values))
    # A relative error of eps in the query moves the mean by up to this.
    unavoidable = jnp.sum(jnp.abs(query)) * jnp.max(jnp.abs(covariance))
    return _Iterate(
        x=x,
        step=step,
        error=jnp.max(jnp.abs(difference)),
        goal=eps**0.75 * size + 8 * eps * unavoidable,
        rounding=4 * eps * size,
        fraction=jnp.ones((), x.dtype),
        refused=jnp.bool_(False),
        trials=jnp.int32(0),
    )


def _attend(
    x: Array, values: Array, keys: Array, past: Array, w_query: Array
) -> tuple[Array, Array, Array]:
    """Return one query's attention weights over the past, their mean, and the query."""
    query = jnp.matmul(x, w_query, precision=_HIGHEST)
    logits = jnp.matmul(keys, query, precision=_HIGHEST) / math.sqrt(keys.shape[1])
    weights = jax.nn.softmax(logits, where=past)
    return weights, jnp.matmul(weights, values, precision=_HIGHEST), query


@jax.custom_jvp
def _implicit(
    x: Float[Array, "T d"],
    e: Float[Array, "T d"],
    w_query: Float[Array, "d r"],
    w_key: Float[Array, "d r"],
    bound: ArrayLike | None,
) -> Float[Array, "T d"]:
    """Return the solution x itself, with the derivative that residual(x) = e implies for it."""
    return x


@_implicit.defjvp
def _implicit_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    solution, e, *parameters = primals
    _, e_tangent, *parameter_tangents = tangents
    x = _implicit(solution, e, *parameters)  # so that this rule can be differentiated in turn

    def at_fixed_x(w_query: Array, w_key: Array, bound: ArrayLike | None) -> Array:
        return residual(x, w_query, w_key, bound=bound)

    _, moved = jax.jvp(at_fixed_x, tuple(parameters), tuple(parameter_tangents))
    return x, solve_jacobian(factorise(x, *parameters), e_tangent - moved)


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
        shares = (jnp.sum(vector**2, axis=-1) for vector in (u, v))
        return 1 / (1 / gain + change), *shares, error

    signature = "(t,d),(d,r),(d,r)->(),(t),(t),()"
    return SequenceGain(*jnp.vectorize(of_sequence, signature=signature)(x, w_query, w_key))
