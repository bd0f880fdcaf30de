"""The command `probattn`: parse, call, print."""

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from probattn.corpora import DataConfig
from probattn.inference import console
from probattn.inference.config import FitConfig, RunConfig, read_config
from probattn.inference.demo import demo
from probattn.inference.evaluate import NOISE_ABSOLUTE, NOISE_RELATIVE, evaluate
from probattn.inference.fit import fit
from probattn.inference.generate import generate, write_csv
from probattn.inference.interrupts import Interrupted
from probattn.inference.paper import paper_report
from probattn.inference.report import comparison_figures, margin_figures
from probattn.inference.runs import load_run
from probattn.inference.token_margins import text_margins
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
    """TOML file with the tables data, model, objective and fit; flags win over it"""
    resume: bool = False
    """continue the run in --out from its latest checkpoint, with its own configuration"""
    overwrite: bool = False
    """replace the run in --out"""
    data: DataConfig = field(default_factory=DataConfig)
    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    fit: FitConfig = field(default_factory=FitConfig)

    def __call__(self, screen: Console) -> None:
        """Run the command."""
        config = RunConfig(self.data, self.model, self.objective, self.fit)
        result = fit(config, self.out, resume=self.resume, overwrite=self.overwrite, progress=True)
        screen.print(
            f"{self.out}: validation {result.validation_bpc:.4f} bits per character "
            f"({result.validation_cross_entropy:.4f} nats per token), "
            f"parameters of step {result.run.step}",
            markup=False,
            soft_wrap=True,
        )


@dataclass(frozen=True)
class Evaluate:
    """Bits per character, robustness to embedding noise, and margins of a run; with figures."""

    run: tyro.conf.Positional[Path]
    """run directory"""
    text: Path | None = None
    """UTF-8 file to evaluate on, by default the run's validation text"""
    noise_absolute: tuple[float, ...] = NOISE_ABSOLUTE
    """standard deviations of noise on the embeddings, in their own unit"""
    noise_relative: tuple[float, ...] = NOISE_RELATIVE
    """standard deviations in units of the embeddings' root mean square"""
    seed: int = 0
    """of the noise"""

    def __call__(self, screen: Console) -> None:
        """Run the command."""
        run = load_run(self.run)
        result = evaluate(
            run,
            text=self.text,
            noise_absolute=self.noise_absolute,
            noise_relative=self.noise_relative,
            seed=self.seed,
            progress=True,
        )
        label = self.run.resolve().name
        console.print_evaluations(screen, {label: result})
        figures = comparison_figures({label: run}, {label: result}, self.run / "figures")
        console.print_paths(screen, figures)


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

    def __call__(self, screen: Console) -> None:
        """Run the command."""
        margins = text_margins(load_run(self.run), self.text, stride=self.stride, progress=True)
        paths = margin_figures(margins, self.out)
        console.print_margins(screen, margins)
        console.print_paths(screen, paths)


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

    def __call__(self, screen: Console) -> None:
        """Run the command."""
        result = generate(
            load_run(self.run),
            self.prompt,
            length=self.length,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=self.seed,
            progress=sys.stderr.isatty(),
        )
        console.print_generated(screen, result)
        if self.out is not None:
            write_csv(result, self.out)
            console.print_paths(screen, [self.out])


@dataclass(frozen=True)
class Demo:
    """Fit objectives ce and margin on Python's language reference and compare them."""

    out: Path = Path("demo")
    """directory for the two runs and the figures"""

    def __call__(self, screen: Console) -> None:
        """Run the command."""
        result = demo(self.out, progress=True)
        console.print_evaluations(screen, result.evaluations, heads=False)
        console.print_paths(screen, result.figures)


@dataclass(frozen=True)
class Figures:
    """The paper's figures and numbers, computed, and where the conditional density is proper."""

    out: Path
    """directory for the figures, a CSV of what each shows, and the comparison paper.csv"""

    def __call__(self, screen: Console) -> None:
        """Run the command."""
        comparisons, paths = paper_report(self.out, progress=True)
        console.print_comparisons(screen, comparisons)
        console.print_paths(screen, paths)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 when the work is done, 1 when it failed, 2 for bad input, 130 or
        143 when SIGINT or SIGTERM ended it. Errors are one line on standard error.
    """
    arguments = _lengthened(sys.argv[1:] if arguments is None else arguments)
    try:
        command = _parse(arguments)
        command(Console(highlight=False))
    except (ValueError, ImportError, OSError) as error:
        return _fail(error, status=2)
    except RuntimeError as error:
        return _fail(error, status=1)
    except Interrupted as signal:
        print(f"probattn: {signal}; go on with --resume", file=sys.stderr)
        return 128 + signal.signum
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
        | Annotated[Figures, tyro.conf.subcommand("figures")]
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


if __name__ == "__main__":
    sys.exit(main())
