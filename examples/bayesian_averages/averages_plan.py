"""What is compared: the two models, the methods, and the runs that come of them."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from probattn.inference import FitConfig, RunConfig, read_config
from probattn.inference.config import GuideName
from probattn.models import ObjectiveConfig
from probattn.models.objective import ObjectiveName

METHODS = Path(__file__).with_name("methods.toml")
_EXAMPLES = Path(__file__).parents[1]


@dataclass(frozen=True)
class Scale:
    """A model with its text, and how much is done with it.

    Attributes:
        config: file of the model and of its fit, whose minibatches all methods take.
        gradients: of a minibatch, that every method has.
        seeds: how often everything is done.
        objectives: objectives of the methods that average.
        skipped: methods that the model is too large for, or that have no use here.
        sample: fields of `SampleConfig` for the samplers, by method.
        margin_sequences: training sequences whose margins are measured.
        needs_text: whether the text is given by the user.
    """

    config: Path
    gradients: int
    seeds: int
    objectives: tuple[ObjectiveName, ...]
    skipped: tuple[str, ...] = ()
    sample: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    margin_sequences: int = 16
    needs_text: bool = False


SCALES = {
    "small": Scale(
        config=_EXAMPLES / "small.toml",
        gradients=10_000,
        seeds=5,
        objectives=("full", "ce"),
        sample={"sghmc": {"steps": 50}, "mclmc": {"steps": 4}},
    ),
    "tinyshakespeare": Scale(
        config=_EXAMPLES / "tinyshakespeare.toml",
        gradients=2_000,
        seeds=3,
        objectives=("ce",),
        # Laplace refuses a model of this size; the others take all the data in every gradient.
        # The file's steps are the gradients.
        skipped=("laplace", "mclmc", "nuts", "map_of_file", "pooled_of_file"),
        # With ce no density is zero, and ten passes over the text cost more than all gradients.
        sample={"sghmc": {"steps": 150, "precision": "float32", "full_density": False}},
        margin_sequences=4,
        needs_text=True,
    ),
}


@dataclass(frozen=True)
class Method:
    """A method, as methods.toml describes it.

    Attributes:
        name: its name.
        label: what tables call it.
        objectives: objectives that it always has; None for those of the scale.
        guide: guide of its fits.
        members: fits, and chains of a sampler that start at one each.
        of_file: whether the fit has the steps of the file, and not all of the gradients.
        start: share of the gradients that fits take before a sampler.
        warmup: share of a sampler's iterations that are not kept.
        sample: fields of `SampleConfig`, None for a fit.
        pooled: method whose runs of all other seeds are averaged, which costs nothing further.
        learning_rate: of its fits, None for that of the file.
    """

    name: str
    label: str
    objectives: tuple[ObjectiveName, ...] | None = None
    guide: GuideName = "map"
    members: int = 1
    of_file: bool = False
    start: float = 1.0
    warmup: float = 0.5
    sample: Mapping[str, Any] | None = None
    pooled: str | None = None
    learning_rate: float | None = None


@dataclass(frozen=True)
class Task:
    """A run to be made and measured.

    Attributes:
        method: how.
        seed: seed of it.
        config: text, model, objective and fit of the scale.
        gradients: of a minibatch, that it has.
        sample: fields of `SampleConfig`.
        margin_sequences: training sequences whose margins are measured.
        out: its folder.
        others: folders of the runs that it averages, of a pooled method.
    """

    method: Method
    seed: int
    config: RunConfig
    gradients: int
    sample: Mapping[str, Any]
    margin_sequences: int
    out: Path
    others: tuple[Path, ...] = ()

    @property
    def title(self) -> str:
        """What a line of progress calls it."""
        return f"{self.config.objective.name} {self.method.name} seed {self.seed}"

    @property
    def fit_paths(self) -> list[Path]:
        """Folders of its fits."""
        return [self.out / f"fit-{number}" for number in range(self.method.members)]

    def fit_config(self, number: int) -> RunConfig:
        """Return the configuration of one of its fits.

        Only the last step is reported: the parameters are those of that step, and nothing is
        chosen on the text that is held out.
        """
        given = self.config.fit
        steps = int(self.method.start * self.gradients) // self.method.members
        steps = given.steps if self.method.of_file else steps
        fit: FitConfig = replace(
            given,
            steps=steps,
            learning_rate=self.method.learning_rate or given.learning_rate,
            warmup=min(given.warmup_steps, steps // 10),
            seed=self.method.members * self.seed + number,
            eval_every=steps,
            checkpoint_every=steps,
            evaluation_tokens=8192,
            guide=self.method.guide,
        )
        return replace(self.config, fit=fit)


def read_methods() -> dict[str, Method]:
    """Read the methods by name, in their order."""
    tables = tomllib.loads(METHODS.read_text(encoding="utf-8"))
    return {name: _method(name, table) for name, table in tables.items()}


def _method(name: str, table: dict[str, Any]) -> Method:
    if "objectives" in table:
        table["objectives"] = tuple(table["objectives"])
    return Method(name, **table)


def tasks(
    scale: Scale, *, text: str | None, out: Path, only: Sequence[str] | None = None
) -> Iterator[Task]:
    """List what is run, seed by seed, so that every row of the table soon has one.

    Args:
        scale: the model.
        text: path of its text, if it is not the file's.
        out: folder of all runs of the scale.
        only: names of methods; by default all that the scale does not skip.

    Raises:
        ValueError: if the text is missing, or `only` names what is no method of the scale.
    """
    config = read_config(scale.config)
    if scale.needs_text:
        if text is None:
            raise ValueError(f"--text is missing: expected the text of {scale.config.name}")
        config = replace(config, data=replace(config.data, source=text))
    methods = {n: each for n, each in read_methods().items() if n not in scale.skipped}
    if unknown := sorted(set(only or ()) - methods.keys()):
        raise ValueError(
            f"--only names {', '.join(unknown)}: expected some of {', '.join(methods)}"
        )
    chosen = [each for name, each in methods.items() if only is None or name in only]
    for pooled in (False, True):
        for seed in range(scale.seeds):
            for method in chosen:
                if (method.pooled is not None) == pooled:
                    for objective in method.objectives or scale.objectives:
                        yield _task(scale, config, method, objective, seed, out)


def _task(
    scale: Scale, config: RunConfig, method: Method, objective: ObjectiveName, seed: int, out: Path
) -> Task:
    def folder(name: str, of_seed: int) -> Path:
        return out / "runs" / objective / name / f"seed-{of_seed}"

    others = [each for each in range(scale.seeds) if each != seed]
    return Task(
        method,
        seed,
        replace(config, objective=ObjectiveConfig(objective)),
        scale.gradients,
        scale.sample.get(method.name, {}),
        scale.margin_sequences,
        folder(method.name, seed),
        tuple(folder(method.pooled, each) for each in others) if method.pooled else (),
    )
