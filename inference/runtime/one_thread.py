"""One thread at a time where NumPyro runs a model."""

import functools
import threading
from collections.abc import Callable

_NUMPYRO = threading.RLock()


def one_thread_at_a_time[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Let a function wait until no other thread is in one of these functions.

    NumPyro has one stack of handlers for all threads. A model that is traced in two of them at once
    would get the other's sites.
    """

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with _NUMPYRO:
            return function(*args, **kwargs)

    return alone
