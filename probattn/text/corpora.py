"""Text corpora: where training and validation text come from, and the checksum that names them."""

import hashlib
import importlib
import os
import platform
import stat
from dataclasses import dataclass, field
from pathlib import Path

from probattn.messages import is_utf8, one_line
from probattn.text.download import Archive, DataError, read_archive
from probattn.text.vocabulary import parse_tokenizer

__all__ = [
    "NAMED_SOURCES",
    "WIKITEXT_2",
    "Corpus",
    "DataConfig",
    "DataError",
    "load_corpus",
    "read_text",
]

NAMED_SOURCES = ("pydoc", "wikitext-2")
_LARGEST = 2**31 - 1  # bytes of a text

WIKITEXT_2 = Archive(
    name="wikitext-2",
    url="https://wikitext.smerity.com/wikitext-2-raw-v1.zip",  # the first author's own copy
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
"""WikiText-2, raw characters: its training text, then its validation text."""


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
        tokenizer: "character", "frequent:SIZE" for the most frequent characters and one symbol for
            all others, or "bpe:SIZE" for byte-level byte pairs with SIZE tokens, such as
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
        for name, path in (("source", self.source), ("validation", self.validation)):
            if path is not None and not is_utf8(path):
                raise ValueError(
                    f"data.{name}: got {path!r}, whose name is not UTF-8: expected a name that the "
                    "configuration of a run can hold; rename the file, or make a link to it"
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
        text, validation = (_decode(data, name) for data in read_archive(WIKITEXT_2, cache_dir))
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
        DataError: if there is no such file, it cannot be read, is no regular file, is empty, is
            larger than 2 GiB, or is not UTF-8 (the message gives the byte offset).
    """
    try:
        file = Path(path).expanduser()
        status = file.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            # It could be read once at most, or for ever; a run reads its text again.
            raise DataError(f"{str(path)!r}: got a device or a pipe, expected a UTF-8 text file")
        if status.st_size > _LARGEST:
            raise DataError(
                f"{str(path)!r}: has {status.st_size} bytes, expected at most {_LARGEST}, as "
                "positions are numbers of 32 bits; give a part of the text"
            )
        data = file.read_bytes()
    except DataError:
        raise
    except FileNotFoundError:
        where = "" if file.is_absolute() else f" in {Path.cwd()}"
        raise DataError(f"{str(path)!r}: no such file{where}, expected a UTF-8 text file") from None
    except IsADirectoryError:
        raise DataError(f"{str(path)!r}: got a directory, expected a UTF-8 text file") from None
    except (OSError, RuntimeError, ValueError) as error:  # ~ without a home; a NUL in the path
        raise DataError(f"{str(path)!r}: cannot be read: {one_line(error)}") from None
    return _decode(data, path)


def _decode(data: bytes, origin: object) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{str(origin)!r}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert the file to UTF-8"
        ) from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if not text:
        raise DataError(f"{str(origin)!r}: got an empty file, expected a UTF-8 text file")
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
