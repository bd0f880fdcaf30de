"""Progress bars: the one place that draws on the terminal while work goes on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm

from probattn.inference.runtime.outputs import Forgiving


class Bar(Protocol):
    """What a long computation tells of itself."""

    def update(self, done: int) -> None:
        """Count so many more units as done."""

    def show(self, **values: str) -> None:
        """Show short values beside the bar."""

    def line(self, text: str) -> None:
        """Print a line above the bar, to stay."""


class _TqdmBar:
    def __init__(self, bar: tqdm, stream: Forgiving) -> None:
        self._bar, self._stream = bar, stream

    def update(self, done: int) -> None:
        self._bar.update(done)

    def show(self, **values: str) -> None:
        self._bar.set_postfix(values, refresh=False)

    def line(self, text: str) -> None:
        tqdm.write(text, file=self._stream)


class _Silent:
    def update(self, done: int) -> None:
        pass

    def show(self, **values: str) -> None:
        pass

    def line(self, text: str) -> None:
        pass


@contextmanager
def progress_bar(
    description: str, *, total: int, unit: str, initial: int = 0, visible: bool = True
) -> Iterator[Bar]:
    """Show a progress bar on standard error; only lines if that is no terminal; none if hidden.

    Standard error may be closed or fail at any time: the work goes on.
    """
    if not visible or sys.stderr is None:
        yield _Silent()
        return
    stream = Forgiving(sys.stderr)
    with tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        file=stream,
        dynamic_ncols=True,
        disable=None,  # where there is no terminal
    ) as bar:
        yield _TqdmBar(bar, stream)
