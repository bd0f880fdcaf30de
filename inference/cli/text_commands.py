"""The commands that show a text: margins, what noise does, runs side by side."""

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from probattn.inference.cli import console
from probattn.inference.cli.proofs import print_folds
from probattn.inference.comparison.compare import compare
from probattn.inference.evaluation.folding_texts import folding_texts
from probattn.inference.evaluation.perturbations import NoiseKind
from probattn.inference.evaluation.sensitivity import sensitivity
from probattn.inference.evaluation.token_margins import text_margins
from probattn.inference.figures.pages import comparison_page
from probattn.inference.figures.report import (
    check_report,
    compared_report,
    margin_figures,
    sensitivity_report,
)
from probattn.inference.runs.files import check_new
from probattn.inference.runs.run import load_fitted, load_run


@dataclass(frozen=True)
class Margins:
    """Margin, certificate and support tokens of every token of a text: a table and figures."""

    run: tyro.conf.Positional[Path]
    """run directory"""
    out: Path | None = None
    """directory for margins.csv and the figures"""
    html: Path | None = None
    """HTML file for a page that shows the text in a browser; it needs no --out"""
    overwrite: bool = False
    """replace the file of --html"""
    text: Path | None = None
    """UTF-8 file of any length, by default the run's validation text"""
    stride: int | None = None
    """distance between windows, 1 to block, by default half a block"""
    radius: bool = False
    """compute how far tokens may move, by proof; takes two to three times as long as all else"""
    all_layers: bool = False
    """take the heads of all layers: a description, since only the first layer is the theory's"""
    post_hoc: bool = False
    """take the post-hoc attention prior of an imported model too; its first fit takes minutes"""
    find_folds: bool = False
    """look for a text that folds each stage for which none is ruled out"""

    def __call__(self, screen: Console) -> None:
        """Run the command."""
        _check_outputs("margins", self.out, self.html, self.overwrite)
        run = load_fitted(self.run)
        found = text_margins(
            run,
            self.text,
            stride=self.stride,
            radius=self.radius,
            all_layers=self.all_layers,
            post_hoc=self.post_hoc,
            details=self.html is not None,
            progress=True,
        )
        console.print_margins(screen, found)
        if self.out is not None:
            console.print_paths(screen, margin_figures(found, self.out))
        if self.html is not None:
            console.print_paths(screen, [found.to_html(self.html, overwrite=self.overwrite)])
        if self.find_folds:
            print_folds(screen, folding_texts(run, found.certificates, progress=True))


@dataclass(frozen=True)
class MeasureSensitivity:
    """Whether noise harms most at tokens of small margin: loss and margins token by token."""

    run: tyro.conf.Positional[Path]
    """run directory"""
    out: Path | None = None
    """directory for the tables and the figure"""
    html: Path | None = None
    """HTML file for a page that shows text, margins and losses in a browser; it needs no --out"""
    overwrite: bool = False
    """replace the file of --html"""
    text: Path | None = None
    """UTF-8 file, by default the run's validation text"""
    noise_kind: NoiseKind = "gaussian"
    """see the command evaluate"""
    level: float = 0.5
    """in units of the embeddings' root mean square; of substitution a probability"""
    draws: int = 8
    """of the noise, whose losses are averaged"""
    most_tokens: int = 16_384
    """of the text, in windows spread evenly"""
    seed: int = 0
    """of the noise and the bootstrap"""

    def __call__(self, screen: Console) -> None:
        """Run the command."""
        _check_outputs("sensitivity", self.out, self.html, self.overwrite)
        found = sensitivity(
            load_fitted(self.run),
            self.text,
            noise_kind=self.noise_kind,
            level=self.level,
            draws=self.draws,
            most_tokens=self.most_tokens,
            seed=self.seed,
            progress=True,
        )
        console.print_sensitivity(screen, found)
        if self.out is not None:
            console.print_paths(screen, sensitivity_report(found, self.out))
        if self.html is not None:
            console.print_paths(screen, [found.to_html(self.html, overwrite=self.overwrite)])


@dataclass(frozen=True)
class Compare:
    """Runs on the same text side by side: a table, and point estimates within the posterior."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run directories, of fits and of sampled posteriors"""
    out: Path | None = None
    """directory for comparison.csv and the figures"""
    html: Path | None = None
    """HTML file for a page that shows the runs on one text in a browser; it needs no --out"""
    overwrite: bool = False
    """replace the file of --html"""
    seed: int = 0
    """of the noise, of particles and of the draws of guides"""

    def __call__(self, screen: Console) -> None:
        """Run the command."""
        if not self.runs:
            raise ValueError("runs: got none, expected the directories of one run or more")
        names = [path.resolve().name for path in self.runs]
        distinct = len(set(names)) == len(names)
        labels = names if distinct else [str(path) for path in self.runs]
        if len(set(labels)) < len(labels):
            raise ValueError(f"runs: got {', '.join(labels)}, expected each run once")
        runs = {label: load_run(path) for label, path in zip(labels, self.runs, strict=True)}
        _check_outputs("compared", self.out, self.html, self.overwrite)
        compared = compare(runs, seed=self.seed, progress=True)
        console.print_compared(screen, compared)
        if self.out is not None:
            console.print_paths(screen, compared_report(compared, self.out))
        if self.html is not None:
            page = comparison_page(compared, self.html, overwrite=self.overwrite)
            console.print_paths(screen, [page])


def _check_outputs(report: str, out: Path | None, page: Path | None, overwrite: bool) -> None:
    """Refuse outputs that cannot be written, before the work whose results they are to hold."""
    if out is None and page is None:
        raise ValueError("--out: got none, expected a directory, or a file for --html, or both")
    if overwrite and page is None:
        raise ValueError("--overwrite: it replaces the file of --html; give that, or leave it out")
    if out is not None:
        check_report(report, out)
    if page is not None:
        check_new(page, overwrite=overwrite)
