"""Public functions as one compiled program each."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.typing import ArrayLike

from probattn.arguments import check_bound

_ARRAYS = ("x", "w_query", "w_key")  # the first arguments of every such function


def one_program[**P, R](*static: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function of arrays so that a call by itself runs as one compiled program.

    Operation by operation, a first call would compile some hundred programs, and every later one
    would start as many: it would take several hundred times as long. A call under a transformation
    is left as it is, since what it is part of is compiled as a whole. So is a call with anything
    but arrays, which the function converts or refuses.

    Args:
        static: names of the options that a program is compiled for. `bound` is none of them.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        program = jax.jit(function, static_argnames=static)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            named: dict[str, Any] = kwargs
            first = len(_ARRAYS)
            arrays = [*args[:first], *(named[name] for name in _ARRAYS if name in named)]
            options = [*args[first:], *(named[name] for name in static if name in named)]
            bound = named.get("bound")
            if (
                all(map(_is_array, arrays))
                and all(isinstance(option, str | bool | float) for option in options)
                and not isinstance(bound, jax.core.Tracer)
            ):
                check_bound(bound)  # inside of a program it would be taken at its word
                if isinstance(bound, int):
                    named["bound"] = float(bound)  # an integer of any size
                try:
                    return program(*args, **kwargs)
                except (TypeError, ValueError):
                    function(*args, **kwargs)  # refuses the same, without JAX's own remarks
                    raise
            return function(*args, **kwargs)

        return call

    return decorate


def _is_array(value: object) -> bool:
    is_number = isinstance(value, bool | int | float | complex | jax.core.Tracer)
    return isinstance(value, ArrayLike) and not is_number
