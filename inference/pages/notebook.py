"""What results show of themselves in a notebook: HTML with its styles in it, and no script."""

import html
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from probattn.inference.pages.colours import SUPPORT, colours, ink

MOST_SHOWN = 400
"""Tokens that a notebook shows of a text."""

_CELL = "padding:1px 12px 1px 0;text-align:left;border:0"
_MONO = "font-family:DejaVu Sans Mono,Menlo,Consolas,monospace"
_MARKS = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW TO BAR}"}


def facts_in_notebook(title: str, facts: Mapping[str, object]) -> str:
    """Return a title and a table of names and values.

    Args:
        title: one line.
        facts: values by name; a number has four significant digits.
    """
    rows = ((name, _cell(value)) for name, value in facts.items())
    return f"<div><b>{html.escape(title)}</b>{_table((), rows)}</div>"


def text_in_notebook(
    title: str,
    tokens: Sequence[str],
    values: Float[np.ndarray, " N"],
    support: Bool[np.ndarray, " N"],
    label: str,
    series: Mapping[str, Float[np.ndarray, " M"]],
    length: int,
) -> str:
    """Return the beginning of a text, every token on the colour of its value, and a table.

    Support tokens have an outline. Values that are not positive are struck through.

    Args:
        title: one line.
        tokens: the first tokens of the text, at most MOST_SHOWN of which are shown.
        values: their values, (N,).
        support: which of them are outlined, (N,).
        label: what the values are.
        series: values of all tokens by name, whose smallest, first percentile and median the table
            has; NaN counts for nothing.
        length: number of tokens of the text.
    """
    tokens, values = tokens[:MOST_SHOWN], values[:MOST_SHOWN]
    drawn = zip(tokens, values, support[:MOST_SHOWN], colours(values), strict=True)
    text = "".join(_token(*each) for each in drawn)
    cut = f"; the first {len(tokens)} of {length:,} tokens" if length > len(tokens) else ""
    rows = []
    for name, of_all in series.items():
        known = of_all[~np.isnan(of_all)]
        cells = np.quantile(known, [0, 0.01, 0.5], method="lower") if known.size else [np.nan] * 3
        rows.append((name, *(f"{value:.3g}" for value in cells)))
    return (
        f"<div><b>{html.escape(title)}</b>"
        f'<div style="{_MONO};line-height:1.8;white-space:pre-wrap;overflow-wrap:anywhere">'
        f"{text}</div><div>dark: small {html.escape(label)}; outlined: support token{cut}</div>"
        f"{_table(('', 'smallest', '1 %', 'median'), rows)}</div>"
    )


def _token(token: str, value: float, support: bool, colour: np.ndarray) -> str:
    red, green, blue = colour
    style = f"background:rgb({red},{green},{blue});color:{ink(colour)};padding:1px 0"
    if support:
        style += f";box-shadow:0 0 0 2px {SUPPORT}"
    if value <= 0:
        style += ";text-decoration:line-through"
    shown = "".join(map(_visible, token)) or "\N{BOX DRAWINGS LIGHT QUADRUPLE DASH HORIZONTAL}"
    after = "\n" if token.endswith("\n") else ""
    return f'<span style="{style}" title="{value:.3g}">{html.escape(shown)}</span>{after}'


def _visible(character: str) -> str:
    if unicodedata.category(character)[0] == "C" or character in "\u2028\u2029":
        return _MARKS.get(character, "\N{REPLACEMENT CHARACTER}")
    return character


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th style="{_CELL}">{html.escape(name)}</th>' for name in columns)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{html.escape(cell)}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return f'<table style="border-collapse:collapse"><tr>{head}</tr>{body}</table>'


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
