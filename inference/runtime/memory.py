"""The memory of this machine, and what is too large for it."""

import os
from pathlib import Path

_LIMITS = (  # of a container, in the two versions of Linux's control groups
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def check_memory(what: str, size: int, limit: int | None = None) -> None:
    """Refuse what no memory holds, before it is allocated.

    Args:
        what: name of the arrays, as a sentence begins.
        size: their bytes.
        limit: bytes of memory; by default `host_memory`.

    Raises:
        ValueError: if they are more than the memory.
    """
    memory = host_memory() if limit is None else limit
    if size > memory:
        raise ValueError(
            f"{what} would take {gibibytes(size)}: expected at most the {gibibytes(memory)} of "
            "this machine's memory"
        )


def host_memory() -> int:
    """Return the bytes of memory of this machine, or of its container if that has fewer."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _LIMITS:
        try:
            memory = min(memory, int(path.read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such file, or no limit: "max"
            continue
    return memory


def gibibytes(size: int) -> str:
    """Write a number of bytes in GiB."""
    return f"{(size + 2**29) // 2**30:,} GiB"  # of integers, which may be larger than any float
