"""Runs of published models that were fine-tuned: what has moved, and where the rest lies."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpyro
from jaxtyping import Array

from probattn.inference.config_files import format_config
from probattn.inference.config_imported import ImportConfig
from probattn.inference.config_tuning import BaseConfig, TuneConfig
from probattn.inference.pretrained.checkpoint import Checkpoint
from probattn.inference.runs.directory import base_folder, read_description, read_run_config
from probattn.inference.runs.files import RunError, write_text
from probattn.inference.runs.fit_directory import FitDirectory
from probattn.inference.runs.folder import locked
from probattn.inference.runs.imported import DecoderRun, ImportedRun
from probattn.models.networks import DecoderNetwork
from probattn.models.tuned import sample_changes, tuned_parameters


@dataclass(frozen=True)
class TunedRun(FitDirectory, DecoderRun):
    """A published model that was fine-tuned, as `load_run` opens it.

    It holds what has moved. The rest is read from the run of the published model.
    """

    config: TuneConfig

    @cached_property
    def base(self) -> ImportedRun:
        """The run of the published model.

        Raises:
            RunError: if there is no such run any more, or it holds another model.
        """
        given = self.config.base
        path = base_folder(self.path, self.config)
        config, data, vocabulary = read_description(path)
        if not isinstance(config, ImportConfig):
            raise RunError(f"{self.path}: was fitted from {path}, which is no imported model now")
        found = ImportedRun(path, config, data, vocabulary)
        if (checksum := found.checksum) != given.sha256:
            raise RunError(
                f"{self.path}: was fitted from {path} with checksum {given.sha256[:12]}, and the "
                f"model there now has {checksum[:12]}; restore it, name its place (fit --resume "
                f"--out {self.path} --from PLACE), or start a new run"
            )
        return found

    @property
    def checkpoint(self) -> Checkpoint:
        """The published model as Hugging Face has it."""
        return self.base.checkpoint

    @property
    def network(self) -> DecoderNetwork:
        """The network."""
        return replace(self.base.network, block=self.config.base.block)

    @property
    def fitted_network(self) -> DecoderNetwork:
        """The network in the precision of the fit."""
        return replace(self.network, precision=self.config.fit.precision)

    @property
    def sites(self) -> dict[str, Array]:
        """Values of what moves, by site name, of the best validation.

        Raises:
            CheckpointError: if there are none yet or they are damaged.
        """
        return self.point[1]

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """All parameters, adapters worked into their matrices.

        Raises:
            CheckpointError: if what moves has not been saved yet, or is damaged.
            RunError: see `base`.
        """
        return self.network_parameters(self.sites)

    def parameters_up_to(self, layer: int) -> dict[str, Any]:
        """Return the parameters: those of the first layer may have moved."""
        return self.parameters

    def parameter_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every site."""

        def draw(start: dict[str, Any]) -> dict[str, Array]:
            with numpyro.handlers.seed(rng_seed=0):
                return sample_changes(start, self.network.config, self.config.tuning)

        return jax.eval_shape(draw, self.base.parameters)

    def network_parameters(self, sites: Mapping[str, Array]) -> dict[str, Any]:
        """Return the network's parameters at values of the sites."""
        decoder, tuning = self.network.config, self.config.tuning
        return tuned_parameters(self.base.parameters, sites, decoder, tuning)

    @property
    def prior_rank(self) -> int:
        """Rank of the post-hoc attention prior."""
        return self.base.prior_rank

    @property
    def seed(self) -> int:
        """Seed of the fit."""
        return self.config.fit.seed


def move_base(path: Path, base: BaseConfig) -> None:
    """Note in a fine-tuned run where its published model lies now; leave another run as it is.

    Args:
        path: of the run.
        base: the model that was named.

    Raises:
        RunError: if it is another model, or another block, than the run began with.
    """
    config = read_run_config(path)
    if not isinstance(config, TuneConfig) or config.base == base:
        return
    began = config.base
    if (began.sha256, began.block) != (base.sha256, base.block):
        raise RunError(
            f"{path}: was fitted from a model with checksum {began.sha256[:12]} in blocks of "
            f"{began.block}, and {base.run} has {base.sha256[:12]} and {base.block}; name the "
            "import that it began with, or start a new run"
        )
    with locked(path):
        write_text(path / "config.toml", format_config(replace(config, base=base)))
