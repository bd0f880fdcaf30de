"""Text corpora: where training and validation text come from, and the checksum that names them."""

import importlib
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

from probattn.messages import is_utf8
from probattn.text.documents import decoded, documents_text, find_documents
from probattn.text.download import Archive, DataError, read_archive
from probattn.text.pieces import Text, checksum
from probattn.text.vocabulary import parse_tokenizer

__all__ = [
    "NAMED_SOURCES",
    "WIKITEXT_2",
    "Corpus",
    "DataConfig",
    "DataError",
    "TextConfig",
    "load_corpus",
    "open_text",
    "read_text",
]

NAMED_SOURCES = ("pydoc", "wikitext-2")
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
class TextConfig:
    """Which text to train and validate on.

    Attributes:
        source: "pydoc" (Python's own language reference, present wherever Python is), "wikitext-2"
            (the raw character version, downloaded once), or UTF-8 text, plain or compressed by
            gzip: a file, a folder, a pattern such as "texts/*.txt", or several of these. Documents
            are taken in sorted order, an empty line between two of them. One of the two names
            stands alone; a file of that name is reached as "./pydoc". A tuple of one is kept as the
            string in it.
        validation: a second text to validate on: a file, a folder or a pattern. Without it,
            "wikitext-2" has its own validation text and the other sources hold out their end.
        validation_fraction: fraction of the characters, between 0 and 1, held out at the end of the
            text where there is no separate validation text.

    Raises:
        ValueError: if a field is of the wrong type or out of range.
    """

    source: str | tuple[str, ...] = "pydoc"
    validation: str | None = None
    validation_fraction: float = 0.1

    def __post_init__(self) -> None:
        several = self.source if isinstance(self.source, tuple) else (self.source,)
        if not several or not all(isinstance(each, str) and each for each in several):
            raise ValueError(
                f"data.source: got {self.source!r}, expected {' or '.join(NAMED_SOURCES)}, or "
                "paths of text files"
            )
        if len(several) == 1:
            object.__setattr__(self, "source", several[0])
        elif named := [each for each in several if each in NAMED_SOURCES]:
            raise ValueError(
                f"data.source: got {named[0]!r} among {len(several)} texts, expected it alone, or "
                f"paths of text files; a file of that name is './{named[0]}'"
            )
        if self.validation is not None and (
            not isinstance(self.validation, str) or not self.validation
        ):
            raise ValueError(
                f"data.validation: got {self.validation!r}, expected the path of a text file, or "
                "None"
            )
        paths = [("source", each) for each in several] + [("validation", self.validation)]
        for name, path in paths:
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


@dataclass(frozen=True)
class DataConfig(TextConfig):
    """Which text to train and validate on, see `TextConfig`, and how to cut it into tokens.

    Attributes:
        tokenizer: "character", "frequent:SIZE" for the most frequent characters and one symbol for
            all others, or "bpe:SIZE" for byte-level byte pairs with SIZE tokens, such as
            "bpe:512", learnt from a sample of 2^25 characters where the text has more.

    Raises:
        ValueError: if a field is of the wrong type or out of range.
    """

    tokenizer: str = "character"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            parse_tokenizer(self.tokenizer)
        except ValueError as error:
            raise ValueError(f"data.{error}") from None


@dataclass(frozen=True)
class Corpus:
    """Training and validation text, which are read anew whenever they are needed.

    Attributes:
        name: the named source, or the name of the file or the folder.
        train_text: training text, not empty; a string is made one.
        validation_text: validation text, not empty; likewise.
        description: where the text came from, with the version where there is one.
        sha256: hexadecimal SHA-256 of the UTF-8 bytes of the training text, the byte 0xFF and the
            UTF-8 bytes of the validation text, so that the checksum fixes the split as well.

    Raises:
        DataError: if a text is empty, or holds a lone surrogate, which has no UTF-8.
    """

    name: str
    train_text: Text = field(repr=False, compare=False)
    validation_text: Text = field(repr=False, compare=False)
    description: str
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        for part in ("train", "validation"):
            text = Text.of(getattr(self, f"{part}_text"))
            object.__setattr__(self, f"{part}_text", text)
            if not text.length:
                raise DataError(f"corpus {self.name!r}: got an empty {part} text")
        try:
            digest = checksum((self.train_text, self.validation_text))
        except UnicodeEncodeError as error:
            found = error.object[error.start]
            texts = self.train, self.validation  # strings that were given: files are UTF-8
            position = next(text.index(found) for text in texts if found in text)
            raise DataError(
                f"corpus {self.name!r}: got the lone surrogate {found!r} at position {position}, "
                "expected text that UTF-8 can hold"
            ) from None
        object.__setattr__(self, "sha256", digest)

    @property
    def train(self) -> str:
        """The training text as a string, whole in memory."""
        return self.train_text.read()

    @property
    def validation(self) -> str:
        """The validation text as a string, whole in memory."""
        return self.validation_text.read()

    @property
    def text(self) -> Text:
        """Training and validation text as one."""
        return Text.joined(self.train_text, self.validation_text)


