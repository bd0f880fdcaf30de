"""Keep libraries from adding to the one line that an error of the command is."""

import logging
import sys
from typing import Any


def silence_libraries() -> None:
    """Silence what orbax says about an error that it also raises, for the rest of the process.

    Orbax closes its event loop at the first error. Threads of tensorstore still call that loop for
    the arrays that were being written, even after the command has printed its line, and Python
    reports each call to `sys.unraisablehook`. A command owns its process, so it may set the hook; a
    library may not.
    """
    for name in ("absl", "asyncio"):  # through which orbax tells of its errors and of its tasks
        logging.getLogger(name).setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        late = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        if not (late and unraisable.object is None):
            before(unraisable)

    sys.unraisablehook = hook
