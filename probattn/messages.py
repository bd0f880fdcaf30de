"""One line for a message: of an error, of a bad value, of a text that may steer the terminal."""

import reprlib


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def describe(value: object) -> str:
    """Return a value's type and a short repr: it may be huge or deeply nested."""
    return f"{type(value).__name__} {reprlib.repr(value)}"


def legible(text: str) -> str:
    """Quote a text of somebody else's where it would break a message's line or steer a terminal."""
    return text if text.isprintable() else repr(text)


def is_utf8(name: str) -> bool:
    """Tell whether UTF-8 holds a name: that of a file may be any bytes, which Python escapes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
