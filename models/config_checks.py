"""Checks that the dataclasses of a configuration share."""

from typing import Any


def check_integers(config: Any, table: str, /, **least: int | None) -> None:
    """Refuse fields that are no integers of at least this size, None for any size.

    Raises:
        ValueError: naming the field as a configuration file does, `table.field`.
    """
    for name, smallest in least.items():
        value = getattr(config, name)
        integer = isinstance(value, int) and not isinstance(value, bool)
        if not integer or (smallest is not None and value < smallest):
            expected = "an integer" if smallest is None else f"an integer >= {smallest}"
            raise ValueError(f"{table}.{name} is {value!r}: expected {expected}")
