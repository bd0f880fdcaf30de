"""The contract of real attention: what determinants and margins need of a stage.

A stage has values n_s, queries q_t and keys k_s as a network makes them, logits f(c q_t . k_s) for
s < t, and the derivative M_t = dq_t/dn_t = B_t W_Q^T. Its residual is e_t = n_t - sum_s alpha_ts
n_s. The embeddings x with matrices W_Q and W_K are the plain case: n = x, B_t = I, c = 1/sqrt(r).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from probattn.arguments import (
    check_arguments,
    check_leading_axes,
    check_weights,
    floating,
    is_positive,
)
from probattn.blocks.geometry import (
    Projections,
    Start,
    bounded,
    geometry,
    projections,
    weights_and_slopes,
)
from probattn.blocks.nonfinite import after_nonfinite, zero_nonfinite
from probattn.blocks.promotion import with_rank

_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
_ARRAYS = ("values", "queries", "keys", "w_query", "transforms")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=list(_ARRAYS),
    meta_fields=["scale", "cap", "window", "positional"],
)
@dataclass(frozen=True)
class AttentionStage:
    """A stage of real attention: D_t = I - c Cov_{alpha_t}(n_s, f'_ts k_s) B_t W_Q^T.

    The logits are c q_t . k_s, or cap tanh(c q_t . k_s / cap), and f' is their slope: 1 without a
    cap. Leading axes are batches and heads, and they broadcast: values are shared by heads, and
    keys by groups of heads, if their axes have length 1 or are left out. It is a pytree, so JAX
    maps and differentiates it; queries, keys and transforms have the derivatives with which they
    were made. `AttentionLayer.stage` makes one from a network's numbers.

    Attributes:
        values: n (..., T, d), the tokens as queries, keys and values are made of them.
        queries: q (..., T, r), with bias, norm and rotation.
        keys: k (..., T, r), likewise.
        w_query: W_Q (..., d, r), the linear part that all queries share.
        transforms: B (..., T, r, r) with dq_t/dn_t = B_t W_Q^T, or None where it is I.
        scale: c > 0, or None for 1/sqrt(r).
        cap: soft cap of the logits, > 0, or None.
        window: how many tokens before its own a token attends to, or None for all. A network whose
            window of W tokens counts the own one has W - 1.
        positional: whether B_t depends on the position alone, as a rotation does. The certificate
            needs that, and takes your word for it.
    """

    values: Float[Array, "*batch T d"]
    queries: Float[Array, "*batch T r"]
    keys: Float[Array, "*batch T r"]
    w_query: Float[Array, "*batch d r"]
    transforms: Float[Array, "*batch T r r"] | None = None
    scale: float | None = None
    cap: float | None = None
    window: int | None = None
    positional: bool = False

    @classmethod
    def plain(
        cls, x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike, *, bound: ArrayLike | None = None
    ) -> "AttentionStage":
        """Make the stage of embeddings and matrices, as the other functions take them.

        Args:
            x: token embeddings (..., T, d).
            w_query: W_Q, (..., d, r).
            w_key: W_K, (..., d, r).
            bound: c of a bounded context, > 0, in the unit of x; None leaves it unbounded.

        Raises:
            ValueError: if the shapes do not fit, the arrays are not floating point or the bound is
                not positive.
        """
        x, w_query, w_key = check_arguments(x, w_query, w_key, bound)
        values = bounded(x, bound)
        return cls(values, _matmul(x, w_query), _matmul(values, w_key), w_query)

    @property
    def factor(self) -> float:
        """c: what q_t . k_s is multiplied by."""
        return 1 / math.sqrt(self.keys.shape[-1]) if self.scale is None else self.scale

    @property
    def is_plain(self) -> bool:
        """Whether D_t is that of embeddings and matrices, but for where the keys come from."""
        return self.transforms is None and self.cap is None and self.window is None


# What the public functions take first: embeddings, or a stage instead of three arrays.
Tokens = ArrayLike | AttentionStage


def prepared(
    x: Tokens,
    w_query: ArrayLike | None = None,
    w_key: ArrayLike | None = None,
    bound: ArrayLike | None = None,
) -> tuple[Start, Float[Array, "*weights d r"]]:
    """Check arguments and return the geometry that blocks are made from, and W_Q.

    Of a stage, W_Q and the queries are in the unit in which c is 1/sqrt(r).

    Raises:
        ValueError: if they do not fit together.
    """
    if isinstance(x, AttentionStage):
        return _geometry_of(checked(x, w_query, w_key, bound))
    x, w_query, w_key = checked_arrays(x, w_query, w_key, bound)
    return Start(*geometry(x, w_query, w_key, bound)), w_query


def plain_projections(
    x: Tokens, w_query: ArrayLike | None, w_key: ArrayLike | None, bound: ArrayLike | None
) -> Projections:
    """Check arguments and return the projections of what is plain, a stage or arrays.

    Raises:
        ValueError: if they do not fit together.
    """
    if not isinstance(x, AttentionStage):
        return projections(*checked_arrays(x, w_query, w_key, bound), bound)
    stage = checked(x, w_query, w_key, bound)
    own, values, w_query, keys = _in_unit(stage)
    rank = max(part.ndim for part in (own, values, w_query, keys))
    parts = (with_rank(part, rank) for part in (values, own, _matmul(values, w_query), keys))
    leading = jnp.broadcast_shapes(*(part.shape[:-2] for part in (own, values, w_query, keys)))
    return Projections(*(jnp.broadcast_to(part, (*leading, *part.shape[-2:])) for part in parts))


def checked_arrays(
    x: ArrayLike, w_query: ArrayLike | None, w_key: ArrayLike | None, bound: ArrayLike | None
) -> tuple[Array, Array, Array]:
    """Return embeddings and matrices, as `check_arguments` does.

    Raises:
        ValueError: if a matrix is missing, or they do not fit together.
    """
    if w_query is None or w_key is None:
        raise ValueError(
            "w_query and w_key are missing: expected x, w_query and w_key, or one AttentionStage"
        )
    return check_arguments(x, w_query, w_key, bound)


def checked(
    stage: AttentionStage,
    w_query: ArrayLike | None = None,
    w_key: ArrayLike | None = None,
    bound: ArrayLike | None = None,
) -> AttentionStage:
    """Return a stage with arrays of floating dtypes, at least float32.

    Raises:
        ValueError: if its fields do not fit together, or anything is given beside it that it
            holds itself.
    """
    if not (w_query is None and w_key is None and bound is None):
        raise ValueError(
            "an AttentionStage was given with w_query, w_key or bound: expected the stage alone, "
            "which holds them"
        )
    given = {name: getattr(stage, name) for name in _ARRAYS}
    arrays: dict[str, Any] = {
        name: floating(name, array) for name, array in given.items() if array is not None
    }
    _check_shapes(**{name: array.shape for name, array in arrays.items()})
    check_logits(stage.scale, stage.cap, stage.window, shortest_window=1)
    return replace(stage, **arrays)


def check_logits(
    scale: float | None, cap: float | None, window: int | None, *, shortest_window: int
) -> None:
    """Refuse numbers that make no logits: None stands for the default of each.

    Raises:
        ValueError: it names the number.
    """
    for name, value in (("scale", scale), ("cap", cap)):
        if value is not None and not is_positive(value):
            raise ValueError(f"{name} is {value!r}: expected a finite number > 0, or None")
    if window is not None and (type(window) is not int or window < shortest_window):
        raise ValueError(f"window is {window!r}: expected an integer >= {shortest_window}, or None")


def weights_alone(name: str, w_query: Tokens, w_key: ArrayLike | None) -> tuple[Array, Array]:
    """Return matrices as `check_weights` does, for a function of the coupling A.

    Raises:
        ValueError: if a stage is given, or the matrices are missing or do not fit.
    """
    arrays = refuse_stage(
        name,
        w_query,
        why="with rotated, normalised or capped logits there is no single matrix A = W_K W_Q^T c "
        "for all positions; give w_query and w_key",
    )
    if w_key is None:
        raise ValueError("w_key is missing: expected w_query and w_key")
    return check_weights(arrays, w_key)


def refuse_stage(name: str, argument: Tokens, *, why: str) -> ArrayLike:
    """Return an argument that is no stage, where embeddings and matrices alone will do.

    Raises:
        ValueError: if the argument is a stage.
    """
    if isinstance(argument, AttentionStage):
        raise ValueError(f"{name} of an AttentionStage is not defined: {why}")
    return argument


def by_head(function: Callable[[AttentionStage], Any], stage: AttentionStage) -> Any:
    """Apply a function to one head of one sequence after the other, in the same memory."""
    arrays = [getattr(stage, name) for name in _ARRAYS]
    ranks = [3 if name == "transforms" else 2 for name in _ARRAYS]
    given = [
        (array, array.shape[: array.ndim - rank])
        for array, rank in zip(arrays, ranks, strict=True)
        if array is not None
    ]
    leading = jnp.broadcast_shapes(*(axes for _, axes in given))
    if leading == ():
        return function(stage)
    # Each array once, however many heads share it.
    places = [
        jnp.broadcast_to(jnp.arange(math.prod(axes)).reshape(axes), leading).ravel()
        for _, axes in given
    ]
    flat = [array.reshape(-1, *array.shape[len(axes) :]) for array, axes in given]

    def one(indices: list[Array]) -> Any:
        picked = iter([array[index] for array, index in zip(flat, indices, strict=True)])
        fields: dict[str, Any] = {
            name: None if array is None else next(picked)
            for name, array in zip(_ARRAYS, arrays, strict=True)
        }
        return function(replace(stage, **fields))

    found = lax.map(one, places)
    return jax.tree.map(lambda part: part.reshape(*leading, *part.shape[1:]), found)


def _check_shapes(**shapes: tuple[int, ...]) -> None:
    values, w_query, keys = shapes["values"], shapes["w_query"], shapes["keys"]
    if min(map(len, (values, w_query, keys))) < 2 or min(values[-2], *w_query[-2:]) < 1:
        raise ValueError(
            f"values have shape {values}, keys {keys} and w_query {w_query}: expected "
            "(..., T, d), (..., T, r) and (..., d, r) with T, d and r >= 1"
        )
    (length, width), rank = values[-2:], w_query[-1]
    expected = {
        "queries": (length, rank),
        "keys": (length, rank),
        "w_query": (width, rank),
        "transforms": (length, rank, rank),
    }
    for name, last in expected.items():
        shape = shapes.get(name, last)
        if shape[max(len(shape) - len(last), 0) :] != last:
            raise ValueError(
                f"{name} has shape {shape}: expected (..., {', '.join(map(str, last))}), to fit "
                f"values of shape {values} and w_query of shape {w_query}"
            )
    check_leading_axes(
        **{name: shape[: -3 if name == "transforms" else -2] for name, shape in shapes.items()}
    )


def _in_unit(stage: AttentionStage) -> tuple[Array, Array, Array, Array]:
    """Return queries, relative values, W_Q and keys, such that c is 1/sqrt(r)."""
    unit = 1.0 if stage.scale is None else stage.scale * math.sqrt(stage.keys.shape[-1])
    values = stage.values - lax.stop_gradient(stage.values[..., :1, :])
    keys = stage.keys
    if stage.cap is None:
        # A shift of all keys moves all logits of a row, and no covariance. With a cap it does.
        keys = keys - lax.stop_gradient(keys[..., :1, :])
    return stage.queries * unit, values, stage.w_query * unit, keys


def _geometry_of(stage: AttentionStage) -> tuple[Start, Array]:
    own, values, w_query, keys = _in_unit(stage)
    queries = _matmul(values, w_query)
    weights, slopes = weights_and_slopes(own, keys, stage.cap, stage.window)
    weights = jnp.where(after_nonfinite(values, queries, keys)[..., None], jnp.nan, weights)
    values, queries, keys = (zero_nonfinite(part) for part in (values, queries, keys))
    return Start(values, queries, keys, weights, slopes, stage.transforms), w_query
