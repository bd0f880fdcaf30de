"""Formulas of the pages, which are plain Unicode, with their sub- and superscripts set as such.

In the pages of `PAGES`, an indented block is a formula: it is set in a font for formulas. There and
in the sentences, `x_t`, `α_{ts}` and `e^{-x}` become what they mean. Code is left alone.
"""

import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

PAGES = ("mathematics", "idea")
_LETTER = r"A-Za-z\u0391-\u03a9\u03b1-\u03c9"  # the Greek ones, too
_GROUP = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
# A letter, perhaps a differential or primed, or one of a few words; then a group in braces, in
# parentheses as an exponent, or at most three letters and digits.
SCRIPT = re.compile(
    rf"((?<![{_LETTER}0-9_])(?:d?[{_LETTER}]|Cov|Var|concat|min|max)[\u0304\u2032*]?|[)‖∫])"
    rf"(?:_(?:{_GROUP}|([{_LETTER}0-9]{{1,3}})(?![{_LETTER}0-9_]))"
    rf"|\^(?:{_GROUP}|\(([^()]*)\)|([{_LETTER}0-9])(?![{_LETTER}0-9_])))"
)
CODE = re.compile(r"`([^`]+)`")
CODE_NODES = (nodes.literal, nodes.literal_block, nodes.raw)


def pieces(text: str) -> Iterator[nodes.Node]:
    """Split a text into plain text, subscripts and superscripts."""
    last = 0
    for match in SCRIPT.finditer(text):
        base, *bodies = match.groups()
        yield nodes.Text(text[last : match.start()] + base)
        number = next(index for index, body in enumerate(bodies) if body is not None)
        kind = nodes.subscript if number < 2 else nodes.superscript
        yield kind("", "", *pieces(bodies[number]))
        last = match.end()
    yield nodes.Text(text[last:])


def formula(text: str) -> nodes.Node:
    """Set a block of formulas, in which names of code are between backticks."""
    made = nodes.paragraph("", classes=["formula"])
    for number, part in enumerate(CODE.split(text)):
        made += [nodes.literal("", part)] if number % 2 else list(pieces(part))
    return made


class Formulas(SphinxPostTransform):
    """Set formulas on the pages that have them."""

    default_priority = 400
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """Replace blocks first, then texts outside of code."""
        if self.env.docname not in PAGES:
            return
        for text in list(self.document.findall(nodes.Text)):
            above = text.parent
            if not isinstance(above, CODE_NODES) and SCRIPT.search(text):
                above.replace(text, list(pieces(text.astext())))
        for block in list(self.document.findall(nodes.literal_block)):
            if block.get("language", "none") in ("none", "default"):
                block.replace_self(formula(block.astext()))


def setup(app: Any) -> dict[str, bool]:
    """Register the transform with Sphinx."""
    app.add_post_transform(Formulas)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
