"""Make table, answers and figure of the `tokens.csv.gz` in a folder, and of nothing else.

python examples/fragility/summarise.py examples/fragility/results
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from associations import STATISTICS, Association, associations
from matplotlib.axes import Axes
from questions import CONTROLS, HARM, PERMUTED, PLACE, PLACES, PRIMARY, RIVALS, SIZE, WORST

from probattn.inference.evaluation.intervals import Estimate
from probattn.inference.figures.style import (
    DOUBLE,
    TYPE_SIZE,
    label_axes,
    line_style,
    new_figure,
    save_figure,
    styled,
)
from probattn.inference.runs.csv_tables import read_packed, write_table
from probattn.inference.runs.files import write_text

RESAMPLES = 1000
_MINUS = "\N{MINUS SIGN}"
_SHOWN_HARMS = {
    "noise_0.25": "noise 0.25",
    "rounding_all_3": "3 bits",
    "dropped": "dropped",
    "ascent": "ascent",
    "likely_other": "replaced",
    "misspelt": "misspelt",
}
_SHOWN = {
    PRIMARY: "margin, worst head",
    "certificate_worst": "certificate, worst head",
    "spectrum_smallest": "real block, smallest",
    "spectrum_largest": "real block, largest",
    "loss": "own loss",
    "entropy": "own entropy",
    "token_constraint_bound": "Token Constraint Bound",
    "gradient": "gradient at embedding",
    "loss_slope": "slope of own loss",
    "attention_max": "largest attention",
    PERMUTED: "permuted margin",
}


def main(arguments: Sequence[str]) -> int:
    """Summarise the folder that the command line names."""
    parser = argparse.ArgumentParser(description="make tables and a figure of a table of tokens")
    parser.add_argument("folder", type=Path, help="folder with tokens.csv.gz")
    parser.add_argument(
        "--without",
        type=int,
        nargs="+",
        metavar="TYPE",
        help="leave out the tokens of these types, and write answers_without.md alone",
    )
    options = parser.parse_args(arguments)
    try:
        if options.without:
            print(summarise_without(options.folder, options.without))
            return 0
        for path in summarise(options.folder):
            print(path)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def summarise(folder: Path, *, resamples: int = RESAMPLES, seed: int = 0) -> list[Path]:
    """Write tables and figure beside a table of tokens; returns the files."""
    tokens = read_packed(folder / "tokens.csv.gz", needed=PLACES)
    found = compute(tokens, resamples=resamples, seed=seed)
    table = write_associations(found, folder / "table.csv")
    answers = folder / "answers.md"
    write_text(answers, answers_table(found))
    return [table, answers, draw(found, folder / "fragility.png")]


def summarise_without(
    folder: Path, types: Sequence[int], *, resamples: int = RESAMPLES, seed: int = 0
) -> Path:
    """Write the answers that remain without the tokens of some types; returns the file.

    Raises:
        ValueError: if no token is of one of these types.
    """
    tokens = read_packed(folder / "tokens.csv.gz", needed=PLACES)
    if missing := sorted(set(types) - set(tokens["type"].astype(int))):
        raise ValueError(f"--without: no token is of type {missing[0]}: expected types that are")
    left = ~np.isin(tokens["type"], types)
    chosen = {name: values[left] for name, values in tokens.items()}
    path = folder / "answers_without.md"
    write_text(path, answers_table(compute(chosen, resamples=resamples, seed=seed)))
    return path


def compute(
    columns: dict[str, np.ndarray], *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Association]:
    """Compute the associations of a table of tokens, those of the sizes of harms among them."""
    harms = {
        name.removeprefix(HARM): values for name, values in columns.items() if name.startswith(HARM)
    }
    # A harm that hardly raises losses in the mean may yet move them far, up or down.
    harms |= {SIZE + name: abs(values) for name, values in harms.items()}
    places = set(PLACES) - set(RIVALS)
    predictors = {
        name: values
        for name, values in columns.items()
        if not name.startswith(HARM) and name not in places
    }
    return associations(
        harms,
        predictors,
        columns["document"].astype(int),
        columns["type"].astype(int),
        rivals=RIVALS,
        controls=CONTROLS,
        place=PLACE,
        worst=WORST,
        resamples=resamples,
        seed=seed,
    )


def write_associations(found: Sequence[Association], path: Path) -> Path:
    """Write the table: the interval of the rank correlation is in `low` and `high`."""
    columns = ["harm", "predictor", "tokens", "rank_correlation", "low", "high"]
    for name in STATISTICS[1:]:
        columns += [name, f"{name}_low", f"{name}_high"]
    rows = [
        [
            each.harm,
            each.predictor,
            each.tokens,
            *(round(v, 4) for name in STATISTICS for v in getattr(each, name)),
        ]
        for each in found
    ]
    return write_table(path, columns, rows)


def answers_table(found: Sequence[Association]) -> str:
    """Return a Markdown table with a row per harm: margin, control, and the best of the rivals."""
    by_name = {(each.harm, each.predictor): each for each in found}
    heads = (
        *("harm", "rank correlation", "within a type", "partial", "AUC", "permuted"),
        *("best rival", "beyond"),
    )
    lines = [heads, ("---",) * len(heads)]
    for harm in dict.fromkeys(each.harm for each in found if not each.harm.startswith(SIZE)):
        margin = by_name[harm, PRIMARY]
        rival = max(
            (by_name[harm, name] for name in RIVALS),
            key=lambda each: abs(each.rank_correlation.value),
        )
        control = by_name[harm, PERMUTED].rank_correlation
        own = (margin.rank_correlation, margin.within_type, margin.partial, margin.auc, control)
        best = f"{rival.predictor}: {_interval(rival.rank_correlation)}"
        lines.append((harm, *map(_interval, own), best, _interval(margin.beyond)))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _interval(found: Estimate) -> str:
    value, low, high = (f"{each:.2f}".replace("-", _MINUS) for each in found)
    return f"{value} ({low} to {high})"


@styled
def draw(found: Sequence[Association], path: Path) -> Path:
    """Draw rank correlations with their intervals, a panel for each kind of harm."""
    by_name = {(each.harm, each.predictor): each for each in found}
    there = {each.predictor for each in found}
    rows = [name for name in _SHOWN if name in there]
    harms = [name for name in _SHOWN_HARMS if (name, rows[0]) in by_name]
    figure = new_figure(DOUBLE, 0.6 + 0.24 * len(rows), layout="constrained")
    panels = figure.subplots(1, len(harms), sharey=True, squeeze=False)[0]
    for number, (axes, harm) in enumerate(zip(panels, harms, strict=True)):
        chosen = [by_name.get((harm, name)) for name in rows]
        _panel(axes, chosen)
        label_axes(axes, number, "", "", title=_SHOWN_HARMS[harm])
        axes.set_xlim(-1, 1)
    panels[0].set_yticks(range(len(rows)), [_SHOWN[name] for name in rows])
    panels[0].invert_yaxis()
    figure.supxlabel("rank correlation with the increase of the loss", fontsize=TYPE_SIZE)
    return save_figure(figure, path)


def _panel(axes: Axes, chosen: Sequence[Association | None]) -> None:
    axes.axvline(0, color="0.3", linewidth=0.8)
    for row, each in enumerate(chosen):
        if each is not None:
            value, low, high = each.rank_correlation
            style = line_style(2 if each.predictor == PERMUTED else each.predictor in RIVALS)
            axes.plot([low, high], [row, row], color=style["color"], linewidth=1.2)
            axes.plot([value], [row], **(style | {"linestyle": ""}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
