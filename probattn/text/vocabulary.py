"""Vocabularies: text to token ids and back, by characters here, by byte pairs in `byte_pairs`.

All are immutable, and plain JSON when saved. They count characters, so that bits *per character*
mean the same under each: the bits of a text over `characters(ids)`, never over its tokens.
"""

import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probattn.messages import describe
from probattn.text.byte_pairs import (
    MAX_SIZE,
    MAX_TOKEN_BYTES,
    MIN_BPE_SIZE,
    BytePairVocabulary,
    UnknownCharacter,
    check_ids,
    check_text,
)
from probattn.text.pieces import CODE_POINTS, Text, character_counts, code_points

__all__ = [
    "MAX_SIZE",
    "MAX_TOKEN_BYTES",
    "MIN_BPE_SIZE",
    "BytePairVocabulary",
    "CharacterVocabulary",
    "FrequentVocabulary",
    "UnknownCharacter",
    "Vocabulary",
    "build_vocabulary",
    "parse_tokenizer",
    "vocabulary_from_dict",
]


OTHER = "\N{REPLACEMENT CHARACTER}"  # name of a frequent vocabulary's last symbol


class Vocabulary(Protocol):
    """What models and runs need of a vocabulary."""

    @property
    def size(self) -> int:
        """Number of tokens; ids are 0 to size - 1."""

    @property
    def token_characters(self) -> NDArray[np.int32]:
        """Characters that begin in each token, shape (size,)."""

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the token ids of a text, shape (tokens,)."""

    def decode(self, ids: ArrayLike) -> str:
        """Return the text of token ids of shape (tokens,)."""

    def display(self, ids: ArrayLike) -> list[str]:
        """Return what to show for each of token ids of shape (tokens,): see `BytePairVocabulary`.

        For all other vocabularies it is the text of each token.
        """

    def characters(self, ids: ArrayLike) -> int:
        """Count the characters in token ids of any shape."""

    def to_dict(self) -> dict[str, Any]:
        """Return the vocabulary as JSON-safe values, read back by `vocabulary_from_dict`."""


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
                f"symbols: got {describe(self.symbols)}, expected a tuple of 1 to {MAX_SIZE} "
                "characters"
            )
        for symbol in self.symbols:
            if not isinstance(symbol, str) or len(symbol) != 1 or "\ud800" <= symbol <= "\udfff":
                raise ValueError(
                    f"symbols: got {describe(symbol)}, expected single characters, no surrogates"
                )
        for before, after in itertools.pairwise(self.symbols):
            if before >= after:
                raise ValueError(
                    f"symbols: {after!r} follows {before!r}, expected distinct characters in "
                    "increasing order"
                )

    @classmethod
    def from_text(cls, text: str | Text) -> "CharacterVocabulary":
        """Make the vocabulary of all characters of a text.

        Raises:
            ValueError: if the text is empty.
            UnknownCharacter: if it holds a lone surrogate.
        """
        check_text(text)
        return cls(tuple(map(chr, np.flatnonzero(character_counts(Text.of(text))))))

    @property
    def size(self) -> int:
        """Number of symbols."""
        return len(self.symbols)

    @property
    def token_characters(self) -> NDArray[np.int32]:
        """Characters of each token, shape (size,): all one."""
        return np.ones(self.size, np.int32)

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of a text over the symbols, the empty one included, shape (len(text),).

        Raises:
            UnknownCharacter: at the first character that is not among the symbols.
        """
        codes = code_points(text)
        ids = self._ids[codes]
        unknown = np.flatnonzero(ids == self.size)
        if unknown.size:
            position = int(unknown[0])
            raise UnknownCharacter(text[position], position, int(np.unique(codes[unknown]).size))
        return ids

    def decode(self, ids: ArrayLike) -> str:
        """Return the text of token ids of shape (tokens,), the inverse of `encode`.

        Raises:
            ValueError: if `ids` is not a vector of integers from 0 to size - 1.
        """
        return self._points[check_ids(ids, self.size, ndim=1)].tobytes().decode("utf-32-le")

    def display(self, ids: ArrayLike) -> list[str]:
        """Return the character of each of token ids of shape (tokens,).

        Raises:
            ValueError: if `ids` is not a vector of integers from 0 to size - 1.
        """
        return list(self.decode(ids))

    def characters(self, ids: ArrayLike) -> int:
        """Count the characters in token ids of any shape: one each.

        Raises:
            ValueError: if `ids` holds anything but integers from 0 to size - 1.
        """
        return check_ids(ids, self.size).size

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe values: the kind and the list of symbols."""
        return {"kind": "character", "symbols": list(self.symbols)}

    @functools.cached_property
    def _points(self) -> NDArray[np.uint32]:
        """Code point of each symbol, shape (size,), increasing."""
        return code_points("".join(self.symbols))

    @functools.cached_property
    def _ids(self) -> NDArray[np.int32]:
        return _ids_of(self.symbols)


@dataclass(frozen=True)
class FrequentVocabulary:
    """The most frequent characters of a text, and one last symbol for every other character.

    For models whose cost grows with the vocabulary. What is lost is lost: `decode` gives U+FFFD
    for the last symbol, and bits per character are those of the text so reduced.

    Attributes:
        symbols: the characters kept, distinct, in increasing code-point order, without U+FFFD.

    Raises:
        ValueError: if `symbols` is empty, too many, unsorted or holds anything but such characters.
    """

    symbols: tuple[str, ...]

    def __post_init__(self) -> None:
        CharacterVocabulary(self.symbols)
        if OTHER in self.symbols or len(self.symbols) >= MAX_SIZE:
            raise ValueError(
                f"symbols: got {describe(self.symbols)}, expected at most {MAX_SIZE - 1} "
                "characters without U+FFFD, which stands for all others"
            )

    @classmethod
    def from_text(cls, text: str | Text, size: int) -> "FrequentVocabulary":
        """Make the vocabulary of `size` symbols, the last of them for what is not kept.

        Raises:
            ValueError: if size < 2, or the text has fewer than `size` distinct characters.
            UnknownCharacter: if it holds a lone surrogate.
        """
        check_text(text)
        if size < 2:
            raise ValueError(f"size is {size}: expected at least 2, a character and all others")
        counts = character_counts(Text.of(text))
        counts[ord(OTHER)] = 0
        present = np.flatnonzero(counts)
        if len(present) < size:
            raise ValueError(
                f"tokenizer: got 'frequent:{size}' for a text of {len(present)} distinct "
                f"characters, expected SIZE <= {len(present)}; or keep all, with 'character'"
            )
        # Ties by code point, so that the vocabulary is a function of the counts alone.
        ordered = present[np.argsort(-counts[present], kind="stable")]
        return cls(tuple(map(chr, np.sort(ordered[: size - 1]))))

    @property
    def size(self) -> int:
        """Number of symbols, that for all other characters included."""
        return len(self.symbols) + 1

    @property
    def token_characters(self) -> NDArray[np.int32]:
        """Characters of each token, shape (size,): all one."""
        return np.ones(self.size, np.int32)

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the token ids of any text, shape (len(text),)."""
        return self._ids[code_points(text)]

    def decode(self, ids: ArrayLike) -> str:
        """Return the text of token ids of shape (tokens,), U+FFFD for the last symbol.

        Raises:
            ValueError: if `ids` is not a vector of integers from 0 to size - 1.
        """
        shown = (*self.symbols, OTHER)
        return "".join(shown[token] for token in check_ids(ids, self.size, ndim=1))

    def display(self, ids: ArrayLike) -> list[str]:
        """Return the character of each of token ids of shape (tokens,), U+FFFD for all others.

        Raises:
            ValueError: if `ids` is not a vector of integers from 0 to size - 1.
        """
        return list(self.decode(ids))

    def characters(self, ids: ArrayLike) -> int:
        """Count the characters in token ids of any shape: one each.

        Raises:
            ValueError: if `ids` holds anything but integers from 0 to size - 1.
        """
        return check_ids(ids, self.size).size

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe values: the kind and the list of symbols kept."""
        return {"kind": "frequent", "symbols": list(self.symbols)}

    @functools.cached_property
    def _ids(self) -> NDArray[np.int32]:
        return _ids_of(self.symbols)


def parse_tokenizer(tokenizer: str) -> tuple[str, int]:
    """Read the tokenizer setting, "character", "frequent:SIZE" or "bpe:SIZE".

    Returns:
        The kind, and the vocabulary's size; 0 for characters, of which it is not known.

    Raises:
        ValueError: if it is none of them, or the size is out of range: 2 to `MAX_SIZE` for
            frequent characters, `MIN_BPE_SIZE` to `MAX_SIZE` for byte pairs.
    """
    if tokenizer == "character":
        return tokenizer, 0
    if isinstance(tokenizer, str):
        match = re.fullmatch(r"(frequent|bpe):([0-9]{1,9})", tokenizer)
        least = {"frequent": 2, "bpe": MIN_BPE_SIZE}
        if match is not None and least[match[1]] <= int(match[2]) <= MAX_SIZE:
            return match[1], int(match[2])
    raise ValueError(
        f"tokenizer: got {tokenizer!r}, expected 'character', 'frequent:SIZE' with SIZE from 2 (a "
        f"character and the symbol of all others) to {MAX_SIZE}, such as 'frequent:16', or "
        f"'bpe:SIZE' with SIZE from {MIN_BPE_SIZE} (256 bytes and a merge) to {MAX_SIZE}, such as "
        "'bpe:512'"
    )


def build_vocabulary(tokenizer: str, text: str | Text) -> Vocabulary:
    """Build the vocabulary of a text; byte pairs are learnt from a sample of a very long one.

    Args:
        tokenizer: "character", "frequent:SIZE" or "bpe:SIZE".
        text: training and validation text together, so that both are encodable; not empty.

    Raises:
        ValueError: if the setting is malformed, or the text empty or of too few characters.
        UnknownCharacter: if the text holds a lone surrogate.
        ImportError: for "bpe:SIZE" without the library `tokenizers` (the extra `bpe`).
    """
    kind, size = parse_tokenizer(tokenizer)
    if kind == "character":
        return CharacterVocabulary.from_text(text)
    learnt = FrequentVocabulary if kind == "frequent" else BytePairVocabulary
    return learnt.from_text(text, size)


def vocabulary_from_dict(values: Mapping[str, Any]) -> Vocabulary:
    """Read a vocabulary back from what its `to_dict` gave; nothing in it is trusted.

    Raises:
        ValueError: if the values are not a vocabulary: see the classes for what is checked.
    """
    keys = set(values) if isinstance(values, Mapping) else set()
    if keys == {"kind", "symbols"} and values["kind"] in ("character", "frequent"):
        symbols = values["symbols"]
        symbols = tuple(symbols) if isinstance(symbols, list) else symbols
        if values["kind"] == "character":
            return CharacterVocabulary(symbols)
        return FrequentVocabulary(symbols)
    if keys == {"kind", "merges"} and values["kind"] == "byte_pair":
        merges = values["merges"]
        if isinstance(merges, list):
            merges = tuple(tuple(pair) if isinstance(pair, list) else pair for pair in merges)
        return BytePairVocabulary(merges)
    raise ValueError(
        f"vocabulary: got {describe(values)}, expected kind 'character' or 'frequent' with "
        "symbols, or kind 'byte_pair' with merges"
    )


def _ids_of(symbols: tuple[str, ...]) -> NDArray[np.int32]:
    """Return the id of every code point, and of those that are no symbol the number of symbols."""
    ids = np.full(CODE_POINTS, len(symbols), np.int32)
    ids[code_points("".join(symbols))] = np.arange(len(symbols), dtype=np.int32)
    return ids
