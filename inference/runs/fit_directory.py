"""What fits leave in their run directories: checkpoints, and a line for every report."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jaxtyping import Array

from probattn.inference.runs.checkpoints import CheckpointError, CheckpointFolder
from probattn.inference.runs.directory import RunDirectory
from probattn.inference.runs.files import (
    RunError,
    fsync,
    read_bytes,
    write_errors,
    write_text,
)
from probattn.inference.runs.folder import put_aside
from probattn.messages import describe, legible


@dataclass(frozen=True)
class FitDirectory(RunDirectory, ABC):
    """What runs of fits of every kind have."""

    @abstractmethod
    def parameter_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every site of the parameters."""

    @property
    def step(self) -> int | None:
        """Step at which the parameters were saved, None before the first report.

        Once these are read it does not change, though a fit that goes on may save better ones.
        """
        return self.point[0] if "point" in vars(self) else self.best.step

    @cached_property
    def point(self) -> tuple[int, dict[str, Array]]:
        """Step and sites of the best validation.

        Raises:
            CheckpointError: if there are none yet or they are damaged.
        """
        if self.best.step is None:
            before = put_aside(self.path)
            raise CheckpointError(
                f"{self.path}: the fit has not reached its first report, so it has no parameters "
                "yet; finish it with fit --resume"
                + (f"; the run that it replaces lies in {before}" if before else "")
            )
        return self.best.load_with_step(self.parameter_shapes())

    @property
    def best(self) -> CheckpointFolder:
        """Checkpoint of the best validation."""
        return CheckpointFolder(self.path / "checkpoints" / "best")

    @property
    def latest(self) -> CheckpointFolder:
        """Checkpoint to resume from."""
        return CheckpointFolder(self.path / "checkpoints" / "latest")

    def metrics(self, *required: str) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, one per report.

        A last line without its end, which is what a kill leaves, is none: resuming repeats it. Nor
        is the line that says why a fit stopped, see `stopped`.

        Args:
            required: names of values that every line must have.

        Raises:
            RunError: if a line is damaged, or lacks one of them.
        """
        rows = [row for row in self._lines() if "stopped" not in row]
        for row in rows:
            if missing := [name for name in required if name not in row]:
                raise RunError(
                    f"{self.path / 'metrics.jsonl'}: the line of step {row['step']} lacks "
                    f"{', '.join(missing)}; restore the file from a copy"
                )
        return rows

    @property
    def stopped(self) -> tuple[int, str] | None:
        """Step at which the fit could not go on, and why; None if there is no such step."""
        last: dict[str, Any] = next(reversed(self._lines()), {})
        return (last["step"], last["stopped"]) if "stopped" in last else None

    def _lines(self) -> list[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        rows = []
        lines = read_bytes(path).split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or too deep
                raise RunError(f"{path}, line {number}: expected JSON: {error}") from None
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise RunError(f"{path}, line {number}: expected an object with an integer step")
            if not isinstance(row.get("stopped", ""), str):
                raise RunError(f"{path}, line {number}: expected a text for why the fit stopped")
            if wrong := [name for name, value in row.items() if not _is_metric(name, value)]:
                raise RunError(
                    f"{path}, line {number}: {legible(wrong[0])} is {describe(row[wrong[0]])}: "
                    f"expected {'a text' if wrong[0] in _TEXTS else 'a number'}"
                )
            rows.append(row)
        return rows

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Replace metrics.jsonl, at once or not at all."""
        write_text(self.path / "metrics.jsonl", "".join(_json_line(row) for row in rows))

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        line, path = _json_line(row), self.path / "metrics.jsonl"
        with write_errors(path):
            with path.open("a", encoding="utf-8") as stream:
                stream.write(line)
            fsync(path)


_TEXTS = ("stopped", "min_margin_kind")
_MEASURED = ("cross_entropy", "bpc", "rejected_steps")  # in every report; others may be None


def _is_metric(name: str, value: Any) -> bool:
    """Tell whether a value is one that a report has under this name."""
    if value is None:
        return not name.endswith(_MEASURED)
    if name in _TEXTS:
        return isinstance(value, str)
    return type(value) is float or (type(value) is int and value.bit_length() < 64)


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
