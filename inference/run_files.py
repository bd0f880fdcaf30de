"""Files of a run directory: written whole or not at all, read with a clear error, locked."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import filelock


class RunError(ValueError):
    """A run directory cannot be used: the message is one line that says why and what to do."""


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or, after any failure, as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as stream:
        stream.write(text.encode())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that takes its name only when it is whole."""
    with replacing_path(path) as temporary, temporary.open("xb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """A path beside this one, for a file that takes this one's name when it is whole."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a run directory.

    Raises:
        RunError: if another process holds it.
    """
    lock = filelock.FileLock(path / "lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise RunError(f"{path}: another process is writing to this run") from None
    try:
        yield
    finally:
        lock.release()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RunError: if the file is missing, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: is missing from the run") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: damaged: {error}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path}: damaged: expected an object, got {type(content).__name__}")
    return content
