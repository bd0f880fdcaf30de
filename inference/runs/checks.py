"""Whether a run directory is one to start in, and a run one to go on with."""

from pathlib import Path

from probattn.text.corpora import Corpus
from probattn.inference.config import RunConfig
from probattn.inference.config_files import differences
from probattn.inference.runs.files import RunError
from probattn.messages import legible
from probattn.inference.runs.folder import check_target
from probattn.inference.runs.run import RunDirectory
from probattn.inference.config import SampleRunConfig


def check_options(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a directory for what is asked of it.

    Raises:
        ValueError: if both are asked for; RunError if a new run would damage what is there.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other: expected at most one of them")
    if not resume:
        check_target(path, overwrite=overwrite)
    elif not (path / "config.toml").exists():
        raise RunError(f"{path}: holds no run to resume; start one without --resume")


def check_same_config(run: RunDirectory, config: RunConfig | SampleRunConfig) -> None:
    """Refuse to resume a run with another configuration than its own.

    Raises:
        RunError: if they differ; it names the fields.
    """
    if changed := differences(run.config, config):
        raise RunError(
            f"{run.path}: cannot resume with a changed configuration: {'; '.join(changed)}; "
            "give the run's own values, or start a new run"
        )


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
