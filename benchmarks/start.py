"""`probattn fit` from its start to its first step, with and without compiled programs on disk."""

import itertools
import os
import pty
import re
import subprocess
import sys
import tempfile
import termios
import time
from functools import partial
from pathlib import Path
from typing import Any

from harness import CONTROL, alternate, ratio

MODEL = ["--model.layers", "4", "--model.width", "128", "--model.block", "64"]


def start(rounds: int) -> dict[str, Any]:
    """Measure seconds to the first step: of a first start, a second, one with a new seed."""
    seeds = itertools.count(1)
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "kept"
        runs = {
            "first": partial(_seconds, Path(folder)),
            "second": partial(_seconds, Path(folder), kept),
            "another seed": lambda: _seconds(Path(folder), kept, seed=next(seeds)),
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


def _seconds(folder: Path, cache: Path | None = None, *, seed: int = 0) -> float:
    """Wait until the progress bar counts a step, imports included; by default with a new cache."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        environment = {key: value for key, value in os.environ.items() if key[:4] != "JAX_"}
        environment["XDG_CACHE_HOME"] = str(cache or own)
        out = f"{own}/run"
        command = ["fit", "--data", "pydoc", "--out", out, "--fit.seed", str(seed), *MODEL]
        screen, terminal = pty.openpty()  # a bar is drawn on a terminal alone
        termios.tcsetwinsize(terminal, (24, 100))
        started = time.perf_counter()
        fit = subprocess.Popen(
            [sys.executable, "-m", "probattn.inference.cli", *command],
            env=environment,
            cwd=own,
            stdout=subprocess.DEVNULL,
            stderr=terminal,
        )
        os.close(terminal)
        try:
            shown = b""
            while not re.search(rb" [1-9][0-9]*/[0-9]+ ", shown):
                shown += os.read(screen, 4096)  # an error once the fit has ended
            return time.perf_counter() - started
        except OSError:
            raise RuntimeError(f"fit ended before its first step: {shown[-500:]!r}") from None
        finally:
            fit.kill()
            fit.wait()
            os.close(screen)
