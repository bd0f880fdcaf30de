"""Files that show results: the figures of runs and of a text's margins, and their tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from probattn.inference.evaluate import EvaluateResult, NoisePoint
from probattn.inference.runs import Run
from probattn.inference.token_margins import TextMargins, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def comparison_figures(
    runs: Mapping[str, Run], evaluations: Mapping[str, EvaluateResult], folder: Path
) -> list[Path]:
    """Training curves and noise sweeps of several runs, by label."""
    from probattn.inference import plots

    def levels(points: tuple[NoisePoint, ...], name: str) -> list[float]:
        return [getattr(point, name) for point in points]

    sweeps = {
        label: {
            "noise_absolute": levels(result.noise_absolute, "sigma"),
            "bpc_absolute": levels(result.noise_absolute, "bpc"),
            "noise_relative": levels(result.noise_relative, "relative"),
            "bpc_relative": levels(result.noise_relative, "bpc"),
        }
        for label, result in evaluations.items()
    }
    curves = {label: run.metrics() for label, run in runs.items()}
    return _save(
        folder,
        {
            "training": plots.training_curves(curves),
            "noise": plots.noise_sweep(sweeps),
        },
    )


def margin_figures(margins: TextMargins, folder: Path) -> list[Path]:
    """Table of a text's margins, the text coloured by them, their course and distribution."""
    from probattn.inference import plots

    first = margins.stages[0]
    label = f"{first.label}, sigma_min"
    support = np.flatnonzero(first.support)
    by_stage = {f"{stage.label}, sigma_min": stage.margin for stage in margins.stages}
    table = folder / "margins.csv"
    write_csv(margins, table)
    # Positions 0 and 1 of the first window have margin 1 whatever the model is.
    informative = margins.position >= 2
    distributions = {name: margin[informative] for name, margin in by_stage.items()}
    return [
        table,
        *_save(
            folder,
            {
                "margin_text": plots.text_by_margin(
                    margins.tokens, first.margin, support=support, label=label
                ),
                "margin_sequence": plots.margin_along_text(
                    by_stage, support=support, window_starts=margins.window_starts
                ),
                "margin_distribution": plots.margin_distribution(distributions),
            },
        ),
    ]


def _save(folder: Path, figures: Mapping[str, "Figure"]) -> list[Path]:
    from probattn.inference import plots

    paths = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        plots.save_figure(figure, path)
        paths.append(path)
    return paths
