"""Vocabularies: text to token ids and back, by characters or by byte pairs.

Both kinds are immutable, are plain JSON when saved, and count the characters that a token sequence
stands for, so that a cross-entropy in bits *per character* means the same under either: the summed
bits of a text are divided by `characters(ids)`, never by the number of tokens.
"""

import functools
import io
import itertools
import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_SIZE = 2**18
"""Largest vocabulary: above the number of assigned Unicode characters and of any BPE in use."""
MIN_BPE_SIZE = 257
"""Smallest byte-pair vocabulary: the 256 bytes, which make every text encodable, and one merge."""
MAX_TOKEN_BYTES = 64
"""Longest byte-pair token. The bound also keeps a hostile list of merges from doubling for ever."""

_LINES_PER_CALL = 4096  # the library keeps ~100 bytes a token while it works: bound its batches
# How the library's ByteLevel writes each byte as one printable character (GPT-2's convention):
# printable Latin-1 bytes stand for themselves, the others for the characters from U+0100 on.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_SPARE = itertools.count(0x100)
_BYTE_SYMBOLS = tuple(chr(b if b in _PRINTABLE else next(_SPARE)) for b in range(256))


class UnknownCharacter(ValueError):  # noqa: N818 (the standard name of the thing, as UnicodeError)
    """A text holds a character that the vocabulary cannot encode.

    Attributes:
        character: the first such character.
        position: its 0-based position in the text, in characters.
        distinct: how many distinct characters of the text cannot be encoded.
    """

    def __init__(self, character: str, position: int, distinct: int) -> None:
        super().__init__(character, position, distinct)  # these arguments keep it picklable
        self.character, self.position, self.distinct = character, position, distinct

    def __str__(self) -> str:
        surrogate = "\ud800" <= self.character <= "\udfff"
        advice = (
            "it is a lone surrogate, which no UTF-8 text can hold: remove it"
            if surrogate
            else "remove them, or build the vocabulary from text that holds them"
        )
        return (
            f"unknown character {self.character!r} (U+{ord(self.character):04X}) at position "
            f"{self.position} of the text, which holds {self.distinct} distinct character(s) "
            f"outside the vocabulary; {advice}"
        )


