"""Byte-pair vocabularies, and the checks that every vocabulary makes.

The checks (`UnknownCharacter`, `check_text`, `check_ids`, `describe`) stand here and not in
`vocabulary`, which chooses between the kinds and so imports this file: imports run one way.
"""

import functools
import io
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probattn.messages import describe
from probattn.text.pieces import Text

MAX_SIZE = 2**18
"""Largest vocabulary: above the number of assigned Unicode characters and of any BPE in use."""
MIN_BPE_SIZE = 257
"""Smallest byte-pair vocabulary: the 256 bytes, which make every text encodable, and one merge."""
LEARNT_CHARACTERS = 2**25
"""Most characters that merges are learnt from: 64 stretches, spread evenly over a longer text."""
MAX_TOKEN_BYTES = 64
"""Longest byte-pair token. The bound also keeps a hostile list of merges from doubling for ever."""

_LINES_PER_CALL = 4096  # the library keeps ~100 bytes a token while it works: bound its batches
# How the library's ByteLevel writes each byte as one printable character (GPT-2's convention):
# printable Latin-1 bytes stand for themselves, the others for the characters from U+0100 on.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
SYMBOLS = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(0x100 + index) for index, byte in enumerate(_OTHERS)
}
_HEXADECIMAL = {0xDC00 + byte: f"<0x{byte:02X}>" for byte in range(128, 256)}


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
    def from_text(cls, text: str | Text, size: int) -> "BytePairVocabulary":
        """Learn merges from a text; the same text and library version give the same merges.

        Args:
            text: the training text, not empty. Of one with more than `LEARNT_CHARACTERS`, a sample
                is taken that is spread evenly over it.
            size: number of tokens wanted, `MIN_BPE_SIZE` to `MAX_SIZE`. A text without enough pairs
                that occur twice yields fewer: `.size` is what was reached.

        Raises:
            ValueError: if the text is empty or the size out of range.
            UnknownCharacter: if the text holds a lone surrogate.
            ImportError: without the library `tokenizers` (the extra `bpe`).
        """
        check_text(text)
        if not MIN_BPE_SIZE <= size <= MAX_SIZE:
            raise ValueError(f"size: got {size}, expected {MIN_BPE_SIZE} to {MAX_SIZE}")
        library = _library()
        learner = _tokenizer(library.models.BPE())
        trainer = library.trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            initial_alphabet=list(SYMBOLS.values()),
            max_token_length=MAX_TOKEN_BYTES,
            show_progress=False,
        )
        sample = Text.of(text).sample(LEARNT_CHARACTERS)
        lines = itertools.chain.from_iterable(map(_lines, sample.paragraphs()))
        learner.train_from_iterator(lines, trainer)
        ids = {symbol: byte for byte, symbol in SYMBOLS.items()}
        merges = []
        for left, right in json.loads(learner.to_str())["model"]["merges"]:
            merges.append((ids[left], ids[right]))
            ids.setdefault(left + right, len(ids))
        return cls(tuple(merges))

    @functools.cached_property
    def tokens(self) -> tuple[bytes, ...]:
        """The bytes of each token."""
        if not isinstance(self.merges, tuple):
            raise ValueError(f"merges: got {describe(self.merges)}, expected a tuple of id pairs")
        tokens = [bytes([byte]) for byte in range(256)]
        known = set(tokens)
        for number, pair in enumerate(self.merges):
            if not (
                isinstance(pair, tuple)
                and len(pair) == 2
                and all(type(part) is int and 0 <= part < len(tokens) for part in pair)
            ):
                raise ValueError(
                    f"merges[{number}]: got {describe(pair)}, expected two ids of earlier tokens, "
                    f"0 to {len(tokens) - 1}"
                )
            token = tokens[pair[0]] + tokens[pair[1]]
            if len(token) > MAX_TOKEN_BYTES:
                raise ValueError(
                    f"merges[{number}]: makes a token of {len(token)} bytes, expected at most "
                    f"{MAX_TOKEN_BYTES}"
                )
            if token not in known:
                known.add(token)
                tokens.append(token)
        distinct = len(set(self.merges))
        if distinct != len(self.merges) or len(tokens) > MAX_SIZE:
            raise ValueError(
                f"merges: got {len(self.merges)} pairs, {distinct} of them distinct, expected "
                f"distinct pairs and at most {MAX_SIZE} tokens"
            )
        return tuple(tokens)

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
        return characters_begun(self.tokens)

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the token ids of any text, the empty one included, shape (tokens,).

        Raises:
            UnknownCharacter: at a lone surrogate, which has no UTF-8.
            ImportError: without the library `tokenizers` (the extra `bpe`).
        """
        check_surrogates(text)
        parts = [np.zeros(0, np.int32)]
        for lines in itertools.batched(_lines(text), _LINES_PER_CALL):
            encodings = self._encoder.encode_batch_fast(list(lines), add_special_tokens=False)
            parts.extend(np.array(encoding.ids, np.int32) for encoding in encodings)
        return np.concatenate(parts)

    def decode(self, ids: ArrayLike) -> str:
        """Return the text of token ids of shape (tokens,), the inverse of `encode`.

        Ids that are no text's encoding, such as a sequence cut inside a character, decode with the
        replacement character U+FFFD in place of the invalid bytes.

        Raises:
            ValueError: if `ids` is not a vector of integers from 0 to size - 1.
        """
        checked = check_ids(ids, self.size, ndim=1).tolist()
        return b"".join(self.tokens[index] for index in checked).decode("utf-8", errors="replace")

    def display(self, ids: ArrayLike) -> list[str]:
        """Return what to show for each of token ids of shape (tokens,), without U+FFFD.

        A character of several tokens is shown whole at the first of them, and those that only go
        on with it show the empty text, so that the concatenation is the text. A byte that belongs
        to no character, as where a sequence is cut, is shown in hexadecimal, such as <0xC3>.

        Raises:
            ValueError: if `ids` is not a vector of integers from 0 to size - 1.
        """
        return displayed([self.tokens[each] for each in check_ids(ids, self.size, ndim=1).tolist()])

    def characters(self, ids: ArrayLike) -> int:
        """Count the characters that begin in token ids of any shape; see `token_characters`.

        Raises:
            ValueError: if `ids` holds anything but integers from 0 to size - 1.
        """
        return int(self.token_characters[check_ids(ids, self.size)].sum(dtype=np.int64))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe values: the kind and the list of merges."""
        return {"kind": "byte_pair", "merges": [list(pair) for pair in self.merges]}

    @functools.cached_property
    def _encoder(self) -> Any:
        symbols = ["".join(SYMBOLS[byte] for byte in token) for token in self.tokens]
        model = _library().models.BPE(
            vocab={symbol: index for index, symbol in enumerate(symbols)},
            merges=[(symbols[left], symbols[right]) for left, right in self.merges],
        )
        return _tokenizer(model)


