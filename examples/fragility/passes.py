"""The passes of a study, chunk by chunk, each kept on disk as soon as it is measured.

A pass measures one harm, or predictors that are computed together. A study that is interrupted
loses the chunk that it was at.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import harms
import numpy as np
import predictors
from predictors import Found, Measure
from questions import (
    ASCENT_LEVEL,
    ASCENT_STEPS,
    BITS,
    DROPPED,
    FOLLOWING,
    HARM,
    NOISE,
    PERMUTED,
    PRIMARY,
    SCOPES,
)
from replaced import mean_ahead
from sample import Subject

from probattn.inference.runs.files import check_setting, replacing
from probattn.inference.runs.npz import read_part
from probattn.inference.runtime.progress import progress_bar

AHEAD = ("likely_other", "misspelt")  # harms of what follows
_FIRST_PLACES = 2  # positions without a spread in their past, which have no margin


class Seconds(NamedTuple):
    """Seconds that passed, and those that all cores together worked."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Pass:
    """What is measured together.

    Attributes:
        name: of its files; of the harm, if it is one.
        prepare: makes the function that measures windows, given by their numbers.
        harm: whether it is a harm.
    """

    name: str
    prepare: Callable[[], Measure]
    harm: bool = True


def every_pass(subject: Subject, folder: Path) -> list[Pass]:
    """List the passes in the order in which they are made; the costliest come last."""
    known = (predictors.clean, predictors.margins, predictors.gradient, predictors.loss_slope)
    noises = {f"noise_{level:g}": level for level in NOISE}
    rounded = {f"rounding_{scope}_{bits}": (bits, scope) for scope in SCOPES for bits in BITS}

    def others() -> np.ndarray:
        return joined(subject, folder, "clean")["other"]

    return [
        *(Pass(make.__name__, partial(make, subject), harm=False) for make in known),
        *(Pass(n, partial(harms.noise, subject, n, level)) for n, level in noises.items()),
        *(Pass(n, partial(harms.rounding, subject, n, *how)) for n, how in rounded.items()),
        Pass("dropped", partial(harms.dropped, subject, "dropped")),
        Pass("ascent", partial(harms.ascent, subject, "ascent")),
        Pass("likely_other", lambda: harms.likely_other(subject, "likely_other", others())),
        Pass("misspelt", partial(harms.misspelt, subject, "misspelt")),
        Pass("spectrum", partial(predictors.spectrum, subject), harm=False),
    ]


def check_folder(subject: Subject, folder: Path, description: dict[str, str]) -> None:
    """Make the folder of a study's parts, or check that those in it are of this study.

    Raises:
        RunError: if they are of another model, text or scale.
    """
    wanted = {
        **description,
        **{name: str(value) for name, value in asdict(subject.scale).items()},
        "windows": str(len(subject.inputs)),
        "seed": str(subject.seed),
        "settings": f"{NOISE} {BITS} {DROPPED} {ASCENT_LEVEL} {ASCENT_STEPS} {FOLLOWING}",
    }
    check_setting(folder / "setting.json", wanted)


def measure(subject: Subject, folder: Path, *, progress: bool) -> dict[str, Seconds]:
    """Measure what is not measured yet; returns the time that each pass took in all."""
    chunks = list(_chunks(subject))
    passes = every_pass(subject, folder)
    todo = {
        each.name: [n for n in range(len(chunks)) if not _path(folder, each.name, n).exists()]
        for each in passes
    }
    total = len(passes) * len(chunks)
    done = total - sum(map(len, todo.values()))
    with progress_bar(
        "fragility", total=total, initial=done, unit="chunk", visible=progress
    ) as bar:
        for each in passes:
            bar.show(now=each.name)
            if not todo[each.name]:
                continue
            function = each.prepare()
            for number in todo[each.name]:
                started = time.monotonic(), time.process_time()
                found = function(chunks[number])
                ended = time.monotonic(), time.process_time()
                seconds = np.subtract(ended, started)
                with replacing(_path(folder, each.name, number)) as file:
                    np.savez_compressed(file, seconds=seconds, **found)
                bar.update(1)
            taken = joined_seconds(folder, each.name, len(chunks))
            bar.line(f"{each.name}: {taken.wall:.0f} s, of CPUs {taken.cpu:.0f} s")
    return {each.name: joined_seconds(folder, each.name, len(chunks)) for each in passes}


def table(subject: Subject, folder: Path) -> Found:
    """Put together the table of tokens: places, predictors, the control, then harms by name."""
    position = np.broadcast_to(np.arange(subject.inputs.shape[1]), subject.inputs.shape)
    rows = subject.reported & (position >= _FIRST_PLACES)
    window = np.arange(len(subject.inputs))[:, None]
    columns: Found = {
        "document": np.broadcast_to(subject.document[:, None], rows.shape),
        "window": np.broadcast_to(window, rows.shape),
        "position": position,
        "type": subject.type,
        "frequency": subject.frequency,
    }
    measured: Found = {}
    for each in every_pass(subject, folder):
        found = joined(subject, folder, each.name)
        found.pop("other", None)
        (measured if each.harm else columns).update(found)
    shuffled = np.random.default_rng(subject.seed).permutation(columns[PRIMARY][rows])
    ahead = mean_ahead(columns["loss"])
    for name, losses in measured.items():
        columns[HARM + name] = losses - (ahead if name in AHEAD else columns["loss"])
    flat = {name: values[rows] for name, values in columns.items()}
    flat = {name: values for name, values in flat.items() if not np.isnan(values).all()}
    names = list(flat)
    first_harm = next(n for n, name in enumerate(names) if name.startswith(HARM))
    items = list(flat.items())
    return dict([*items[:first_harm], (PERMUTED, shuffled), *items[first_harm:]])


def joined(subject: Subject, folder: Path, name: str) -> Found:
    """Return what a pass has found, all chunks of it, (W, T) each."""
    parts = [read_part(_path(folder, name, n)) for n, _ in enumerate(_chunks(subject))]
    names = parts[0].keys() - {"seconds"}
    order = [each for each in parts[0] if each in names]
    return {each: np.concatenate([part[each] for part in parts]) for each in order}


def joined_seconds(folder: Path, name: str, chunks: int) -> Seconds:
    """Return the time that a pass took."""
    parts = [read_part(_path(folder, name, number))["seconds"] for number in range(chunks)]
    return Seconds(*map(float, np.sum(parts, axis=0)))


def _chunks(subject: Subject) -> Iterator[np.ndarray]:
    windows, size = len(subject.inputs), subject.scale.chunk
    for start in range(0, windows, size):
        yield np.arange(start, min(start + size, windows))


def _path(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}-{number:03d}.npz"
