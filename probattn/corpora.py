"""Text corpora: where training and validation text come from, and the checksum that names them."""

import hashlib
import http.client
import importlib
import io
import os
import platform
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from probattn.vocabulary import parse_tokenizer

NAMED_SOURCES = ("pydoc", "wikitext-2")
_TIMEOUT_SECONDS = 30.0


class DataError(ValueError):
    """A corpus cannot be had: the message is one line that says why and what to do."""


@dataclass(frozen=True)
class DataConfig:
    """Which text to train and validate on, and how to cut it into tokens.

    Attributes:
        source: "pydoc" (Python's own language reference, present wherever Python is), "wikitext-2"
            (the raw character version, downloaded once), or the path of a UTF-8 text file. A file
            with one of these two names is reached as "./pydoc".
        validation: path of a second UTF-8 text file to validate on. Without it, "wikitext-2" has
            its own validation text and the other sources hold out their end.
        validation_fraction: fraction of the characters, between 0 and 1, held out at the end of the
            text where there is no separate validation text.
        tokenizer: "character", or "bpe:SIZE" for byte-level byte pairs with SIZE tokens, such as
            "bpe:512".

    Raises:
        ValueError: if a field is of the wrong type or out of range.
    """

    source: str = "pydoc"
    validation: str | None = None
    validation_fraction: float = 0.1
    tokenizer: str = "character"

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source:
            raise ValueError(
                f"data.source: got {self.source!r}, expected {' or '.join(NAMED_SOURCES)}, or the "
                "path of a text file"
            )
        if self.validation is not None and (
            not isinstance(self.validation, str) or not self.validation
        ):
            raise ValueError(
                f"data.validation: got {self.validation!r}, expected the path of a text file, or "
                "None"
            )
        fraction = self.validation_fraction
        if not isinstance(fraction, float) or not 0.0 < fraction < 1.0:
            raise ValueError(
                f"data.validation_fraction: got {fraction!r}, expected a number strictly between 0 "
                "and 1"
            )
        try:
            parse_tokenizer(self.tokenizer)
        except ValueError as error:
            raise ValueError(f"data.{error}") from None


@dataclass(frozen=True)
class Corpus:
    """Training and validation text.

    Attributes:
        name: the named source, or the file's name.
        train: training text, not empty.
        validation: validation text, not empty.
        description: where the text came from, with the version where there is one.
        sha256: hexadecimal SHA-256 of the UTF-8 bytes of `train`, the byte 0xFF and the UTF-8 bytes
            of `validation`. 0xFF occurs in no UTF-8 text, so the checksum fixes the split as well.

    Raises:
        DataError: if a text is empty, or holds a lone surrogate, which has no UTF-8.
    """

    name: str
    train: str = field(repr=False)
    validation: str = field(repr=False)
    description: str
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        for part in ("train", "validation"):
            if not getattr(self, part):
                raise DataError(f"corpus {self.name!r}: got an empty {part} text")
        try:
            data = self.train.encode() + b"\xff" + self.validation.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"corpus {self.name!r}: got the lone surrogate {error.object[error.start]!r} at "
                f"position {error.start}, expected text that UTF-8 can hold"
            ) from None
        object.__setattr__(self, "sha256", hashlib.sha256(data).hexdigest())


def load_corpus(config: DataConfig, *, cache_dir: Path | None = None) -> Corpus:
    """Load the text that a configuration names.

    "wikitext-2" (Merity et al. 2017, arXiv:1609.07843; CC BY-SA) is read from files called
    `wiki.train.raw` and `wiki.valid.raw`, in a folder `wikitext-2-raw` (as its zip archive unpacks)
    or directly in the first of these directories that is given:

    1. `cache_dir`;
    2. the environment variable `PROBATTN_DATA`, which is only read, never written to;
    3. the user's cache, `$XDG_CACHE_HOME/probattn`, by default `~/.cache/probattn`.

    Where 1 or 3 lacks them they are downloaded into it. The files' checksums are verified at every
    load, so that the name always means the same text.

    Args:
        config: the source and the split.
        cache_dir: directory to use instead of the user's cache.

    Returns:
        The corpus. Held-out text is the last `validation_fraction` of the characters, rounded, at
        least one character and at most all but one.

    Raises:
        DataError: if a text cannot be had, is empty or not UTF-8, or is too short to be split.
    """
    validation = None
    if config.source == "pydoc":
        name, text = "pydoc", _python_reference()
        description = f"language reference of Python {platform.python_version()}"
    elif config.source == "wikitext-2":
        name, description = "wikitext-2", "WikiText-2, raw characters, CC BY-SA"
        text, validation = _read_archive(WIKITEXT_2, cache_dir)
    else:
        name, description = Path(config.source).name, f"file {config.source}"
        try:
            text = read_text(config.source)
        except DataError as error:
            names = " or ".join(NAMED_SOURCES)
            raise DataError(f"data.source: {error} (it may also be {names})") from None

    if config.validation is not None:
        try:
            validation = read_text(config.validation)
        except DataError as error:
            raise DataError(f"data.validation: {error}") from None
        description += f", validated on file {config.validation}"
    if validation is None:
        if len(text) < 2:
            raise DataError(
                f"corpus {name!r}: got {len(text)} character, expected two or more to hold out "
                "validation text; give a longer text or a data.validation file"
            )
        held_out = round(len(text) * config.validation_fraction)
        cut = len(text) - min(max(held_out, 1), len(text) - 1)
        text, validation = text[:cut], text[cut:]
    return Corpus(name=name, train=text, validation=validation, description=description)


