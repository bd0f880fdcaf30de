"""Texts that are read in pieces, as often as they are needed, and never whole."""

import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TEXT_END = b"\xff"
"""What ends a text in a checksum of several: it occurs in no UTF-8 text."""
PIECE = 2**20
"""Most characters in a piece of a string, and in a piece that is encoded at once."""
CODE_POINTS = 0x110000
"""Number of code points of Unicode."""
LONGEST_WORD = 2**24
"""Most characters between two places at which a text may be cut for a byte-pair vocabulary."""
CONTEXT = 64
"""Characters on either side of a cut by which it is judged: more than nearly all tokens have."""

_STRETCHES = 64  # of a sample: many, so that it is of every part of a text
# As far as the last space between two visible characters, where a word of GPT-2's pattern begins.
_UP_TO_A_WORD = re.compile(r".*[!-~](?= [!-~])", re.DOTALL)
# Up to where published tokenizers end a token, the best place first: after a line, but not inside a
# stretch of white space; before a word; before a mark, for writing without spaces.
_CUTS = tuple(map(re.compile, (r"\S\n(?=\S)", r"[!-~](?= [!-~])", r"[^\W_](?=[^\w\s])")))
_TRIES = 16  # of each kind of place: where so many are refused, the next would be too


@dataclass(frozen=True)
class Text:
    """A text, or a stretch of one, that is read anew whenever it is needed.

    Attributes:
        source: function that reads a whole text from its beginning, as pieces of any length.
        first: number of the character at which this stretch of it begins.
        stop: number of the character before which it ends; None where it ends with the source.
    """

    source: Callable[[], Iterable[str]]
    first: int = 0
    stop: int | None = None

    @classmethod
    def of(cls, text: "str | Text") -> "Text":
        """Return a string as a text, and a text as it is."""
        return text if isinstance(text, Text) else cls(functools.partial(_slices, text))

    @classmethod
    def joined(cls, *texts: "Text") -> "Text":
        """Return several texts as one, one after the other."""
        pieces = lambda: (piece for text in texts for piece in text.pieces())  # noqa: E731
        return cls(pieces, stop=sum(text.length for text in texts))

    def pieces(self) -> Iterator[str]:
        """Read the text; every piece has one character or more."""
        position = 0
        for piece in self.source():
            if self.stop is not None and position >= self.stop:
                return
            stop = None if self.stop is None else self.stop - position
            if kept := piece[max(self.first - position, 0) : stop]:
                yield kept
            position += len(piece)

    def paragraphs(self) -> Iterator[str]:
        """Read the text in pieces that end where no token of a byte-pair vocabulary goes on.

        That is after a newline, or else before a single space between two words.

        Raises:
            ValueError: if there is no such place within `LONGEST_WORD` characters.
        """
        kept = ""
        for piece in self.pieces():
            kept += piece
            word = None if "\n" in piece else _UP_TO_A_WORD.match(kept)
            end = kept.rfind("\n") + 1 if word is None else word.end()
            if end:
                yield kept[:end]
                kept = kept[end:]
            if len(kept) > LONGEST_WORD:
                raise ValueError(
                    f"text: got a word of more than {LONGEST_WORD:,} characters, expected spaces "
                    "or line ends for byte pairs; take tokenizer 'character'"
                )
        if kept:
            yield kept

    def cut(self, allowed: Callable[[str, str], bool]) -> Iterator[tuple[str, str]]:
        """Read the text in pieces of at most `PIECE` characters, where it can be cut so often.

        Where it is cut depends on its characters alone, and not on how its source reads them. A
        text of at most `PIECE` characters is one piece.

        Args:
            allowed: says of the `CONTEXT` characters before and after a place, or of those that
                there are, whether the text may be cut there.

        Yields:
            The `CONTEXT` characters before a piece, none before the first, and the piece.

        Raises:
            ValueError: if there is no such place within `LONGEST_WORD` characters.
        """
        before, kept, most = "", "", PIECE
        for piece in itertools.chain(self.pieces(), [None]):  # None: the text has ended
            kept += piece or ""
            while len(kept) >= most + (1 if piece is None else CONTEXT):
                end = _last_cut(before, kept, most, allowed)
                if end:
                    yield before, kept[:end]
                    before = _tail(before, kept, end)
                    kept, most = kept[end:], PIECE
                elif most < LONGEST_WORD:
                    most += PIECE
                else:
                    raise ValueError(
                        f"text: got {most:,} characters among which no token surely ends, expected "
                        "spaces or line ends; give a text with some"
                    )
        if kept:
            yield before, kept

    def read(self) -> str:
        """Return the whole text as a string."""
        return "".join(self.pieces())

    @functools.cached_property
    def length(self) -> int:
        """Number of characters."""
        if self.stop is not None:
            return self.stop - self.first
        return sum(map(len, self.pieces()))

    def sample(self, most: int) -> "Text":
        """Return the text if it has at most that many characters, else a sample of about so many.

        The sample is 64 stretches of equal length, spread evenly over the text.
        """
        if self.length <= most:
            return self
        return Text(functools.partial(self._stretches, self.length // _STRETCHES, most))

    def _stretches(self, period: int, most: int) -> Iterator[str]:
        kept, position = most // _STRETCHES, 0
        for piece in self.pieces():
            first = position // period * period
            while first < position + len(piece):
                stop = max(first + kept - position, 0)
                yield piece[max(first - position, 0) : stop]
                first += period
            position += len(piece)


def checksum(texts: Sequence[Text]) -> str:
    """Return the hexadecimal SHA-256 of texts in UTF-8, with the byte 0xFF between two of them.

    0xFF occurs in no UTF-8 text, so the checksum fixes too where one text ends.

    Raises:
        UnicodeEncodeError: if a text holds a lone surrogate. Its `start` is in the piece.
    """
    digest = hashlib.sha256()
    for number, text in enumerate(texts):
        if number:
            digest.update(TEXT_END)
        for piece in text.pieces():
            digest.update(piece.encode())
    return digest.hexdigest()


def code_points(text: str) -> NDArray[np.uint32]:
    """Return the code point of every character of a string, surrogates included."""
    # surrogatepass: a surrogate is to be reported as an unknown character, not as a codec failure
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def character_counts(text: Text) -> NDArray[np.int64]:
    """Count each character of a text; the index is the code point."""
    counts = np.zeros(CODE_POINTS, np.int64)
    for piece in text.pieces():
        codes, found = np.unique(code_points(piece), return_counts=True)
        counts[codes] += found
    return counts


def _last_cut(before: str, kept: str, most: int, allowed: Callable[[str, str], bool]) -> int:
    """Return after how many characters to cut: at most `most`, or 0 where no place will do."""
    for place in _CUTS:
        ends = [match.end() for match in place.finditer(kept, most - PIECE, most)]
        for end in reversed(ends[-_TRIES:]):
            if allowed(_tail(before, kept, end), kept[end : end + CONTEXT]):
                return end
    return 0


def _tail(before: str, kept: str, end: int) -> str:
    """Return the last `CONTEXT` characters before the place `end` of what is kept."""
    return (before + kept[max(end - CONTEXT, 0) : end])[-CONTEXT:]


def _slices(text: str) -> Iterator[str]:
    for first in range(0, len(text), PIECE):
        yield text[first : first + PIECE]
