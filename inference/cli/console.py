"""Results as a terminal shows them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from probattn.inference.cli.proofs import of_any_text, print_proved
from probattn.inference.comparison.compare import ComparedRun
from probattn.inference.evaluation.evaluate import EvaluateResult
from probattn.inference.evaluation.generation import Generated
from probattn.inference.evaluation.intervals import Estimate
from probattn.inference.evaluation.noise_sweeps import NoisePoint
from probattn.inference.evaluation.post_hoc import NOT_CONVERGED
from probattn.inference.evaluation.sensitivity import Sensitivity
from probattn.inference.evaluation.token_margins import TextMargins, TokenMargins
from probattn.inference.exchange.import_decoder import Imported
from probattn.inference.export.diagnostics import divergence_margin, summarise, values_of
from probattn.inference.figures.data import character_head, character_heads
from probattn.inference.figures.report import compared_row
from probattn.inference.fitting.result import FitResult
from probattn.inference.paper.data import PaperComparison

if TYPE_CHECKING:
    import xarray as xr

# Columns of a comparison that a terminal has room for.
_COMPARED = {
    "inference": "inference",
    "barrier_weight": "lambda_m",
    "log_predictive_density": "held-out nats",
    "bpc": "bits per character",
    "calibration_error": "calibration error",
    "degradation_absolute_0.5": "x clean, noise 0.5",
    "degradation_relative_1": "x clean, noise 1 RMS",
    "unconverged_particles": "particles left out",
    "margin_stage": "margins of",
    "smallest_margin": "smallest margin",
    "margin_quantile_0.01": "1 % quantile",
    "elpd_loo": "elpd_loo",
    "pareto_k": "largest Pareto k",
    "divergences": "divergences",
    "seconds": "seconds",
}
_SENSITIVITY = {
    "margin": "rank correlation of the increase with the margin (below 0: small margins suffer)",
    "embedding_margin": "rank correlation of the increase with the first-order embedding margin",
    "support": "mean increase at support tokens less that at others (nats; above 0: they suffer)",
}
_COLUMNS = 4  # columns of a comparison, in a terminal of 80 characters
_NEAR = 0.1  # margins below it are coloured


def print_evaluations(
    screen: Console, results: Mapping[str, EvaluateResult], *, heads: bool = True
) -> None:
    """Print one table with a column per run.

    Args:
        screen: where to print.
        results: results by label, at least one.
        heads: whether to show the heads of the first layer.
    """
    table = Table(title=Text(printable(next(iter(results.values())).text)), title_justify="left")
    table.add_column("")
    for label in results:
        table.add_column(printable(label), justify="right")
    columns = [_evaluation_rows(result) for result in results.values()]
    for name in dict.fromkeys(name for column in columns for name in column):
        if heads or not name.startswith("layer"):
            table.add_row(name, *(column.get(name, "-") for column in columns))
    screen.print(table)
    for label, result in results.items():
        if not result.post_hoc_converged:
            screen.print(f"{printable(label)}: {NOT_CONVERGED}")


def print_fit(screen: Console, out: Path, result: FitResult) -> None:
    """Print what a fit in this directory has reached, and what is proved of its stage."""
    screen.print(
        f"{printable(str(out))}: "
        f"validation {result.validation_bpc:.4f} bits per character "
        f"({result.validation_cross_entropy:.4f} nats per token), "
        f"parameters of step {result.run.step}",
        soft_wrap=True,
    )
    if result.table_certificate is not None:
        screen.print(f"trained stage: {of_any_text(result.table_certificate)}", soft_wrap=True)


def print_imported(screen: Console, out: Path, imported: Imported) -> None:
    """Print what a published model is, and how well it predicts a sample of the text."""
    run, score = imported.run, imported.score
    decoder, kind = run.network.config, printable(str(run.checkpoint.config["model_type"]))
    screen.print(
        f"{printable(str(out))}: {kind}, {decoder.layers} layers of {decoder.heads} heads, width "
        f"{decoder.width}, {decoder.vocabulary} tokens",
        soft_wrap=True,
    )
    screen.print(
        f"{score.tokens} tokens of the validation text of {printable(run.data['name'])}: "
        f"{score.bpc:.4f} bits per character ({score.cross_entropy:.4f} nats per token)",
        soft_wrap=True,
    )


def print_margins(screen: Console, margins: TextMargins) -> None:
    """Print one table with a row per attention stage."""
    title = Text(f"margins of {printable(margins.name)} (sigma_min)")
    table = Table(title=title, title_justify="left")
    header = ("stage", "smallest", "1 %", "median")  # of which 1 % is a quantile
    inner = margins.position >= 2
    rows, support = [], []
    for stage in margins.stages:
        known = inner & ~np.isnan(stage.margin)
        values = stage.margin[known] if known.any() else np.nan
        quantiles = (f"{value:.3f}" for value in np.quantile(values, [0, 0.01, 0.5]))
        rows.append((stage.label, *quantiles))
        weakest = np.argmin(np.where(known, stage.margin, np.inf))
        support.append(character_head(margins.tokens, int(weakest)))
    for name in header:
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    table.add_column("support token", justify="right", no_wrap=True)
    taken = sum(max(map(len, column)) + 3 for column in zip(header, *rows, strict=True))
    for row, head in zip(rows, support, strict=True):
        table.add_row(*row, _token_in_text(margins.tokens, head, screen.width - taken - 4))
    screen.print(table)
    print_proved(screen, margins)
    _print_unknown(screen, margins.stages, range(len(margins.tokens)), margins.tokens)
    if not margins.post_hoc_converged:
        screen.print(NOT_CONVERGED)


def _print_unknown(
    screen: Console,
    stages: Sequence[TokenMargins],
    index: np.ndarray | range,
    tokens: Sequence[str],
) -> None:
    """Print, of every stage with margins that are NaN, how many they are and which is the first."""
    for stage in stages:
        unknown = np.flatnonzero(np.isnan(stage.margin))
        if len(unknown):
            screen.print(
                Text(
                    f"{stage.label}: {len(unknown)} of {len(tokens)} margins are not known (NaN) "
                    f"and left out, the first at token {index[unknown[0]]}, {tokens[unknown[0]]!r}"
                ),
                soft_wrap=True,
            )


def _token_in_text(tokens: Sequence[str], position: int, room: int) -> Text:
    """Quote a token and what of the text before it has room in so many columns of a terminal."""
    before = "".join(tokens[max(position - 12, 0) : position])
    for start in range(len(before)):
        shown = f"{tokens[position]!r} after {before[start:]!r}"
        if cell_len(shown) <= room:
            return Text(shown)
    alone = Text(repr(tokens[position]))
    alone.truncate(max(room, 1), overflow="ellipsis")
    return alone


def print_sensitivity(screen: Console, found: Sensitivity) -> None:
    """Print a table per statistic: a row per attention stage, a column per set of tokens."""
    unit = "" if found.kind == "substitution" else " embedding RMS"
    screen.print(
        Text(
            f"{printable(found.name)}: {found.kind} noise of {found.level:g}{unit} raises the "
            f"loss from {found.loss.mean():.3f} to {found.noisy_loss.mean():.3f} nats per token"
        ),
        soft_wrap=True,
    )
    for statistic, title in _SENSITIVITY.items():
        chosen = [each for each in found.comparisons if each.statistic == statistic]
        table = Table(title=title, title_justify="left", padding=0)
        table.add_column("stage")
        columns = list(dict.fromkeys(each.within for each in chosen))
        for within in columns:
            shown = "all tokens" if within == "text" else f"same {within}"
            table.add_column(shown, justify="right")
        for stage in dict.fromkeys(each.stage for each in chosen):
            cells = [each.estimate for each in chosen if each.stage == stage]
            table.add_row(stage, *(_interval(cell) for cell in cells))
        screen.print(table)
    screen.print("below each value its 95 % interval, by a bootstrap over windows")
    _print_unknown(screen, found.stages, found.index, found.tokens)
    if not found.post_hoc_converged:
        screen.print(NOT_CONVERGED)


def _interval(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "-"
    return f"{estimate.value:.3f}\n{estimate.low:.3f}, {estimate.high:.3f}"


def print_posterior(screen: Console, tree: "xr.DataTree") -> None:
    """Print identified quantities of a posterior with their diagnostics, and what diverged."""
    table = Table()
    table.add_column("quantity")
    for name in ("mean", "sd", "r_hat", "ess bulk", "ess tail"):
        table.add_column(name, justify="right")
    rows = summarise(tree)
    for row in rows:
        values = (row.mean, row.sd, row.r_hat, row.ess_bulk, row.ess_tail)
        cells = zip(values, (".4f", ".4f", ".3f", ".0f", ".0f"), strict=True)
        shown = ("-" if np.isnan(value) else format(value, form) for value, form in cells)
        table.add_row(printable(row.name), *shown)
    screen.print(table)
    for row in rows:
        if row.unknown:
            screen.print(f"{printable(row.name)}: {row.unknown} draws are not known (NaN)")
    if tree["posterior"].sizes["chain"] == 1:
        screen.print("r_hat compares chains, and there is one: sample 2 or more, better 4")
    diverging = values_of(tree, "sample_stats", "diverging")
    if diverging is not None:
        line = f"{int(diverging.sum())} of {diverging.size} draws diverged"
        smallest = divergence_margin(tree)
        if smallest is not None:
            line += f", the smallest margin among them {smallest:.4f}"
        screen.print(line)
    certified = values_of(tree, "support_tokens", "certified_probability")
    if certified is not None:
        screen.print(f"certified at positions >= 2: {100 * certified[..., 2:].mean():.1f} %")


def print_compared(screen: Console, compared: Sequence[ComparedRun]) -> None:
    """Print tables with a column per run, four runs at a time."""
    for first in range(0, len(compared), _COLUMNS):
        rows = [compared_row(run) for run in compared[first : first + _COLUMNS]]
        table = Table()
        table.add_column("", no_wrap=True)
        for row in rows:
            table.add_column(printable(str(row["run"])), justify="right", overflow="fold")
        for name, shown in _COMPARED.items():
            values = [row[name] for row in rows]
            if any(value is not None for value in values):
                table.add_row(shown, *(_cell(value) for value in values))
        screen.print(table)
    for run in compared:
        if run.unknown_margins:
            screen.print(
                f"{printable(run.label)}: {run.unknown_margins} margins are not known (NaN) and "
                "left out"
            )
    if any(run.pareto_k is not None and not run.pareto_k <= 0.7 for run in compared):
        screen.print("a Pareto k not below 0.7: the elpd_loo of that run cannot be trusted")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_comparisons(screen: Console, comparisons: Sequence[PaperComparison]) -> None:
    """Print the paper's numbers beside ours, one row for each."""
    table = Table()
    for name in ("figure", "quantity", "paper", "formula", "reproduced"):
        table.add_column(name, justify="left" if name in ("figure", "quantity") else "right")
    for each in comparisons:
        table.add_row(each.figure, each.quantity, each.paper, each.formula or "-", each.reproduced)
    screen.print(table)


