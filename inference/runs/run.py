"""Run directories: everything that a fit or a sampler leaves behind, and how to open it again.

config.toml      the configuration        checkpoints/latest  state to resume from
data.json        corpus and vocabulary    checkpoints/best    parameters of the best validation,
                                          and of a guide with its own, those with them
metrics.jsonl    one line per report      post_hoc_prior.npz  attention prior, see post_hoc.py
summary.json     results                  figures/            pictures and their tables
segments/        draws as they come       posterior.nc        draws for ArviZ
start.npz        what chains start from, if not draws of the prior
lock             held by the process that writes (lock.owner where a file system has no locks)
"""

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import jax
from jaxtyping import Array

from probattn.inference.config import RunConfig, SampleRunConfig
from probattn.inference.config_files import read_tables
from probattn.inference.pages.notebook import facts_in_notebook
from probattn.inference.runs.checkpoints import CheckpointError, CheckpointFolder
from probattn.inference.runs.files import (
    RunError,
    WriteError,
    fsync,
    read_bytes,
    read_json,
    write_errors,
    write_text,
)
from probattn.inference.runs.folder import BOUNDED_FORMAT, enter, locked, put_aside
from probattn.inference.runs.segments import SegmentFolder
from probattn.messages import describe, legible
from probattn.models.language import parameter_shapes
from probattn.text.vocabulary import Vocabulary, vocabulary_from_dict


