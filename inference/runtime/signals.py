"""Signals that end a long computation between two of its steps, and not within one."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a command: Ctrl-C, a batch system, a terminal that is gone."""

# Seconds after a signal in which others are the same one again: launchers pass Ctrl-C on to a
# process that has it from the terminal, and a shell repeats the kernel's SIGHUP.
_BURST = 1.0

_heard = -math.inf  # when a signal last had an effect


class Ended(KeyboardInterrupt):
    """A signal ended a computation.

    Args:
        signum: number of the signal.
    """

    _work = ""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    def __str__(self) -> str:
        return f"ended by {signal.Signals(self.signum).name}{self._work}"


class Interrupted(Ended):
    """A signal ended a computation after what it had done was saved.

    Args:
        signum: number of the signal.
    """

    _work = "; what was done is saved"


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise `Ended` at the signals `ENDING`, so that locks are released and files put away.

    A signal that the process ignores, as SIGHUP under `nohup`, stays ignored.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        if _is_new():
            raise Ended(signum)

    with _handled_by(end):
        yield


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], int]]:
    """Note the signals `ENDING` instead of acting on them; a second one acts at once.

    Yields:
        A function that returns the number of the signal noted, 0 if there was none. Outside the
        main thread, where Python handles no signals, it always returns 0.
    """
    noted = 0

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal noted
        if _is_new():
            if noted:
                raise Ended(signum)
            noted = signum

    with _handled_by(note):
        yield lambda: noted


def ignore_signals() -> None:
    """Ignore further signals within `ended_by_signals`: one of them is being obeyed."""
    global _heard
    _heard = math.inf


def _is_new() -> bool:
    """Tell whether a signal is one of its own, and not part of a burst."""
    global _heard
    now = time.monotonic()
    if now - _heard <= _BURST:
        return False
    _heard = now
    return True


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    global _heard
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _heard = -math.inf
    # None is a handler that is not Python's, which could not be put back.
    kept = (signal.SIG_IGN, None)
    before = {
        signum: signal.signal(signum, handler)
        for signum in ENDING
        if signal.getsignal(signum) not in kept
    }
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)
