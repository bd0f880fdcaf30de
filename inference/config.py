"""Configuration of a run: frozen dataclasses, read from and written to TOML."""

import dataclasses
import math
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli_w

from probattn.corpora import DataConfig
from probattn.download import one_line
from probattn.models import LanguageModelConfig, ObjectiveConfig
from probattn.models.checks import check_integers
from probattn.models.transformer import Precision

GuideName = Literal["map", "laplace", "mean_field", "low_rank"]


@dataclass(frozen=True)
class FitConfig:
    """How a model is fitted.

    Attributes:
        steps: optimizer steps.
        batch: sequences in a minibatch.
        learning_rate: peak of the learning rate, after a linear warm-up and before a cosine decay
            to a tenth of it.
        warmup: steps of the linear warm-up, fewer than steps.
        seed: of the initial parameters and the minibatches.
        eval_every: steps between reports on training and validation text.
        checkpoint_every: steps between checkpoints to resume from.
        precision: of the network's matrix products; the determinant is float32 in any case.
        guide: family that approximates the posterior: map is a point; laplace a Gaussian at that
            point, of the curvature there; mean_field independent Gaussians; low_rank a Gaussian
            whose covariance is diagonal plus low-rank.
        weight_decay: decoupled weight decay (AdamW) of all matrices, per unit of the learning
            rate, on top of the priors.
        embedding_noise: standard deviation of Gaussian noise on what enters the network in
            training, in units of the embeddings' root mean square.
        neftune_alpha: NEFTune's uniform noise in its place, alpha / sqrt(block * width) times
            uniform on [-1, 1], in the embedding's own unit (Jain et al. 2023).
        noise_probability: of either noise, sequence by sequence: the others are fitted clean.
        sam_rho: radius of sharpness-aware minimisation (Foret et al. 2021): the gradient is that at
            the point this far uphill, of the same minibatch and noise, which doubles the work.
            These five change what is fitted, and are for the guide map alone.
        evaluation_tokens: at most so many tokens of the validation text are scored at the end, in
            windows spread evenly over it; by default all.
    """

    steps: int = 2000
    batch: int = 12
    learning_rate: float = 3e-3
    warmup: int = 100
    seed: int = 0
    eval_every: int = 250
    checkpoint_every: int = 500
    precision: Precision = "float32"
    guide: GuideName = "map"
    weight_decay: float = 0.0
    embedding_noise: float = 0.0
    neftune_alpha: float = 0.0
    noise_probability: float = 1.0
    sam_rho: float = 0.0
    evaluation_tokens: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that make no fit."""
        check_integers(self, "fit", steps=1, batch=1, eval_every=1, checkpoint_every=1)
        check_integers(self, "fit", warmup=None, seed=None)
        if self.evaluation_tokens is not None:
            check_integers(self, "fit", evaluation_tokens=1)
        rate = self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float):
            raise ValueError(f"fit.learning_rate is {rate!r}: expected a number")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(
                f"fit.warmup is {self.warmup} and fit.steps {self.steps}: "
                "expected 0 <= warmup < steps"
            )
        if not (rate > 0 and math.isfinite(rate)):
            raise ValueError(f"fit.learning_rate is {rate}: expected a finite number > 0")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"fit.seed is {self.seed}: expected an integer from 0 to 2^32 - 1")
        for name, choices in (("precision", Precision), ("guide", GuideName)):
            if getattr(self, name) not in typing.get_args(choices):
                raise ValueError(
                    f"fit.{name} is {getattr(self, name)!r}: "
                    f"expected one of {', '.join(typing.get_args(choices))}"
                )
        self._check_regularisers()

    def _check_regularisers(self) -> None:
        for name in ("weight_decay", "embedding_noise", "neftune_alpha", "sam_rho"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and value >= 0 and math.isfinite(value)):
                raise ValueError(f"fit.{name} is {value!r}: expected a finite number >= 0")
            if value > 0 and self.guide != "map":
                raise ValueError(
                    f"fit.{name} is {value} with the guide {self.guide}, which approximates a "
                    "posterior that it has no part in: expected 0, or fit.guide map"
                )
        if self.embedding_noise > 0 and self.neftune_alpha > 0:
            raise ValueError(
                f"fit.embedding_noise is {self.embedding_noise} and fit.neftune_alpha "
                f"{self.neftune_alpha}: expected one kind of noise, the other 0"
            )
        share = self.noise_probability
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not (number and 0 < share <= 1):
            raise ValueError(f"fit.noise_probability is {share!r}: expected a number in (0, 1]")
        if share < 1 and self.embedding_noise == self.neftune_alpha == 0:
            raise ValueError(
                f"fit.noise_probability is {share} without a noise: expected 1, or "
                "fit.embedding_noise or fit.neftune_alpha > 0"
            )


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a fitted model.

    Attributes:
        data: which text.
        model: size of the network.
        objective: what is fitted.
        fit: how it is fitted.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        """Refuse settings of a fit or a model that the objective has no use for."""
        objective = self.objective
        normalised = objective.trains_attention_prior and objective.attention == "normalised"
        if self.model.bound is not None and normalised:
            raise ValueError(
                f"model.bound is {self.model.bound} with objective.attention normalised, whose "
                "tokens are bounded already, by sqrt(model.width): expected none"
            )
        if self.objective.name != "latent":
            return
        if self.fit.guide != "map":
            raise ValueError(
                f"fit.guide is {self.fit.guide} with objective latent, which approximates the "
                "embeddings and takes a point for the parameters: expected map"
            )
        for name in ("embedding_noise", "neftune_alpha"):
            if (value := getattr(self.fit, name)) > 0:
                raise ValueError(
                    f"fit.{name} is {value} with objective latent, whose guide draws the "
                    "embeddings: expected 0; objective.guide_scale is its noise"
                )


def read_config(path: str | os.PathLike[str]) -> RunConfig:
    """Read a TOML file whose tables are the fields of `RunConfig`; what it leaves out is default.

    Raises:
        ValueError: see `read_tables`.
    """
    return read_tables(path, RunConfig)


def read_tables[C](
    path: str | os.PathLike[str], kind: type[C], defaults: Mapping[str, Any] | None = None
) -> C:
    """Read a TOML file whose tables are the fields of a dataclass of dataclasses.

    Args:
        path: of the file.
        kind: the dataclass.
        defaults: by table, what gives the fields that the file leaves out of it; else its class.

    Raises:
        ValueError: if the file cannot be read, is no TOML, or names an unknown or ill-typed field.
    """
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, too long a number, too deep
        raise ValueError(f"{path}: expected a TOML file: {one_line(error)}") from None
    try:
        return _from_tables(tables, kind, defaults or {})
    except ValueError as error:  # in which names of the file may stand, with line ends in them
        raise ValueError(f"{path}: {one_line(error)}") from None


def format_config(config: Any) -> str:
    """Write a configuration as TOML, without tables and fields that are None."""
    tables = {
        table: {name: value for name, value in fields.items() if value is not None}
        for table, fields in dataclasses.asdict(config).items()
        if fields is not None
    }
    return tomli_w.dumps(tables)


def differences(old: Any, new: Any) -> list[str]:
    """Fields in which two configurations differ, as "table.field: old -> new"."""
    before, after = _fields(old), _fields(new)
    return [
        f"{name}: {before.get(name)} -> {after.get(name)}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]


def _fields(config: Any) -> dict[str, Any]:
    return {
        f"{table}.{name}": value
        for table, fields in dataclasses.asdict(config).items()
        if fields is not None
        for name, value in fields.items()
    }


def _from_tables[C](tables: dict[str, Any], kind: type[C], defaults: Mapping[str, Any]) -> C:
    kinds = {name: _given(hint) for name, hint in typing.get_type_hints(kind).items()}
    _check_names(tables, kinds, "tables")
    parts = {}
    for table, values in tables.items():
        if not isinstance(values, dict):
            raise ValueError(f"{table} is {values!r}: expected a table, [{table}]")
        types_of = typing.get_type_hints(kinds[table])
        _check_names(values, types_of, f"fields of [{table}]")
        converted = {
            name: _convert(f"{table}.{name}", value, types_of[name])
            for name, value in values.items()
        }
        if table in defaults:
            parts[table] = dataclasses.replace(defaults[table], **converted)
        else:
            parts[table] = kinds[table](**converted)
    return kind(**parts)


def _check_names(given: dict[str, Any], known: dict[str, Any], what: str) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"unknown {what}: {', '.join(unknown)}; expected {', '.join(known)}")


def _convert(name: str, value: Any, kind: Any) -> Any:
    """Value as the declared type: only int to float is converted, and nothing guessed."""
    kind = _given(kind)
    if typing.get_origin(kind) is Literal:
        kind = str
    if type(value) is int and value.bit_length() > 63:  # in base 16 it may have any length
        raise ValueError(f"{name} is an integer of {value.bit_length()} bits: expected at most 63")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r}: expected {kind.__name__}")
    return value


def _given(kind: Any) -> Any:
    """The type of what may be None where it is not."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = [option for option in typing.get_args(kind) if option is not type(None)]
    return kind
