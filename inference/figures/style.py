"""What all figures share: type, line styles, legend, the boundary of margins, and the PNG file.

Only Matplotlib's object-oriented interface is used: no figure needs a display, registers with
pyplot or depends on the user's matplotlibrc. Each is 3.4 or 7 inches wide, a journal's single or
double column, in 8-point type, and its curves can be told apart without colour.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from matplotlib import font_manager, style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from probattn.inference.figures.text_layout import replace_missing_glyphs
from probattn.inference.runs.files import replacing

SINGLE, DOUBLE = 3.4, 7.0  # widths of a figure, in inches
DPI = 200
SANS, MONO = "DejaVu Sans", "DejaVu Sans Mono"  # both come with Matplotlib
TYPE_SIZE = 8
SUPPORT_COLOUR = "#D55E00"

# Okabe and Ito (2008), ordered so that neighbours differ in grey as well.
COLOURS = ("#0072B2", "#E69F00", "#000000", "#CC79A7", "#D55E00", "#56B4E9", "#009E73")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (9, 1.5)))
_MARKERS = "os^Dv"
_BOUNDARY: dict[str, Any] = {"color": "0.3", "linewidth": 0.9, "linestyle": (0, (1.5, 1.5))}
_INFEASIBLE: dict[str, Any] = {"facecolor": "0.9", "edgecolor": "none"}

styled = style.context(
    [
        "default",
        {
            "font.family": SANS,
            "font.size": TYPE_SIZE,
            "axes.linewidth": 0.6,
            "axes.titlesize": TYPE_SIZE,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "legend.fontsize": TYPE_SIZE,
            "legend.title_fontsize": TYPE_SIZE,
        },
    ]
)
"""Decorator of every function that draws: the style holds inside it and nowhere else."""


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """Make a figure of so many inches, off screen."""
    figure = Figure(figsize=(width, height), **options)
    FigureCanvasAgg(figure)
    return figure


def line_style(number: int) -> dict[str, Any]:
    """Return colour, line style and marker of this curve's number; the first 35 all differ."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "linewidth": 1.2,
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 3.5,
    }


def label_axes(axes: Axes, number: int | None, x: str, y: str, *, title: str = "") -> None:
    """Set axis labels, a light grid, the panel's letter (from 0, if it has a number) and title."""
    axes.set_xlabel(x)
    axes.set_ylabel(y, parse_math=False)
    letter = "" if number is None else f"({chr(ord('a') + number)})  "
    axes.set_title(letter + drawable(title), loc="left", pad=3, parse_math=False)
    # Set on the axes as well: Matplotlib makes ticks as it draws, when the style is over.
    axes.tick_params(labelsize=7, length=2.5, width=0.6, pad=2)
    axes.grid(color="0.9", linewidth=0.5, linestyle="-")
    axes.set_axisbelow(True)


def mark_boundary(axes: Axes, along: Literal["x", "y"]) -> dict[str, Artist]:
    """Draw margin 0 and, where the data go beyond it, shade the infeasible side.

    Args:
        axes: axes whose data are drawn already.
        along: the axis of the margins.

    Returns:
        The entries for a legend.
    """
    lowest = axes.dataLim.y0 if along == "y" else axes.dataLim.x0
    line = (axes.axhline if along == "y" else axes.axvline)(0, **_BOUNDARY)
    entries: dict[str, Artist] = {"boundary, margin 0": line}
    if lowest < 0:
        edge = (axes.get_ylim() if along == "y" else axes.get_xlim())[0]
        shade = (axes.axhspan if along == "y" else axes.axvspan)(edge, 0, **_INFEASIBLE)
        entries["infeasible"] = shade
        if along == "y":
            axes.set_ylim(bottom=edge)
        else:
            axes.set_xlim(left=edge)
    return entries


def add_legend(figure: Figure, entries: Mapping[str, Artist], *, title: str = "") -> None:
    """Add a title and a legend above the panels, in as many columns as fit the figure's width."""
    room, handle = figure.get_figwidth() - 0.1, 0.55  # inches; the handle with the space around it
    labels = [wrap_label(label, room - handle) for label in entries]
    widest = max(_width(line) for label in labels for line in label.splitlines() or [""])
    legend = figure.legend(
        list(entries.values()),
        labels,
        title=wrap_label(title, room),
        loc="outside upper center",
        ncols=max(1, min(len(labels), int(room / (handle + widest)))),
        columnspacing=1.4,
        handlelength=2.6,
        handletextpad=0.7,
        borderpad=0,
    )
    for text in [*legend.get_texts(), legend.get_title()]:
        text.set_parse_math(False)


def wrap_label(text: str, room: float) -> str:
    """Break a label in 8-point type into lines of at most `room` inches; see `drawable`."""
    text = drawable(text)
    width = _width(text)
    return text if width <= room else textwrap.fill(text, max(1, int(len(text) * room / width)))


def _width(text: str) -> float:
    """Return the width of a label, in inches."""
    type_ = font_manager.FontProperties(family=SANS, size=TYPE_SIZE)
    canvas = FigureCanvasAgg(Figure((1, 1), dpi=DPI))
    return canvas.get_renderer().get_text_width_height_descent(text, type_, False)[0] / DPI


@cache
def glyphs(family: str) -> frozenset[int]:
    """Return the code points that a font can draw."""
    font = font_manager.get_font(font_manager.findfont(family, fallback_to_default=False))
    return frozenset(font.get_charmap())


def drawable(text: str) -> str:
    """Return a label without characters that the font lacks: Matplotlib warns of those."""
    return replace_missing_glyphs(text, lambda character: ord(character) in glyphs(SANS))


@styled
def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as a PNG of 200 dots per inch, whole or not at all.

    Folders above it are made. A file of that name is replaced in one step, and stays as it was if
    drawing or writing fails.

    Returns:
        The path.

    Raises:
        ValueError: if the path does not end in .png.
        OSError: if the folder or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path: got {os.fspath(path)!r}, expected a name that ends in .png")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=DPI)
    return path


def panel_grid(count: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    """Make a figure of a double column with that many panels, at most three in a row."""
    columns = min(count, 3) if count != 4 else 2
    lines = -(-count // columns)
    figure = new_figure(DOUBLE, 0.5 + height * lines, layout="constrained")
    return figure, [figure.add_subplot(lines, columns, 1 + index) for index in range(count)]
