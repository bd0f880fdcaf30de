"""Runs of published models: the model as it was published, and what is measured of it."""

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from probattn.inference.config_imported import ImportConfig
from probattn.inference.pretrained.checkpoint import Checkpoint, open_checkpoint
from probattn.inference.runs.checkpoints import checksums
from probattn.inference.runs.directory import MODEL, RunDirectory
from probattn.models.networks import DecoderNetwork

MOST_BLOCK = 1024
"""Tokens that are read at once, by default, of a model with a longer context."""

_FIRST = ("attention_norm", "query", "key", "query_norm", "key_norm")


class DecoderRun(RunDirectory, ABC):
    """What runs whose network is a published decoder have."""

    @property
    @abstractmethod
    def checkpoint(self) -> Checkpoint:
        """The published model as Hugging Face has it; its tensors are read when asked for."""

    @property
    def stored(self) -> int:
        """Bytes of the published parameters."""
        entries = self.checkpoint.tensors.entries.values()
        return sum(each.dtype.itemsize * math.prod(each.shape) for each in entries)

    @property
    @abstractmethod
    def network(self) -> DecoderNetwork:
        """The network."""

    @property
    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """All parameters, in the layout of `models.decoder.shapes`."""

    @property
    def bound(self) -> None:
        """None: the context of the post-hoc prior's stage is not bounded."""


@dataclass(frozen=True)
class ImportedRun(DecoderRun):
    """A published model that was imported, as `load_run` opens it."""

    config: ImportConfig

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model as Hugging Face has it; its tensors are read when they are asked for."""
        return open_checkpoint(self.path / MODEL)

    @property
    def checksum(self) -> str:
        """SHA-256 of the model's files and their names; all of them are read."""
        return hashlib.sha256(checksums(self.path / MODEL).encode()).hexdigest()

    @cached_property
    def network(self) -> DecoderNetwork:
        """The network."""
        decoder, prefix = self.checkpoint.decoder, self.checkpoint.tokenizer.begins_with
        block = self.config.imported.block or min(decoder.context - len(prefix), MOST_BLOCK)
        return DecoderNetwork(decoder, block, prefix=prefix)

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """All parameters, in the layout of `models.decoder.shapes` and of the dtypes of the model.

        Raises:
            PretrainedError: if the model is damaged.
        """
        return self._read(None)

    def parameters_up_to(self, layer: int) -> dict[str, Any]:
        """Return parameters that hold those of the stack up to a layer's attention.

        Of the first layer they are the embedding, and what makes its queries and keys: no more is
        read from the disk.
        """
        if layer or "parameters" in vars(self):
            return self.parameters
        return self._first

    @property
    def step(self) -> int:
        """Zero: nothing was fitted here."""
        return 0

    @property
    def prior_rank(self) -> int:
        """Rank of the post-hoc attention prior."""
        return self.config.imported.prior_rank

    @property
    def seed(self) -> int:
        """Seed of that prior's fit."""
        return 0

    @cached_property
    def _first(self) -> dict[str, Any]:
        return self._read({f"layers.0.{name}" for name in _FIRST} | {"embedding"})

    def _read(self, parts: set[str] | None) -> dict[str, Any]:
        return jax.tree.map(jnp.asarray, self.checkpoint.read_parameters(parts))
