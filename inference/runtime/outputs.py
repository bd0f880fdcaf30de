"""Outputs whose end does not end the work: a terminal that is gone, a reader that has left."""

import errno
import io
import locale
import os
import stat
import sys
from contextlib import suppress
from typing import Any, TextIO


class Forgiving:
    """A text stream that drops what it cannot write, for what need not be read.

    Args:
        stream: any text stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        """Write a text if that is possible."""
        with suppress(OSError, ValueError):  # ValueError: the stream is closed
            self._stream.write(text)

    def flush(self) -> None:
        """Flush if that is possible."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Tell whether the stream is a terminal that is still there."""
        with suppress(OSError, ValueError):
            return self._stream.isatty()
        return False


def keep_outputs_open() -> None:
    """Let standard output and error of this process take whatever is written, to its end.

    What cannot be written is dropped, see `lost_output`. A descriptor that is closed is opened:
    otherwise the next file would get its number, and libraries would write their messages there.
    A setting of the whole process: for commands, not for functions that others call.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the smallest number that is free
    sys.stdout = _kept(sys.stdout, 1)
    sys.stderr = _kept(sys.stderr, 2)


def lost_output() -> OSError | None:
    """Return why standard output has not all been written; None if it has, or nobody reads it."""
    buffer = getattr(sys.stdout, "buffer", None)
    descriptor = getattr(buffer, "raw", buffer)
    if not isinstance(descriptor, _Descriptor):
        return None
    sys.stdout.flush()
    return descriptor.error


class _Descriptor(io.FileIO):
    """A descriptor that takes everything: after an error, what is written to it is dropped."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._lost = False
        self.error: OSError | None = None

    def write(self, data: Any, /) -> int | None:  # type: ignore[override]
        if not self._lost:
            try:
                return super().write(data)
            except OSError as error:
                self._lost = True
                if not self._is_unread(error):
                    self.error = error
        return len(data)

    def _is_unread(self, error: OSError) -> bool:
        """Tell whether the reader of a pipe, or the terminal, is gone."""
        terminal = stat.S_ISCHR(os.fstat(self.fileno()).st_mode)
        return error.errno == errno.EPIPE or (terminal and error.errno == errno.EIO)


def _kept(stream: TextIO | None, descriptor: int) -> TextIO | None:
    raw = _Descriptor(descriptor)
    if stream is None:  # it was closed when the process started
        return io.TextIOWrapper(io.BufferedWriter(raw), locale.getencoding(), "replace")
    if not isinstance(stream, io.TextIOWrapper) or stream.fileno() != descriptor:
        return stream  # somebody else's, who knows what to do
    stream.flush()
    unbuffered = isinstance(stream.buffer, io.RawIOBase)  # by `python -u` or PYTHONUNBUFFERED
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
