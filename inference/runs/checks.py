"""Whether a run is one to go on with."""

from probattn.inference.config import RunConfig, SampleRunConfig
from probattn.inference.config_files import differences
from probattn.inference.runs.files import RunError
from probattn.inference.runs.run import RunDirectory
from probattn.messages import legible
from probattn.text.corpora import Corpus


def check_same_config(run: RunDirectory, config: RunConfig | SampleRunConfig) -> None:
    """Refuse to resume a run with another configuration than its own.

    Raises:
        RunError: if they differ; it names the fields.
    """
    if changed := differences(_resolved(run.config), _resolved(config)):
        raise RunError(
            f"{run.path}: cannot resume with a changed configuration: {'; '.join(changed)}; "
            "give the run's own values, or start a new run"
        )


def _resolved(config: RunConfig | SampleRunConfig) -> RunConfig | SampleRunConfig:
    return config.resolved() if isinstance(config, RunConfig) else config


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
