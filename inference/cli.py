"""The command `probattn`: parse, call, print."""

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from probattn.corpora import DataConfig
from probattn.inference.config import FitConfig, RunConfig, read_config
from probattn.models import LanguageModelConfig, ObjectiveConfig

_SHORT = {"--data": "--data.source", "--objective": "--objective.name"}


@dataclass(frozen=True)
class Fit:
    """Fit a language model by MAP.

    --data and --objective are short for --data.source and --objective.name.
    """

    out: Path
    """run directory, new or empty unless --resume or --overwrite is given"""
    config: Path | None = None
    """TOML file with the tables data, model, objective and fit; flags go before it"""
    resume: bool = False
    """continue the run in --out from its latest checkpoint, with its own configuration"""
    overwrite: bool = False
    """replace the run in --out"""
    data: DataConfig = field(default_factory=DataConfig)
    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    fit: FitConfig = field(default_factory=FitConfig)

    def __call__(self, console: Console) -> None:
        """Run the command."""
        from probattn.inference.fit import fit

        config = RunConfig(self.data, self.model, self.objective, self.fit)
        result = fit(config, self.out, resume=self.resume, overwrite=self.overwrite, progress=True)
        console.print(
            f"{self.out}: validation {result.validation_bpc:.4f} bits per character "
            f"({result.validation_cross_entropy:.4f} nats per token), "
            f"parameters of step {result.run.step}"
        )


@dataclass(frozen=True)
class Evaluate:
    """Bits per character, robustness to embedding noise, and margins of a run."""

    run: tyro.conf.Positional[Path]
    """run directory"""
    text: Path | None = None
    """UTF-8 file to evaluate on, by default the run's validation text"""
    noise_absolute: tuple[float, ...] = (0.0, 0.1, 0.2, 0.5)
    """standard deviations of noise on the embeddings, in their own unit"""
    noise_relative: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)
    """standard deviations in units of the embeddings' root mean square"""
    seed: int = 0
    """of the noise"""

    def __call__(self, console: Console) -> None:
        """Run the command."""
        from probattn.inference.evaluate import evaluate
        from probattn.inference.runs import load_run

        result = evaluate(
            load_run(self.run),
            text=self.text,
            noise_absolute=self.noise_absolute,
            noise_relative=self.noise_relative,
            seed=self.seed,
            progress=True,
        )
        _print_evaluations(console, {self.run.name: result})


@dataclass(frozen=True)
class Margins:
    """Margin, certificate and support tokens of every token of a text: a table and figures."""

    run: tyro.conf.Positional[Path]
    """run directory"""
    out: Path
    """directory for margins.csv and the figures"""
    text: Path | None = None
    """UTF-8 file of any length, by default the run's validation text"""
    stride: int | None = None
    """distance between windows, 1 to block, by default half a block"""

    def __call__(self, console: Console) -> None:
        """Run the command."""
        from probattn.inference.report import margin_figures
        from probattn.inference.runs import load_run
        from probattn.inference.token_margins import text_margins

        margins = text_margins(load_run(self.run), self.text, stride=self.stride, progress=True)
        paths = margin_figures(margins, self.out)
        table = Table(title=f"margins of {margins.name} (sigma_min)", title_justify="left")
        for name in ("stage", "smallest", "1 %", "median", "certified", "support token"):
            table.add_column(name, justify="left" if name in ("stage",) else "right")
        for row in _margin_rows(margins):
            table.add_row(*row)
        console.print(table)
        _print_paths(console, paths)


@dataclass(frozen=True)
class Generate:
    """Continue a prompt, coloured by the margin of each generated token."""

    run: tyro.conf.Positional[Path]
    """run directory"""
    prompt: str
    """text to continue"""
    length: int = 200
    """tokens to generate"""
    temperature: float = 1.0
    """the logits are divided by it; 0 takes the most probable token"""
    top_k: int | None = None
    """sample from the k most probable tokens only"""
    seed: int = 0
    """of the sampling"""
    out: Path | None = None
    """CSV file for the margin of every generated token"""

    def __call__(self, console: Console) -> None:
        """Run the command."""
        from probattn.inference.generate import generate, write_csv
        from probattn.inference.runs import load_run

        result = generate(
            load_run(self.run),
            self.prompt,
            length=self.length,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=self.seed,
            progress=sys.stderr.isatty(),
        )
        text = Text(_printable(result.prompt), style="bold")
        for token, margin in zip(result.tokens, result.margin, strict=True):
            text.append(_printable(token), style=_margin_style(margin))
        console.print(text)
        weakest = int(result.margin.argmin())
        console.print(
            f"\nmargins (sigma_min, post hoc): smallest {result.margin[weakest]:.3f} at generated "
            f"token {weakest} ({_printable(repr(result.tokens[weakest]))}); "
            "[red]red < 0[/], [yellow]yellow < 0.1[/]",
            highlight=False,
        )
        if self.out is not None:
            write_csv(result, self.out)
            _print_paths(console, [self.out])


