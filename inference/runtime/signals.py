"""Signals that end a long computation between two of its steps, and not within one."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Ended(KeyboardInterrupt):
    """A signal ended a computation.

    Args:
        signum: number of the signal.
        state: what the computation had done.
    """

    def __init__(self, signum: int, state: str = "") -> None:
        super().__init__(f"ended by {signal.Signals(signum).name}{state}")
        self.signum = signum


class Interrupted(Ended):
    """A signal ended a computation after what it had done was saved.

    Args:
        signum: number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum, "; what was done is saved")


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise `Ended` at SIGINT and SIGTERM, so that locks are released and files put away."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise Ended(signum)

    with _handled_by(end):
        yield


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
            raise Ended(signum)
        noted = signum

    with _handled_by(note):
        yield lambda: noted


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)
