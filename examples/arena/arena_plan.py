"""What is run: contenders, the values of their settings, learning rates, seeds, and the size."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from arena_training import Contender, Strengths

from probattn.inference import FitConfig
from probattn.inference.config_files import read_tables
from probattn.models import LanguageModelConfig, ObjectiveConfig

HERE = Path(__file__).parent
METHODS = HERE / "methods.toml"
_WEIGHTS = {"margin": (1.0, 0.0), "full": (1.0, 1.0)}  # which the strength multiplies


@dataclass(frozen=True)
class StudyConfig:
    """How much is run and measured.

    Attributes:
        rates: learning rates of the study of their sensitivity.
        clips: largest norms of the gradient that it is made with; tuning has the first.
        seeds: seeds of every tuned setting.
        rate_seeds: seeds of every learning rate.
        tokens: at most so many of each half of the evaluation text, in windows spread over it.
        windows: windows at whose tokens margins and singular values are measured.
        bits: bits that weights are rounded to.
    """

    rates: list
    clips: list
    seeds: int
    rate_seeds: int
    tokens: int
    windows: int
    bits: int

    def __post_init__(self) -> None:
        """Refuse numbers that make no study."""
        for name in ("rates", "clips"):
            values = getattr(self, name)
            if not values or not all(isinstance(v, int | float) and v > 0 for v in values):
                raise ValueError(f"study.{name} is {values!r}: expected numbers > 0, one at least")
        for name in ("seeds", "rate_seeds", "tokens", "windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"study.{name} is {getattr(self, name)}: expected an integer >= 1")


@dataclass(frozen=True)
class Scale:
    """Size of the network, of its training and of the measurements."""

    study: StudyConfig
    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    fit: FitConfig = field(default_factory=FitConfig)


@dataclass(frozen=True)
class Setting:
    """A contender at one value of its setting.

    Attributes:
        method: name of the method.
        name: its value without the learning rate, for tables and files.
        contender: what is trained.
        strengths: numbers that its program takes.
        rate: its learning rate.
        always: whether it is run with every seed and rate, even where another one is tuned.
    """

    method: str
    name: str
    contender: Contender
    strengths: Strengths
    rate: float
    always: bool = False


@dataclass(frozen=True)
class Run:
    """A training, and how much is measured of it.

    Attributes:
        setting: what is trained.
        rate: peak of the learning rate.
        clip: largest norm of the gradient.
        seed: seed of it.
        whole: whether noise, rounding and margins are measured too.
    """

    setting: Setting
    rate: float
    clip: float
    seed: int
    whole: bool

    @property
    def path(self) -> Path:
        """Name of its file of results, in the folder of the runs."""
        name = f"rate-{self.rate:g}_clip-{self.clip:g}_seed-{self.seed}.json"
        return Path(self.setting.method) / self.setting.name.replace(" ", "_") / name


Methods = dict[str, list[Setting]]


def read_scale(name: str) -> Scale:
    """Read the scale of that name, or from a TOML file.

    Raises:
        ValueError: if there is no such scale, or the file has other fields.
    """
    path = HERE / f"{name}.toml"
    return read_tables(path if path.exists() and name != "methods" else Path(name), Scale)


def read_labels() -> dict[str, str]:
    """Read what tables and figures call each method."""
    tables = tomllib.loads(METHODS.read_text(encoding="utf-8"))
    return {method: table["label"] for method, table in tables.items()}


def read_common() -> str:
    """Return what methods.toml sets at every value of each method, a line for each."""
    tables = tomllib.loads(METHODS.read_text(encoding="utf-8"))
    return "".join(f"{method}: {table.get('set', {})}\n" for method, table in tables.items())


def read_methods(scale: Scale, only: Sequence[str] | None = None) -> Methods:
    """Read the settings of every method, in their order.

    Args:
        scale: size of all of them.
        only: names of methods; by default all.

    Raises:
        ValueError: if `only` names what is no method.
    """
    tables = tomllib.loads(METHODS.read_text(encoding="utf-8"))
    if unknown := sorted(set(only or ()) - tables.keys()):
        raise ValueError(f"--only: got {', '.join(unknown)}, expected some of {', '.join(tables)}")
    return {
        method: [
            _setting(method, table.get("set", {}), row, scale, row in table.get("always", ()))
            for row in table["grid"]
        ]
        for method, table in tables.items()
        if only is None or method in only
    }


def tuning_runs(methods: Methods, scale: Scale) -> list[Run]:
    """List the runs that settings are tuned by: every value, with the first seed."""
    clip = scale.study.clips[0]
    return [Run(each, each.rate, clip, 0, True) for each in _all(methods)]


def seed_runs(methods: Methods, tuned: Mapping[str, Setting], scale: Scale) -> list[Run]:
    """List the runs of the tuned settings, and of those that are always run, with every seed."""
    clip = scale.study.clips[0]
    return [
        Run(each, each.rate, clip, seed, True)
        for each in chosen(methods, tuned)
        for seed in range(scale.study.seeds)
    ]


def rate_runs(methods: Methods, tuned: Mapping[str, Setting], scale: Scale) -> list[Run]:
    """List the runs of the same settings at every learning rate, first those always run.

    Where two of them differ by their own learning rate alone they are one.
    """
    ordered = sorted(chosen(methods, tuned), key=lambda each: not each.always)
    distinct = {(each.method, each.name): each for each in ordered}
    return [
        Run(each, rate, clip, seed, False)
        for clip in scale.study.clips
        for each in distinct.values()
        for seed in range(scale.study.rate_seeds)
        for rate in scale.study.rates
    ]


def chosen(methods: Methods, tuned: Mapping[str, Setting]) -> list[Setting]:
    """Return the settings that are tuned or always run, in the order of the methods."""
    return [each for each in _all(methods) if each.always or tuned.get(each.method) == each]


def _all(methods: Methods) -> Iterator[Setting]:
    for settings in methods.values():
        yield from settings


def _setting(
    method: str, common: dict[str, Any], row: dict[str, Any], scale: Scale, always: bool
) -> Setting:
    given = {**common, **row}
    rate = given.pop("learning_rate", 1.0) * scale.fit.learning_rate
    model = replace(scale.model, spectral_cap=given.pop("spectral_cap", None))
    objective = _objective(
        given.pop("objective", "ce"),
        {name: given.pop(name) for name in ("attention", "guide_scale") if name in given},
    )
    variant = given.pop("variant", None)
    try:
        strengths = Strengths(**given)
    except TypeError as error:
        raise ValueError(f"{METHODS}: {method}: {error}") from None
    contender = Contender(model, objective, variant, noisy=strengths.noise > 0)
    named = {name: value for name, value in row.items() if name != "learning_rate"}
    name = " ".join(f"{name}={value:g}" for name, value in named.items()) or "plain"
    return Setting(method, name, contender, strengths, float(f"{rate:g}"), always)


def _objective(name: str, options: dict[str, Any]) -> ObjectiveConfig:
    if name in _WEIGHTS:
        barrier, residual = _WEIGHTS[name]
        options |= {"barrier_weight": barrier, "residual_weight": residual}
    return ObjectiveConfig(name, **options)
