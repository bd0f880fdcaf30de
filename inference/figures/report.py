"""Files that show results: figures of runs, of a text's margins and of posteriors; tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from probattn.inference.comparison.compare import QUANTILES, ComparedRun
from probattn.inference.evaluation.evaluate import EvaluateResult
from probattn.inference.evaluation.margin_comparisons import QUANTITIES, increase_by_margin
from probattn.inference.evaluation.noise_sweeps import NoisePoint
from probattn.inference.evaluation.sensitivity import Sensitivity, write_tables
from probattn.inference.evaluation.token_margins import TextMargins, write_csv
from probattn.inference.export.diagnostics import values_of
from probattn.inference.export.to_arviz import to_datatree
from probattn.inference.runs.csv_tables import write_table
from probattn.inference.runs.files import check_outputs, replacing_path
from probattn.inference.runs.folder import LOCK_SECONDS
from probattn.inference.runs.run import PosteriorRun, Run
from probattn.inference.sampling.posterior_runs import posterior_data

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure


_OPTIONAL = {"barrier", "noise", "noise_kinds"}  # figures of comparison_figures

REPORTS = {
    "comparison": ("noise.csv", "training.png", *(f"{name}.png" for name in sorted(_OPTIONAL))),
    "margins": ("margins.csv", "margin_text.png", "margin_sequence.png", "margin_distribution.png"),
    "sensitivity": (
        "sensitivity.csv",
        "sensitivity_comparisons.csv",
        "support_tokens.csv",
        "sensitivity.png",
    ),
    "compared": ("comparison.csv", "reliability.png", "smallest_margin.png"),
}
"""The files that the functions below may write into the folder that they are given."""


def check_report(name: str, folder: Path) -> None:
    """Check that the files of a report can be written, before the work whose results they hold.

    Raises:
        ValueError: if a folder, a disk or a socket lies where a file is to lie.
        WriteError: if the folder cannot be written to.
    """
    check_outputs(*(folder / file for file in REPORTS[name]))


def comparison_figures(
    runs: Mapping[str, Run], evaluations: Mapping[str, EvaluateResult], folder: Path
) -> list[Path]:
    """Draw training curves, what the barrier did, and noise sweeps with their table, by run.

    The file barrier.png is there if a run's metrics have it, noise.png if all have Gaussian noise,
    noise_kinds.png if one has other noise: those of an earlier evaluation are removed.
    """
    from probattn.inference.figures.noise import noise_kinds, noise_sweep
    from probattn.inference.figures.training import barrier_curves, training_curves

    required = ("bpc", "validation_bpc", "min_margin", "min_margin_kind")
    curves = {label: run.metrics(*required) for label, run in runs.items()}
    figures = {"training": training_curves(curves)} if curves else {}
    gaussian = {label: _gaussian(each) for label, each in evaluations.items()}
    if all(each["noise_absolute"] for each in gaussian.values()):
        figures["noise"] = noise_sweep(gaussian)
    if any("coupling_eigenvalue_min" in row for rows in curves.values() for row in rows):
        figures["barrier"] = barrier_curves(curves)
    if any(point.kind != "gaussian" for each in evaluations.values() for point in _points(each)):
        by_kind = {label: _by_kind(each) for label, each in evaluations.items()}
        figures["noise_kinds"] = noise_kinds(by_kind)
    names = [field.name for field in fields(NoisePoint)]
    rows = [
        [label, *(getattr(point, name) for name in names)]
        for label, each in evaluations.items()
        for point in _points(each)
    ]
    table = write_table(folder / "noise.csv", ["run", *names], rows)
    paths = [table, *_save(folder, figures)]
    for name in _OPTIONAL - figures.keys():  # they would show other noise than the table
        (folder / f"{name}.png").unlink(missing_ok=True)
    return paths


def _points(result: EvaluateResult) -> tuple[NoisePoint, ...]:
    return result.noise_absolute + result.noise_relative + result.noise_substituted


def _gaussian(result: EvaluateResult) -> dict[str, list[Any]]:
    """Return levels and bits per character of Gaussian noise, in both units."""
    absolute, relative = (
        [point for point in points if point.kind == "gaussian"]
        for points in (result.noise_absolute, result.noise_relative)
    )
    return {
        "noise_absolute": [point.sigma for point in absolute],
        "bpc_absolute": [point.bpc for point in absolute],
        "noise_relative": [point.relative for point in relative],
        "bpc_relative": [point.bpc for point in relative],
    }


def _by_kind(result: EvaluateResult) -> dict[tuple[str, str], np.ndarray]:
    """Return level, degradation and its interval, by kind of noise and unit of its levels."""
    tables: dict[tuple[str, str], list[tuple[float | None, ...]]] = {}
    for unit, name, points in (
        ("noise \N{GREEK SMALL LETTER SIGMA} (embedding units)", "sigma", result.noise_absolute),
        (
            "noise \N{GREEK SMALL LETTER SIGMA} / embedding RMS",
            "relative",
            result.noise_relative,
        ),
        ("probability", "probability", result.noise_substituted),
    ):
        for point in points:
            ends = point.degradation_low, point.degradation_high
            row = (getattr(point, name), point.degradation, *ends)
            tables.setdefault((point.kind, unit), []).append(row)
    return {panel: np.array(rows, np.float64) for panel, rows in tables.items()}


def margin_figures(margins: TextMargins, folder: Path) -> list[Path]:
    """Write the table of a text's margins, and draw the text, their course and distribution."""
    from probattn.inference.figures.margins import margin_along_text, margin_distribution
    from probattn.inference.figures.text import text_by_margin

    first = margins.stages[0]
    label = f"{first.label}, sigma_min"
    support = np.flatnonzero(first.support)
    by_stage = {f"{stage.label}, sigma_min": stage.margin for stage in margins.stages}
    table = folder / "margins.csv"
    write_csv(margins, table)
    # Positions 0 and 1 of the first window have margin 1 whatever the model is.
    informative = margins.position >= 2
    return [
        table,
        *_save(
            folder,
            {
                "margin_text": text_by_margin(
                    margins.tokens, first.margin, support=support, label=label
                ),
                "margin_sequence": margin_along_text(
                    by_stage, support=support, window_starts=margins.window_starts
                ),
                "margin_distribution": margin_distribution(by_stage, among=informative),
            },
        ),
    ]


