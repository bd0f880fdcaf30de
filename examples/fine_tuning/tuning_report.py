"""Table and figure of the comparison, from runs.csv in a folder alone.

python examples/fine_tuning/tuning_report.py examples/fine_tuning/results
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from tuning_plan import NOISE, PUBLISHED, SETTINGS

from probattn.inference.figures.style import (
    DOUBLE,
    add_legend,
    label_axes,
    line_style,
    mark_boundary,
    new_figure,
    save_figure,
    styled,
)
from probattn.inference.runs.csv_tables import markdown_table, read_table
from probattn.inference.runs.files import write_text

Row = Mapping[str, str]
_NOISES = {f"noise_{level:g}": f"noise {level:g} RMS" for level in NOISE}
_DISTURBED = {**_NOISES, "rounded": "3 bits"}


def main(arguments: Sequence[str]) -> int:
    """Write the report of the folder that the command line names."""
    if len(arguments) != 1:
        print("expected one folder with runs.csv", file=sys.stderr)
        return 2
    try:
        for path in write_report(Path(arguments[0])):
            print("wrote", path)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def write_report(folder: Path) -> list[Path]:
    """Write table and figure beside runs.csv; returns the files.

    Raises:
        ValueError: if a setting, or the published model, is missing.
    """
    rows = read_table(folder / "runs.csv")
    missing = {PUBLISHED, *SETTINGS} - {row["setting"] for row in rows}
    if missing:
        raise ValueError(
            f"{folder / 'runs.csv'}: has no {', '.join(sorted(missing))}: expected all settings; "
            "let fine_tune.py end first"
        )
    table = folder / "table.md"
    write_text(table, runs_table(rows))
    return [table, save_figure(runs_figure(rows), folder / "fine_tuning.png")]


def degradation(row: Row, name: str) -> float:
    """Return the bits per character that a disturbance adds."""
    return float(row[name]) - float(row["bpc"])


def runs_table(rows: Sequence[Row]) -> str:
    """Write a row per model: bits per character, what disturbances add, and margins."""
    lines = [
        (
            row["setting"],
            row["seed"] or "\N{EM DASH}",
            f"{float(row['bpc']):.4f}",
            f"{float(row['other']):.4f}",
            *(f"{degradation(row, name):.4f}" for name in _DISTURBED),
            *(_signed(float(row[name])) for name in ("smallest", "median")),
            f"{100 * float(row['folded']):.2f}",
        )
        for row in rows
    ]
    heads = (
        *("setting", "seed", "bits per character", "on WikiText"),
        *(f"added by {label}" for label in _DISTURBED.values()),
        *("smallest margin", "median margin", "folded, %"),
    )
    return markdown_table(heads, lines)


def _signed(value: float) -> str:
    return f"{value:.3f}".replace("-", "\N{MINUS SIGN}")


@styled
def runs_figure(rows: Sequence[Row]) -> Figure:
    """Draw bits per character, what disturbances add, and margins, a point for every run."""
    panels: dict[str, tuple[str, Callable[[Row], float]]] = {
        "clean": ("bits per character", lambda row: float(row["bpc"])),
        "WikiText": ("bits per character", lambda row: float(row["other"])),
        **{
            label: ("bits added", lambda row, name=name: degradation(row, name))
            for name, label in _DISTURBED.items()
        },
        "smallest margin": ("sigma_min", lambda row: float(row["smallest"])),
    }
    figure = new_figure(DOUBLE, 4.2, layout="constrained")
    entries = {}
    for number, (axes, (title, (unit, value))) in enumerate(
        zip(figure.subplots(2, 3).flat, panels.items(), strict=True)
    ):
        for place, setting in enumerate((PUBLISHED, *SETTINGS)):
            found = [value(row) for row in rows if row["setting"] == setting]
            style = line_style(place) | {"linestyle": ""}
            (entries[setting],) = axes.plot([place] * len(found), found, **style)
        label_axes(axes, number, "", unit, title=title)
        axes.set_xticks([])
        axes.set_xlim(-0.5, len(SETTINGS) + 0.5)
        if title == "smallest margin":
            mark_boundary(axes, "y")
    add_legend(figure, entries)
    return figure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
