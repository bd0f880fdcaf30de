"""Checks of what the public functions take: x, W_Q, W_K, the bound, numbers and switches."""

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float


def check_arguments(
    x: ArrayLike, w_query: ArrayLike, w_key: ArrayLike, bound: ArrayLike | None
) -> tuple[Float[Array, "*batch T d"], Float[Array, "*weights d r"], Float[Array, "*weights d r"]]:
    """Return arguments of public functions as arrays of one floating dtype, at least float32.

    Raises:
        ValueError: if a shape, a dtype or the bound does not fit.
    """
    check_bound(bound)
    x = floating("x", x)
    w_query, w_key = check_weights(w_query, w_key)
    d = w_query.shape[-2]
    if x.ndim < 2 or x.shape[-1] != d:
        raise ValueError(
            f"x has shape {x.shape}: expected (..., T, d) with d = {d}, "
            f"to fit w_query of shape {w_query.shape}"
        )
    if x.shape[-2] < 1:
        raise ValueError(f"x has shape {x.shape}: expected (..., T, d) with T >= 1")
    check_leading_axes(x=x.shape[:-2], w_query=w_query.shape[:-2], w_key=w_key.shape[:-2])
    return x, w_query, w_key


def check_weights(
    w_query: ArrayLike, w_key: ArrayLike
) -> tuple[Float[Array, "*batch d r"], Float[Array, "*batch d r"]]:
    """Return projection matrices as arrays of one shape and floating dtype, at least float32.

    Raises:
        ValueError: if a shape or a dtype does not fit.
    """
    w_query = floating("w_query", w_query)
    w_key = floating("w_key", w_key)
    if w_query.ndim < 2 or w_key.ndim < 2 or w_query.shape[-2:] != w_key.shape[-2:]:
        raise ValueError(
            f"w_query has shape {w_query.shape} and w_key {w_key.shape}: "
            "expected both as (..., d, r) with the same d and r"
        )
    if min(w_query.shape[-2:]) < 1:
        raise ValueError(
            f"w_query has shape {w_query.shape}: expected (..., d, r) with d >= 1 and r >= 1"
        )
    check_leading_axes(w_query=w_query.shape[:-2], w_key=w_key.shape[:-2])
    shape = jnp.broadcast_shapes(w_query.shape, w_key.shape)
    return jnp.broadcast_to(w_query, shape), jnp.broadcast_to(w_key, shape)


def check_bound(bound: ArrayLike | None) -> None:
    """Refuse a bound that is no positive finite number; a traced one is taken at its word.

    Raises:
        ValueError: if it is anything else.
    """
    if bound is None:
        return
    shape = getattr(bound, "shape", ())
    if shape != ():
        raise ValueError(f"bound has shape {shape}: expected one number > 0, or None")
    if isinstance(bound, jax.core.Tracer):
        return
    if not is_positive(bound):
        raise ValueError(f"bound is {bound!r}: expected a finite number > 0, or None")


def is_positive(value: object) -> bool:
    """Tell whether something is a finite number > 0; texts, lists and truth values are none."""
    return _as_finite(value) > 0


def is_non_negative(value: object) -> bool:
    """Tell whether something is a finite number >= 0; texts, lists and truth values are none."""
    return _as_finite(value) >= 0


def _as_finite(value: object) -> float:
    """Return a finite number as a float, and NaN for anything that is none."""
    if isinstance(value, str | bytes | bool):
        return math.nan
    try:
        number = float(cast(float, value))
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def check_switches(config: Any, table: str, /, *names: str) -> None:
    """Refuse fields that are not True or False: a text such as "no" would count as True.

    Raises:
        ValueError: naming the field as a configuration file does, `table.field`.
    """
    for name in names:
        value = getattr(config, name)
        if type(value) is not bool:
            raise ValueError(f"{table}.{name} is {value!r}: expected True or False")


def floating(name: str, array: ArrayLike) -> Float[Array, "..."]:
    """Return an argument as an array of a floating dtype, at least float32.

    Raises:
        ValueError: if it is no array of a floating-point dtype; it names the argument.
    """
    try:
        array = jnp.asarray(array)
    except (TypeError, ValueError):  # a text, an object, lists of several lengths
        raise ValueError(
            f"{name} is a {type(array).__name__} that is no array: expected numbers of a "
            "floating-point dtype"
        ) from None
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {array.dtype}: expected a floating-point dtype")
    # Half precision has no LAPACK, and too few digits for a determinant.
    return array.astype(jnp.float32) if array.dtype.itemsize < 4 else array


def check_leading_axes(**shapes: tuple[int, ...]) -> None:
    """Refuse leading axes that do not broadcast.

    Raises:
        ValueError: it names the arguments and their shapes.
    """
    try:
        jnp.broadcast_shapes(*shapes.values())
    except ValueError:
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(
            f"leading axes do not broadcast: got {given}; expected shapes that NumPy broadcasts"
        ) from None