@dataclass(frozen=True)
class Demo:
    """Fit objectives ce and margin on Python's language reference and compare them."""

    out: Path = Path("demo")
    """directory for the two runs and the figures"""

    def __call__(self, console: Console) -> None:
        """Run the command."""
        from probattn.inference.demo import demo

        result = demo(self.out, progress=True)
        _print_evaluations(console, result.evaluations, heads=False)
        _print_paths(console, result.figures)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 when the work is done, 1 when it failed, 2 for bad input, 130 when it
        was interrupted. Errors are one line on standard error.
    """
    arguments = _lengthened(sys.argv[1:] if arguments is None else arguments)
    try:
        command = _parse(arguments)
        command(Console(highlight=False))
    except (ValueError, ImportError, OSError) as error:
        return _fail(error, status=2)
    except RuntimeError as error:
        return _fail(error, status=1)
    except KeyboardInterrupt:
        print("probattn: interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: list[str]) -> Any:
    commands: Any = (
        Annotated[Fit, tyro.conf.subcommand("fit", default=_fit_defaults(arguments))]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Margins, tyro.conf.subcommand("margins")]
        | Annotated[Generate, tyro.conf.subcommand("generate")]
        | Annotated[Demo, tyro.conf.subcommand("demo")]
    )
    # tyro frames its messages and spreads them over lines; a script wants one.
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(
                commands,
                prog="probattn",
                description="Causal self-attention as a probabilistic program.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_unframed(stderr.getvalue())) from None


def _fit_defaults(arguments: list[str]) -> Fit:
    """Defaults of `fit`: those of the configuration file or of the run to resume."""
    given = _value_of(arguments, "--config")
    out = _value_of(arguments, "--out")
    config = RunConfig()
    if given is not None:
        config = read_config(given)
    elif out is not None and "--resume" in arguments and (Path(out) / "config.toml").exists():
        config = read_config(Path(out) / "config.toml")
    parts = {part.name: getattr(config, part.name) for part in dataclasses.fields(config)}
    return Fit(out=tyro.MISSING, **parts)


def _value_of(arguments: list[str], flag: str) -> str | None:
    for position, argument in enumerate(arguments):
        if argument == flag and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None


def _lengthened(arguments: Sequence[str]) -> list[str]:
    lengthened = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        lengthened.append(_SHORT.get(flag, flag) + equals + value)
    return lengthened


def _unframed(message: str) -> str:
    """The message within tyro's frame, without its title and its pointer to --help."""
    lines = [line for line in message.splitlines() if not line.startswith("╭")]
    text = " ".join(re.sub(r"[╰╯│─]+", " ", " ".join(lines)).split())
    text = re.sub(r"^Error parsing \S+: ", "", text.partition("For full helptext")[0])
    return f"{text.strip()}; see probattn --help"


def _fail(error: BaseException, *, status: int) -> int:
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"probattn: error: {message}", file=sys.stderr)
    return status


def _print_evaluations(console: Console, results: Mapping[str, Any], *, heads: bool = True) -> None:
    first = next(iter(results.values()))
    table = Table(title=f"{first.text}", title_justify="left")
    table.add_column("")
    for label in results:
        table.add_column(label, justify="right")
    columns = [_evaluation_rows(result) for result in results.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    for name in names:
        if heads or "head" not in name:
            table.add_row(name, *(column.get(name, "-") for column in columns))
    console.print(table)
    if not all(result.post_hoc_converged for result in results.values()):
        console.print("the post-hoc attention prior has not come to rest: see post_hoc_prior.npz")


def _evaluation_rows(result: Any) -> dict[str, str]:
    rows = {
        "bits per character": f"{result.bpc:.3f}",
        "embedding RMS": f"{result.embedding_rms:.4f}",
    }
    for points, unit, value in (
        (result.noise_absolute, "", "sigma"),
        (result.noise_relative, " RMS", "relative"),
    ):
        for point in points:
            if point.sigma:
                rows[f"x clean at noise {getattr(point, value):g}{unit}"] = (
                    f"{point.degradation:.3f}"
                )
    for summary in result.margins:
        name = f"{summary.label}: "
        rows[name + "smallest margin"] = f"{summary.quantiles[0.0]:.3f}"
        rows[name + "median margin"] = f"{summary.quantiles[0.5]:.3f}"
        rows[name + "infeasible"] = f"{100 * summary.infeasible_fraction:.2f} %"
    return rows


def _margin_rows(margins: Any) -> list[list[str]]:
    rows = []
    for stage in margins.stages:
        inner = margins.position >= 2
        values = stage.margin[inner]
        weakest = int(stage.margin.argmin())
        context = "".join(margins.tokens[max(weakest - 12, 0) : weakest])
        rows.append(
            [
                stage.label,
                f"{values.min():.3f}",
                f"{sorted(values)[len(values) // 100]:.3f}",
                f"{sorted(values)[len(values) // 2]:.3f}",
                f"{100 * (stage.certificate[inner] < 1).mean():.1f} %",
                f"{_printable(repr(margins.tokens[weakest]))} after {_printable(repr(context))}",
            ]
        )
    return rows


def _print_paths(console: Console, paths: Sequence[Path]) -> None:
    for path in paths:
        console.print(f"wrote {path}", soft_wrap=True, markup=False)


def _margin_style(margin: float) -> str:
    return "red" if margin < 0 else "yellow" if margin < 0.1 else ""


def _printable(text: str) -> str:
    """Text without characters that would steer a terminal."""
    return "".join(
        character if character.isprintable() or character == "\n" else "�" for character in text
    )


if __name__ == "__main__":
    sys.exit(main())
