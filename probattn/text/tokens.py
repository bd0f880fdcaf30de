"""Texts as arrays of token ids: made once, kept in the user's cache, mapped into memory.

An array has the smallest unsigned integers that hold the vocabulary: a byte for each token of up to
256. Those of a long text are written to a file, piece after piece, and a file is named after the
checksum of its text and that of its vocabulary, so that the same text is encoded once. A file ends
with a checksum of its name and its content, and one that does not match it is made again. Files are
removed, those first that were not used for longest, when all take more than 8 GiB. Where the cache
cannot be written to, arrays are made in memory, at every start.

The tokens are a function of the text and the vocabulary, however the text is read. Byte pairs of
this library end with every line and word, so that pieces may too: see `Text.paragraphs`. Other
people's tokenizers write spaces before a text, and have tokens of several lines. A piece for these,
see `Text.cut`, is encoded after the characters before it, whose own tokens are then dropped. It
begins only where those tokens are the same with and without what follows.
"""

import functools
import hashlib
import importlib.metadata
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import UInt

from probattn.text.byte_pairs import BytePairVocabulary, UnknownCharacter
from probattn.text.corpora import Corpus
from probattn.text.download import DataError
from probattn.text.pieces import TEXT_END, Text
from probattn.text.vocabulary import (
    CharacterVocabulary,
    FrequentVocabulary,
    Vocabulary,
    build_vocabulary,
    vocabulary_from_dict,
)
from probattn.user_cache import private_folder

CACHED = 2**22
"""Characters from which on the tokens of a text are kept in the user's cache."""

MOST_BYTES = 2**33
"""Most bytes that all files take."""

_FORMAT = "probattn tokens 2"  # of what earlier versions kept, nothing is read
_SEAL_BYTES = 32  # of SHA-256, at the end of a file
_BYTES = 2**20  # in one read
_UNFINISHED = ".new."
_UNFINISHED_SECONDS = 3600.0  # without a write, after which a file is one that a kill left


def corpus_vocabulary(corpus: Corpus, tokenizer: str) -> Vocabulary:
    """Build the vocabulary of a corpus, or read that of a long one from the user's cache.

    Raises:
        ValueError: see `build_vocabulary`.
    """
    text = corpus.text
    folder = private_folder("tokens") if text.length >= CACHED else None
    if folder is None:
        return build_vocabulary(tokenizer, text)
    name = f"{corpus.sha256} {tokenizer}"
    if tokenizer.startswith("bpe:"):  # merges are a function of the library's version too
        with suppress(importlib.metadata.PackageNotFoundError):
            name += f" {importlib.metadata.version('tokenizers')}"
    path = folder / f"{_digest(name)}.vocabulary"
    with suppress(OSError):
        _check_seal(path)
        vocabulary = vocabulary_from_dict(json.loads(path.read_bytes()[:-_SEAL_BYTES]))
        _mark_used(path)
        return vocabulary
    vocabulary = build_vocabulary(tokenizer, text)
    with suppress(OSError), _replacing(path) as stream:
        stream.write(json.dumps(vocabulary.to_dict()).encode())
        _seal(stream, path)
    return vocabulary


def corpus_tokens(
    corpus: Corpus, vocabulary: Vocabulary
) -> tuple[UInt[np.ndarray, " N"], UInt[np.ndarray, " M"]]:
    """Return the tokens of the training text and of the validation text, (N,) and (M,).

    Raises:
        UnknownCharacter: at a character that the vocabulary lacks.
        DataError: if the text changes while it is read.
    """
    train, validation = token_arrays(
        vocabulary, (corpus.train_text, corpus.validation_text), corpus.sha256
    )
    return train, validation


def token_arrays(
    vocabulary: Vocabulary, texts: Sequence[Text], sha256: str
) -> list[UInt[np.ndarray, " N"]]:
    """Return the tokens of texts, of a long text mapped from a file and not to be written to.

    Args:
        vocabulary: the vocabulary.
        texts: texts that belong together.
        sha256: their `pieces.checksum`.

    Raises:
        UnknownCharacter: at a character that the vocabulary lacks.
        DataError: if a text changes while it is read.
    """
    dtype = np.min_scalar_type(vocabulary.size - 1)
    if sum(text.length for text in texts) >= CACHED and (folder := private_folder("tokens")):
        key = _digest(sha256 + json.dumps(vocabulary.to_dict()))
        paths = [folder / f"{key}.{number}.npy" for number in range(len(texts))]
        with suppress(OSError):  # there is none, or it is damaged
            return [_mapped(path) for path in paths]
        with suppress(OSError):
            _write(paths, vocabulary, texts, sha256, dtype)
            _make_room(folder, keep=paths)
            return [_mapped(path) for path in paths]
    buffers = [io.BytesIO() for _ in texts]
    _encode(buffers, vocabulary, texts, sha256, dtype)
    return [np.frombuffer(buffer.getbuffer(), dtype) for buffer in buffers]