def displayed(tokens: Sequence[bytes]) -> list[str]:
    """Return what to show for each of a text's tokens: see `BytePairVocabulary.display`."""
    # A byte of no character becomes one of 128 surrogates, which no UTF-8 text holds.
    text = b"".join(tokens).decode("utf-8", "surrogateescape")
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    lone = (codes >= 0xDC80) & (codes <= 0xDCFF)
    width = 1 + sum((codes >= least) & ~lone for least in (0x80, 0x800, 0x10000))
    begins = np.cumsum(width) - width
    ends = np.cumsum([len(token) for token in tokens])
    cuts = np.searchsorted(begins, ends)  # characters that begin before each token's end
    shown = (text[start:stop] for start, stop in itertools.pairwise([0, *cuts]))
    return [each.translate(_HEXADECIMAL) for each in shown]


def characters_begun(tokens: Iterable[bytes]) -> NDArray[np.int32]:
    """Count the characters that begin in each token: see `BytePairVocabulary.token_characters`."""
    counts = [sum(byte >> 6 != 0b10 for byte in token) for token in tokens]
    return np.array(counts, np.int32)


def _lines(text: str) -> io.StringIO:
    """Return the lines of a text with their ends; only a newline ends one."""
    return io.StringIO(text, newline="\n")


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError(
            "tokenizer 'bpe:SIZE' needs the library tokenizers: pip install 'probattn[bpe]'"
        ) from None
    return tokenizers


def _tokenizer(model: Any) -> Any:
    library = _library()
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


class UnknownCharacter(ValueError):  # noqa: N818 (the standard name of the thing, as UnicodeError)
    """A text holds a character that the vocabulary cannot encode.

    Attributes:
        character: the first such character.
        position: its 0-based position in the text, in characters.
        distinct: how many distinct characters of the text cannot be encoded. Of a long file that a
            published tokenizer reads, they are those of the first piece with any.
    """

    def __init__(self, character: str, position: int, distinct: int) -> None:
        super().__init__(character, position, distinct)  # these arguments keep it picklable
        self.character, self.position, self.distinct = character, position, distinct

    def __str__(self) -> str:
        if "\ud800" <= self.character <= "\udfff":
            advice = "it is a lone surrogate, which no UTF-8 text can hold: remove it"
        else:
            advice = "remove them, or build the vocabulary from text that holds them"
        return (
            f"unknown character {self.character!r} (U+{ord(self.character):04X}) at position "
            f"{self.position} of the text, which holds {self.distinct} distinct character(s) "
            f"outside the vocabulary; {advice}"
        )


def check_text(text: str | Text) -> None:
    """Refuse a text that gives no vocabulary: empty, or with a lone surrogate."""
    if not any(True for _ in Text.of(text).pieces()):
        raise ValueError("text: got an empty text, expected one character or more")
    if isinstance(text, str):  # a text from files is UTF-8
        check_surrogates(text)


def check_surrogates(text: str) -> None:
    """Raise `UnknownCharacter` at a lone surrogate, which has no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        surrogates = set(re.findall("[\ud800-\udfff]", text))
        raise UnknownCharacter(text[error.start], error.start, len(surrogates)) from None


def check_ids(ids: ArrayLike, size: int, *, ndim: int | None = None) -> NDArray[np.integer[Any]]:
    """Return token ids as an array, refused unless they are integers from 0 to size - 1."""
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
