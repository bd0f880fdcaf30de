"""`probattn fit` from its start to its end after one step, with and without compiled programs."""

import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from harness import CONTROL, alternate, ratio

MODEL = ["--model.layers", "4", "--model.width", "128", "--model.block", "64"]


def start(rounds: int) -> dict[str, Any]:
    """Seconds of a first start, of a second one, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "kept"
        runs = {
            "first": partial(_seconds, Path(folder)),
            "second": partial(_seconds, Path(folder), kept),
        }
        runs["second"]()  # which fills the cache
        seconds = alternate({**runs, CONTROL: runs["first"]}, rounds=rounds)
    return {
        name: {"seconds": sorted(own)[len(own) // 2], **ratio(own, seconds["first"])}
        for name, own in seconds.items()
    }


def report(results: dict[str, Any]) -> None:
    """Print a table of what `start` returns."""
    for name, figures in results.items():
        print(
            f"start of fit, {'first again' if name == CONTROL else name:12s} "
            f"{figures['seconds']:7.2f} s  x {figures['ratio']:.3f} "
            f"({figures['ratio_low']:.3f} to {figures['ratio_high']:.3f})"
        )


def _seconds(folder: Path, cache: Path | None = None) -> float:
    """Of one fit of one step, imports and its report included; a cache of its own by default."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        environment = {key: value for key, value in os.environ.items() if key[:4] != "JAX_"}
        environment["XDG_CACHE_HOME"] = str(cache or own)
        schedule = ["--fit.steps", "1", "--fit.warmup", "0", "--fit.eval-every", "1"]
        command = ["fit", "--data", "pydoc", "--out", f"{own}/run", *MODEL, *schedule]
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "probattn.inference.cli", *command],
            env=environment,
            cwd=own,
            check=True,
            capture_output=True,
        )
        return time.perf_counter() - started
