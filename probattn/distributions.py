"""The attention process for NumPyro: its residual map as a Transform, its density a Distribution.

A sequence x of T tokens in R^d has residuals e = residual(x), independent Normal(0, sigma^2), so

    log p(x) = sum_t [ log Normal(e_t; 0, sigma^2 I) + log det D_t ],

where every det D_t is positive, and -inf elsewhere (paper, Corollary 3.1). It is a normalised
density where the process is proper (`is_proper`, `certificate`); where the map folds it counts
some regions more than once, and its total mass exceeds one (`conditional_mass`).
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

# Before any submodule: once ArviZ is imported `numpyro` is a lazy module, and `import
# numpyro.distributions` would load that package twice, the second time without its submodules.
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import validate_sample

from probattn.ancestral import AncestralSolution, solve_residual
from probattn.arguments import check_bound, check_weights
from probattn.attention import residual
from probattn.blocks.promotion import default_promotion, with_rank
from probattn.log_determinants import log_det


class AttentionResidual(Transform):
    """The map of a sequence to its residuals, x -> e with e_t = x_t - mu_t, as a Transform.

    Domain and codomain are real matrices (T, d) of any length T; leading axes of the weights and
    of the argument broadcast. The inverse is ancestral: see `ancestral.solve_residual`.

    Args:
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point or not finite, or
            the bound is not positive.
    """

    domain = constraints.real_matrix
    codomain = constraints.real_matrix

    def __init__(
        self, w_query: ArrayLike, w_key: ArrayLike, *, bound: ArrayLike | None = None
    ) -> None:
        check_bound(bound)
        self.w_query, self.w_key = check_weights(w_query, w_key)
        for name, weights in (("w_query", w_query), ("w_key", w_key)):
            if not _holds(np.isfinite, weights):
                raise ValueError(f"{name} has entries that are not finite: expected finite numbers")
        self.bound = bound

    def __call__(self, x: ArrayLike) -> Float[Array, "*batch T d"]:
        """Compute the residuals of a sequence."""
        return self._apply(residual, "(t,d)", x)

    def _inverse(self, y: ArrayLike) -> Float[Array, "*batch T d"]:
        return self.solve(y).x

    def solve(self, e: ArrayLike) -> AncestralSolution:
        """Solve for the sequence of given residuals, and tell which positions converged."""
        return AncestralSolution(*self._apply(solve_residual, "(t,d),(t),(t)", e))

    def log_abs_det_jacobian(
        self, x: ArrayLike, y: ArrayLike, intermediates: Any = None
    ) -> Float[Array, "*batch"]:
        """Sum log|det de/dx| over positions, in nats; whether or not the map folds there."""
        return self._sign_and_log_det(x)[1]

    def _sign_and_log_det(
        self, x: ArrayLike
    ) -> tuple[Float[Array, "*batch T"], Float[Array, "*batch"]]:
        """Return the sign of every det D_t, and log|det de/dx|, their sum in nats."""
        return self._apply(functools.partial(log_det, summed=True), "(t),()", x)

    def _apply(self, function: Callable, returns: str, x: ArrayLike) -> Any:
        """Apply a function of x, weights and bound; `returns` is its part of a gufunc signature.

        A bound is one number, yet NumPyro's scan stacks it in front as it does every leaf; its
        axes (...) are then the first of the weights' batch.
        """
        if self.bound is None or jnp.ndim(self.bound) == 0:
            return function(x, self.w_query, self.w_key, bound=self.bound)
        missing = self.w_query.ndim - 2 - jnp.ndim(self.bound)
        bounds = jnp.reshape(self.bound, (*jnp.shape(self.bound), *(1,) * missing))
        over_bounds = jnp.vectorize(
            lambda x, w_query, w_key, bound: function(x, w_query, w_key, bound=bound),
            signature=f"(t,d),(d,r),(d,r),()->{returns}",
        )
        return over_bounds(x, self.w_query, self.w_key, bounds)

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the residuals of an x of this shape."""
        _check_event(shape, self.w_query.shape[-2])
        return (*jnp.broadcast_shapes(shape[:-2], self.w_query.shape[:-2]), *shape[-2:])

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the x of residuals of this shape."""
        return self.forward_shape(shape)

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """Return children and names, as NumPyro's transforms give them."""
        return (self.w_query, self.w_key, self.bound), (("w_query", "w_key", "bound"), {})

    def eq(self, other: object, static: bool = False) -> ArrayLike:
        """Tell whether both map alike: the same weights and bound."""
        if not isinstance(other, AttentionResidual):
            return False
        if (self.bound is None) != (other.bound is None):
            return False
        pairs: list[tuple[Any, Any]]
        pairs = [(self.w_query, other.w_query), (self.w_key, other.w_key)]
        if self.bound is not None:
            pairs.append((self.bound, other.bound))
        if static:
            # What is traced has no values to compare: it equals itself only, as in NumPyro. A
            # bound that is a number has one, in the precision that a compiled function gives it.
            with jax.ensure_compile_time_eval():
                return all(
                    mine is theirs or np.array_equal(jnp.asarray(mine), jnp.asarray(theirs))
                    for mine, theirs in pairs
                )
        return jnp.all(jnp.array([jnp.array_equal(mine, theirs) for mine, theirs in pairs]))


