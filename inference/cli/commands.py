"""The commands of `probattn`: what each takes, calls and prints."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from probattn.inference.cli import console
from probattn.inference.config import FitConfig, RunConfig
from probattn.inference.config_sampling import (
    SAMPLED_DATA,
    SAMPLED_OBJECTIVE,
    SampleConfig,
    SampleRunConfig,
)
from probattn.inference.evaluation.evaluate import evaluate
from probattn.inference.evaluation.generation import generate, write_csv
from probattn.inference.evaluation.noise_sweeps import (
    ASCENT_TOKENS,
    NOISE_ABSOLUTE,
    NOISE_RELATIVE,
    SUBSTITUTED,
)
from probattn.inference.evaluation.perturbations import NoiseKind
from probattn.inference.figures.pages import check_margins, posterior_page
from probattn.inference.figures.report import (
    comparison_figures,
    posterior_report,
)
from probattn.inference.fitting.fit import fit
from probattn.inference.runs.files import check_new, check_outputs
from probattn.inference.runs.folder import LOCK_SECONDS
from probattn.inference.runs.run import Run, load_fitted
from probattn.inference.runtime.processes import distributed, is_main_process
from probattn.inference.sampling.posterior_runs import fitted_starts, sample_run
from probattn.models import LanguageModelConfig, LatentEmbeddingsConfig, ObjectiveConfig
from probattn.text.corpora import DataConfig


@dataclass(frozen=True)
class Fit:
    """Fit a language model by MAP, or with another variational guide.

    --data, --objective and --guide are short for --data.source, --objective.name and --fit.guide.
    With --from RUN a published model is fine-tuned: `probattn fit --from RUN --help`. Several
    processes, on one host or several, are given the same command, but for --process-id.
    """

    out: Path
    """run directory, new or empty unless --resume or --overwrite is given"""
    config: Path | None = None
    """TOML file with the tables data, model, objective and fit; flags win over it"""
    resume: bool = False
    """continue the run in --out from its latest checkpoint, with its own configuration"""
    overwrite: bool = False
    """replace the run in --out"""
    mesh: str = ""
    """devices to spread minibatches over, data=N, and parameters too, fsdp=M, or data=N,fsdp=M; it
    may be another one with --resume"""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes, or auto where the cluster says it"""
    num_processes: int | None = None
    """how many processes there are"""
    process_id: int | None = None
    """which of them this is, from 0; the first writes and prints"""
    data: DataConfig = field(default_factory=DataConfig)
    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    fit: FitConfig = field(default_factory=FitConfig)

    def __call__(self, screen: Console) -> None:
        """Run the command."""
        config = RunConfig(self.data, self.model, self.objective, self.fit)
        with distributed(self.coordinator, self.num_processes, self.process_id):
            result = fit(
                config,
                self.out,
                resume=self.resume,
                overwrite=self.overwrite,
                mesh=self.mesh,
                progress=True,
            )
            if is_main_process():
                console.print_fit(screen, self.out, result)


@dataclass(frozen=True)
class Sample:
    """Sample a posterior: of latent embeddings, or of a small language model.

    --data, --model and --method are short for --data.source, --kind and --sample.method.
    """

    out: Path
    """run directory, new or empty unless --resume or --overwrite is given"""
    kind: Literal["latent", "language"] | None = None
    """which model, by default latent; of a language model, --model.* and --objective.* tell more"""
    start: Annotated[tuple[Path, ...], tyro.conf.arg(name="from")] = ()
    """run of a fit whose model is sampled, on its text, from its parameters on; of the method
    ensemble a run for each chain"""
    config: Path | None = None
    """TOML file with the tables data, latent or model and objective, and sample; flags win"""
    resume: bool = False
    """go on with the run in --out, with its own configuration"""
    overwrite: bool = False
    """replace the run in --out, and the file of --html"""
    html: Path | None = None
    """HTML file for a page with intervals of margins and probabilities of support"""
    data: DataConfig = SAMPLED_DATA
    latent: LatentEmbeddingsConfig = field(default_factory=LatentEmbeddingsConfig)
    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    objective: ObjectiveConfig = SAMPLED_OBJECTIVE
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __call__(self, screen: Console) -> None:
        """Run the command."""
        if self.html is not None:
            check_new(self.html, overwrite=self.overwrite)
        parameters = None
        if self.start:
            plain = Sample(self.out)
            for name in ("config", "kind", "data", "latent", "model", "objective", "resume"):
                if getattr(self, name) != getattr(plain, name):
                    raise ValueError(
                        f"--{name} with --from: the run that --from names brings data, model and "
                        "objective, and to resume none is named; leave one of the two out"
                    )
            config, parameters = fitted_starts(self.start, self.sample)
        elif self.kind != "language":
            config = SampleRunConfig(self.data, self.sample, latent=self.latent)
        else:
            config = SampleRunConfig(
                self.data, self.sample, model=self.model, objective=self.objective
            )
        if self.html is not None:
            check_margins(config.objective)
        run, _ = sample_run(
            config,
            self.out,
            init_values=parameters,
            resume=self.resume,
            overwrite=self.overwrite,
            progress=True,
        )
        tree, paths = posterior_report(run)
        if self.html is not None:
            paths = [*paths, posterior_page(run, self.html, overwrite=self.overwrite)]
        console.print_posterior(screen, tree)
        console.print_paths(screen, paths)


@dataclass(frozen=True)
class Evaluate:
    """Bits per character, robustness to noise, and margins of a run; with figures."""

    run: tyro.conf.Positional[Path]
    """run directory"""
    text: Path | None = None
    """UTF-8 file to evaluate on, by default the run's validation text"""
    noise_absolute: tuple[float, ...] = NOISE_ABSOLUTE
    """standard deviations of noise on the embeddings, in their own unit"""
    noise_relative: tuple[float, ...] = NOISE_RELATIVE
    """standard deviations in units of the embeddings' root mean square"""
    noise_kinds: tuple[NoiseKind, ...] = ("gaussian",)
    """gaussian or uniform noise, worst-case directions by one or ten steps of gradient ascent
    within a ball as large, substitution of tokens by others of the training text's frequencies"""
    substituted: tuple[float, ...] = SUBSTITUTED
    """probabilities of a token to be replaced, of the kind substitution"""
    ascent_tokens: int = ASCENT_TOKENS
    """tokens of the text for worst-case directions, in windows spread evenly"""
    seed: int = 0
    """of the noise"""

    def __call__(self, screen: Console) -> None:
        """Run the command."""
        run = load_fitted(self.run)
        result = evaluate(
            run,
            text=self.text,
            noise_absolute=self.noise_absolute,
            noise_relative=self.noise_relative,
            noise_kinds=self.noise_kinds,
            substituted=self.substituted,
            ascent_tokens=self.ascent_tokens,
            seed=self.seed,
            progress=True,
        )
        label = self.run.resolve().name
        console.print_evaluations(screen, {label: result})
        if not run.is_writable(wait=LOCK_SECONDS):
            return
        with run.lock(wait=LOCK_SECONDS):
            fits = {label: run} if isinstance(run, Run) else {}
            figures = comparison_figures(fits, {label: result}, run.path / "figures")
        console.print_paths(screen, figures)


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
        if self.out is not None:
            check_outputs(self.out)
        result = generate(
            load_fitted(self.run),
            self.prompt,
            length=self.length,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=self.seed,
            progress=True,
        )
        console.print_generated(screen, result)
        if self.out is not None:
            console.print_paths(screen, [write_csv(result, self.out)])
