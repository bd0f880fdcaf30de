"""One line for a message: of an error, of a bad value, of a text that may steer the terminal."""

import reprlib


def one_line(error: BaseException) -> str:
    """An exception's message on one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def describe(value: object) -> str:
    """A value's type and a short repr: it may be huge or deeply nested."""
    return f"{type(value).__name__} {reprlib.repr(value)}"


def legible(text: str) -> str:
    """A text of somebody else's for a message: quoted where it would break the line or steer."""
    return text if text.isprintable() else repr(text)