def read_text(path: str | os.PathLike[str]) -> str:
    r"""Read a UTF-8 text file.

    A byte-order mark at its start is dropped, and the line ends `\r\n` and `\r` become `\n`, so
    that a file gives the same text, and the same checksum, whichever system saved it. Nothing else
    is changed: no Unicode normalisation.

    Args:
        path: the file; a leading `~` is the user's home.

    Raises:
        DataError: if there is no such file, it cannot be read, is a directory, is empty, or is not
            UTF-8 (the message gives the byte offset).
    """
    return _decode(_read_bytes(path), path)


def _read_bytes(path: str | os.PathLike[str]) -> bytes:
    shown = str(path)
    try:
        expanded = Path(path).expanduser()
        if expanded.is_dir():
            raise DataError(f"{shown!r}: got a directory, expected a UTF-8 text file")
        return expanded.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{shown!r}: no such file, expected a UTF-8 text file") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ without a home
        raise DataError(f"{shown!r}: cannot be read: {_one_line(error)}") from None
    except ValueError as error:  # a NUL inside the path
        if isinstance(error, DataError):
            raise
        raise DataError(f"{shown!r}: not a path: {_one_line(error)}") from None


def _decode(data: bytes, path: str | os.PathLike[str]) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{str(path)!r}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert the file to UTF-8"
        ) from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if not text:
        raise DataError(f"{str(path)!r}: got an empty file, expected a UTF-8 text file")
    return text


def _python_reference() -> str:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise DataError(
            "pydoc: this Python comes without pydoc_data.topics; give the path of a UTF-8 text "
            "file as data.source"
        ) from None
    return "\n".join(topics[key] for key in sorted(topics))


@dataclass(frozen=True)
class _Archive:
    """A zip archive on the web, and the two files of it that are used.

    `files` lists (name inside `folder`, bytes, SHA-256): the training text, then the validation
    text. The checksums are pinned, so the host need not be trusted.
    """

    name: str
    url: str
    size: int
    sha256: str
    folder: str
    files: tuple[tuple[str, int, str], ...]


WIKITEXT_2 = _Archive(
    name="wikitext-2",
    url="https://wikitext.smerity.com/wikitext-2-raw-v1.zip",  # the first author's own copy
    size=4_721_645,
    sha256="ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
    folder="wikitext-2-raw",
    files=(
        (
            "wiki.train.raw",
            10_940_747,
            "6707892fa3788b5ab9ed78ab5ff37d9fe825f6011a2ad4fcd6a6d467f0e7da57",
        ),
        (
            "wiki.valid.raw",
            1_146_846,
            "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7",
        ),
    ),
)


def _read_archive(archive: _Archive, cache_dir: Path | None) -> tuple[str, str]:
    """Training and validation text of an archive, downloaded where that is allowed."""
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
    train, validation = (
        _decode(_verified(_read_bytes(folder / name), size, digest, folder / name), folder / name)
        for name, size, digest in archive.files
    )
    return train, validation


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification has relative values ignored
        return Path(base) / "probattn"
    try:
        return Path.home() / ".cache" / "probattn"
    except RuntimeError:
        raise DataError(
            "no home directory to keep downloads in: set XDG_CACHE_HOME to a directory"
        ) from None


def _download(archive: _Archive, folder: Path) -> bytes:
    # The host answers urllib's default User-Agent with status 403.
    request = urllib.request.Request(archive.url, headers={"User-Agent": "probattn"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            data = response.read(archive.size + 1)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{archive.name}: cannot download {archive.url} ({_one_line(error)}); put "
            f"{' and '.join(name for name, _, _ in archive.files)} in {str(folder)!r}, or set "
            "PROBATTN_DATA to the directory that holds them, or give the path of another UTF-8 "
            "text file as data.source"
        ) from None
    return _verified(data, archive.size, archive.sha256, archive.url)


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


def _unpack(archive: _Archive, data: bytes) -> dict[str, bytes]:
    """The archive's two files, by name. No name from inside the archive becomes a path."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as unpacked:
            for name in unpacked.namelist():
                if "\\" in name or name.startswith("/") or ".." in PurePosixPath(name).parts:
                    raise DataError(
                        f"{archive.url!r}: the archive has the unsafe name {name!r}; do not use it"
                    )
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
            f"{archive.url!r}: not the expected zip archive: {_one_line(error)}"
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
            f"{str(folder)!r}: cannot keep the downloaded files there: {_one_line(error)}; set "
            "XDG_CACHE_HOME to a directory that can be written"
        ) from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
