"""What runs of every kind have: their description on disk, results, a lock."""

import dataclasses
import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from probattn.inference.config import RunConfig
from probattn.inference.config_files import read_tables
from probattn.inference.config_imported import AnyRunConfig, ImportConfig
from probattn.inference.config_sampling import SampleRunConfig
from probattn.inference.config_tuning import TuneConfig
from probattn.inference.pretrained.checkpoint import open_checkpoint
from probattn.inference.pretrained.errors import PretrainedError
from probattn.inference.runs.files import RunError, WriteError, read_json, write_text
from probattn.inference.runs.folder import BOUNDED_FORMAT, enter, locked
from probattn.messages import describe
from probattn.text.vocabulary import Vocabulary, vocabulary_from_dict

MODEL = "model"
"""Where a run of a published model keeps it: a folder as Hugging Face has them."""

_TABLES: dict[str, type[AnyRunConfig]] = {
    "sample": SampleRunConfig,
    "imported": ImportConfig,
    "base": TuneConfig,
}
_DATA_FIELDS = {
    "name": str,
    "description": str,
    "sha256": str,
    "train_characters": int,
    "validation_characters": int,
}


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
    config: AnyRunConfig
    data: Mapping[str, Any] = field(hash=False)
    vocabulary: Vocabulary = field(repr=False)

    def reopened(self) -> Self:
        """Open the run again, under its lock.

        Raises:
            RunError: if another run has been made there.
        """
        if read_description(self.path) != (self.config, self.data, self.vocabulary):
            raise RunError(f"{self.path}: holds another run than when it was opened; open that one")
        return dataclasses.replace(self)

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


def read_run_config(path: Path) -> AnyRunConfig:
    """Read a run's configuration.

    Raises:
        RunError: see `run.load_run`.
        WriteError: likewise.
    """
    enter(path)
    if not (path / "config.toml").is_file():
        raise RunError(f"{path}: expected a run directory, which has a config.toml")
    try:
        text = (path / "config.toml").read_text(encoding="utf-8")
        kind = next((_TABLES[table] for table in _TABLES if f"\n[{table}]\n" in text), RunConfig)
        return read_tables(path / "config.toml", kind)
    except ValueError as error:
        raise RunError(f"damaged run: {error}") from None


def read_description(path: Path) -> tuple[AnyRunConfig, dict[str, Any], Vocabulary]:
    """Read a run's configuration, what it says of its corpus, and its vocabulary.

    Raises:
        RunError: see `run.load_run`.
        WriteError: likewise.
    """
    config = read_run_config(path)
    data = read_json(path / "data.json")
    if data.get("format", 0) < BOUNDED_FORMAT and _has_bounded_coupling(config):
        raise RunError(
            f"{path}: was made by an earlier version of probattn, to which the parameters of a "
            "bounded coupling meant another coupling; fit or sample it again with --overwrite"
        )
    try:
        vocabulary = _vocabulary(path, config, data)
        described = {name: data[name] for name in _DATA_FIELDS}
        for name, kind_of in _DATA_FIELDS.items():
            if type(described[name]) is not kind_of:
                expected = kind_of.__name__
                raise TypeError(f"{name} is {describe(described[name])}, expected {expected}")
        if not re.fullmatch("[0-9a-f]{64}", described["sha256"]):
            raise ValueError(f"sha256 is {describe(described['sha256'])}, expected 64 hex digits")
    except PretrainedError as error:
        raise RunError(f"{path}: damaged: {error}") from None
    except RunError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path / 'data.json'}: damaged: {error}") from None
    return config, described, vocabulary


def base_folder(path: Path, config: TuneConfig) -> Path:
    """Find the run that a fit began with: where it was, or beside the fit if both were moved.

    Raises:
        RunError: if there is no imported model.
    """
    was = Path(config.base.run)
    for folder in (was, path.absolute().parent / was.name):
        if (folder / MODEL).is_dir():
            return folder
    raise RunError(
        f"{path}: was fitted from {was}, which holds no imported model any more; put it back there "
        f"or beside {path}, or name its place: probattn fit --resume --out {path} --from PLACE"
    )


def _vocabulary(path: Path, config: AnyRunConfig, data: Mapping[str, Any]) -> Vocabulary:
    if isinstance(config, ImportConfig):
        return open_checkpoint(path / MODEL).tokenizer
    if isinstance(config, TuneConfig):
        return open_checkpoint(base_folder(path, config) / MODEL).tokenizer
    return vocabulary_from_dict(data["vocabulary"])


def _has_bounded_coupling(config: AnyRunConfig) -> bool:
    """Tell whether the coupling is made by `sample_coupling` or `proper_weights` with a bound."""
    if isinstance(config, SampleRunConfig):
        return config.latent is not None and config.latent.context_bound is not None
    if isinstance(config, ImportConfig | TuneConfig):
        return False
    return config.objective.name == "latent" and config.model.bound is not None
