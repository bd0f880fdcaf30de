"""The demonstration: two objectives on the same text, evaluated side by side."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from probattn.inference.config import FitConfig, RunConfig
from probattn.inference.evaluation.evaluate import EvaluateResult, evaluate
from probattn.inference.evaluation.token_margins import text_margins
from probattn.inference.figures.report import check_report, comparison_figures, margin_figures
from probattn.inference.fitting.fit import fit
from probattn.inference.runs.files import check_outputs, write_text
from probattn.inference.runs.folder import check_target
from probattn.inference.runs.run import Run, require_fit
from probattn.models import LanguageModelConfig, ObjectiveConfig
from probattn.models.objective import ObjectiveName
from probattn.text.corpora import DataConfig, load_corpus

DEMO_CONFIG = RunConfig(
    data=DataConfig("pydoc"),
    model=LanguageModelConfig(layers=2, heads=4, width=64, block=64, prior_rank=8),
    fit=FitConfig(steps=800, warmup=80, eval_every=100, checkpoint_every=400),
)
_OBJECTIVES: tuple[ObjectiveName, ...] = ("ce", "margin")
_EXCERPT = 600  # characters of the validation text whose margins are drawn


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration made.

    Attributes:
        runs: runs by objective.
        evaluations: evaluations by objective.
        figures: files written.
    """

    runs: Mapping[str, Run]
    evaluations: Mapping[str, EvaluateResult]
    figures: tuple[Path, ...]


def demo(out: Path, *, config: RunConfig = DEMO_CONFIG, progress: bool = False) -> DemoResult:
    """Fit objectives ce and margin, evaluate both under noise, draw the figures.

    Args:
        out: directory for the two runs and the figures; those of an earlier demonstration are
            replaced.
        config: configuration of both runs, up to the objective.
        progress: show progress bars.

    Raises:
        ValueError: if `out` holds something else under the names of the runs or of the files.
        WriteError: if nothing can be written there.
    """
    excerpt = out / "excerpt.txt"
    for name in _OBJECTIVES:
        check_target(out / name, overwrite=True)
    for report in ("comparison", "margins"):
        check_report(report, out / "figures")
    check_outputs(excerpt)
    runs: dict[str, Run] = {}
    evaluations: dict[str, EvaluateResult] = {}
    for name in _OBJECTIVES:
        chosen = RunConfig(config.data, config.model, ObjectiveConfig(name), config.fit)
        found = fit(chosen, out / name, overwrite=True, progress=progress)
        runs[name] = require_fit(found.run)
        evaluations[name] = evaluate(runs[name], progress=progress)
    figures = comparison_figures(runs, evaluations, out / "figures")
    write_text(excerpt, load_corpus(config.data).validation[:_EXCERPT])
    margins = text_margins(runs["margin"], excerpt, progress=progress)
    figures += margin_figures(margins, out / "figures")
    return DemoResult(runs, evaluations, tuple(figures))
