"""The memory of this machine, and what is too large for it."""

import os


def check_memory(what: str, size: int) -> None:
    """Refuse what no memory holds, before it is allocated.

    Args:
        what: name of the arrays, as a sentence begins.
        size: their bytes.

    Raises:
        ValueError: if they are more than the machine's memory.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise ValueError(
            f"{what} would take {gibibytes(size)}: expected at most the {gibibytes(memory)} of "
            "this machine's memory"
        )


def gibibytes(size: int) -> str:
    """Write a number of bytes in GiB."""
    return f"{(size + 2**29) // 2**30:,} GiB"  # of integers, which may be larger than any float
