"""Target: what the public array functions take and refuse, by shape, dtype, and options.

Nothing is computed: they are traced. The oracle says which arguments are right, and of which shape
the result is.
"""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import probattn as pa
from tests.robustness.fuzzing.target import Target, refused, require

_DTYPES = ["float32", "float64", "float16", "bfloat16", "int32", "bool", "complex64", "O", "U"]
_LEADING = [(), (2,), (1,), (3,), (0,), (2, 1)]
_sizes = st.sampled_from([3, 3, 3, 0, 1, 2])
_array = st.one_of(
    st.tuples(
        st.sampled_from(_LEADING), _sizes, _sizes, st.sampled_from(_DTYPES[:2] * 6 + _DTYPES)
    ),
    st.tuples(st.just(()), st.just(3), st.just(3), st.just("float32")),
)
_BAD = [None, "x", [[1.0], [1.0, 2.0]], 1.0, [], {}, b"x"]
_given = st.one_of(*[_array] * 6, st.sampled_from(range(len(_BAD))))
_bounds = st.sampled_from(
    [None, None, None, 1.0, 2, np.float32(0.5), 0.0, -1.0, math.nan, math.inf, "x", [1.0], 1j, {}]
)
# Of every function: where d stands in the shape of its result, after the leading axes and T.
_OF_X = {
    "conditional_mean": ("T", "d"),
    "residual": ("T", "d"),
    "reduced_blocks": ("T", "r", "r"),
    "jacobian_blocks": ("T", "d", "d"),
    "log_det": ("T",),
    "relaxed_barrier": ("T",),
    "stability_margin": ("T",),
    "infeasible": ("T",),
    "embedding_margin": ("T",),
    "certificate": ("T",),
    "margin_lower_bound": ("T",),
}
_OF_WEIGHTS = {"coupling": ("d", "d"), "is_proper": (), "AttentionResidual": None}
_OF_PAIRS = {"attention_weights": ("T", "T")}
_OPTIONS: dict[str, tuple[str, list[Any]]] = {
    "relaxed_barrier": ("delta", [1e-3, 1, 0.0, -1.0, math.nan, math.inf, "x", None]),
    "stability_margin": ("kind", ["sigma_min", "reduced", "det", "log_det", "", None, 1, []]),
}


def _valid_option(name: str, value: Any) -> bool:
    match name:
        case "delta":
            return isinstance(value, int | float) and 0 < value < math.inf
        case "kind":
            return value in ("sigma_min", "reduced", "det", "log_det")
        case _:
            return type(value) is int and value >= 0


def _valid_bound(value: Any) -> bool:
    return value is None or (isinstance(value, int | float | np.floating) and 0 < value < math.inf)


def _make(given: Any) -> Any:
    if isinstance(given, int):
        return _BAD[given]
    leading, rows, columns, dtype = given
    array = np.zeros((*leading, rows, columns))
    return jnp.asarray(array, dtype) if dtype == "bfloat16" else array.astype(dtype)


def _matrix(given: Any) -> bool:
    """Whether it is an array of floating-point numbers with at least two axes."""
    return not isinstance(given, int) and given[3] in _DTYPES[:4]


def _leading(*given: Any) -> tuple[int, ...] | None:
    try:
        return np.broadcast_shapes(*(each[0] for each in given))
    except ValueError:
        return None


def _result(name: str, arrays: list[Any]) -> tuple[int, ...] | None:
    """Shape of the result, None where the arguments are wrong."""
    if not all(map(_matrix, arrays)) or (leading := _leading(*arrays)) is None:
        return None
    if name in _OF_PAIRS:
        sizes = {"T": arrays[0][1]}
        if arrays[0][1:3] != arrays[1][1:3] or arrays[0][2] < 1:
            return None
    else:
        *own, w_query, w_key = arrays
        sizes = {"d": w_query[1], "r": w_query[2]}
        if w_query[1:3] != w_key[1:3] or min(w_query[1:3]) < 1:
            return None
        if own:
            sizes["T"] = own[0][1]
            if own[0][2] != w_query[1] or own[0][1] < 1:
                return None
    axes = (_OF_X | _OF_WEIGHTS | _OF_PAIRS)[name]
    return leading if axes is None else (*leading, *(sizes[axis] for axis in axes))


def shapes(folder: Path) -> Target:
    """Arguments of any shape, dtype and kind to every public function of arrays."""
    del folder
    names = [*_OF_X, *_OF_WEIGHTS, *_OF_PAIRS]

    def check(given: tuple[str, list[Any], Any, int]) -> str:
        name, arrays, bound, choice = given
        arrays = arrays if name in _OF_X else arrays[1:]
        options: dict[str, Any] = {}
        valid = True
        if name not in (*_OF_PAIRS, "coupling"):
            options["bound"], valid = bound, _valid_bound(bound)
        if name in _OPTIONS:
            option, values = _OPTIONS[name]
            options[option] = values[choice % len(values)]
            valid = valid and _valid_option(option, options[option])
        expected = _result(name, arrays) if valid else None
        call = functools.partial(getattr(pa, name), *map(_make, arrays), **options)
        try:
            if name == "AttentionResidual":
                call()
                found = expected or ()
            else:
                found = jax.tree.leaves(jax.eval_shape(call))[0].shape
        except ValueError as error:
            require(expected is None, f"what is right was refused: {error}")
            return refused(error)
        require(expected is not None, f"a result of shape {found} of wrong arguments")
        require(found == expected, f"a result of shape {found}, expected {expected}")
        return "accepted"

    inputs = st.tuples(
        st.sampled_from(names),
        st.lists(_given, min_size=3, max_size=3),
        _bounds,
        st.integers(0, 9),
    )
    return Target("shapes", inputs, check)
