"""Segments of a sampler's run: draws, and the state to go on from, saved as they come.

Every segment is one file, `<first>-<stop>.npz`, for the iterations from first to stop, warm-up
included. It takes its name only when it is whole, and holds plain arrays: opening one executes
nothing.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from probattn.inference.runs.files import replacing
from probattn.inference.runs.npz import read_arrays
from probattn.inference.runtime.cores import cores

_NAME = re.compile(r"([0-9]{8})-([0-9]{8})\.npz")
_KINDS = ("draws", "statistics", "state")


class SegmentError(ValueError):
    """Segments are damaged, missing, or of another model: one line says which and what to do."""


@dataclass(frozen=True)
class Segment:
    """Iterations from `first` to `stop` of all chains.

    Attributes:
        first: first iteration.
        stop: the iteration after the last.
        draws: values by sample site, (chains, draws, ...); none of the warm-up's.
        statistics: what NUTS says of each iteration, (chains, iterations).
        state: leaves of the sampler's state after the last iteration, (chains, ...).
        digest: of the configuration and data that they were made with.
        cores: number of cores that they were computed on, None where a file does not say.
    """

    first: int
    stop: int
    draws: Mapping[str, np.ndarray]
    statistics: Mapping[str, np.ndarray]
    state: Mapping[str, np.ndarray]
    digest: np.ndarray
    cores: int | None = None


class SegmentFolder:
    """A folder of segments.

    Args:
        path: the folder; `save` creates it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def save(self, segment: Segment) -> None:
        """Save a segment, whole or not at all, with its place and the cores of this machine."""
        arrays = {
            f"{kind}/{name}": value
            for kind in _KINDS
            for name, value in getattr(segment, kind).items()
        } | {"digest": segment.digest, "first": np.int64(segment.first), "cores": np.int64(cores())}
        with replacing(self._file(segment.first, segment.stop)) as stream:
            # Without pickle: an array of objects is refused, and nothing else would need it.
            np.savez(stream, allow_pickle=False, **arrays)

    def ranges(self) -> list[tuple[int, int]]:
        """First and stop of every segment, in order.

        Raises:
            SegmentError: if they do not follow each other from iteration 0.
        """
        names = sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []
        found = [match for name in names if (match := _NAME.fullmatch(name))]
        ranges = [(int(match[1]), int(match[2])) for match in found]
        expected = 0
        for (first, stop), match in zip(ranges, found, strict=True):
            if first != expected or stop <= first:
                raise SegmentError(
                    f"{self.path / match[0]}: expected a segment that begins at iteration "
                    f"{expected}; restore the one that is missing from a copy, or delete this and "
                    "all later ones and go on with --resume"
                )
            expected = stop
        return ranges

    def load(self) -> Iterator[Segment]:
        """Load the segments one by one, in order.

        Raises:
            SegmentError: if one is damaged or missing.
        """
        for first, stop in self.ranges():
            yield self._load(first, stop)

    def _load(self, first: int, stop: int) -> Segment:
        path = self._file(first, stop)
        parts: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in _KINDS}
        try:
            arrays = read_arrays(path)
            digest = arrays.pop("digest")
            # Earlier versions saved neither of these.
            begins = int(arrays.pop("first", first))
            computed_on = int(arrays.pop("cores")) if "cores" in arrays else None
            for key, array in arrays.items():
                kind, _, name = key.partition("/")
                parts[kind][name] = array
        # NumPy and zipfile raise what they meet: BadZipFile, EOFError, zlib.error and others.
        except Exception as error:
            raise SegmentError(
                f"{path}: the segment is damaged ({error}); restore it from a copy, or delete it "
                "and all later ones and go on with --resume"
            ) from None
        if begins != first:
            raise SegmentError(
                f"{path}: begins at iteration {begins}, whatever its name; give the segments their "
                "names again"
            )
        for name, value in parts["statistics"].items():
            if value.ndim != 2 or value.shape[1] != stop - first:
                raise SegmentError(
                    f"{path}: {name} has shape {value.shape}: expected {stop - first} iterations; "
                    "restore the segment from a copy"
                )
        return Segment(first, stop, **parts, digest=digest, cores=computed_on)

    def _file(self, first: int, stop: int) -> Path:
        return self.path / f"{first:08d}-{stop:08d}.npz"
