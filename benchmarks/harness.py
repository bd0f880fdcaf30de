"""Timing of alternatives in one run, rounds alternated, the first against itself as control."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import jax

CONTROL = "control"

# A library's threads may spin for a tenth of a second after their last work, as OpenBLAS's do, and
# on two cores they take half the machine from whatever is timed next; and a machine that has
# rested is slow for as long again.
_REST, _WARM = 0.15, 0.25  # seconds


def compare(
    alternatives: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Time each alternative once a round, in an order that turns, and the first twice.

    Before each timing the threads of what was timed before come to rest, and the alternative runs
    untimed, at least once.

    Args:
        alternatives: what to time, by name.
        rounds: how often each is timed.
        clock: in seconds. `time.process_time` counts what all threads of this process work.

    Returns:
        By name, and for the second timing of the first alternative under "control": median time
        in seconds, and median and quartiles over rounds of its ratio to the first.
    """
    return ratios(timed_in_turn(alternatives, rounds=rounds, clock=clock))


def timed_in_turn(
    alternatives: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return what `compare` compares: by name, the seconds of each round."""
    runs = {**alternatives, CONTROL: next(iter(alternatives.values()))}
    for run in alternatives.values():
        jax.block_until_ready(run())  # compiled and warm

    def seconds_of(run: Callable[[], Any]) -> float:
        started = clock()
        jax.block_until_ready(run())
        return clock() - started

    def timed(run: Callable[[], Any]) -> float:
        time.sleep(_REST)
        warm = 0.0
        while warm < _WARM:
            warm += seconds_of(run)
        return seconds_of(run)

    return alternate({name: partial(timed, run) for name, run in runs.items()}, rounds=rounds)


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Return what `compare` does, from the seconds of each round."""
    first = next(iter(seconds))
    return {
        name: {"seconds": statistics.median(own), **ratio(own, seconds[first])}
        for name, own in seconds.items()
    }


def alternate[T](runs: Mapping[str, Callable[[], T]], *, rounds: int) -> dict[str, list[T]]:
    """Return what each run returns, called once a round, in an order that turns."""
    results: dict[str, list[T]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            results[name].append(runs[name]())
    return results


def ratio(values: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles of the ratios of values to those of the same rounds."""
    ratios = [a / b for a, b in zip(values, reference, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"ratio": middle, "ratio_low": low, "ratio_high": high}


def environment() -> dict[str, Any]:
    """Return machine and versions, for the result file."""
    return {
        "device": str(jax.devices()[0].device_kind),
        "platform": jax.default_backend(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "numpyro", "optax", "probattn")},
    }