def _encode(
    streams: Sequence[IO[bytes]],
    vocabulary: Vocabulary,
    texts: Sequence[Text],
    sha256: str,
    dtype: np.dtype,
) -> list[int]:
    """Write the tokens of each text to its stream, and return how many each has."""
    digest, counts = hashlib.sha256(), []
    for number, (stream, text) in enumerate(zip(streams, texts, strict=True)):
        if number:
            digest.update(TEXT_END)
        position = count = 0
        for before, piece in _pieces(vocabulary, text):
            digest.update(piece.encode())
            dropped = len(vocabulary.encode(before)) if before else 0
            try:
                ids = vocabulary.encode(before + piece)[dropped:]
            except UnknownCharacter as error:
                distinct = error.distinct  # of this piece
                if isinstance(vocabulary, CharacterVocabulary):
                    distinct = len(set().union(*text.pieces()).difference(vocabulary.symbols))
                found = position - len(before) + error.position
                raise UnknownCharacter(error.character, found, distinct) from None
            stream.write(ids.astype(dtype))
            position, count = position + len(piece), count + len(ids)
        counts.append(count)
    if digest.hexdigest() != sha256:
        raise DataError("the text has changed while it was read; start again when it is at rest")
    return counts


def _pieces(vocabulary: Vocabulary, text: Text) -> Iterator[tuple[str, str]]:
    """Yield what comes before a piece, as far as it matters to its tokens, and the piece."""
    if isinstance(vocabulary, CharacterVocabulary | FrequentVocabulary):
        return (("", piece) for piece in text.pieces())
    if isinstance(vocabulary, BytePairVocabulary):
        return (("", piece) for piece in text.paragraphs())
    return text.cut(functools.partial(_ends_a_token, vocabulary))


def _ends_a_token(vocabulary: Vocabulary, before: str, after: str) -> bool:
    """Say whether the tokens before a place stay what they are when the text goes on."""
    try:
        short, long = vocabulary.encode(before), vocabulary.encode(before + after)
    except UnknownCharacter:
        return True  # the piece that holds it says so, with its place in the text
    return np.array_equal(long[: len(short)], short)


def _write(
    paths: Sequence[Path],
    vocabulary: Vocabulary,
    texts: Sequence[Text],
    sha256: str,
    dtype: np.dtype,
) -> None:
    """Write a file for each text, each whole or not at all."""
    with ExitStack() as files:
        streams = [files.enter_context(_replacing(path)) for path in paths]
        for stream in streams:
            _write_header(stream, dtype, 0)
        counts = _encode(streams, vocabulary, texts, sha256, dtype)
        for stream, path, count in zip(streams, paths, counts, strict=True):
            stream.seek(0)
            _write_header(stream, dtype, count)  # as long as before: NumPy leaves room for it
            _seal(stream, path)


def _write_header(stream: IO[bytes], dtype: np.dtype, count: int) -> None:
    fields = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(stream, fields)


def _mapped(path: Path) -> UInt[np.ndarray, " N"]:
    _check_seal(path)
    tokens = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    _mark_used(path)
    return tokens


def _seal(stream: IO[bytes], path: Path) -> None:
    """Write a checksum of the name that a file will have, and of its content, to its end."""
    size = stream.seek(0, os.SEEK_END)
    seal = _sealed(stream, size, path)
    stream.seek(size)
    stream.write(seal)


def _check_seal(path: Path) -> None:
    """Raise OSError if a file is damaged, or was another one."""
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END) - _SEAL_BYTES
        if size < 0 or _sealed(stream, size, path) != stream.read():
            raise OSError(f"{path}: is damaged")


def _sealed(stream: IO[bytes], size: int, path: Path) -> bytes:
    """Return the checksum of the first bytes of a file; the stream then stands after them."""
    digest = hashlib.sha256(path.name.encode())
    stream.seek(0)
    while size and (data := stream.read(min(size, _BYTES))):  # read, as a map would count as memory
        digest.update(data)
        size -= len(data)
    return digest.digest()


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file under another name, and give it its own when it is whole and on the disk."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_UNFINISHED, delete=False) as stream:
        try:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(stream.name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(stream.name)
            raise


def _make_room(folder: Path, keep: Sequence[Path]) -> None:
    """Remove what a kill left, and files that were not used for longest, up to the limit."""
    files = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process makes room too
            files.append((path.stat().st_mtime, path.stat().st_size, path))
    size = sum(each for _, each, _ in files)
    for used, each, path in sorted(files):
        unfinished = path.name.startswith(_UNFINISHED)
        left = unfinished and used < time.time() - _UNFINISHED_SECONDS
        if left or (size > MOST_BYTES and not unfinished and path not in keep):
            path.unlink(missing_ok=True)
            size -= each


def _mark_used(path: Path) -> None:
    with suppress(OSError):
        os.utime(path)


def _digest(name: str) -> str:
    return hashlib.sha256(f"{_FORMAT} {name}".encode()).hexdigest()
