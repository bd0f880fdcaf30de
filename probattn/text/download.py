"""Files of an archive on the web: downloaded, verified, unpacked and kept.

Neither the host nor the copies that are kept are trusted: their checksums are pinned, and verified
at every use. `DataError` and `one_line` stand here and not in `corpora`, which uses them too and so
imports this file: imports run one way.
"""

import hashlib
import http.client
import io
import os
import tempfile
import time
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from probattn.messages import one_line
from probattn.user_cache import user_cache

_TIMEOUT_SECONDS = 30.0  # without a byte
_WHOLE_SECONDS = 1800.0  # of a download


class DataError(ValueError):
    """A corpus cannot be had: the message is one line that says why and what to do."""


@dataclass(frozen=True)
class Archive:
    """A zip archive on the web, and those of its files that are used.

    Attributes:
        name: what messages call it.
        url: where it is downloaded from.
        size: its number of bytes.
        sha256: its SHA-256, hexadecimal.
        folder: the folder inside it that holds the files.
        files: (name inside `folder`, number of bytes, SHA-256) of each file used.
    """

    name: str
    url: str
    size: int
    sha256: str
    folder: str
    files: tuple[tuple[str, int, str], ...]


def read_archive(archive: Archive, cache_dir: Path | None = None) -> list[bytes]:
    """The contents of an archive's files, in their order.

    Args:
        archive: what to read.
        cache_dir: directory that holds the files, directly or in `archive.folder`. By default the
            one that the environment variable `PROBATTN_DATA` names, else `probattn` in the user's
            cache. Files that lack are downloaded into it, except into `PROBATTN_DATA`.

    Raises:
        DataError: if the files cannot be had, or are not of the pinned sizes and checksums.
    """
    shared = os.environ.get("PROBATTN_DATA") if cache_dir is None else None
    root = Path(shared) if shared else cache_dir or _user_cache()
    names = [name for name, _, _ in archive.files]
    for folder in (root / archive.folder, root):
        if all((folder / name).is_file() for name in names):
            break
    else:
        if shared:
            raise DataError(
                f"{archive.name}: PROBATTN_DATA={shared!r} holds no {' and '.join(names)}; put "
                "them there, or unset it to have them downloaded"
            )
        folder = root / archive.folder
        _store(folder, _unpack(archive, _download(archive, folder)))
    return [
        _verified(_read(folder / name, size + 1), size, digest, folder / name)
        for name, size, digest in archive.files
    ]


def _user_cache() -> Path:
    folder = user_cache()
    if folder is None:
        raise DataError("no home directory to keep downloads in: set XDG_CACHE_HOME to a directory")
    return folder


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise DataError(
            f"{str(path)!r}: cannot be read: {one_line(error)}; make it readable or delete it"
        ) from None


def _download(archive: Archive, folder: Path) -> bytes:
    # The host of WikiText-2 answers urllib's default User-Agent with status 403.
    request = urllib.request.Request(archive.url, headers={"User-Agent": "probattn"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            data = _received(response, archive.size + 1)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{archive.name}: cannot download {archive.url} ({one_line(error)}); put "
            f"{' and '.join(name for name, _, _ in archive.files)} in {str(folder)!r}, or set "
            "PROBATTN_DATA to the directory that holds them, or give the path of another UTF-8 "
            "text file as data.source"
        ) from None
    return _verified(data, archive.size, archive.sha256, archive.url)


def _received(response: http.client.HTTPResponse, most: int) -> bytes:
    """At most so many bytes, of a host that may send them one by one for ever."""
    deadline = time.monotonic() + _WHOLE_SECONDS
    data = bytearray()
    while len(data) < most and (part := response.read1(min(most - len(data), 2**16))):
        data += part
        if time.monotonic() > deadline:
            raise TimeoutError(f"got {len(data)} bytes in {_WHOLE_SECONDS:.0f} s")
    return bytes(data)


def _verified(data: bytes, size: int, digest: str, origin: object) -> bytes:
    """The data, if it is of the pinned size and checksum."""
    if len(data) > size:
        raise DataError(f"{str(origin)!r}: got more than the expected {size} bytes; do not use it")
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise DataError(
            f"{str(origin)!r}: got {len(data)} bytes with SHA-256 {found}, expected {size} bytes "
            f"with {digest}; delete a damaged copy, or give another text's path as data.source"
        )
    return data


def _unpack(archive: Archive, data: bytes) -> dict[str, bytes]:
    """Contents of the archive's files, by name. No name that the archive gives becomes a path."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as unpacked:
            contents = {}
            for name, size, digest in archive.files:
                member = f"{archive.folder}/{name}"
                declared = unpacked.getinfo(member).file_size
                if declared != size:  # before reading: a small archive can unpack to terabytes
                    raise DataError(
                        f"{archive.url!r}: {member} has {declared} bytes, expected {size}; do not "
                        "use it"
                    )
                contents[name] = _verified(unpacked.read(member), size, digest, member)
            return contents
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(
            f"{archive.url!r}: not the expected zip archive: {one_line(error)}"
        ) from None


def _store(folder: Path, contents: dict[str, bytes]) -> None:
    """Write files so that a failure or an interrupt leaves each whole or absent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():
            descriptor, partial = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                os.replace(partial, folder / name)
            except BaseException:
                os.unlink(partial)
                raise
    except OSError as error:
        raise DataError(
            f"{str(folder)!r}: cannot keep the downloaded files there: {one_line(error)}; set "
            "XDG_CACHE_HOME to a directory that can be written"
        ) from None
