"""Tables and figures of the arena, from its CSV files alone.

python examples/arena/arena_report.py examples/arena/results
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from arena_figures import rates_figure, trade_off_figure
from arena_plan import read_labels
from arena_statistics import (
    Results,
    Subject,
    below_zero,
    column,
    degradation,
    difference,
    largest_rate,
    losses_by_rate,
    quantity,
    read_results,
    score,
    sensitivity,
)

from probattn.inference.evaluation.intervals import interval, paired_cost, shown
from probattn.inference.figures.style import save_figure
from probattn.inference.runs.csv_tables import markdown_table
from probattn.inference.runs.files import write_text

PRACTICE = ("sigma_reparam", "qk_norm", "z_loss")
_GEOMETRY = ("ce", "margin", "full", "margin_first_layer")
_SHARPENS = (("margin", "strength=0.05"), ("full", "strength=1"))  # of which rule 4 asks
_QUANTITIES = {  # and the quantile of their worst tokens
    "margin_worst": ("margin of the worst head", 0.05),
    "certificate_worst": ("largest certificate", 0.95),
    "block_smallest": ("smallest singular value of the real block", 0.05),
    "block_largest": ("largest singular value of the real block", 0.95),
}
_NOTE = (
    "Means over seeds with 95 % intervals of Student's t; a number without one is of a single "
    "seed. Differences and costs are paired by seed, over ce at the learning rate of all. Bold is "
    "a win by the rules of the README."
)


def write_report(folder: Path) -> list[Path]:
    """Write table.md, and draw the figures whose runs are there."""
    results = read_results(folder)
    labels = read_labels()
    parts = ["# Results\n", _NOTE + "\n", "## Tuned networks\n", tuned_table(results, labels)]
    clips = sorted({float(row["clip"]) for row in results.rates}, reverse=True)
    for clip in clips:
        said = f", gradients clipped at {clip:g}" if np.isfinite(clip) else ""
        parts += [f"## Learning rates{said}\n", rates_table(results, labels, clip)]
        parts += [f"## Loss at every learning rate{said}\n", losses_table(results, labels, clip)]
    parts += ["## Geometry of the first layer\n", geometry_table(results, labels)]
    parts += ["## Setting\n", "```\n" + results.setting.strip() + "\n```\n"]
    write_text(folder / "table.md", "\n".join(parts))
    written = [folder / "table.md"]
    if clips:
        written.append(save_figure(rates_figure(results, labels, clips[0]), folder / "rates.png"))
    written.append(save_figure(trade_off_figure(results, labels), folder / "trade_off.png"))
    return written


def tuned_table(results: Results, labels: dict[str, str]) -> str:
    """Write every tuned network: clean, under noise, rounded, and against ce."""
    reference, tuned, rows = results.reference, results.tuned_reference, []
    clean = column(results, reference, "bpc")
    for subject in results.subjects():
        bpc = column(results, subject, "bpc")
        worse = (
            shown(interval(degradation(results, subject, name).values()), 3)
            for name in ("noise_0.5", "noise_1", "rounded")
        )
        own = score(results, subject)
        gain = difference(own, score(results, reference))
        over_tuned = difference(own, score(results, tuned))
        spikes = column(results, subject, "spikes")
        diverged = sum(column(results, subject, "diverged").values())
        is_reference = subject == reference
        rows.append(
            (
                *_named(subject, labels),
                len(spikes),
                shown(interval(bpc.values()), 3),
                "" if is_reference else shown(paired_cost(bpc, clean), 1, signed=True, unit=" %"),
                *worse,
                "" if is_reference else _bold(shown(gain, 3, signed=True), below_zero(gain)),
                "" if subject == tuned else shown(over_tuned, 3, signed=True),
                shown(interval(spikes.values()), 1),
                f"{diverged:.0f}",
            )
        )
    heads = (
        *("method", "setting", "rate", "seeds", "clean BPC", "cost over ce", "at 0.5 RMS"),
        *("at 1 RMS", "rounded", "score less ce", "less tuned ce"),
        *("spikes", "diverged"),
    )
    return markdown_table(heads, rows)


def rates_table(results: Results, labels: dict[str, str], clip: float) -> str:
    """Write how sensitive every method is to the learning rate, against ce and practice."""
    found = {subject: losses_by_rate(results, subject, clip) for subject in _distinct(results)}
    rivals = [s for name in ("ce", *PRACTICE) for s in found if s.method == name and found[s]]
    rows = []
    for subject, losses in found.items():
        if not losses:
            continue
        own = sensitivity(losses)
        cells = [_against(subject, losses, rival, found[rival]) for rival in rivals]
        best = min(float(np.mean(list(of_rate.values()))) for of_rate in losses.values())
        of_rates = [
            row
            for row in results.rates
            if (row["method"], row["setting"], row["clip"]) == (*subject[:2], clip)
        ]
        rows.append(
            (
                *_named(subject, labels)[:2],
                len(own),
                shown(interval(own.values()), 3),
                *cells,
                f"{largest_rate(losses):g}",
                f"{best:.3f}",
                f"{np.mean([row['spikes'] for row in of_rates]):.1f}",
                f"{sum(row['diverged'] for row in of_rates):.0f}",
            )
        )
    less = (f"less {labels[rival.method]}" for rival in rivals)
    heads = ("method", "setting", "seeds", "sensitivity", *less, "largest rate that trains")
    return markdown_table((*heads, "best BPC", "spikes a run", "diverged"), rows)


def losses_table(results: Results, labels: dict[str, str], clip: float) -> str:
    """Write the loss of every method at every learning rate."""
    rates = sorted({float(row["rate"]) for row in results.rates})
    rows = []
    for subject in _distinct(results):
        if losses := losses_by_rate(results, subject, clip):
            cells = (shown(interval(losses[rate].values()), 2) for rate in rates)
            rows.append((*_named(subject, labels)[:2], *cells))
    return markdown_table(("method", "setting", *(f"{rate:g}" for rate in rates)), rows)


def geometry_table(results: Results, labels: dict[str, str]) -> str:
    """Write margins, certificates and the real block's singular values, less those of ce."""
    rows, reference = [], results.reference
    subjects = [s for s in results.subjects() if s.method in _GEOMETRY]
    heads = sorted({str(r["quantity"]) for r in results.geometry if _is_margin(str(r["quantity"]))})
    named = _QUANTITIES | {head: (head.replace("_", " "), 0.05) for head in heads}
    for name, (described, tail) in named.items():
        for statistic in ("median", f"quantile_{tail:g}"):
            of_ce = quantity(results, reference, name, statistic)
            row = [described, "median" if statistic == "median" else f"{100 * tail:.0f} % quantile"]
            for subject in subjects:
                own = quantity(results, subject, name, statistic)
                if subject == reference:
                    row.append(shown(interval(own.values()), 3))
                    continue
                less = difference(own, of_ce)
                asked = (name, statistic) == ("margin_worst", "median")
                wins = asked and subject[:2] in _SHARPENS and less.mean - less.half_width > 0
                row.append(_bold(shown(less, 3, signed=True), wins))
            rows.append(row)
    titles = ["ce" if s == reference else f"{_title(s, labels)} less ce" for s in subjects]
    return markdown_table(("quantity", "over tokens", *titles), rows)


