"""What is run: the methods, the values of their settings, the seeds, and the size of it all."""

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from summary import PAPER, REFERENCE

from probattn.inference import FitConfig, RunConfig
from probattn.inference.config_files import read_tables
from probattn.models import LanguageModelConfig
from probattn.text.corpora import Corpus, DataConfig, DataError, load_corpus

HERE = Path(__file__).parent
METHODS = HERE / "methods.toml"
PARTS = ("paper", "sweep", "sensitivity", "methods", "kinds")
TUNING_SEEDS = 1
_FACTOR = re.compile(r"\d+(\.\d+)?x")  # of what the scale has


@dataclass(frozen=True)
class NoiseConfig:
    """Noise that every run is measured under.

    Attributes:
        absolute: Gaussian, standard deviations in the embedding's unit.
        relative: Gaussian, standard deviations in units of the embeddings' root mean square.
        tokens: at most so many of each half of the evaluation text, in windows spread over it.
        kinds: further kinds of noise, for the tuned settings.
        kinds_relative: levels of the kinds on embeddings, in units of their root mean square.
        substituted: probabilities of a token to be replaced.
        ascent_tokens: worst-case directions are looked for at most so many tokens.
        sensitivity_tokens: losses and margins are compared token by token at most so many tokens.
        sensitivity_draws: number of draws of that noise, over which losses are averaged.
    """

    absolute: list
    relative: list
    tokens: int
    kinds: list
    kinds_relative: list
    substituted: list
    ascent_tokens: int
    sensitivity_tokens: int
    sensitivity_draws: int

    def __post_init__(self) -> None:
        """Refuse levels without those that settings are tuned by and tables show."""
        for name, needed in (("absolute", {0.5}), ("relative", {0.5, 1.0})):
            if not needed <= set(levels := getattr(self, name)):
                raise ValueError(
                    f"noise.{name} is {levels}: expected levels with "
                    f"{' and '.join(map(str, sorted(needed)))} among them"
                )


@dataclass(frozen=True)
class Scale:
    """Size of the model, of its fit and of the measurements."""

    noise: NoiseConfig
    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    fit: FitConfig = field(default_factory=FitConfig)


@dataclass(frozen=True)
class Setting:
    """A method at one value of its setting.

    Attributes:
        method: name of the method.
        name: name of the value, for tables and folders.
        changes: fields of the configuration; a string such as "2x" multiplies what the scale has.
        every_seed: whether it is run with every seed, even where another value is the tuned one.
    """

    method: str
    name: str
    changes: dict[str, Any]
    every_seed: bool = False


@dataclass(frozen=True)
class Task:
    """A run to be made: a setting with a seed, and what is measured of it."""

    setting: Setting
    seed: int
    config: RunConfig
    out: Path
    noise: NoiseConfig
    kinds: bool = False
    sensitivity: bool = False

    @property
    def title(self) -> str:
        """What a line of progress calls it."""
        return f"{self.setting.method} {self.setting.name} seed {self.seed}"


Methods = dict[str, list[Setting]]


def read_scale(name: str) -> Scale:
    """Read the scale of that name, or from a TOML file.

    Raises:
        ValueError: if there is no such scale, or the file has other fields.
    """
    path = HERE / f"{name}.toml"
    return read_tables(path if path.exists() and name != "methods" else Path(name), Scale)