def print_generated(screen: Console, result: Generated) -> None:
    """Print the prompt in bold and its continuation, coloured by margin."""
    text = Text().append(printable(result.prompt), style="bold")
    heads = character_heads(result.tokens)
    shown, begins = np.unique(heads, return_index=True)
    for head, margin in zip(shown, np.fmin.reduceat(result.margin, begins), strict=True):
        style = "red" if margin < 0 else "yellow" if margin < _NEAR else ""
        text.append(printable(result.tokens[head]), style=style)
    screen.print(text, soft_wrap=True)
    weakest = int(np.argmin(np.where(np.isnan(result.margin), np.inf, result.margin)))
    token = result.tokens[heads[weakest]]
    screen.print()
    screen.print(
        Text(
            f"margins (sigma_min, {result.margin_stage}): smallest {result.margin[weakest]:.3f} at "
            f"generated token {weakest}, {token!r}; red is below 0, yellow below {_NEAR}"
        )
    )
    if not result.post_hoc_converged:
        screen.print(NOT_CONVERGED)


def print_paths(screen: Console, paths: Sequence[Path]) -> None:
    """Print a line per file written."""
    for path in paths:
        screen.print(Text(printable(f"wrote {path}")), soft_wrap=True)


def _evaluation_rows(result: EvaluateResult) -> dict[str, str]:
    rows = {
        "bits per character": f"{result.bpc:.3f}",
        "embedding RMS": f"{result.embedding_rms:.4f}",
    }
    for points, shown in (
        (result.noise_absolute, lambda point: f"{point.sigma:g}"),
        (result.noise_relative, lambda point: f"{point.relative:g} RMS"),
        (result.noise_substituted, lambda point: f"{point.probability:g}"),
    ):
        for point in points:
            if point.sigma or point.probability:
                kind = "noise" if point.kind == "gaussian" else point.kind
                rows[f"x clean, {kind} {shown(point)}"] = _with_reach(point)
    for summary in result.margins:
        rows[f"{summary.label}: smallest margin"] = f"{summary.quantiles[0.0]:.3f}"
        rows[f"{summary.label}: median margin"] = f"{summary.quantiles[0.5]:.3f}"
        rows[f"{summary.label}: infeasible"] = f"{100 * summary.infeasible_fraction:.2f} %"
        if summary.unknown:
            rows[f"{summary.label}: not known"] = f"{summary.unknown} of {summary.positions}"
    if result.table_certificate is not None:
        said = "proved" if result.table_certificate < 1 else "not proved"
        rows["trained: no text folds it"] = f"{said} (rho {result.table_certificate:.2f})"
    return rows


def _with_reach(point: NoisePoint) -> str:
    """Return degradation, and half the width of its interval."""
    reach = (point.degradation_high - point.degradation_low) / 2
    return f"{point.degradation:.3f}" + (f" ± {reach:.3f}" if np.isfinite(reach) else "")


def printable(text: str) -> str:
    """Return a text without characters that would steer a terminal."""
    return "".join(
        character if character.isprintable() or character == "\n" else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )
