"""Timing of alternatives in one run, rounds alternated, the first against itself as control."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import jax

CONTROL = "control"


def compare(
    alternatives: Mapping[str, Callable[[], Any]], *, rounds: int
) -> dict[str, dict[str, float]]:
    """Time each alternative once a round, in an order that turns, and the first twice.

    Returns:
        By name, and for the second timing of the first alternative under "control": median time
        in seconds, and median and quartiles over rounds of its ratio to the first.
    """
    first = next(iter(alternatives))
    runs = {**alternatives, CONTROL: alternatives[first]}
    for run in alternatives.values():
        jax.block_until_ready(run())  # compiled and warm
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            started = time.perf_counter()
            jax.block_until_ready(runs[name]())
            seconds[name].append(time.perf_counter() - started)
    results = {}
    for name in runs:
        ratios = [a / b for a, b in zip(seconds[name], seconds[first], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        results[name] = {
            "seconds": statistics.median(seconds[name]),
            "ratio": middle,
            "ratio_low": low,
            "ratio_high": high,
        }
    return results


def environment() -> dict[str, Any]:
    """Machine and versions, for the result file."""
    return {
        "device": str(jax.devices()[0].device_kind),
        "platform": jax.default_backend(),
        "machine": platform.machine(),
        "cores": len(__import__("os").sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "numpyro", "optax", "probattn")},
    }