def _against(subject: Subject, losses: dict, rival: Subject, rival_losses: dict) -> str:
    """Return the sensitivity less that of a rival, bold where it wins by the rules."""
    if subject[:2] == rival[:2]:
        return ""
    less = difference(sensitivity(losses), sensitivity(rival_losses))
    wins = below_zero(less) and largest_rate(losses) >= largest_rate(rival_losses)
    return _bold(shown(less, 3, signed=True), wins)


def _distinct(results: Results) -> list[Subject]:
    """Return the subjects of the study of rates, where the own rate counts for nothing."""
    found: dict[tuple[str, str], Subject] = {}
    for subject in results.subjects():
        found.setdefault(subject[:2], subject)
    return list(found.values())


def _named(subject: Subject, labels: dict[str, str]) -> tuple[str, str, str]:
    setting = "" if subject.setting == "plain" else subject.setting.replace("_", " ")
    return labels[subject.method], setting, f"{subject.rate:g}"


def _title(subject: Subject, labels: dict[str, str]) -> str:
    label, setting, rate = _named(subject, labels)
    return f"{label} {setting or f'rate {rate}'}"


def _is_margin(name: str) -> bool:
    return name.startswith("margin_head_")


def _bold(text: str, wins: bool) -> str:
    return f"**{text}**" if wins else text


def main(arguments: Sequence[str]) -> int:
    """Make the tables and figures of a folder."""
    if len(arguments) != 1:
        print("usage: python arena_report.py FOLDER, where arena.py wrote its tables")
        return 2
    try:
        for path in write_report(Path(arguments[0])):
            print(path)
    except (OSError, ValueError) as error:
        print(f"arena_report.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