def sensitivity_report(found: Sensitivity, folder: Path) -> list[Path]:
    """Write tables of what noise does token by token, and draw the loss over the margin."""
    from probattn.inference.figures.noise import loss_by_margin

    increase = found.noisy_loss - found.loss
    bins: dict[str, dict[str, np.ndarray]] = {}
    for stage in found.stages:
        heads = ", heads of layer 1" if stage.label.startswith("layer") else ""
        for name in QUANTITIES:
            values = getattr(stage, name)
            panel = "first-order embedding margin" if name == "embedding_margin" else name
            bins.setdefault(panel + heads, {})[stage.label] = increase_by_margin(
                increase, values, found.window, found.position
            )
    figure = loss_by_margin(bins)
    return [*write_tables(found, folder), *_save(folder, {"sensitivity": figure})]


def compared_report(compared: Sequence[ComparedRun], folder: Path) -> list[Path]:
    """Write the table of a comparison, and its figures.

    The figures are those that the runs allow: reliability.png and, where there is a sampled
    posterior, smallest_margin.png with all point estimates in it. Those of an earlier comparison
    are removed.
    """
    from probattn.inference.figures.posterior import reliability_diagram

    columns = list(compared_row(compared[0]))
    rows = [list(compared_row(run).values()) for run in compared]
    table = write_table(folder / "comparison.csv", columns, rows)
    figures: dict[str, Figure] = {}
    curves = {
        run.label: (run.predictions.reliability.confidence, run.predictions.reliability.accuracy)
        for run in compared
        if run.predictions is not None
    }
    if curves:
        figures["reliability"] = reliability_diagram(curves)
    sampled = [
        run for run in compared if run.divergences is not None and _is_known(run.smallest_margin)
    ]
    if sampled:
        # Point estimates are of language models: a posterior of one, if there is any.
        posterior = min(sampled, key=lambda run: run.model != "language")
        figures["smallest_margin"] = _within_posterior(posterior, compared)
    paths = [table, *_save(folder, figures)]
    for name in {"reliability", "smallest_margin"} - figures.keys():  # of runs not in the table
        (folder / f"{name}.png").unlink(missing_ok=True)
    return paths


