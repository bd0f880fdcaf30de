"""Where the characters of a text stand when it is drawn in a monospaced font."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

RETURN_MARK, TAB_MARK, UNKNOWN_MARK = "↵", "⇥", "\N{REPLACEMENT CHARACTER}"

# What may not be torn at the end of a row: a word with the space after it.
_UNIT = re.compile(r"\S+ ?|\s")


@dataclass(frozen=True)
class Piece:
    """What one token has on one row.

    Attributes:
        token: index of the token.
        row: 0-based, from the top.
        column: column of its first character, 0-based.
        text: its characters, each one column wide.
    """

    token: int
    row: int
    column: int
    text: str


@dataclass(frozen=True)
class TextLayout:
    """A text cut into rows.

    Attributes:
        pieces: in reading order; a token that goes over the end of a row has several.
        rows: number of rows, at least one.
        shown: characters placed.
        total: characters in the text; a token of no characters counts as one.
    """

    pieces: tuple[Piece, ...]
    rows: int
    shown: int
    total: int


def lay_out(
    tokens: Sequence[str],
    *,
    columns: int,
    max_rows: int,
    max_characters: int,
    has_glyph: Callable[[str], bool],
) -> TextLayout:
    """Break a text into rows between words, at newlines, and inside words longer than a row.

    Args:
        tokens: the text, in order; a token of no characters is shown by U+FFFD.
        columns: characters in a row.
        max_rows: the text is cut after so many rows.
        max_characters: and after so many characters.
        has_glyph: whether the font can draw a character; see `replace_missing_glyphs`.
    """
    characters = [(index, each) for index, token in enumerate(tokens) for each in token or "\0"]
    shown = characters[:max_characters]
    placed: list[tuple[int, int, int, str]] = []  # token, row, column, character
    row = column = 0
    for unit in _UNIT.finditer("".join(each for _, each in shown)):
        length = unit.end() - unit.start()
        if columns - column < length <= columns:
            row, column = row + 1, 0
        for token, character in shown[unit.start() : unit.end()]:
            if column == columns:
                row, column = row + 1, 0
            placed.append((token, row, column, replace_missing_glyphs(character, has_glyph)))
            column += 1
            if character == "\n":
                row, column = row + 1, 0
    placed = [each for each in placed if each[1] < max_rows]
    return TextLayout(
        pieces=tuple(_pieces(placed)),
        rows=placed[-1][1] + 1 if placed else 1,
        shown=len(placed),
        total=len(characters),
    )


def replace_missing_glyphs(text: str, has_glyph: Callable[[str], bool]) -> str:
    """Return a text as long, with every character visible and one column wide.

    Newlines and tabs become marks, other spaces plain ones; control, combining and unassigned
    characters and those without a glyph become U+FFFD.
    """
    return "".join(_legible_character(character, has_glyph) for character in text)


def _legible_character(character: str, has_glyph: Callable[[str], bool]) -> str:
    if character in "\n\t":
        return RETURN_MARK if character == "\n" else TAB_MARK
    category = unicodedata.category(character)
    if category == "Zs":
        return " "
    if category[0] in "CMZ" or not has_glyph(character):
        return UNKNOWN_MARK
    return character


def _pieces(placed: Iterable[tuple[int, int, int, str]]) -> Iterable[Piece]:
    for (token, row), group in groupby(placed, key=lambda each: each[:2]):
        first, *rest = group
        text = "".join(each[3] for each in chain([first], rest))
        yield Piece(token, row, first[2], text)
