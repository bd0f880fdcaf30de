"""GGUF files made byte by byte, right or wrong in any place."""

import struct
from collections.abc import Sequence
from typing import Any

STRING, ARRAY = 8, 9
_CODES = {0: "B", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 12: "d"}


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value(kind: int, content: Any) -> bytes:
    """A value of the metadata with its type; an array is (type of its elements, elements)."""
    return struct.pack("<I", kind) + _plain(kind, content)


def _plain(kind: int, content: Any) -> bytes:
    if kind == STRING:
        return text(content)
    if kind == ARRAY:
        inner, elements = content
        parts = [_plain(inner, each) for each in elements]
        return struct.pack("<IQ", inner, len(parts)) + b"".join(parts)
    return struct.pack("<" + _CODES[kind], content)


def key(name: str, kind: int, content: Any) -> bytes:
    return text(name) + value(kind, content)


def tensor(name: str, shape: Sequence[int], kind: int, offset: int) -> bytes:
    """What the header says of a tensor; the shape is as in NumPy."""
    dimensions = list(reversed(shape))
    return (
        text(name)
        + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
        + struct.pack("<IQ", kind, offset)
    )


def gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    alignment: int = 32,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file: its counts are those of the tensors and keys unless others are given."""
    given = (len(tensors), len(keys)) if counts is None else counts
    header = b"GGUF" + struct.pack("<IQQ", version, *given) + b"".join([*keys, *tensors])
    return header + bytes(-len(header) % alignment) + data
