"""Progress bars: the one place that draws on the terminal while work goes on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm


class Bar(Protocol):
    """What a long computation tells of itself."""

    def update(self, done: int) -> None:
        """Count so many more units as done."""

    def show(self, **values: str) -> None:
        """Show short values beside the bar."""

    def line(self, text: str) -> None:
        """Print a line above the bar, to stay."""


class _TqdmBar:
    def __init__(self, bar: tqdm) -> None:
        self._bar = bar

    def update(self, done: int) -> None:
        self._bar.update(done)

    def show(self, **values: str) -> None:
        self._bar.set_postfix(values, refresh=False)

    def line(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)


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
    """Show a progress bar on standard error; only lines if that is no terminal; none if hidden."""
    if not visible:
        yield _Silent()
        return
    with tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        dynamic_ncols=True,
        disable=None,  # where there is no terminal
    ) as bar:
        yield _TqdmBar(bar)
