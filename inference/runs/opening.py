"""The one way to open a run to write to it: a new one, or one that goes on."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from probattn.inference.config import RunConfig
from probattn.inference.config_files import LARGEST, format_config
from probattn.inference.config_imported import AnyRunConfig, ImportConfig
from probattn.inference.config_memory import check_size, check_tuned_size
from probattn.inference.config_sampling import SampleRunConfig
from probattn.inference.config_tuning import TuneConfig
from probattn.inference.runs.checks import (
    check_same_config,
    check_same_corpus,
    with_absolute_paths,
)
from probattn.inference.runs.directory import read_run_config
from probattn.inference.runs.files import RunError, replacing, write_text
from probattn.inference.runs.folder import FORMAT, check_target, enter, locked, replacement
from probattn.inference.runs.imported import DecoderRun
from probattn.inference.runs.run import ImportedRun, RunDirectory, TunedRun, load_run
from probattn.inference.runtime.processes import (
    check_same_everywhere,
    is_main_process,
    wait_for_all,
)
from probattn.text.corpora import Corpus, load_corpus
from probattn.text.tokens import corpus_vocabulary
from probattn.text.vocabulary import Vocabulary


def find_run[R: RunDirectory](
    kind: type[R],
    path: Path,
    config: RunConfig | SampleRunConfig | TuneConfig,
    *,
    resume: bool,
    overwrite: bool,
    agreed: tuple[Any, ...] = (),
    base: ImportedRun | None = None,
) -> tuple[R, Corpus]:
    """Find the run to go on with, or describe a new one; write nothing yet.

    Args:
        kind: of the run: that of a fit, or a sampled posterior.
        path: its directory.
        config: its configuration.
        resume: go on with the run that is there.
        overwrite: replace the run that is there.
        agreed: what else all processes must be told alike.
        base: of a new run that begins with a published model, the run of that model.

    Returns:
        The run, and its corpus.

    Raises:
        ValueError: if both are asked for, the text is unusable or the run larger than the memory;
            RunError if a new run would damage what is there, or the run to resume is another one.
    """
    if is_main_process():
        _check_options(path, resume=resume, overwrite=overwrite)
    corpus = load_corpus(config.data)
    check_same_everywhere("the options", format_config(config), corpus.sha256, resume, *agreed)
    if not resume:
        if isinstance(config, TuneConfig):
            assert base is not None  # `fit` finds it
            vocabulary: Vocabulary = base.vocabulary
            check_tuned_size(config, base.network, base.stored)
        else:
            vocabulary = corpus_vocabulary(corpus, config.data.tokenizer)
            check_size(config, vocabulary.size)
        config = with_absolute_paths(config)
        if len(format_config(config).encode()) > LARGEST:  # else the run could not be opened
            raise ValueError(
                f"the configuration has more than {LARGEST} bytes: expected fewer; name a "
                "folder or a pattern in data.source instead of every file"
            )
        return new_run(kind, path, config, corpus, vocabulary), corpus
    run = load_run(path)
    if not isinstance(run, kind):
        raise _of_another_command(path, run.config)
    check_same_config(run, config)
    check_same_corpus(run, corpus)
    if isinstance(run, TunedRun):
        check_tuned_size(run.config, run.network, run.stored)
    elif not isinstance(config, TuneConfig):
        check_size(config, run.vocabulary.size)
    return run, corpus


def check_resumes(path: Path, command: Literal["fit", "sample"]) -> None:
    """Refuse to go on with a run by another command than the one that made it.

    Args:
        path: directory of the run.
        command: the one that is to go on.

    Raises:
        RunError: if it is another one, or there is no run that can be read.
    """
    config = read_run_config(path)
    if _COMMANDS[type(config)].split()[0] != command:
        raise _of_another_command(path, config)


_COMMANDS: dict[type, str] = {
    RunConfig: "fit",
    TuneConfig: "fit --from",
    SampleRunConfig: "sample",
    ImportConfig: "import",
}


def _of_another_command(path: Path, config: AnyRunConfig) -> RunError:
    if isinstance(config, ImportConfig):
        return RunError(f"{path}: is a run of `probattn import`: expected one to be resumed")
    made = _COMMANDS[type(config)]
    return RunError(f"{path}: is a run of `probattn {made}`: resume it with that command")


def new_run[R: RunDirectory](
    kind: type[R],
    path: Path,
    config: AnyRunConfig,
    corpus: Corpus,
    vocabulary: Vocabulary,
) -> R:
    """Describe a run that `open_run` is to make."""
    data = {
        "name": corpus.name,
        "description": corpus.description,
        "sha256": corpus.sha256,
        "train_characters": corpus.train_text.length,
        "validation_characters": corpus.validation_text.length,
    }
    return kind(path, config, data, vocabulary)


@contextmanager
def open_run[R: RunDirectory](
    run: R,
    *,
    resume: bool = False,
    overwrite: bool = False,
    start: Mapping[str, Any] | None = None,
    write: Callable[[], object] | None = None,
) -> Iterator[R]:
    """Hold a run from before it is made, or goes on, to its end; the main process alone writes.

    Args:
        run: as `find_run` returns it.
        resume: the run is there already.
        overwrite: replace the run that is there. It is removed at the end of the block, and comes
            back if the block raises before the new run has a checkpoint or draws.
        start: arrays that the chains of a sampler start from.
        write: writes what else a new run begins with.

    Raises:
        RunError: if another process holds the run, or has made another one there.
        WriteError: if it cannot be written.
    """
    with ExitStack() as held:
        if is_main_process():
            held.enter_context(locked(run.path))
            if not resume:  # again: another process may have been faster
                check_target(run.path, overwrite=overwrite)
            held.enter_context(replacement(run.path, overwrite=not resume))
            if not resume:
                if write is not None:
                    write()
                _write_description(run, start)
        wait_for_all("made")
        yield run.reopened()


def _check_options(path: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other: expected at most one of them")
    if not resume:
        check_target(path, overwrite=overwrite)
        return
    enter(path)
    if not (path / "config.toml").exists():
        raise RunError(f"{path}: holds no run to resume; start one without --resume")


def _write_description(run: RunDirectory, start: Mapping[str, Any] | None) -> None:
    description = {"format": FORMAT, **run.data}
    if not isinstance(run, DecoderRun):  # whose tokenizer is beside its model
        description["vocabulary"] = run.vocabulary.to_dict()
    write_text(run.path / "data.json", json.dumps(description, ensure_ascii=False) + "\n")
    if start is not None:
        with replacing(run.path / "start.npz") as stream:
            np.savez(stream, allow_pickle=False, **start)
    # Last: a directory with a config.toml is a run, and must be a whole one.
    write_text(run.path / "config.toml", format_config(run.config))