class Vocabulary(Protocol):
    """What models and runs need of a vocabulary."""

    @property
    def size(self) -> int:
        """Number of tokens; ids are 0 to size - 1."""

    @property
    def token_characters(self) -> NDArray[np.int32]:
        """Characters that begin in each token, shape (size,)."""

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token ids of a text, shape (tokens,)."""

    def decode(self, ids: ArrayLike) -> str:
        """The text of token ids of shape (tokens,)."""

    def characters(self, ids: ArrayLike) -> int:
        """Number of characters that token ids of any shape stand for."""

    def to_dict(self) -> dict[str, Any]:
        """The vocabulary as JSON-safe values, read back by `vocabulary_from_dict`."""


@dataclass(frozen=True)
class CharacterVocabulary:
    """One token for each distinct character (Unicode code point) of a text.

    Attributes:
        symbols: the characters, distinct and in increasing code-point order; the id of a character
            is its index. Lone surrogates are refused: no UTF-8 file can hold them.

    Raises:
        ValueError: if `symbols` is empty, larger than `MAX_SIZE`, unsorted or holds anything but
            single characters.
    """

    symbols: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.symbols, tuple) or not 1 <= len(self.symbols) <= MAX_SIZE:
            raise ValueError(
                f"symbols: got {_describe(self.symbols)}, expected a tuple of 1 to {MAX_SIZE} "
                "characters"
            )
        for symbol in self.symbols:
            if not isinstance(symbol, str) or len(symbol) != 1 or "\ud800" <= symbol <= "\udfff":
                raise ValueError(
                    f"symbols: got {_describe(symbol)}, expected single characters, no surrogates"
                )
        for before, after in itertools.pairwise(self.symbols):
            if before >= after:
                raise ValueError(
                    f"symbols: {after!r} follows {before!r}, expected distinct characters in "
                    "increasing order"
                )

    @classmethod
    def from_text(cls, text: str) -> "CharacterVocabulary":
        """The vocabulary of all characters of a text.

        Raises:
            ValueError: if the text is empty.
            UnknownCharacter: if it holds a lone surrogate.
        """
        _check_text(text)
        return cls(tuple(sorted(set(text))))

    @property
    def size(self) -> int:
        """Number of symbols."""
        return len(self.symbols)

    @property
    def token_characters(self) -> NDArray[np.int32]:
        """Characters of each token, shape (size,): all one."""
        return np.ones(self.size, np.int32)

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token ids of a text.

        Args:
            text: any text over the symbols, the empty one included.

        Returns:
            Array of shape (len(text),).

        Raises:
            UnknownCharacter: at the first character that is not among the symbols.
        """
        codes = _code_points(text)
        table = self._table
        ids = table[np.minimum(codes, table.size - 1)]
        unknown = np.flatnonzero(ids < 0)
        if unknown.size:
            position = int(unknown[0])
            raise UnknownCharacter(text[position], position, int(np.unique(codes[unknown]).size))
        return ids

    def decode(self, ids: ArrayLike) -> str:
        """The text of token ids, the inverse of `encode`.

        Raises:
            ValueError: if `ids` is not a vector of integers from 0 to size - 1.
        """
        return self._points[_check_ids(ids, self.size, ndim=1)].tobytes().decode("utf-32-le")

    def characters(self, ids: ArrayLike) -> int:
        """Number of characters that token ids of any shape stand for: one each.

        Raises:
            ValueError: if `ids` holds anything but integers from 0 to size - 1.
        """
        return _check_ids(ids, self.size).size

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe values: the kind and the list of symbols."""
        return {"kind": "character", "symbols": list(self.symbols)}

    @functools.cached_property
    def _points(self) -> NDArray[np.uint32]:
        """Code point of each symbol, shape (size,)."""
        return _code_points("".join(self.symbols))

    @functools.cached_property
    def _table(self) -> NDArray[np.int32]:
        """Id of each code point up to one past the last symbol, -1 where there is none."""
        table = np.full(int(self._points[-1]) + 2, -1, np.int32)
        table[self._points] = np.arange(self.size, dtype=np.int32)
        return table


@dataclass(frozen=True)
class BytePairVocabulary:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; on bytes as in Radford et al. 2019).

    Ids 0 to 255 are the bytes themselves, and each merge adds the concatenation of two earlier
    tokens, so every UTF-8 text is encodable and `decode(encode(text)) == text` exactly. Text is cut
    after each newline, then at the word boundaries of GPT-2's pattern, and merged inside the
    pieces; no token spans them.

    Attributes:
        merges: pairs of token ids, most frequent first. Merge k makes token 256 + k, unless an
            earlier merge made the same bytes already.

    Raises:
        ValueError: if `merges` refers to a later token, repeats a pair, makes a token longer than
            `MAX_TOKEN_BYTES` or a vocabulary larger than `MAX_SIZE`.
    """

    merges: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        _ = self.tokens  # building them checks the merges

    @classmethod
    def from_text(cls, text: str, size: int) -> "BytePairVocabulary":
        """Learn merges from a text; the same text and library version give the same merges.

        Args:
            text: the training text, not empty.
            size: number of tokens wanted, `MIN_BPE_SIZE` to `MAX_SIZE`. A text without enough pairs
                that occur twice yields fewer: `.size` is what was reached.

        Raises:
            ValueError: if the text is empty or the size out of range.
            UnknownCharacter: if the text holds a lone surrogate.
            ImportError: without the library `tokenizers` (the extra `bpe`).
        """
        _check_text(text)
        if not MIN_BPE_SIZE <= size <= MAX_SIZE:
            raise ValueError(f"size: got {size}, expected {MIN_BPE_SIZE} to {MAX_SIZE}")
        library = _tokenizers()
        learner = _tokenizer(library, library.models.BPE())
        trainer = library.trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            initial_alphabet=list(_BYTE_SYMBOLS),
            max_token_length=MAX_TOKEN_BYTES,
            show_progress=False,
        )
        learner.train_from_iterator(_lines(text), trainer)
        ids = {symbol: byte for byte, symbol in enumerate(_BYTE_SYMBOLS)}
        merges = []
        for left, right in json.loads(learner.to_str())["model"]["merges"]:
            merges.append((ids[left], ids[right]))
            ids.setdefault(left + right, len(ids))
        return cls(tuple(merges))

    @functools.cached_property
    def tokens(self) -> tuple[bytes, ...]:
        """The bytes of each token."""
        if not isinstance(self.merges, tuple):
            raise ValueError(f"merges: got {_describe(self.merges)}, expected a tuple of id pairs")
        tokens = dict.fromkeys(bytes([byte]) for byte in range(256))  # ordered, without repeats
        by_id = list(tokens)
        for number, pair in enumerate(self.merges):
            if not (
                isinstance(pair, tuple)
                and len(pair) == 2
                and all(type(part) is int and 0 <= part < len(by_id) for part in pair)
            ):
                raise ValueError(
                    f"merges[{number}]: got {_describe(pair)}, expected two ids of earlier tokens, "
                    f"0 to {len(by_id) - 1}"
                )
            token = by_id[pair[0]] + by_id[pair[1]]
            if len(token) > MAX_TOKEN_BYTES:
                raise ValueError(
                    f"merges[{number}]: makes a token of {len(token)} bytes, expected at most "
                    f"{MAX_TOKEN_BYTES}"
                )
            if token not in tokens:
                tokens[token] = None
                by_id.append(token)
        if len(set(self.merges)) != len(self.merges) or len(by_id) > MAX_SIZE:
            raise ValueError(
                f"merges: got {len(self.merges)} pairs, {len(set(self.merges))} of them distinct, "
                f"expected distinct pairs and at most {MAX_SIZE} tokens"
            )
        return tuple(by_id)

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @functools.cached_property
    def token_characters(self) -> NDArray[np.int32]:
        """Characters that begin in each token, shape (size,).

        In UTF-8 each character has exactly one byte that is not a continuation byte (0b10xxxxxx),
        its first. A character cut in two by a token boundary counts for the token that begins it,
        and a token of continuation bytes alone counts none, so the counts of a text's tokens sum to
        its number of characters, whichever way they are cut into blocks.
        """
        counts = [sum(byte >> 6 != 0b10 for byte in token) for token in self.tokens]
        return np.array(counts, np.int32)

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token ids of a text.

        Args:
            text: any text, the empty one included.

        Returns:
            Array of shape (tokens,).

        Raises:
            UnknownCharacter: at a lone surrogate, which has no UTF-8.
            ImportError: without the library `tokenizers` (the extra `bpe`).
        """
        _check_surrogates(text)
        parts = [np.zeros(0, np.int32)]
        for lines in itertools.batched(_lines(text), _LINES_PER_CALL):
            encodings = self._encoder.encode_batch_fast(list(lines), add_special_tokens=False)
            parts.extend(np.array(encoding.ids, np.int32) for encoding in encodings)
        return np.concatenate(parts)

    def decode(self, ids: ArrayLike) -> str:
        """The text of token ids, the inverse of `encode`.

        Ids that are no text's encoding, such as a sequence cut inside a character, decode with the
        replacement character U+FFFD in place of the broken bytes.

        Raises:
            ValueError: if `ids` is not a vector of integers from 0 to size - 1.
        """
        checked = _check_ids(ids, self.size, ndim=1).tolist()
        return b"".join(map(self.tokens.__getitem__, checked)).decode("utf-8", errors="replace")

    def characters(self, ids: ArrayLike) -> int:
        """Number of characters that begin in token ids of any shape; see `token_characters`.

        Raises:
            ValueError: if `ids` holds anything but integers from 0 to size - 1.
        """
        return int(self.token_characters[_check_ids(ids, self.size)].sum(dtype=np.int64))

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe values: the kind and the list of merges."""
        return {"kind": "byte_pair", "merges": [list(pair) for pair in self.merges]}

    @functools.cached_property
    def _encoder(self) -> Any:
        library = _tokenizers()
        symbols = ["".join(_BYTE_SYMBOLS[byte] for byte in token) for token in self.tokens]
        model = library.models.BPE(
            vocab={symbol: index for index, symbol in enumerate(symbols)},
            merges=[(symbols[left], symbols[right]) for left, right in self.merges],
        )
        return _tokenizer(library, model)