class CausalAttention(dist.TransformedDistribution):
    """The attention process over sequences of a given length, as a NumPyro distribution.

    The event is a sequence (length, d); leading axes of the weights and of the scale are the
    batch. Being a TransformedDistribution of normal residuals, it has the non-centred form of
    NumPyro's TransformReparam: the residuals are sampled and the sequence solved for. A sequence
    for which no solution is found, which `is_proper` rules out but for rounding, is NaN from there.

    Args:
        w_query: W_Q, (..., d, r).
        w_key: W_K, (..., d, r).
        scale: sigma > 0, standard deviation of the residuals, a number or an array (...).
        length: tokens T of a sequence, >= 1.
        bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.
        validate_args: see NumPyro; checks what cannot be checked before it is traced.

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point or not finite,
            scale or bound is not positive, or length is smaller than 1.
    """

    arg_constraints: ClassVar = {
        "w_query": constraints.real_matrix,
        "w_key": constraints.real_matrix,
        "scale": constraints.positive,
    }
    pytree_data_fields = ("w_query", "w_key", "scale", "bound")
    support = constraints.real_matrix
    reparametrized_params: ClassVar = ["w_query", "w_key", "scale"]

    @default_promotion()
    def __init__(
        self,
        w_query: ArrayLike,
        w_key: ArrayLike,
        scale: ArrayLike,
        length: int,
        *,
        bound: ArrayLike | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if isinstance(length, bool) or not isinstance(length, int | np.integer) or length < 1:
            raise ValueError(f"length is {length!r}: expected an integer >= 1")
        transform = AttentionResidual(w_query, w_key, bound=bound)
        self.scale = jnp.asarray(scale, transform.w_query.dtype)
        if not _holds(lambda values: (values > 0) & np.isfinite(values), scale):
            raise ValueError(f"scale is {scale}: expected finite numbers > 0")
        try:
            batch = jnp.broadcast_shapes(transform.w_query.shape[:-2], self.scale.shape)
        except ValueError:
            raise ValueError(
                f"scale has shape {self.scale.shape} and w_query {transform.w_query.shape}: "
                "expected a scale that broadcasts with the leading axes of w_query"
            ) from None
        # As many leading axes for each, so that those that NumPyro's scan stacks in front line up.
        transform.w_query = with_rank(transform.w_query, len(batch) + 2)
        transform.w_key = with_rank(transform.w_key, len(batch) + 2)
        self.scale = with_rank(self.scale, len(batch))
        self.w_query, self.w_key, self.bound = transform.w_query, transform.w_key, bound
        shape = (*batch, int(length), self.w_query.shape[-2])
        super().__init__(_noise(self.scale, shape), transform.inv, validate_args=validate_args)

    @default_promotion()
    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Float[Array, "*batch T d"]:
        """Draw sequences (*sample_shape, ..., length, d)."""
        return super().sample(key, sample_shape)

    @default_promotion()
    @validate_sample
    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Float[Array, "*batch"]:
        """Return log densities of sequences (..., length, d), in nats; -inf if a det D_t is <= 0.

        The determinants are those of the exact formula, at any distance from the boundary. A
        positive determinant is weaker than feasible: see `margins`.
        """
        del intermediates  # the residuals are cheaper to compute than to keep
        if jnp.shape(value)[-2:] != self.event_shape:
            length, width = self.event_shape
            raise ValueError(
                f"value has shape {jnp.shape(value)}: expected (..., T, d) with d = {width} and "
                f"T = {length}"
            )
        transform = self.transforms[0].inv
        noise = self.base_dist.log_prob(transform(value))
        sign, log_abs = transform._sign_and_log_det(value)
        return jnp.where(jnp.all(sign > 0, axis=-1), noise + log_abs, -jnp.inf)


@promote_batch_shape.register
def _promoted(process: CausalAttention) -> CausalAttention:
    """Return what vmap or scan has stacked with its leading axes as a batch, and noise for each."""
    batch = jnp.broadcast_shapes(process.w_query.shape[:-2], process.scale.shape)
    promoted = copy.copy(process)
    promoted._batch_shape = batch
    promoted.base_dist = _noise(process.scale, (*batch, *process.event_shape))
    return promoted


@default_promotion()
def _noise(scale: Float[Array, "*batch"], shape: tuple[int, ...]) -> dist.Distribution:
    """Return independent normal residuals of sequences, of this shape (..., T, d) in all."""
    normal = dist.Normal(jnp.zeros((), scale.dtype), scale[..., None, None])
    return normal.expand(shape).to_event(2)


def _holds(condition: Callable[[np.ndarray], np.ndarray], values: ArrayLike) -> bool:
    """Tell whether a condition holds everywhere; what is traced is left to NumPyro's validation."""
    return isinstance(values, jax.core.Tracer) or bool(np.all(condition(np.asarray(values))))


def _check_event(shape: tuple[int, ...], width: int) -> None:
    if len(shape) < 2 or shape[-1] != width:
        raise ValueError(f"got a shape {shape}: expected (..., T, d) with d = {width}")
