"""What saving costs a fit of the default configuration, at its default intervals, in one run."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from probattn.inference import FitConfig, RunConfig, fit
from probattn.inference.runs.checkpoints import CheckpointFolder
from probattn.text.corpora import DataConfig


def checkpoints(rounds: int) -> dict[str, Any]:
    """Measure which part of the time saves take, of the state and of the best parameters.

    A round is the time from one save of the state to the next.
    """
    every, saves = FitConfig().checkpoint_every, []
    save = CheckpointFolder.save

    def timed(folder: CheckpointFolder, step: int, *arrays: Any, **others: Any) -> None:
        started = time.perf_counter()
        save(folder, step, *arrays, **others)
        saves.append((step, started, time.perf_counter()))

    config = RunConfig(DataConfig("pydoc"), fit=FitConfig(steps=every * (rounds + 1)))
    with tempfile.TemporaryDirectory() as out, mock.patch.object(CheckpointFolder, "save", timed):
        fit(config, Path(out) / "run", progress=True)
    shares, seconds = [], []
    for number in range(1, rounds + 1):
        # The last save of a step is that of the state.
        begin, end = (max(s[2] for s in saves if s[0] == every * n) for n in (number, number + 1))
        took = [stop - start for _, start, stop in saves if begin < stop <= end]
        seconds += took
        shares.append(sum(took) / (end - begin))
    low, middle, high = statistics.quantiles(shares, n=4)
    return {
        "share": middle,
        "share_low": low,
        "share_high": high,
        "seconds_each": statistics.median(seconds),
        "steps_between": every,
    }


def report(results: dict[str, Any]) -> None:
    """Print what `checkpoints` returns."""
    print(
        f"saving, every {results['steps_between']} steps: {100 * results['share']:.2f} % of the "
        f"time ({100 * results['share_low']:.2f} to {100 * results['share_high']:.2f}), "
        f"{1e3 * results['seconds_each']:.0f} ms each"
    )