def parse_tokenizer(tokenizer: str) -> int | None:
    """Read the tokenizer setting, "character" or "bpe:SIZE".

    Returns:
        The byte-pair vocabulary's size, or None for characters.

    Raises:
        ValueError: if it is neither, or the size is outside `MIN_BPE_SIZE` to `MAX_SIZE`.
    """
    if tokenizer == "character":
        return None
    match = re.fullmatch(r"bpe:([0-9]{1,9})", tokenizer) if isinstance(tokenizer, str) else None
    if match is None or not MIN_BPE_SIZE <= int(match[1]) <= MAX_SIZE:
        raise ValueError(
            f"tokenizer: got {tokenizer!r}, expected 'character' or 'bpe:SIZE' with SIZE from "
            f"{MIN_BPE_SIZE} (256 bytes and a merge) to {MAX_SIZE}, such as 'bpe:512'"
        )
    return int(match[1])


def build_vocabulary(tokenizer: str, text: str) -> Vocabulary:
    """Build the vocabulary of a text.

    Args:
        tokenizer: "character" or "bpe:SIZE".
        text: training and validation text together, so that both are encodable; not empty.

    Raises:
        ValueError: if the setting is malformed or the text empty.
        UnknownCharacter: if the text holds a lone surrogate.
        ImportError: for "bpe:SIZE" without the library `tokenizers` (the extra `bpe`).
    """
    size = parse_tokenizer(tokenizer)
    if size is None:
        return CharacterVocabulary.from_text(text)
    return BytePairVocabulary.from_text(text, size)


