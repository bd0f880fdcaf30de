"""Configuration of a run of a published model, and of a run of any kind."""

from dataclasses import dataclass, field

from probattn.inference.config import RunConfig
from probattn.inference.config_sampling import SampleRunConfig
from probattn.inference.config_tuning import TuneConfig
from probattn.models.checks import check_integers
from probattn.text.corpora import TextConfig


@dataclass(frozen=True)
class ImportedConfig:
    """How a published model is read.

    Attributes:
        source: where it was imported from, as it was named.
        block: tokens that are read at once, at least 3; by default its context, but at most 1,024.
        prior_rank: rank r of its post-hoc attention prior.
    """

    source: str = ""
    block: int | None = None
    prior_rank: int = 16

    def __post_init__(self) -> None:
        """Refuse what makes no run."""
        if not self.source:
            raise ValueError(
                "imported.source is empty: expected a folder, a .gguf file or hf:owner/name"
            )
        check_integers(self, "imported", prior_rank=1)
        if self.block is not None:
            check_integers(self, "imported", block=3)


@dataclass(frozen=True)
class ImportConfig:
    """Everything that determines a run of a published model, beside the model itself.

    Attributes:
        data: text that it is measured on. The post-hoc attention prior is fitted to its training
            part.
        imported: where the model comes from, and how it is read.
    """

    data: TextConfig = field(default_factory=TextConfig)
    imported: ImportedConfig = field(default_factory=ImportedConfig)


AnyRunConfig = RunConfig | SampleRunConfig | ImportConfig | TuneConfig
"""The configuration of a run of any kind."""
