"""Time and temporary memory of log det and its gradient against T, r, d and the batch.

One size varies at a time, from a base point. An exponent is the slope of a straight line through
the logarithms of the upper values, fitted by least squares.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
from harness import CONTROL, compare
from log_det import arguments_of, gradient_of, log_abs_of
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from probattn.inference.figures.style import (
    DOUBLE,
    add_legend,
    label_axes,
    line_style,
    new_figure,
    styled,
)

NAMES = ("batch", "T", "d", "r")  # in this order sizes are given
BASE = (4, 128, 128, 16)
GRID: Mapping[str, Sequence[int]] = {
    "T": (64, 128, 256, 512, 1024),
    "r": (2, 4, 8, 16, 32),
    "d": (32, 64, 128, 256, 512),
    "batch": (1, 2, 4, 8, 16),
}
UPPER = 3  # values that an exponent is fitted to
ALIVE = ((2, 256, 128, 32), (32, 256, 128, 32))  # two batches at T >= 256

Size = tuple[int, ...]


def scaling(
    rounds: int,
    *,
    base: Size = BASE,
    grid: Mapping[str, Sequence[int]] = GRID,
    alive: tuple[Size, Size] = ALIVE,
) -> dict[str, Any]:
    """Measure seconds, temporary bytes and exponents by size, and memory by batch."""
    curves = {name: [_with(base, name, value) for value in values] for name, values in grid.items()}
    sizes = list(dict.fromkeys([base, *(size for curve in curves.values() for size in curve)]))
    programs = _compiled([*sizes, *alive])
    calls = {str(size): partial(programs[size], *arguments_of(size, np.float32)) for size in sizes}
    times = compare(calls, rounds=rounds)
    memory = {
        size: program.memory_analysis().temp_size_in_bytes for size, program in programs.items()
    }
    along = {}
    for name, curve in curves.items():
        seconds = [times[str(size)]["seconds"] for size in curve]
        taken = [memory[size] for size in curve]
        along[name] = {
            "values": list(grid[name]),
            "seconds": seconds,
            "temporary_bytes": taken,
            "exponent_of_time": exponent(grid[name], seconds),
            "exponent_of_memory": exponent(grid[name], taken),
        }
    return {
        "base": dict(zip(NAMES, base, strict=True)),
        "precision": "float32",
        "fitted_to_the_upper": UPPER,
        "control": times[CONTROL],
        "along": along,
        "memory_per_sequence": _per_sequence(alive, [memory[size] for size in alive]),
    }


def report(results: dict[str, Any]) -> None:
    """Print a table of what `scaling` returns."""
    base = ", ".join(f"{name} = {value}" for name, value in results["base"].items())
    control = results["control"]
    print(
        f"scaling from {base}; base again x {control['ratio']:.3f} "
        f"({control['ratio_low']:.3f} to {control['ratio_high']:.3f})"
    )
    for name, curve in results["along"].items():
        for value, seconds, taken in zip(
            curve["values"], curve["seconds"], curve["temporary_bytes"], strict=True
        ):
            print(f"scaling, {name:5s} {value:5d} {1e3 * seconds:9.2f} ms {taken / 2**20:8.2f} MiB")
        print(
            f"scaling, {name:5s} exponent of time {curve['exponent_of_time']:.2f}, "
            f"of memory {curve['exponent_of_memory']:.2f}"
        )
    alive = results["memory_per_sequence"]
    print(
        f"scaling, T = {alive['T']}, r = {alive['r']}: each sequence more takes "
        f"{alive['bytes'] / 2**10:.0f} KiB; T x r x r numbers are "
        f"{alive['blocks_bytes'] / 2**10:.0f} KiB (x {alive['ratio']:.3f})"
    )


@styled
def figure(results: dict[str, Any]) -> Figure:
    """Draw time above and temporary memory below, a column for each size that varies."""
    along = results["along"]
    drawn = new_figure(DOUBLE, 3.6, layout="constrained")
    panels = drawn.subplots(2, len(along), sharex="col", sharey="row", squeeze=False)
    entries: dict[str, Any] = {}
    rows = (
        ("seconds", 1e3, "time, ms", "time"),
        ("temporary_bytes", 2**-20, "memory, MiB", "memory"),
    )
    for row, (quantity, unit, label, short) in enumerate(rows):
        for column, (name, curve) in enumerate(along.items()):
            axes = panels[row, column]
            values = np.array(curve["values"])
            measured = unit * np.array(curve[quantity])
            power = curve[f"exponent_of_{short}"]
            upper = values[-results["fitted_to_the_upper"] :]
            # Through the mean of the logarithms, as a least-squares line goes.
            height = np.exp(np.log(measured[-len(upper) :]).mean() - power * np.log(upper).mean())
            axes.loglog(values, measured, **line_style(2) | {"linestyle": ""})
            entries["measured"] = axes.lines[-1]
            axes.loglog(upper, height * upper**power, color="0.4", linewidth=1.2)
            entries["power law through the upper values"] = axes.lines[-1]
            label_axes(
                axes,
                row * len(along) + column,
                name if row else "",
                "" if column else label,
                title=f"{name}^{power:.2f}",
            )
            axes.set_xticks(values, [str(value) for value in values])
            axes.minorticks_off()
            # A decade alone may hold one tick, of which no value could be read.
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
    add_legend(drawn, entries)
    return drawn


def exponent(values: Sequence[float], measured: Sequence[float]) -> float:
    """Return the slope of log(measured) over log(values), over the upper values."""
    logarithms = (np.log(np.asarray(part, float))[-UPPER:] for part in (values, measured))
    return float(np.polyfit(*logarithms, 1)[0])


def _with(base: Size, name: str, value: int) -> Size:
    return tuple(value if other == name else size for other, size in zip(NAMES, base, strict=True))


def _compiled(sizes: Sequence[Size]) -> dict[Size, Any]:
    def compiled(size: Size) -> Any:
        return jax.jit(gradient_of(log_abs_of)).lower(*arguments_of(size, np.float32)).compile()

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(sizes, pool.map(compiled, sizes), strict=True))


def _per_sequence(sizes: tuple[Size, Size], memory: Sequence[int]) -> dict[str, Any]:
    """Return what one more sequence takes, beside one number per entry of its R_t."""
    (few, length, width, rank), (many, *_) = sizes
    grown = (memory[1] - memory[0]) / (many - few)
    blocks = length * rank**2 * 4
    return {
        "batches": [few, many],
        "T": length,
        "d": width,
        "r": rank,
        "temporary_bytes": list(memory),
        "bytes": grown,
        "blocks_bytes": blocks,
        "ratio": grown / blocks,
        "no_blocks_alive": grown < blocks / 2,
    }