def _is_known(margin: float | None) -> TypeGuard[float]:
    return margin is not None and not math.isnan(margin)


def _within_posterior(posterior: ComparedRun, compared: Sequence[ComparedRun]) -> "Figure":
    """Draw the posterior's smallest margin with those of all other runs, by weight if several."""
    from probattn.inference.figures.posterior import barrier_weights, smallest_margin

    weights: dict[float, float] = {}
    others: dict[str, float] = {}
    labels: dict[str, float] = {}
    for run in compared:
        if run is posterior or run.model != posterior.model:
            continue
        if not _is_known(run.smallest_margin):
            continue
        labels[run.label] = run.smallest_margin
        kind = run.objective, run.inference, run.margin_stage
        of_margin = kind == ("margin", "map", posterior.margin_stage)
        if of_margin and run.barrier_weight and run.barrier_weight not in weights:
            weights[run.barrier_weight] = run.smallest_margin
        else:
            others[run.label] = run.smallest_margin
    draws = posterior.smallest_margin_draws
    assert draws is not None  # the caller looked
    if len(weights) > 1:
        return barrier_weights(draws, weights, others)
    return smallest_margin(draws, labels)


def compared_row(run: ComparedRun) -> dict[str, Any]:
    """Return the columns of a comparison: what does not apply to a run is empty."""
    row: dict[str, Any] = {
        "run": run.label,
        "model": run.model,
        "objective": run.objective,
        "barrier_weight": run.barrier_weight,
        "inference": run.inference,
    }
    found = run.predictions
    row |= {
        "parameter_sets": found and found.members,
        "log_predictive_density": found and found.log_predictive_density,
        "bpc": found and found.bpc,
        "calibration_error": found and found.reliability.error,
        "degradation_absolute_0.5": found and found.noise_absolute,
        "degradation_relative_1": found and found.noise_relative,
        "unconverged_particles": found and found.unconverged,
        "margin_stage": run.margin_stage,
        "smallest_margin": run.smallest_margin,
    }
    row |= {
        f"margin_quantile_{level:g}": (run.margin_quantiles or {}).get(level) for level in QUANTILES
    }
    return row | {
        "unknown_margins": run.unknown_margins,
        "elpd_loo": run.elpd_loo,
        "elpd_loo_se": run.elpd_loo_se,
        "elpd_loo_filter_error": run.elpd_loo_filter_error,
        "pareto_k": run.pareto_k,
        "divergences": run.divergences,
        "seconds": run.seconds,
    }


def posterior_report(run: PosteriorRun) -> tuple["xr.DataTree", list[Path]]:
    """Write posterior.nc and the figures of a sampled posterior.

    The log likelihoods are in it unless the temperature is another than 1. Draws whose smallest
    margin is not known (NaN) are left out of its figure, which says how many.

    Returns:
        The posterior, and the files.
    """
    from probattn.inference.figures.posterior import smallest_margin, support_map

    tree = to_datatree(run, log_likelihood=run.config.sample.temperature == 1)
    path = run.path / "posterior.nc"
    with run.lock(wait=LOCK_SECONDS), replacing_path(path) as temporary:
        tree.to_netcdf(temporary)
    figures = {}
    smallest = values_of(tree, "posterior", "smallest_margin")
    if smallest is not None and not np.isnan(smallest).all():
        figures["smallest_margin"] = smallest_margin(smallest)
    probability = values_of(tree, "support_tokens", "support_probability")
    if probability is not None and probability.ndim == 2:  # no heads
        tokens = posterior_data(run)[0]  # inputs: their embeddings have the margins
        symbols = [run.vocabulary.display(row) for row in tokens]
        figures["support_probability"] = support_map(probability, symbols)
    with run.lock(wait=LOCK_SECONDS):
        return tree, [path, *_save(run.path / "figures", figures)]


def _save(folder: Path, figures: Mapping[str, "Figure"]) -> list[Path]:
    from probattn.inference.figures.style import save_figure

    paths = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        save_figure(figure, path)
        paths.append(path)
    return paths