def read_methods(path: Path) -> Methods:
    """Read the settings that are tried, by method, in their order.

    Raises:
        ValueError: if the file cannot be read, has another form, or lacks the paper's two settings.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        methods = {
            method: [
                Setting(
                    method, _named(row), {**table["set"], **row}, table.get("every_seed", False)
                )
                for row in table["grid"]
            ]
            for method, table in tables.items()
        }
    except OSError as error:
        raise ValueError(f"{path}: cannot read the methods: {error.strerror}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a table for each method, with set, grid and perhaps label and "
            f"every_seed: {error!r}"
        ) from None
    known = {(each.method, each.name) for settings in methods.values() for each in settings}
    if missing := [name for name in PAPER if name not in known]:
        raise ValueError(f"{path}: lacks {' '.join(missing[0])}, which the paper's figures need")
    return methods


def read_labels(path: Path = METHODS) -> dict[str, str]:
    """Read what tables and figures call each method; one without a label has its name."""
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    return {method: table["label"] for method, table in tables.items()}


def choose_data(text: str | None, test: str | None) -> tuple[DataConfig, Corpus]:
    """Choose a text to fit and one to evaluate: given, else WikiText-2, else Python's reference.

    Raises:
        DataError: if a text that was given cannot be used.
    """
    if text is not None:
        data = DataConfig(text, test)
        return data, load_corpus(data)
    for source in ("wikitext-2", "pydoc"):
        data = DataConfig(source, test)
        try:
            return data, load_corpus(data)
        except DataError as error:
            failed = error
            print(f"{source}: {error}", flush=True)
    raise failed


def make_task(
    setting: Setting,
    seed: int,
    scale: Scale,
    data: DataConfig,
    runs: Path,
    *,
    kinds: bool = False,
    sensitivity: bool = False,
) -> Task:
    """Make the run of a setting and a seed.

    Raises:
        ValueError: if the setting names a field that there is not, or a value that it cannot have.
    """
    base = RunConfig(data=data, model=scale.model, fit=scale.fit)
    tables: dict[str, dict[str, Any]] = {"fit": {"seed": seed}}
    try:
        for name, value in setting.changes.items():
            table, _, part = name.partition(".")
            if isinstance(value, str) and _FACTOR.fullmatch(value):
                value = float(value[:-1]) * getattr(getattr(base, table), part)
            tables.setdefault(table, {})[part] = value
        # At once: a weight of the barrier has no meaning without the name of its objective.
        config = dataclasses.replace(
            base,
            **{
                table: dataclasses.replace(getattr(base, table), **changes)
                for table, changes in tables.items()
            },
        )
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{setting.method}: {error}: expected fields of a run") from None
    out = runs / setting.method / setting.name.replace(" ", "_") / f"seed-{seed}"
    return Task(setting, seed, config, out, scale.noise, kinds, sensitivity)


def first_tasks(
    parts: Sequence[str],
    methods: Methods,
    seeds: int,
    scale: Scale,
    data: DataConfig,
    runs: Path,
) -> list[Task]:
    """List every run that does not depend on the outcome of another, each once.

    The paper's two, which the part sensitivity looks at too, then the sweep over the weight of the
    barrier, then every value of every method's setting with the seeds that tune it.
    """
    chosen: list[tuple[Setting, int]] = []
    papers = paper_settings(methods)
    if {"paper", "sensitivity"} & set(parts):
        chosen += [(setting, n) for n in range(seeds) for setting in papers]
    if "sweep" in parts:
        chosen += [
            (setting, n) for n in range(seeds) for setting in [papers[0], *methods["margin"]]
        ]
    if {"methods", "kinds"} & set(parts):
        every = [setting for settings in methods.values() for setting in settings]
        chosen += [(setting, n) for n in range(min(seeds, TUNING_SEEDS)) for setting in every]
    distinct = {(each.method, each.name, seed): (each, seed) for each, seed in chosen}
    looked_at = papers if "sensitivity" in parts else []
    return [
        make_task(setting, seed, scale, data, runs, sensitivity=setting in looked_at)
        for setting, seed in distinct.values()
    ]


def every_task(
    methods: Methods, seeds: Iterable[int], scale: Scale, data: DataConfig, runs: Path
) -> list[Task]:
    """List every setting of every method with these seeds; not all of them need be run."""
    return [
        make_task(setting, seed, scale, data, runs)
        for settings in methods.values()
        for setting in settings
        for seed in seeds
    ]


def tuned_tasks(
    tuned: dict[str, str],
    parts: Sequence[str],
    methods: Methods,
    seeds: int,
    scale: Scale,
    data: DataConfig,
    runs: Path,
) -> list[Task]:
    """List every tuned method, by name, with every seed; and the references for costs.

    These are measured under other kinds of noise too, where that is asked for. Settings that are
    run with every seed for a curve are not.
    """
    chosen = {*tuned.items(), REFERENCE}
    return [
        make_task(setting, seed, scale, data, runs, kinds="kinds" in parts and is_chosen)
        for seed in range(seeds)
        for settings in methods.values()
        for setting in settings
        if (is_chosen := (setting.method, setting.name) in chosen) or setting.every_seed
    ]


def paper_settings(methods: Methods) -> list[Setting]:
    """Return the settings of the paper: cross-entropy, and the margin at its weight."""
    found = {(each.method, each.name): each for rows in methods.values() for each in rows}
    return [found[key] for key in PAPER]


def _named(row: dict[str, Any]) -> str:
    for name, value in row.items():
        if type(value) not in (int, float) and not _FACTOR.fullmatch(str(value)):
            raise ValueError(f"{name} is {value!r} in a grid: expected a number, or such as 2x")
    return " ".join(
        f"{name.partition('.')[2]}={value if isinstance(value, str) else f'{value:g}'}"
        for name, value in row.items()
    )