def vocabulary_from_dict(values: Mapping[str, Any]) -> Vocabulary:
    """Read a vocabulary back from what its `to_dict` gave; nothing in it is trusted.

    Raises:
        ValueError: if the values are not a vocabulary: see the two classes for what is checked.
    """
    keys = set(values) if isinstance(values, Mapping) else set()
    if keys == {"kind", "symbols"} and values["kind"] == "character":
        symbols = values["symbols"]
        return CharacterVocabulary(tuple(symbols) if isinstance(symbols, list) else symbols)
    if keys == {"kind", "merges"} and values["kind"] == "byte_pair":
        merges = values["merges"]
        if isinstance(merges, list):
            merges = tuple(tuple(pair) if isinstance(pair, list) else pair for pair in merges)
        return BytePairVocabulary(merges)
    raise ValueError(
        f"vocabulary: got {_describe(values)}, expected kind 'character' with symbols, or kind "
        "'byte_pair' with merges"
    )


def _describe(value: object) -> str:
    """A value's type and a short repr: it may be huge or deeply nested."""
    return f"{type(value).__name__} {reprlib.repr(value)}"


def _code_points(text: str) -> NDArray[np.uint32]:
    # surrogatepass: a surrogate is to be reported as an unknown character, not as a codec failure
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _check_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        surrogates = set(re.findall("[\ud800-\udfff]", text))
        raise UnknownCharacter(text[error.start], error.start, len(surrogates)) from None


def _check_text(text: str) -> None:
    if not text:
        raise ValueError("text: got an empty text, expected one character or more")
    _check_surrogates(text)


def _check_ids(ids: ArrayLike, size: int, *, ndim: int | None = None) -> NDArray[np.integer[Any]]:
    array = np.asarray(ids)
    if array.size == 0:  # an empty list has dtype float
        array = array.astype(np.int32)
    if not np.issubdtype(array.dtype, np.integer) or (ndim is not None and array.ndim != ndim):
        wanted = "integers" if ndim is None else f"integers in {ndim} dimension(s)"
        raise ValueError(f"ids: got {array.dtype} of shape {array.shape}, expected {wanted}")
    outside = np.flatnonzero((array < 0) | (array >= size))
    if outside.size:
        raise ValueError(
            f"ids: got {array.flat[outside[0]]} at position {outside[0]}, expected 0 to {size - 1}"
        )
    return array


def _lines(text: str) -> io.StringIO:
    """The lines of a text with their ends; only a newline ends one."""
    return io.StringIO(text, newline="\n")


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError(
            "tokenizer 'bpe:SIZE' needs the library tokenizers: pip install 'probattn[bpe]'"
        ) from None
    return tokenizers


def _tokenizer(library: Any, model: Any) -> Any:
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer
