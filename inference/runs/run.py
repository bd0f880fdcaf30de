"""Run directories: everything that a fit or a sampler leaves behind, and how to open it again.

config.toml      the configuration        checkpoints/latest  state to resume from
data.json        corpus and vocabulary    checkpoints/best    parameters of the best validation,
                                          and of a guide with its own, those with them
metrics.jsonl    one line per report      post_hoc_prior.npz  attention prior, see post_hoc.py
summary.json     results                  figures/            pictures and their tables
segments/        draws as they come       posterior.nc        draws for ArviZ
model/           a published model, as Hugging Face has them
start.npz        what chains start from, if not draws of the prior
lock             held by the process that writes (lock.owner where a file system has no locks)
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
from jaxtyping import Array

from probattn.inference.config import RunConfig
from probattn.inference.config_imported import ImportConfig
from probattn.inference.config_sampling import SampleRunConfig
from probattn.inference.config_tuning import TuneConfig
from probattn.inference.pages.notebook import facts_in_notebook
from probattn.inference.runs.directory import RunDirectory, read_description
from probattn.inference.runs.files import RunError
from probattn.inference.runs.fit_directory import FitDirectory
from probattn.inference.runs.imported import ImportedRun
from probattn.inference.runs.segments import SegmentFolder
from probattn.inference.runs.tuned import TunedRun
from probattn.models.language import parameter_shapes
from probattn.models.networks import TransformerNetwork

__all__ = [
    "FittedRun",
    "ImportedRun",
    "PosteriorRun",
    "Run",
    "RunDirectory",
    "TunedRun",
    "load_fit",
    "load_fitted",
    "load_run",
    "require_fit",
    "require_fitted",
]


@dataclass(frozen=True)
class PosteriorRun(RunDirectory):
    """A sampled posterior, as `load_run` opens it; `posterior.load_posterior` reads its draws."""

    config: SampleRunConfig

    @property
    def segments(self) -> SegmentFolder:
        """Draws, and the state to resume from."""
        return SegmentFolder(self.path / "segments")


@dataclass(frozen=True)
class Run(FitDirectory):
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
    def parameters(self) -> dict[str, Array]:
        """Parameters of the best validation, by site name: a point estimate (of MAP, the mode).

        Raises:
            CheckpointError: if there are none yet or they are damaged.
        """
        return self.point[1]

    def parameter_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every parameter."""
        return parameter_shapes(self.vocabulary.size, self.config.model, self.config.objective)

    def parameters_up_to(self, layer: int) -> dict[str, Array]:
        """Return the parameters: a fitted network is small."""
        return self.parameters

    def network_parameters(self, sites: Mapping[str, Array]) -> dict[str, Array]:
        """Return the network's parameters at values of the sites: they are the same."""
        return dict(sites)

    @property
    def fitted_network(self) -> TransformerNetwork:
        """The network in the precision of the fit."""
        return TransformerNetwork(self.config.model, self.config.fit.precision)

    @property
    def network(self) -> TransformerNetwork:
        """The network."""
        return TransformerNetwork(self.config.model)

    @property
    def prior_rank(self) -> int:
        """Rank of the post-hoc attention prior."""
        return self.config.model.prior_rank

    @property
    def bound(self) -> float | None:
        """Largest norm of a token in the bounded context of that prior's stage, or None."""
        return self.config.model.bound

    @property
    def seed(self) -> int:
        """Seed of the fit."""
        return self.config.fit.seed


FittedRun = Run | ImportedRun | TunedRun
"""What a text can be read by: one network with one set of parameters."""


def load_run(path: str | os.PathLike[str]) -> FittedRun | PosteriorRun:
    """Open a run directory for reading; parameters and draws are loaded when they are asked for.

    Raises:
        RunError: if the directory is no run, one of a newer version, or one of an earlier version
            whose bounded coupling would be misread; or if its description is damaged.
        WriteError: if a killed --overwrite had put the run aside, and it cannot be brought back.
    """
    path = Path(path)
    config, data, vocabulary = read_description(path)
    if isinstance(config, SampleRunConfig):
        return PosteriorRun(path, config, data, vocabulary)
    if isinstance(config, ImportConfig):
        return ImportedRun(path, config, data, vocabulary)
    if isinstance(config, TuneConfig):
        return TunedRun(path, config, data, vocabulary)
    return Run(path, config, data, vocabulary)


def load_fit(path: str | os.PathLike[str]) -> Run:
    """Open the run directory of a fit.

    Raises:
        RunError: if the directory is no run of a fit, or its description is damaged.
    """
    return require_fit(load_run(path))


def load_fitted(path: str | os.PathLike[str]) -> FittedRun:
    """Open the run directory of a fit or of a published model.

    Raises:
        RunError: if the directory is none, or its description is damaged.
    """
    return require_fitted(load_run(path))


def require_fit(run: RunDirectory) -> Run:
    """Return the run, which must be that of a fit.

    Raises:
        RunError: if it is not.
    """
    if not isinstance(run, Run):
        kinds: dict[type, str] = {
            ImportedRun: "an imported model",
            TunedRun: "a published model that was fine-tuned",
        }
        what = kinds.get(type(run), "a sampled posterior")
        raise RunError(f"{run.path}: is {what}: expected a run of `probattn fit`")
    return run


def require_fitted(run: RunDirectory) -> FittedRun:
    """Return the run, which must have one set of parameters: no sampled posterior.

    Raises:
        RunError: if it is a posterior.
    """
    if not isinstance(run, FittedRun):
        raise RunError(
            f"{run.path}: is a sampled posterior: expected a run of `probattn fit` or `import`"
        )
    return run
