"""Signals that end a long computation between two of its steps, and not within one."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A signal ended a computation after what it had done was saved.

    Args:
        signum: number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"ended by {signal.Signals(signum).name}; what was done is saved")
        self.signum = signum


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], int]]:
    """Note SIGINT and SIGTERM instead of acting on them; a second one acts at once.

    Yields:
        A function that returns the number of the signal noted, 0 if there was none. Outside the
        main thread, where Python handles no signals, it always returns 0.
    """
    noted = 0

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = signum

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
