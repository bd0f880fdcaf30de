"""A picture of a text, every token on a background that tells its margin."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from probattn.inference.figures import data
from probattn.inference.figures.style import (
    DOUBLE,
    MONO,
    SUPPORT_COLOUR,
    glyphs,
    new_figure,
    styled,
    wrap_label,
)
from probattn.inference.figures.text_layout import RETURN_MARK, Piece, TextLayout, lay_out

_COLUMNS, _MAX_ROWS = 88, 100
_TOKENS_OF_A_CHARACTER = 4  # at most: it has at most four bytes
_TYPE = 9.0  # points
_COLUMN = 0.602 * _TYPE / 72  # inches: DejaVu Sans Mono is 0.602 em wide
_ROW = 1.75 * _TYPE / 72
_HEAD, _BAR, _LINE = 0.06, 0.36, 0.15  # inches: above the text, colour bar, line of its label


@styled
def text_by_margin(
    tokens: Sequence[str],
    margin: ArrayLike,
    *,
    support: ArrayLike,
    label: str,
    max_characters: int = 1200,
) -> Figure:
    """Draw the text itself, each token on the colour of its margin, support tokens boxed.

    Newlines show as a return mark and break the row; what the font cannot draw shows as U+FFFD. A
    token of no characters goes with the token before it: the two have the colour of the smaller
    margin, and the box of either. The colours span the 1st to the 99th percentile of the finite
    margins drawn; NaN is grey. A text of more than 100 rows is cut there too. The caption says
    where a text is cut.

    Args:
        tokens: the text of each token, N of them, as `display` of a vocabulary returns it.
        margin: its margin, shape (N,); NaN and infinities are allowed.
        support: positions of the support tokens, shape (k,).
        label: whose margin it is, and of which kind.
        max_characters: most characters to draw, from the start of the text.

    Raises:
        ValueError: if there are no tokens, or not as many margins, or a position is no integer from
            0 to N - 1, or `max_characters` is less than 1.
    """
    values = data.vector("margin", margin)
    if len(tokens) != len(values) or not len(tokens):
        raise ValueError(
            f"margin: got {len(values)} margins for {len(tokens)} tokens, expected one for each of "
            "at least one token"
        )
    if max_characters < 1:
        raise ValueError(f"max_characters: got {max_characters}, expected at least 1")
    boxed = data.positions("support", support, len(tokens))
    characters, supports = sum(map(len, tokens)) + (not tokens[0]), len(boxed)
    tokens = tokens[: _TOKENS_OF_A_CHARACTER * max_characters]  # what is drawn lies among them
    boxed, values = boxed[boxed < len(tokens)], values[: len(tokens)]
    heads = data.character_heads(tokens)
    shown, begins = np.unique(heads, return_index=True)
    values, boxed = np.fmin.reduceat(values, begins), np.searchsorted(shown, heads[boxed])
    layout = lay_out(
        [tokens[head] for head in shown],
        columns=_COLUMNS,
        max_rows=_MAX_ROWS,
        max_characters=max_characters,
        has_glyph=lambda character: ord(character) in glyphs(MONO),
    )
    drawn = values[: layout.pieces[-1].token + 1]
    low, high = data.colour_limits(drawn)
    scale = ScalarMappable(Normalize(low, high), colormaps["cividis"].with_extremes(bad="0.75"))
    faces = np.asarray(scale.to_rgba(np.ma.masked_where(np.isnan(drawn), drawn)))

    width, height = _COLUMNS * _COLUMN, layout.rows * _ROW
    bar_label = wrap_label(f"margin ({label})", width)
    foot = _BAR + _LINE * len(bar_label.splitlines())
    total = _HEAD + height + foot
    figure = new_figure(DOUBLE, total)
    left = (DOUBLE - width) / 2 / DOUBLE
    page = figure.add_axes((left, foot / total, width / DOUBLE, height / total))
    page.set(xlim=(0, _COLUMNS), ylim=(layout.rows, 0))
    page.set_axis_off()
    _draw_cells(page, layout.pieces, faces)
    _draw_characters(page, layout.pieces, faces)
    _draw_boxes(page, [piece for piece in layout.pieces if piece.token in boxed])

    bar = figure.add_axes((left, (foot - 0.14) / total, 2.4 / DOUBLE, 0.09 / total))
    ends = {(False, False): "neither", (True, False): "min", (False, True): "max"}
    beyond = bool((drawn < low).any()), bool((drawn > high).any())
    figure.colorbar(scale, cax=bar, orientation="horizontal", extend=ends.get(beyond, "both"))
    bar.tick_params(labelsize=7, length=2, width=0.6, pad=1.5)
    bar.set_xlabel(bar_label, loc="left", labelpad=1, parse_math=False)
    figure.text(
        1 - left,
        (foot - 0.08) / total,
        _caption(layout, boxed.tolist(), supports, bool(np.isnan(drawn).any()), characters),
        ha="right",
        va="top",
    )
    return figure


def _draw_cells(page: Axes, pieces: Sequence[Piece], faces: NDArray[np.float64]) -> None:
    cells = PolyCollection(
        [_corners(piece, 0.38) for piece in pieces],
        facecolors=[tuple(faces[piece.token]) for piece in pieces],
        edgecolors="white",
        linewidths=0.4,
        gid="tokens",
    )
    page.add_collection(cells, autolim=False)


def _draw_boxes(page: Axes, pieces: Sequence[Piece]) -> None:
    boxes = PolyCollection(
        [_corners(piece, 0.47) for piece in pieces],
        facecolors="none",
        edgecolors=SUPPORT_COLOUR,
        linewidths=2.0,
        clip_on=False,
        zorder=4,
        gid="support",
    )
    page.add_collection(boxes, autolim=False)


def _draw_characters(page: Axes, pieces: Sequence[Piece], faces: NDArray[np.float64]) -> None:
    """Draw each by itself: advances are rounded to pixels, and a line of type would drift."""
    for piece in pieces:
        ink = "black" if _luminance(faces[piece.token]) > 0.18 else "white"
        for offset, character in enumerate(piece.text):
            if character != " ":
                page.text(
                    piece.column + offset + 0.5,
                    piece.row + 0.68,
                    character,
                    color=ink,
                    family=MONO,
                    size=_TYPE,
                    ha="center",
                    va="baseline",
                    parse_math=False,
                )


def _corners(piece: Piece, above: float) -> list[tuple[float, float]]:
    """Return the rectangle of a piece that reaches so far above and below the middle of its row."""
    left, right = piece.column, piece.column + len(piece.text)
    top, bottom = piece.row + 0.5 - above, piece.row + 0.5 + above
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _luminance(colour: NDArray[np.float64]) -> float:
    """Return an sRGB colour's relative luminance (WCAG 2.1); black and white are alike at 0.18."""
    rgb = colour[:3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def _caption(
    layout: TextLayout, boxed: Sequence[int], supports: int, undefined: bool, characters: int
) -> str:
    last = layout.pieces[-1].token
    inside = sum(token <= last for token in boxed)
    parts = []
    if supports:
        parts.append("boxed: support tokens" if inside else "support tokens lie further on")
        if 0 < inside < supports:
            parts[-1] += f" ({inside} of {supports} within)"
    if any(RETURN_MARK in piece.text for piece in layout.pieces):
        parts.append(f"{RETURN_MARK} new line")
    if undefined:
        parts.append("grey: no margin")
    lines = ["; ".join(parts)] if parts else []
    if layout.shown < characters:
        lines.append(f"first {layout.shown} of {characters} characters")
    return "\n".join(lines)