@dataclass(frozen=True)
class RunDirectory:
    """What runs of every kind have.

    Attributes:
        path: its directory.
        config: the configuration it was made with.
        data: name, description, checksum and sizes of its corpus.
        vocabulary: symbols of its tokens.
    """

    path: Path
    config: RunConfig | SampleRunConfig
    data: Mapping[str, Any] = field(hash=False)
    vocabulary: Vocabulary = field(repr=False)

    def reopened(self) -> Self:
        """Open the run again, under its lock.

        Raises:
            RunError: if another run has been made there.
        """
        there = load_run(self.path)
        if not isinstance(there, type(self)) or there != self:
            raise RunError(f"{self.path}: holds another run than when it was opened; open that one")
        return there

    def summary(self) -> dict[str, Any]:
        """Results so far, by the command that made them."""
        path = self.path / "summary.json"
        return read_json(path) if path.exists() else {}

    def update_summary(self, **results: Any) -> None:
        """Set results in summary.json."""
        summary = self.summary() | results
        write_text(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    @contextmanager
    def lock(self, *, wait: float = 0.0) -> Iterator[None]:
        """Hold the run's lock while writing to it.

        Args:
            wait: seconds to wait for another process that holds it.

        Raises:
            RunError: if it holds it still, or another run has been made there.
        """
        with locked(self.path, wait=wait):
            self.reopened()
            yield

    def is_writable(self, *, wait: float = 0.0) -> bool:
        """Tell whether results can be stored in the run, or this user may only read it.

        Args:
            wait: seconds to wait for another process that holds its lock.

        Raises:
            RunError: if it holds it still, or another run has been made there.
        """
        if not os.access(self.path, os.W_OK):
            return False
        try:
            with self.lock(wait=wait):
                return True
        except WriteError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                return False
            raise


@dataclass(frozen=True)
class PosteriorRun(RunDirectory):
    """A sampled posterior, as `load_run` opens it; `posterior.load_posterior` reads its draws."""

    config: SampleRunConfig

    @property
    def segments(self) -> SegmentFolder:
        """Draws, and the state to resume from."""
        return SegmentFolder(self.path / "segments")


@dataclass(frozen=True)
class Run(RunDirectory):
    """A fitted run, as `load_run` opens it."""

    config: RunConfig

    def _repr_html_(self) -> str:
        model, fit = self.config.model, self.config.fit
        facts: dict[str, object] = {
            "corpus": self.data["name"],
            "symbols": self.vocabulary.size,
            "network": f"{model.layers} layers, {model.heads} heads, width {model.width}, "
            f"blocks of {model.block} tokens",
            "objective": self.config.objective.name,
            "guide": fit.guide,
            "step": f"{self.step} of {fit.steps}",
        }
        rows = self.metrics("validation_bpc")
        if rows and rows[-1]["validation_bpc"] is not None:
            facts["validation bits per character at the last report"] = rows[-1]["validation_bpc"]
        return facts_in_notebook(f"Run in {self.path}", facts)

    @property
    def step(self) -> int | None:
        """Step at which `parameters` were saved, None before the first report.

        Once these are read it does not change, though a fit that goes on may save better ones.
        """
        return self._point[0] if "_point" in vars(self) else self.best.step

    @property
    def parameters(self) -> dict[str, Array]:
        """Parameters of the best validation, by site name: a point estimate (of MAP, the mode).

        Raises:
            CheckpointError: if there are none yet or they are damaged.
        """
        return self._point[1]

    @cached_property
    def _point(self) -> tuple[int, dict[str, Array]]:
        if self.best.step is None:
            before = put_aside(self.path)
            raise CheckpointError(
                f"{self.path}: the fit has not reached its first report, so it has no parameters "
                "yet; finish it with fit --resume"
                + (f"; the run that it replaces lies in {before}" if before else "")
            )
        return self.best.load_with_step(self.parameter_shapes())

    def parameter_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every parameter."""
        return parameter_shapes(self.vocabulary.size, self.config.model, self.config.objective)

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


def load_run(path: str | os.PathLike[str]) -> Run | PosteriorRun:
    """Open a run directory for reading; parameters and draws are loaded when they are asked for.

    Raises:
        RunError: if the directory is no run, one of a newer version, or one of an earlier version
            whose bounded coupling would be misread; or if its description is damaged.
        WriteError: if a killed --overwrite had put the run aside, and it cannot be brought back.
    """
    path = Path(path)
    enter(path)
    if not (path / "config.toml").is_file():
        raise RunError(f"{path}: expected a run directory, which has a config.toml")
    try:
        text = (path / "config.toml").read_text(encoding="utf-8")
        sampled = "\n[sample]\n" in text
        config: RunConfig | SampleRunConfig = (
            read_tables(path / "config.toml", SampleRunConfig)
            if sampled
            else read_tables(path / "config.toml", RunConfig)
        )
    except ValueError as error:
        raise RunError(f"damaged run: {error}") from None
    data = read_json(path / "data.json")
    if data.get("format", 0) < BOUNDED_FORMAT and _has_bounded_coupling(config):
        raise RunError(
            f"{path}: was made by an earlier version of probattn, to which the parameters of a "
            "bounded coupling meant another coupling; fit or sample it again with --overwrite"
        )
    try:
        vocabulary = vocabulary_from_dict(data["vocabulary"])
        described = {name: data[name] for name in _DATA_FIELDS}
        for name, kind in _DATA_FIELDS.items():
            if type(described[name]) is not kind:
                raise TypeError(f"{name} is {describe(described[name])}, expected {kind.__name__}")
        if not re.fullmatch("[0-9a-f]{64}", described["sha256"]):
            raise ValueError(f"sha256 is {describe(described['sha256'])}, expected 64 hex digits")
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path / 'data.json'}: damaged: {error}") from None
    if isinstance(config, SampleRunConfig):
        return PosteriorRun(path, config, described, vocabulary)
    return Run(path, config, described, vocabulary)


def load_fit(path: str | os.PathLike[str]) -> Run:
    """Open the run directory of a fit.

    Raises:
        RunError: if the directory is no run of a fit, or its description is damaged.
    """
    return require_fit(load_run(path))


def require_fit(run: RunDirectory) -> Run:
    """Return the run, which must be that of a fit.

    Raises:
        RunError: if it is not.
    """
    if not isinstance(run, Run):
        raise RunError(f"{run.path}: is a sampled posterior: expected a run of `probattn fit`")
    return run


def _has_bounded_coupling(config: RunConfig | SampleRunConfig) -> bool:
    """Tell whether the coupling is made by `sample_coupling` or `proper_weights` with a bound."""
    if isinstance(config, SampleRunConfig):
        return config.latent is not None and config.latent.context_bound is not None
    return config.objective.name == "latent" and config.model.bound is not None


_DATA_FIELDS = {
    "name": str,
    "description": str,
    "sha256": str,
    "train_characters": int,
    "validation_characters": int,
}


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
