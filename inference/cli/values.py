"""What an argument of the command may be: a number in plain digits, a path that is not empty.

Python itself would also take 1_0_0 and the digits of every script for numbers, and the empty path
for the working directory.
"""

import re
from pathlib import Path
from typing import Any

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

PLAIN_VALUES = ConstructorRegistry()
"""How tyro reads integers, numbers and paths."""

_BITS = 63  # of an integer, as in configuration files


def plain_integer(text: str) -> int:
    """Read an integer.

    Raises:
        ValueError: if the text is none, or one of more than 63 bits.
    """
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ValueError(f"got {text!r}, expected an integer in the digits 0 to 9")
    # The digits are counted first: Python refuses to read thousands of them.
    if len(text) > 4000 or int(text).bit_length() > _BITS:
        digits = len(text.lstrip("+-"))
        raise ValueError(f"got an integer of {digits} digits, expected at most {_BITS} bits")
    return int(text)


def plain_number(text: str) -> float:
    """Read a floating-point number.

    Raises:
        ValueError: if the text is none.
    """
    if not text.isascii() or "_" in text:
        raise ValueError(f"got {text!r}, expected a number in the digits 0 to 9")
    return float(text)


def plain_path(text: str) -> Path:
    """Read a path.

    Raises:
        ValueError: if the text is empty.
    """
    if not text:
        raise ValueError("got an empty path, expected the name of a file or folder; . is this one")
    return Path(text)


@PLAIN_VALUES.primitive_rule
def _plain_value(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    readers: dict[Any, Any] = {int: plain_integer, float: plain_number, Path: plain_path}
    kind = info.type
    if kind not in readers:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=lambda arguments: readers[kind](arguments[0]),
        is_instance=lambda value: isinstance(value, int | float if kind is float else kind),
        str_from_instance=lambda value: [str(value)],
    )
