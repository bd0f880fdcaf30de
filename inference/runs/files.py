"""Files of a run directory: written whole or not at all, read with a clear error."""

import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}")


class RunError(ValueError):
    """A run directory cannot be used: the message is one line that says why and what to do."""


class WriteError(OSError):
    """A file cannot be written: the message is one line that says which and why.

    Args:
        path: of the file.
        error: what the system said.
    """

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"{path}: cannot be written: {error.strerror or error}; what was saved before is as it "
            "was: make room or give permission there, and go on, or name another place"
        )
        self.errno = error.errno
        self._arguments = path, error

    def __reduce__(self) -> tuple[type, tuple[Path, OSError]]:
        return type(self), self._arguments


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or, after any failure, as it was."""
    with replacing(path) as stream:
        stream.write(text.encode())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that takes its name only when it is whole."""
    with replacing_path(path) as temporary, temporary.open("xb") as stream:
        yield stream


@contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """Yield a path beside this one; its file takes this one's name when it is whole, on disk.

    Raises:
        WriteError: if it cannot be written; what was there is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            fsync(temporary)
            os.replace(temporary, path)
            fsync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn what the system says of a file that cannot be written into one clear line."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(path, error) from None


def fsync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk: a machine may die as well as a process."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def final_name(name: str) -> str:
    """Return the name that a temporary file is to take, and any other name as it is."""
    match = _TEMPORARY.fullmatch(name)
    return match[1] if match else name


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        RunError: if it is missing, or no file that can be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise RunError(f"{path}: is missing from the run") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RunError: if the file is missing, or holds something else.
    """
    stored = read_bytes(path)
    try:
        content = json.loads(stored.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, too long a number, too deep
        raise RunError(f"{path}: damaged: {error}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path}: damaged: expected an object, got {type(content).__name__}")
    return content
