"""What is fitted and measured: three settings, their seeds, and the published model itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from probattn.inference import ImportedRun, TuneConfig, TuneFitConfig, load_run
from probattn.inference.config_tuning import TUNED_OBJECTIVE
from probattn.inference.runs.files import write_text
from probattn.models import ObjectiveConfig
from probattn.text.corpora import TextConfig, open_text, read_text
from probattn.text.pieces import checksum

PUBLISHED = "published"
SETTINGS = {
    "ce": ObjectiveConfig("ce"),
    "margin_0.05": TUNED_OBJECTIVE,  # whose weight is the paper's
    "margin_0.5": ObjectiveConfig("margin", attention="first_layer", barrier_weight=0.5),
}
NOISE = (0.25, 0.5)  # of the embeddings' root mean square
BITS = 3


@dataclass(frozen=True)
class Sizes:
    """How much is fitted and measured.

    Attributes:
        steps: steps of every fit.
        batch: sequences in a minibatch.
        seeds: how often every setting is fitted.
        train: characters of the text that are fitted, from its beginning.
        held_out: characters of its end that are held out.
        tokens: tokens of a text that are scored, in windows spread over it.
        margin_tokens: tokens of the held-out text whose margins are taken.
    """

    steps: int = 40
    batch: int = 2
    seeds: int = 2
    train: int = 16_000
    held_out: int = 6_000
    tokens: int = 1_024
    margin_tokens: int = 512


@dataclass(frozen=True)
class Task:
    """A model to be made and measured.

    Attributes:
        setting: name of its setting, or `PUBLISHED`.
        seed: of its fit.
        config: of its fit, None of the published model.
        base: run of the published model.
        held_out: text that is held out.
        other: text of another kind, which a fit may make the model forget.
        sizes: how much is measured.
        checksums: of the published model, the text and the other text.
        out: its folder.
    """

    setting: str
    seed: int
    config: TuneConfig | None
    base: Path
    held_out: Path
    other: Path
    sizes: Sizes
    checksums: tuple[str, ...]
    out: Path

    @property
    def title(self) -> str:
        """What a line of progress calls it."""
        return self.setting if self.config is None else f"{self.setting} seed {self.seed}"


def tasks(base: Path, text: Path, other: Path, sizes: Sizes, out: Path) -> Iterator[Task]:
    """Write the two parts of the text, and list what is made: seed by seed, the published first.

    Raises:
        ValueError: if a text cannot be read, the text is shorter than both parts, or `base` is no
            imported model.
    """
    model = load_run(base)
    if not isinstance(model, ImportedRun):
        raise ValueError(
            f"--base: {base} is no imported model: expected one; make it with `probattn import`"
        )
    parts = {name: out / "texts" / f"{name}.txt" for name in ("train", "held_out")}
    whole = read_text(text)
    if len(whole) < sizes.train + sizes.held_out:
        raise ValueError(
            f"{text.name}: has {len(whole)} characters: expected at least "
            f"{sizes.train + sizes.held_out}; give a longer text, or a smaller --train"
        )
    write_text(parts["train"], whole[: sizes.train])
    write_text(parts["held_out"], whole[-sizes.held_out :])
    data = TextConfig(str(parts["train"]), validation=str(parts["held_out"]))
    checksums = (model.checksum, *(checksum([open_text(path)]) for path in (text, other)))
    places = (base, parts["held_out"], other, sizes, checksums)
    yield Task(PUBLISHED, 0, None, *places, out / "runs" / PUBLISHED)
    for seed in range(sizes.seeds):
        fit = TuneFitConfig(
            steps=sizes.steps,
            batch=sizes.batch,
            learning_rate=1e-3,
            seed=seed,
            # The parameters are those of the last step: nothing is chosen on text held out.
            eval_every=sizes.steps,
            checkpoint_every=20,
            evaluation_tokens=sizes.tokens,
            trainable="adapters",
        )
        for name, objective in SETTINGS.items():
            config = TuneConfig(data, objective=objective, fit=fit)
            yield Task(name, seed, config, *places, out / "runs" / f"{name}-{seed}")
