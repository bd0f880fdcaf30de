"""Pages of posteriors and of comparisons, in one HTML file each."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from probattn.inference.comparison.compare import ComparedRun
from probattn.inference.export.page_series import drawn_series, sequences_page
from probattn.inference.export.to_arviz import to_datatree
from probattn.inference.figures.report import compared_row
from probattn.inference.pages.page import Summary, page_html
from probattn.inference.runs.files import check_new, write_text
from probattn.inference.runs.run import PosteriorRun, Run
from probattn.inference.sampling.posterior_runs import posterior_data, training_sequences
from probattn.models import ObjectiveConfig

if TYPE_CHECKING:
    import xarray as xr

_SEQUENCES = 64  # of a fit with a guide
_DRAWS = 400


def check_margins(objective: ObjectiveConfig | None, *, name: str = "--html") -> None:
    """Check that a posterior has margins to show, before the work that draws them.

    Args:
        objective: of a language model; None for a latent model, which has margins.
        name: what the message is about.

    Raises:
        ValueError: if the objective is ce.
    """
    if objective is not None and objective.name == "ce":
        raise ValueError(
            f"{name}: objective ce has no attention stage, so its posterior has no margins for a "
            "page: expected objective margin or full"
        )


def posterior_page(
    run: PosteriorRun | Run,
    path: str | os.PathLike[str],
    *,
    tree: "xr.DataTree | None" = None,
    overwrite: bool = False,
) -> Path:
    """Write a page of a posterior: margins with intervals, and probabilities of support.

    The page shows the sequences that the posterior is given, or of a fit with a guide at most 64
    of its training text. The interval of a margin is the central 90 % of its draws.

    Args:
        run: a sampled posterior, or a fit with another guide than map.
        path: HTML file to write.
        tree: the posterior as `to_datatree` gives it, if it is there already.
        overwrite: replace a file that is there.

    Returns:
        The path.

    Raises:
        ValueError: if the run is a MAP run, which has no draws, or of objective ce, which has no
            margins, or is not finished, its text is not there any more, something lies at the path,
            or there is more text than a page shows.
        WriteError: if the file cannot be written.
    """
    path = Path(path)
    check_new(path, overwrite=overwrite)
    check_margins(run.config.objective, name=str(run.path))
    if isinstance(run, PosteriorRun):
        tokens = posterior_data(run)[0]  # inputs: their embeddings have the margins
    elif run.config.fit.guide == "map":
        raise ValueError(
            f"{run.path}: is a MAP run, a point without draws, so its margins have no intervals: "
            f"make draws with `probattn sample --from {run.path}`, or fit with another --guide"
        )
    else:
        tokens = training_sequences(run, _SEQUENCES)[0]
    if tree is None:
        tree = to_datatree(run, sequences=_SEQUENCES, draws=_DRAWS)
    sizes = tree["posterior"].sizes
    page = sequences_page(
        f"Posterior of {run.path.resolve().name}",
        [run.vocabulary.display(row) for row in tokens],
        drawn_series(run.path.resolve().name, tree),
        notes=[f"{sizes['chain']} chains of {sizes['draw']} draws. Margins are medians over them."],
    )
    write_text(path, page_html(page))
    return path


def comparison_page(
    compared: Sequence[ComparedRun], path: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Write a page of several runs side by side, on the sequences that their margins are of.

    Runs without margins, such as posteriors of objective ce, are in the table alone. So are those
    whose sequences are others than those of the first: latent models beside language models.

    Args:
        compared: from `compare`.
        path: HTML file to write.
        overwrite: replace a file that is there.

    Returns:
        The path.

    Raises:
        ValueError: if something lies at the path, no run has margins, or there is more text than a
            page shows.
        WriteError: if the file cannot be written.
    """
    path = Path(path)
    check_new(path, overwrite=overwrite)
    with_margins = [run for run in compared if run.sequences is not None]
    if not with_margins:
        raise ValueError("compared: got no run with margins, expected at least one")
    sequences = with_margins[0].sequences
    assert sequences is not None  # of those runs alone
    shown = [run for run in with_margins if run.sequences == sequences]
    others = [run.label for run in with_margins if run.sequences != sequences]
    bare = [run.label for run in compared if run.sequences is None]
    notes = [f"Sequences of other runs are others: {', '.join(others)}."] if others else []
    if bare:
        notes.append(f"{' and '.join(bare)} {'has' if len(bare) == 1 else 'have'} no margins.")
    page = sequences_page(
        " and ".join(run.label for run in shown),
        sequences,
        [series for run in shown for series in run.series],
        notes=notes,
        summary=_summary(compared),
    )
    write_text(path, page_html(page))
    return path


def _summary(compared: Sequence[ComparedRun]) -> Summary:
    rows = [compared_row(run) for run in compared]
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    return Summary(
        [name.replace("_", " ") for name in names],
        [[_cell(row[name]) for name in names] for row in rows],
    )


def _cell(value: object) -> str:
    if value is None:
        return "\N{EN DASH}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