def load_corpus(config: TextConfig, *, cache_dir: Path | None = None) -> Corpus:
    """Load the text that a configuration names.

    "wikitext-2" (Merity et al. 2017, arXiv:1609.07843; CC BY-SA) is read from files called
    `wiki.train.raw` and `wiki.valid.raw`, in a folder `wikitext-2-raw` (as its zip archive unpacks)
    or directly in the first of these directories that is given:

    1. `cache_dir`;
    2. the environment variable `PROBATTN_DATA`, which is only read, never written to;
    3. the user's cache, `$XDG_CACHE_HOME/probattn`, by default `~/.cache/probattn`.

    Where 1 or 3 lacks them they are downloaded into it. The files' checksums are verified at every
    load, so that the name always means the same text.

    Files are read in pieces, here for their length and their checksum.

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
        name, text = "pydoc", Text.of(_python_reference())
        description = f"language reference of Python {platform.python_version()}"
    elif config.source == "wikitext-2":
        name, description = "wikitext-2", "WikiText-2, raw characters, CC BY-SA"
        text, validation = (
            Text.of(decoded(data, name)) for data in read_archive(WIKITEXT_2, cache_dir)
        )
    else:
        try:
            name, description, text = _documents(config.source)
        except DataError as error:
            names = " or ".join(NAMED_SOURCES)
            raise DataError(f"data.source: {error} (it may also be {names})") from None

    if config.validation is not None:
        try:
            _, validated, validation = _documents(config.validation)
        except DataError as error:
            raise DataError(f"data.validation: {error}") from None
        description += f", validated on {validated}"
    if validation is None:
        length = text.length
        if length < 2:
            raise DataError(
                f"corpus {name!r}: got {length} character, expected two or more to hold out "
                "validation text; give a longer text or a data.validation file"
            )
        held_out = round(length * config.validation_fraction)
        cut = length - min(max(held_out, 1), length - 1)
        text, validation = Text(text.source, 0, cut), Text(text.source, cut, length)
    return Corpus(name, text, validation, description)


def open_text(source: str | os.PathLike[str]) -> Text:
    r"""Open a text on disk: a UTF-8 file, or all files of a folder or a pattern.

    See `documents.find_documents` and `documents.documents_text`.

    Raises:
        DataError: if there is no such file, it cannot be read, is no regular file, is empty, is
            larger than 2 GiB, or is not UTF-8 (the message gives the byte offset).
    """
    text = documents_text(find_documents(source))
    _ = text.length  # reads it: what is wrong with it is said here
    return text


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text on disk as a string, whole in memory.

    Raises:
        DataError: see `open_text`.
    """
    return documents_text(find_documents(path)).read()


def _documents(source: str | tuple[str, ...]) -> tuple[str, str, Text]:
    """Return what to call the documents of a source, a description of them, and their text."""
    paths = find_documents(source)
    text = documents_text(paths)
    _ = text.length  # reads it: what is wrong with it is said here
    names = [source] if isinstance(source, str) else list(source)
    if paths == (Path(names[0]).expanduser(),):
        return paths[0].name, f"file {names[0]}", text
    name = Path(names[0]).name if len(names) == 1 else f"{len(paths)} documents"
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return name, f"{len(paths)} documents of {shown}", text


def _python_reference() -> str:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise DataError(
            "pydoc: this Python comes without pydoc_data.topics; give the path of a UTF-8 text "
            "file as data.source"
        ) from None
    return "\n".join(topics[key] for key in sorted(topics))
