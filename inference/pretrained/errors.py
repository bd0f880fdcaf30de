"""What is wrong with somebody else's model, in one line, and JSON that nobody vouches for."""

import json
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

from probattn.messages import legible, one_line

MOST_JSON = 2**27
"""Largest JSON file that is read, in bytes. The largest tokenizers have a quarter of it."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = 120


class PretrainedError(ValueError):
    """A model of somebody else cannot be read: one line says why and what to do.

    Args:
        place: the file or folder that is at fault.
        reason: what is wrong with it.
    """

    def __init__(self, place: Path | str, reason: str) -> None:
        super().__init__(place, reason)  # these arguments keep it picklable
        self._text = f"{legible(str(place))}: {legible(' '.join(reason.split()))}"

    def __str__(self) -> str:
        return self._text


def short(value: object) -> str:
    """Return the repr of a value of somebody else, which may be huge or deeply nested."""
    return _SHORT.repr(value)


def system_says(error: OSError) -> str:
    """Return why the system did not open a file."""
    return f"cannot be read: {error.strerror or one_line(error)}"


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most `MOST_JSON` bytes.

    Raises:
        PretrainedError: if the file cannot be read, is larger or holds something else.
    """
    return parse_object(path, read_bytes(path, MOST_JSON))


def read_bytes(path: Path, most: int) -> bytes:
    """Read a file of at most so many bytes.

    Raises:
        PretrainedError: if the file cannot be read or is larger.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(most + 1)
    except OSError as error:
        raise PretrainedError(path, system_says(error)) from None
    if len(data) > most:
        raise PretrainedError(path, f"has more than {most} bytes: expected a smaller file")
    return data


def parse_object(path: Path, data: bytes) -> dict[str, Any]:
    """Read a JSON object from the bytes of a file, in which no name may stand twice.

    Raises:
        PretrainedError: if the bytes are something else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise PretrainedError(path, f"names {short(twice)} twice: expected each name once")
        return found

    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except PretrainedError:
        raise
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, too long a number, too deep
        reason = f"holds no JSON: {one_line(error)}; download it again"
        raise PretrainedError(path, reason) from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise PretrainedError(path, f"holds a JSON {kind}: expected an object; download it again")
    return content
