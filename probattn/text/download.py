"""Files of an archive on the web: downloaded by pooch, verified at every use, and kept.

Neither the host nor the copies that are kept are trusted: their checksums are pinned. `DataError`
stands here and not in `corpora`, which uses it too and so imports this file: imports run one way.
"""

import hashlib
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from probattn.messages import one_line
from probattn.user_cache import user_cache


class DataError(ValueError):
    """A corpus cannot be had: the message is one line that says why and what to do."""


@dataclass(frozen=True)
class Archive:
    """A zip archive on the web, and those of its files that are used.

    Attributes:
        name: what messages call it.
        url: where it is downloaded from.
        sha256: its SHA-256, hexadecimal.
        folder: the folder inside it that holds the files.
        files: (name inside `folder`, number of bytes, SHA-256) of each file used.
    """

    name: str
    url: str
    sha256: str
    folder: str
    files: tuple[tuple[str, int, str], ...]


def read_archive(archive: Archive, cache_dir: Path | None = None) -> list[bytes]:
    """Return the contents of an archive's files, in their order.

    Args:
        archive: what to read.
        cache_dir: directory that holds the files, directly or in `archive.folder`. By default the
            one that the environment variable `PROBATTN_DATA` names, else `probattn` in the user's
            cache. Files that lack are downloaded into it, except into `PROBATTN_DATA`.

    Raises:
        DataError: if the files cannot be had, or are not of the pinned sizes and checksums.
    """
    shared = os.environ.get("PROBATTN_DATA") if cache_dir is None else None
    root = Path(shared) if shared else cache_dir or user_cache()
    if root is None:
        raise DataError("no home directory to keep downloads in: set XDG_CACHE_HOME to a directory")
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
        _download(archive, folder)
    return [_verified(folder / name, size, digest) for name, size, digest in archive.files]


def _download(archive: Archive, folder: Path) -> None:
    """Put the archive's files into a folder, each whole or not at all."""
    names = [name for name, _, _ in archive.files]
    instead = (
        f"put {' and '.join(names)} in {str(folder)!r}, or set PROBATTN_DATA to the directory that "
        "holds them, or give the path of another UTF-8 text file as data.source"
    )
    try:
        import pooch
    except ImportError:
        raise DataError(
            f"{archive.name}: pooch is not installed: expected it for a download; run "
            f"pip install 'probattn[download]', or {instead}"
        ) from None
    members = [f"{archive.folder}/{name}" for name in names]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download.") as scratch:
            pooch.retrieve(
                archive.url,
                known_hash=f"sha256:{archive.sha256}",
                fname="archive.zip",
                path=scratch,
                processor=pooch.Unzip(members, extract_dir="."),
                # The host of WikiText-2 answers the default User-Agent with status 403.
                downloader=pooch.HTTPDownloader(timeout=30, headers={"User-Agent": "probattn"}),
            )
            paths = [Path(scratch, member) for member in members]
            for path, (_, size, digest) in zip(paths, archive.files, strict=True):
                _verified(path, size, digest)
            for path in paths:
                os.replace(path, folder / path.name)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{archive.name}: cannot download {archive.url} into {str(folder)!r}: "
            f"{one_line(error)}; {instead}"
        ) from None


def _verified(path: Path, size: int, digest: str) -> bytes:
    """Return the contents of a file, which are of the pinned size and checksum."""
    try:
        with path.open("rb") as file:
            data = file.read(size + 1)
    except OSError as error:
        raise DataError(
            f"{str(path)!r}: cannot be read: {one_line(error)}; make it readable or delete it"
        ) from None
    if len(data) > size:
        raise DataError(f"{str(path)!r}: got more than the expected {size} bytes; do not use it")
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise DataError(
            f"{str(path)!r}: got {len(data)} bytes with SHA-256 {found}, expected {size} bytes "
            f"with {digest}; delete a damaged copy, or give another text's path as data.source"
        )
    return data
