"""Files that are written whole or not at all, and read with a clear error.

`is_written_through` decides for every output of the library how its path is opened.
"""

import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from probattn.messages import is_utf8

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


def is_written_through(path: Path) -> bool:
    """Decide how an output is opened: a device or a pipe is written through, a file is replaced.

    Links are followed. Disks are refused with folders and sockets: nobody means them here.

    Raises:
        ValueError: if something else than a file lies there.
        WriteError: if what lies there cannot be found out.
    """
    with write_errors(path):
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:  # a new name, or a link to one
            return False
    if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
        return True
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a disk or a socket"
        raise ValueError(f"{path}: is {what}: expected a file, a pipe or a new name")
    return False


def check_outputs(*paths: Path) -> None:
    """Check that files can be written, before the work whose results they are to hold.

    Raises:
        ValueError: if something else than a file lies there, see `is_written_through`.
        WriteError: if no file can be made there.
    """
    for path in paths:
        if not is_written_through(path):
            _, temporary = _places(path)
            with write_errors(path):
                folder = next(each for each in temporary.parents if each.exists())
                probe = folder / temporary.name
                probe.touch(exist_ok=False)
                probe.unlink()


def check_new(path: Path, *, overwrite: bool) -> None:
    """Check that a file can be written which replaces another only on request.

    Raises:
        ValueError: if a file is there and is not to be replaced, or something else than a file
            lies there, see `is_written_through`.
        WriteError: if no file can be made there.
    """
    if not is_written_through(path) and path.exists() and not overwrite:
        raise ValueError(f"{path}: exists: name another file, or replace it with --overwrite")
    check_outputs(path)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open an output: a file takes its name only when it is whole, anything else is written to.

    Raises:
        ValueError: if something else than a file lies there, see `is_written_through`.
        WriteError: if it cannot be written; a file that was there is then as it was.
    """
    if is_written_through(path):
        with write_errors(path), open(os.open(path, os.O_WRONLY), "wb") as stream:
            yield stream
    else:
        with replacing_path(path) as temporary, temporary.open("xb") as stream:
            yield stream


@contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """Yield a path beside a file; what is written there takes its name when it is whole, on disk.

    Raises:
        WriteError: if it cannot be written; what was there is then as it was.
    """
    target, temporary = _places(path)
    with write_errors(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            fsync(temporary)
            os.replace(temporary, target)
            fsync(target.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _places(path: Path) -> tuple[Path, Path]:
    """Return a file, or that which a link leads to, and a temporary name beside it."""
    target = Path(os.path.realpath(path))
    return target, target.with_name(f".{target.name}.{secrets.token_hex(4)}")


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


def check_name(path: Path) -> None:
    """Refuse a run whose path is not UTF-8, since tensorstore opens no checkpoint there.

    Raises:
        RunError: if it is not.
    """
    if not is_utf8(str(path.absolute())):
        raise RunError(
            f"{path}: its path is not UTF-8: expected a run under a name in UTF-8, which alone "
            "checkpoints can have; rename the folder, or choose another"
        )


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


def check_setting(path: Path, wanted: Mapping[str, str]) -> None:
    """Keep what the parts in a folder are of, or check that they are of the same.

    Args:
        path: JSON file of the folder; written if it is not there.
        wanted: what the parts are of, by name.

    Raises:
        RunError: if it says otherwise.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(wanted, indent=2))
    found = read_json(path)
    for name, value in wanted.items():
        if found.get(name) != value:
            raise RunError(
                f"{path.parent}: holds parts of a study whose {name} is {found.get(name)!r}: "
                f"expected {value!r}; name another folder with --parts"
            )


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
