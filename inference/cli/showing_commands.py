"""The commands that show what the library is about: the demonstration, and the paper's figures."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from probattn.inference.cli import console
from probattn.inference.cli.demo import demo
from probattn.inference.paper.report import paper_report


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
