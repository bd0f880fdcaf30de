"""Checks that configurations and models share."""

from typing import Any

import jax
import numpy as np


def check_integers(config: Any, table: str, /, **least: int | None) -> None:
    """Refuse fields that are no integers of at least this size, None for any size, or of 64 bits.

    Raises:
        ValueError: naming the field as a configuration file does, `table.field`.
    """
    for name, smallest in least.items():
        value = getattr(config, name)
        integer = isinstance(value, int) and not isinstance(value, bool)
        if integer and value.bit_length() > 63:  # no array holds it
            raise ValueError(
                f"{table}.{name} is an integer of {value.bit_length()} bits: expected at most 63"
            )
        if not integer or (smallest is not None and value < smallest):
            expected = "an integer" if smallest is None else f"an integer >= {smallest}"
            raise ValueError(f"{table}.{name} is {value!r}: expected {expected}")


def check_symbols(name: str, symbols: Any, vocabulary_size: int) -> None:
    """Refuse symbols outside a vocabulary: JAX would take the nearest that there is.

    Of traced arrays nothing is known.

    Raises:
        ValueError: naming the argument.
    """
    if isinstance(symbols, jax.core.Tracer):
        return
    symbols = np.asarray(symbols)  # in a jit, JAX would trace even constants
    lowest, highest = symbols.min(), symbols.max()
    if not (lowest >= 0 and highest < vocabulary_size):  # nor NaN
        raise ValueError(
            f"{name} are {lowest} to {highest}: expected symbols from 0 to {vocabulary_size - 1}, "
            f"of {vocabulary_size} that there are"
        )
