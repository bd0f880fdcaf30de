"""The cores of this machine, on whose number the rounding of results depends."""

import os

import jax


def cores() -> int:
    """Return how many cores this process may use: XLA divides its sums among so many threads."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def other_rounding(saved: int | None) -> str | None:
    """Say in one line that what goes on here is rounded otherwise than what was saved.

    Args:
        saved: number of cores that it was computed on, None where it is not known.

    Returns:
        The line; None on other devices than a CPU, and where the numbers are the same.
    """
    here = cores()
    if saved in (None, here) or jax.default_backend() != "cpu":
        return None
    return (
        f"computed so far on {saved} cores, and goes on with {here}: the results are right, but "
        "rounded differently than those of a run that was not interrupted"
    )
