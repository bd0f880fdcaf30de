"""Make table, answers and figure of the two tables of tokens in a folder, and of nothing else.

python examples/decoding/decoding_report.py examples/decoding/results
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from decoding_questions import LEAST_AUC, PERMUTED, PRIMARY, RIVALS
from foretelling import Answer, answers, questions
from matplotlib.axes import Axes

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
from probattn.inference.runs.csv_tables import markdown_table, read_packed, write_table
from probattn.inference.runs.files import write_text

RESAMPLES = 1000
_MINUS = "\N{MINUS SIGN}"
_STATISTICS = ("auc", "beyond", "rank_correlation")
_PLACES = ("article", "position", "loss", "entropy", "probability", "repeated")
_SHOWN = {
    PRIMARY: "margin, worst head",
    f"{PRIMARY}_mean": "its mean over 32 tokens",
    f"{PRIMARY}_least": "its least over 32 tokens",
    **{f"margin_head_{n}": f"margin, head {n}" for n in range(1, 10)},
    "loss": "own loss",
    "entropy": "entropy",
    "probability": "largest probability",
    "repeated": "repeated 4-grams",
    "position": "position",
    "loss_mean": "mean loss",
    "entropy_mean": "mean entropy",
    PERMUTED: "permuted margin",
}
_TITLES = {
    "loop_greedy": "loop, greedy",
    "loop_0.7": "loop, temperature 0.7",
    "rising_loss": "rising loss",
}


def main(arguments: Sequence[str]) -> int:
    """Summarise the folder that the command line names."""
    if len(arguments) != 1:
        print("expected one folder with generated.csv.gz and text.csv.gz", file=sys.stderr)
        return 2
    try:
        for path in summarise(Path(arguments[0])):
            print(path)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def summarise(folder: Path, *, resamples: int = RESAMPLES, seed: int = 0) -> list[Path]:
    """Write table, answers and figure beside the tables of tokens; returns the files."""
    generated = read_packed(folder / "generated.csv.gz", needed=(*_PLACES, "temperature", "loop"))
    text = read_packed(folder / "text.csv.gz", needed=_PLACES)
    found = [
        each
        for question in questions(generated, text, seed=seed)
        for each in answers(question, resamples=resamples, seed=seed)
    ]
    path = folder / "answers.md"
    write_text(path, answers_table(found))
    return [_write(found, folder / "table.csv"), path, draw(found, folder / "decoding.png")]


def _write(found: Sequence[Answer], path: Path) -> Path:
    columns = ["question", "predictor", "tokens", "positives", "articles"]
    for name in _STATISTICS:
        columns += [name, f"{name}_low", f"{name}_high"]
    rows = [
        [
            *(each.question, each.predictor, each.tokens, each.positives, each.articles),
            *(round(value, 4) for name in _STATISTICS for value in getattr(each, name)),
        ]
        for each in found
    ]
    return write_table(path, columns, rows)


def answers_table(found: Sequence[Answer]) -> str:
    """Return a Markdown table with a row per question: the margin, and the best of its rivals."""
    by_name = {(each.question, each.predictor): each for each in found}
    rows = []
    for question in dict.fromkeys(each.question for each in found):
        margin, control = (by_name[question, name] for name in (PRIMARY, PERMUTED))
        rival = max(
            (by_name[question, name] for name in RIVALS), key=lambda each: abs(each.auc.value - 0.5)
        )
        useful = margin.auc.low > LEAST_AUC and margin.beyond.low > 0
        rows.append(
            (
                *(question, f"{margin.positives} of {margin.tokens}"),
                *map(_interval, (margin.auc, margin.rank_correlation)),
                f"{rival.predictor}: {_interval(rival.auc)}",
                *map(_interval, (margin.beyond, control.auc)),
                "yes" if useful else "no",
            )
        )
    heads = (
        *("question", "tokens with yes", "AUC of the margin", "rank correlation"),
        *("AUC of the best rival", "beyond", "AUC of the control", "rule fulfilled"),
    )
    return markdown_table(heads, rows)


def _interval(found: Estimate) -> str:
    if found.value != found.value:
        return "\N{EM DASH}"
    value, low, high = (f"{each:.2f}".replace("-", _MINUS) for each in found)
    return f"{value} ({low} to {high})"


@styled
def draw(found: Sequence[Answer], path: Path) -> Path:
    """Draw areas under the curve with their intervals, a panel for each question."""
    by_name = {(each.question, each.predictor): each for each in found}
    there = {each.predictor for each in found}
    rows = [name for name in _SHOWN if name in there]
    figure = new_figure(DOUBLE, 0.6 + 0.17 * len(rows), layout="constrained")
    panels = figure.subplots(1, len(_TITLES), sharey=True)
    for number, (axes, (question, title)) in enumerate(zip(panels, _TITLES.items(), strict=True)):
        _panel(axes, [by_name[question, name] for name in rows])
        label_axes(axes, number, "", "", title=title)
        axes.set_xlim(0, 1)
    panels[0].set_yticks(range(len(rows)), [_SHOWN[name] for name in rows])
    panels[0].invert_yaxis()
    figure.supxlabel("area under the curve; of margins, small ones warn", fontsize=TYPE_SIZE)
    return save_figure(figure, path)


def _panel(axes: Axes, chosen: Sequence[Answer]) -> None:
    axes.axvline(0.5, color="0.3", linewidth=0.8)
    for row, each in enumerate(chosen):
        value, low, high = each.auc
        style = line_style(2 if each.predictor == PERMUTED else each.predictor in RIVALS)
        axes.plot([low, high], [row, row], color=style["color"], linewidth=1.2)
        axes.plot([value], [row], **(style | {"linestyle": ""}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
