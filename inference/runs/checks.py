"""Whether a run is one to go on with."""

import dataclasses
import os
from typing import Any

from probattn.inference.config import RunConfig
from probattn.inference.config_files import differences
from probattn.inference.config_imported import AnyRunConfig
from probattn.inference.config_tuning import TuneConfig
from probattn.inference.runs.files import RunError
from probattn.inference.runs.run import RunDirectory
from probattn.messages import legible
from probattn.text.corpora import NAMED_SOURCES, Corpus


def with_absolute_paths[C: AnyRunConfig](config: C) -> C:
    """Name the texts of a configuration so that every working directory finds them."""
    data = config.data
    if isinstance(data.source, tuple):
        source: str | tuple[str, ...] = tuple(_absolute(path) for path in data.source)
    else:
        source = data.source if data.source in NAMED_SOURCES else _absolute(data.source)
    validation = None if data.validation is None else _absolute(data.validation)
    changed: Any = dataclasses.replace(data, source=source, validation=validation)
    return dataclasses.replace(config, data=changed)


def check_same_config(run: RunDirectory, config: AnyRunConfig) -> None:
    """Refuse to resume a run with another configuration than its own.

    Raises:
        RunError: if they differ; it names the fields.
    """
    # Earlier versions kept the paths that they were given.
    stored, given = (with_absolute_paths(_resolved(each)) for each in (run.config, config))
    if changed := differences(stored, given):
        raise RunError(
            f"{run.path}: cannot resume with a changed configuration: {'; '.join(changed)}; "
            "give the run's own values, or start a new run"
        )


def _resolved(config: AnyRunConfig) -> AnyRunConfig:
    return config.resolved() if isinstance(config, RunConfig | TuneConfig) else config


def check_same_corpus(run: RunDirectory, corpus: Corpus) -> None:
    """Refuse a corpus that is not the one the run was fitted on.

    Raises:
        RunError: if the checksums differ.
    """
    if run.data["sha256"] != corpus.sha256:
        raise RunError(
            f"{run.path}: was fitted on {legible(run.data['description'])} with checksum "
            f"{run.data['sha256'][:12]}, and that source now has {corpus.sha256[:12]}; "
            "restore the text, or start a new run"
        )


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
