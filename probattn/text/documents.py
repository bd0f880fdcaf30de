"""Documents on disk as one text: a file, several, a folder or a pattern; plain or compressed."""

import codecs
import functools
import glob
import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from probattn.messages import one_line
from probattn.text.download import DataError
from probattn.text.pieces import Text

SEPARATOR = "\n\n"
"""What stands between two documents."""
LARGEST = 2**31 - 1
"""Most bytes of a text, of all its documents together and decompressed."""

_MOST_DOCUMENTS = 2**20
_BYTES = 2**20  # in one read
_GZIP = b"\x1f\x8b"  # begins no UTF-8 text


def find_documents(source: str | os.PathLike[str] | Sequence[str]) -> tuple[Path, ...]:
    """Find the files that a source names, each once and in sorted order.

    Args:
        source: path of a file; of a folder, which stands for all files below it but hidden ones; a
            pattern such as "texts/*.txt", where "**" stands for any folders; or several of these.
            A leading `~` is the user's home.

    Returns:
        Their paths, as they were named. Of a file that several names or links lead to, it is the
        path by the first of the names, and of several by one name, the first in sorted order.

    Raises:
        DataError: if there is no such file, a file is a device or a pipe, or they have more than
            2 GiB.
    """
    named = [source] if isinstance(source, str | bytes | os.PathLike) else source
    found: dict[str, Path] = {}  # by the true path, which all names of a file share
    size = 0
    for name in named:
        # An empty name would be the working directory, with all that lies in it.
        if not isinstance(name, str | os.PathLike) or name == "":
            raise DataError(f"{name!r}: expected the path of a UTF-8 text file, as a str or a Path")
        with _one_line_errors(name):
            here: dict[str, Path] = {}
            for path in _files(name):
                true = os.path.realpath(path)
                if true in found:
                    continue
                if true in here:
                    here[true] = min(here[true], path, key=Path.as_posix)
                    continue
                here[true] = path
                status = path.stat()
                if not stat.S_ISREG(status.st_mode):
                    # It could be read once at most, or for ever; a run reads its text again.
                    raise DataError(
                        f"{str(path)!r}: got a device or a pipe, expected a UTF-8 text file"
                    )
                size += status.st_size
                _check_size(name, size)
                if len(found) + len(here) > _MOST_DOCUMENTS:
                    raise DataError(
                        f"{str(name)!r}: has more than {_MOST_DOCUMENTS:,} files, expected fewer; "
                        "join the documents"
                    )
            found |= here
    return tuple(sorted(found.values(), key=Path.as_posix))


def documents_text(paths: Sequence[Path]) -> Text:
    r"""Return documents as one text, an empty line (`SEPARATOR`) between any two of them.

    Documents are UTF-8, plain or compressed by gzip. A byte-order mark at the start of a document
    is dropped, and the line ends `\r\n` and `\r` become `\n`, so that a file gives the same text,
    and the same checksum, whichever system saved it. Nothing else is changed: no Unicode
    normalisation. An empty document leaves no trace.

    Reading the text raises DataError if a document cannot be read, is not UTF-8 (the message gives
    the byte offset), or if all together have more than 2 GiB or no character.
    """
    return Text(functools.partial(_read, tuple(paths)))


def decoded(data: bytes, origin: str) -> str:
    """Return the text of one document's bytes, as `documents_text` reads it.

    Raises:
        DataError: if they are not UTF-8.
    """
    return "".join(piece for _, piece in _decoded(io.BufferedReader(io.BytesIO(data)), origin))


def _read(paths: tuple[Path, ...]) -> Iterator[str]:
    size, begun = 0, False
    for path in paths:
        first = True
        with _one_line_errors(path), path.open("rb") as file:
            for data, piece in _decoded(file, str(path)):
                size += data
                _check_size(path, size)
                if piece:
                    yield SEPARATOR + piece if first and begun else piece
                    first, begun = False, True
    if not begun:
        what = f"{str(paths[0])!r}: got an empty file" if len(paths) == 1 else "got empty files"
        raise DataError(f"{what}, expected a UTF-8 text file")


def _decoded(file: io.BufferedReader, origin: str) -> Iterator[tuple[int, str]]:
    """Yield the number of bytes and the characters of each part of a document."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = io.IncrementalNewlineDecoder(decoder, translate=True)
    done, begun = 0, False
    compressed = file.peek(2).startswith(_GZIP)
    stream = gzip.GzipFile(fileobj=file) if compressed else file
    while True:
        data = stream.read(_BYTES)
        done += len(data)
        try:
            piece = lines.decode(data, final=not data)
        except UnicodeDecodeError as error:
            offset = done - len(error.object) + error.start
            raise DataError(
                f"{origin!r}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
                f"{offset}; convert the file to UTF-8"
            ) from None
        if piece and not begun:
            piece, begun = piece.removeprefix("\ufeff"), True
        yield len(data), piece
        if not data:
            return


def _files(name: str | os.PathLike[str]) -> Iterator[Path]:
    path = Path(name).expanduser()
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        if not glob.has_magic(str(path)):
            where = "" if path.is_absolute() else f" in {Path.cwd()}"
            raise DataError(
                f"{str(name)!r}: no such file{where}, expected a UTF-8 text file"
            ) from None
        yield from _matching(path, name)
        return
    if not is_folder:
        yield path
        return
    empty = True
    for folder, below, files in os.walk(path, onerror=_raise):
        below[:] = [each for each in below if not each.startswith(".")]
        for file in files:
            if not file.startswith("."):
                empty = False
                yield Path(folder, file)
    if empty:
        raise DataError(f"{str(name)!r}: got a folder without files, expected UTF-8 text files")


def _matching(path: Path, name: str | os.PathLike[str]) -> Iterator[Path]:
    empty = True
    for match in glob.iglob(str(path), recursive=True):
        if not os.path.isdir(match):
            empty = False
            yield Path(match)
    if empty:
        raise DataError(f"{str(name)!r}: no file matches, expected a pattern of UTF-8 text files")


@contextmanager
def _one_line_errors(name: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    # ~ without a home; a NUL in the path; a compressed file that is cut or damaged
    except (OSError, RuntimeError, ValueError, EOFError, zlib.error) as error:
        raise DataError(f"{str(name)!r}: cannot be read: {one_line(error)}") from None


def _check_size(name: str | os.PathLike[str], size: int) -> None:
    if size > LARGEST:
        raise DataError(
            f"{str(name)!r}: has {size} bytes, expected at most {LARGEST}, as positions are "
            "numbers of 32 bits; give a part of the text"
        )


def _raise(error: OSError) -> None:
    raise error
