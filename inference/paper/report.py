"""The paper's figures and numbers as files: pictures, what is drawn in them, and a comparison."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from probattn.inference.paper import data
from probattn.inference.runs.csv_tables import write_table
from probattn.inference.runs.files import check_outputs
from probattn.inference.runtime.progress import progress_bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FIGURES = ("figure_1_1", "figure_3_2", "figure_3_3", "proper_region")


def paper_report(
    folder: Path, *, seeds: int = data.SEEDS, progress: bool = False
) -> tuple[list[data.PaperComparison], list[Path]]:
    """Compute and write figures 1.1, 3.2 and 3.3, and that of proper conditionals.

    Args:
        folder: where each figure goes as a PNG, beside a CSV of what is drawn in it, and the
            comparison as paper.csv.
        seeds: random samples of figure 3.3 behind its numbers; the first is drawn.
        progress: show a progress bar.

    Returns:
        The comparison, and the files.

    Raises:
        ValueError: if a folder, a disk or a socket lies where a file is to lie.
        WriteError: if the folder cannot be written to.
    """
    from probattn.inference.figures.style import save_figure
    from probattn.inference.paper import figures as draw

    check_outputs(*(folder / f"{name}.{kind}" for name in _FIGURES for kind in ("png", "csv")))
    check_outputs(folder / "paper.csv")
    written: list[Path] = []

    def save(name: str, figure: "Figure", columns: Sequence[str], rows: Iterable[Sequence]) -> None:
        written.append(save_figure(figure, folder / f"{name}.png"))
        written.append(write_table(folder / f"{name}.csv", columns, rows))

    with progress_bar("figures", total=4, unit="figure", visible=progress) as bar:
        path = data.trajectory()
        save(
            "figure_1_1",
            draw.margin_geometry(path),
            ("token", "query_spread", "key_spread", "determinant"),
            zip(path.tokens, path.query_spread, path.key_spread, path.determinant, strict=True),
        )
        bar.update(1)
        grid = np.linspace(-3, 5, 401)
        couplings = sorted({*data.PAIR, *data.FAMILY})
        found = {a: data.conditional_density(a, grid) for a in couplings}
        save(
            "figure_3_2",
            draw.conditional_densities(
                grid,
                {a: found[a][0] for a in data.PAIR},
                {a: found[a][1] for a in data.PAIR},
                {a: found[a][0] for a in data.FAMILY},
            ),
            ("coupling", "x_3", "density", "factor"),
            ((a, *row) for a in couplings for row in zip(grid, *found[a], strict=True)),
        )
        bar.update(1)
        strengths = (data.STRENGTH, -data.STRENGTH)
        clouds = {a: [data.cloud(a, seed) for seed in range(seeds)] for a in strengths}
        first = [clouds[a][0] for a in strengths]
        save(
            "figure_3_3",
            draw.coupling_regimes(first),
            ("coupling", "last_variance", "factor", "log_density"),
            (
                (one.coupling, *row)
                for one in first
                for row in zip(one.variance, one.factor, one.log_density, strict=True)
            ),
        )
        bar.update(1)
        maps = [data.mass_map(None), data.mass_map(data.BOUND)]
        save(
            "proper_region",
            draw.proper_region(maps),
            ("bound", "coupling", "spread", "mass", "certificate"),
            (
                (one.bound, a, spread, one.mass[row, column], one.certificate[row, column])
                for one in maps
                for row, spread in enumerate(one.spread)
                for column, a in enumerate(one.coupling)
            ),
        )
        bar.update(1)
    rows = data.comparisons(clouds)
    columns = ("figure", "quantity", "paper", "formula", "reproduced")
    table = ([getattr(row, name) for name in columns] for row in rows)
    written.append(write_table(folder / "paper.csv", columns, table))
    return rows, written
