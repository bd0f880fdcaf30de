"""Margins of many positions against LAPACK's decomposition of every block, in processor time."""

import time
from functools import partial
from typing import Any
from unittest import mock

import jax
import numpy as np
from harness import CONTROL, compare
from log_det import arguments_of

from probattn.blocks import inverse_iteration
from probattn.margins import both_margins

# Sequences, tokens, embedding dimensions and rank: a head and a post-hoc prior of `make demo`, and
# a head of width 32. The last is a posterior's, in double precision.
SIZES = {
    "head": ((4, 64, 64, 16), np.float32),
    "prior": ((4, 64, 64, 8), np.float32),
    "wide": ((4, 64, 128, 32), np.float32),
    "double": ((16, 64, 16, 4), np.float64),
}


def margins(rounds: int) -> dict[str, Any]:
    """Compare the processor time of all threads, which other processes change little."""
    results: dict[str, Any] = {}
    for name, (size, dtype) in SIZES.items():
        with jax.enable_x64(dtype == np.float64):
            arguments = arguments_of(size, dtype)
            with mock.patch.object(inverse_iteration, "FEW", 2**62):
                lapack = jax.jit(partial(both_margins)).lower(*arguments).compile()
            iterated = jax.jit(partial(both_margins)).lower(*arguments).compile()
            found = compare(
                {"lapack": partial(lapack, *arguments), "iterated": partial(iterated, *arguments)},
                rounds=rounds,
                clock=time.process_time,
            )
            expected, got = (np.asarray(way(*arguments)[0]) for way in (lapack, iterated))
        results[name] = {
            "size": size,
            "times": found,
            "largest_difference": float(np.max(np.abs(got - expected))),
        }
    return results


def report(results: dict[str, Any]) -> None:
    """Print a table of what `margins` returns."""
    for size, table in results.items():
        sequences, length, *_ = table["size"]
        for name, figures in table["times"].items():
            label = "lapack again" if name == CONTROL else name
            print(
                f"margins, {size:8s} {label:14s} "
                f"{1e6 * figures['seconds'] / (sequences * length):8.1f} us of processor time per "
                f"position  x {figures['ratio']:.3f} "
                f"({figures['ratio_low']:.3f} to {figures['ratio_high']:.3f})"
            )
        print(f"margins, {size:8s} differ by at most {table['largest_difference']:.1e}")
