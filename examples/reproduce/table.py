"""Tables in Markdown: the paper's numbers beside those here, all methods, and kinds of noise."""

from collections.abc import Sequence
from pathlib import Path

from plan import TUNING_SEEDS, read_labels
from summary import (
    PAPER,
    REFERENCE,
    Results,
    Row,
    by_seed,
    curves_of,
    of_stages,
    paired_difference,
    settings_of,
    tuned_settings,
)

from probattn.inference.evaluation.intervals import Interval, interval, paired_cost, shown
from probattn.inference.runs.csv_tables import markdown_table
from probattn.inference.runs.files import write_text

_POINTS = (("absolute", 0.5), ("relative", 0.5), ("relative", 1.0))
_MISSING, _MINUS = "\N{EM DASH}", "\N{MINUS SIGN}"
_NOTE = (
    "Means over seeds with 95 % intervals of Student's t; a number without one is of a single "
    "seed. Costs and differences are paired by seed, over ce at the learning rate that all other "
    "methods have."
)


_FURTHER = "The same of seeds with which nothing was chosen; then of these and the others together."
_SHARED = [
    f"noise_probability={share} embedding_noise={noise}"
    for share, noise in (("0.15", "0.5"), ("0.5", "0.5"), ("0.5", "0.75"))
]
_DECAYED = f"{_SHARED[0]} weight_decay=0.1"
# Noise on some sequences with the barrier on the first layer, against what it is made of, and
# against Gaussian noise on all of them.
_PAIRS = [
    (("occasional_first_layer", _DECAYED), ("occasional_first_layer", _SHARED[0])),
    (("occasional_first_layer", _DECAYED), ("gaussian", "embedding_noise=0.2")),
    *((("occasional_first_layer", each), ("occasional", each)) for each in _SHARED),
    *(
        (("occasional_first_layer", each), ("gaussian", f"embedding_noise={noise}"))
        for each, noise in zip(_SHARED, ("0.2", "0.35", "0.5"), strict=True)
    ),
]


def write_tables(results: Results, folder: Path) -> list[Path]:
    """Write table.md: every part whose runs are there."""
    there = settings_of(results.noise)
    parts = ["# Results\n", _NOTE + "\n"]
    if all(name in there.get(method, ()) for method, name in PAPER):
        parts += ["## The paper's numbers\n", paper_table(results)]
    if len(there) > 2 and REFERENCE[1] in there.get("ce", ()):
        parts += ["## Methods\n", methods_table(results.noise)]
    if curves_of(results.noise):
        parts += ["## Trade-off, settings with every seed\n", curves_table(results.noise)]
    if pairs := [pair for pair in _PAIRS if all(name in there.get(m, ()) for m, name in pair)]:
        parts += ["## Differences, paired by seed\n", pairs_table(results.noise, pairs)]
    if results.further:
        parts += ["## Further seeds\n", _FURTHER + "\n"]
        parts += further_tables(results.noise, results.further)
    if any(row["kind"] != "gaussian" for row in results.noise):
        parts += ["## Degradation under noise of other kinds\n", kinds_table(results.noise)]
    if results.margins:
        parts += ["## Margins and the harm of noise\n", sensitivity_table(results)]
        if heads := heads_table(results.margins):
            parts += ["## Margins of the first layer, margin less ce, paired by seed\n", heads]
    parts += ["## Setting\n", "```\n" + results.setting.strip() + "\n```\n"]
    write_text(folder / "table.md", "\n".join(parts))
    return [folder / "table.md"]


def paper_table(results: Results) -> str:
    """Write what the paper reports of its Figs 7.4 and 7.5, beside the same here."""
    noise, (ce, margin) = results.noise, PAPER
    whole = [
        {
            int(row["seed"]): float(row["validation_bpc"])
            for row in results.runs
            if (row["method"], row["setting"]) == name
        }
        for name in PAPER
    ]
    rows = [
        ("ce, clean BPC", "2.122", shown(interval(whole[0].values()), 3)),
        ("margin, clean BPC", "2.158", shown(interval(whole[1].values()), 3)),
        ("margin, clean cost", "+1.7 %", _percent(paired_cost(whole[1], whole[0]))),
    ]
    for unit, level in _POINTS:
        found = [
            by_seed(noise, "degradation", *name, unit=unit, level=level) for name in (ce, margin)
        ]
        paper = ("2.58", "2.46", f"{_MINUS}0.12") if unit == "absolute" else (_MISSING,) * 3
        of_both = [shown(interval(values.values()), 3) for values in found]
        difference = shown(paired_difference(found[1], found[0]), 3, signed=True)
        at = f"degradation at {_noise(unit, level)}"
        rows += [
            (f"ce, {at}", paper[0], of_both[0]),
            (f"margin, {at}", paper[1], of_both[1]),
            (f"margin less ce, {at}", paper[2], difference),
        ]
    sizes = {
        name: interval(
            row["embedding_rms"] for row in results.runs if (row["method"], row["setting"]) == name
        )
        for name in PAPER
    }
    rows += [(f"{name[0]}, embedding RMS", _MISSING, shown(sizes[name], 4)) for name in PAPER]
    seeds = interval(whole[1].values()).seeds
    return markdown_table(("what", "paper", f"here, {seeds} seeds"), rows)


def methods_table(noise: Sequence[Row]) -> str:
    """Write every method at its tuned setting: clean BPC, cost, and degradation under noise."""
    labels, tuned = read_labels(), tuned_settings(noise, range(TUNING_SEEDS))
    # In the order of methods.toml, and the rest after it.
    order = [method for method in [*labels, *sorted(tuned.keys() - labels)] if method in tuned]
    return _of_settings(noise, [REFERENCE, *((method, tuned[method]) for method in order)])


def curves_table(noise: Sequence[Row]) -> str:
    """Write the same of every setting that has every seed, of methods with several."""
    curves = curves_of(noise)
    order = [method for method in [*read_labels(), *sorted(curves)] if method in curves]
    return _of_settings(
        noise, [REFERENCE, *((method, name) for method in order for name in curves[method])]
    )


def pairs_table(
    noise: Sequence[Row], pairs: Sequence[tuple[tuple[str, str], tuple[str, str]]]
) -> str:
    """Write one setting less another: clean cost in points of per cent, and degradation."""
    clean, rows = by_seed(noise, "bpc", *REFERENCE), []
    for pair in pairs:
        costs = [
            {seed: 100 * (bpc / clean[seed] - 1) for seed, bpc in found.items() if seed in clean}
            for found in (by_seed(noise, "bpc", *name) for name in pair)
        ]
        cells = [shown(paired_difference(*costs), 1, signed=True)]
        for unit, level in _POINTS:
            found = [by_seed(noise, "degradation", *n, unit=unit, level=level) for n in pair]
            cells.append(shown(paired_difference(*found), 3, signed=True))
        names = (", ".join(_named(*name)) for name in pair)
        rows.append((" less ".join(names), *cells))
    heads = ("what", "clean cost, points", *(f"at {_noise(*point)}" for point in _POINTS))
    return markdown_table(heads, rows)


def further_tables(noise: Sequence[Row], further: Sequence[Row]) -> list[str]:
    """Write settings that were run with further seeds: with these alone, and with all."""
    names = [(method, name) for method, found in settings_of(further).items() for name in found]
    return [_of_settings(rows, [REFERENCE, *names]) for rows in (further, [*noise, *further])]


def _named(method: str, setting: str) -> tuple[str, str]:
    return read_labels().get(method, method), setting.replace("_", " ")


def _of_settings(noise: Sequence[Row], settings: Sequence[tuple[str, str]]) -> str:
    clean = by_seed(noise, "bpc", *REFERENCE)
    at_half = by_seed(noise, "degradation", *REFERENCE, level=0.5)
    rows = []
    for method, setting in dict.fromkeys(settings):
        bpc = by_seed(noise, "bpc", method, setting)
        worse = [
            interval(
                by_seed(noise, "degradation", method, setting, unit=unit, level=level).values()
            )
            for unit, level in _POINTS
        ]
        is_reference = (method, setting) == REFERENCE
        cost = "" if is_reference else _percent(paired_cost(bpc, clean))
        found = by_seed(noise, "degradation", method, setting, level=0.5)
        excess = interval(
            (found[seed] - 1) / (at_half[seed] - 1) for seed in found.keys() & at_half
        )
        cells = (*(shown(each, 3) for each in worse), "" if is_reference else shown(excess, 3))
        name = (*_named(method, setting), str(len(bpc)))
        rows.append((*name, shown(interval(bpc.values()), 3), cost, *cells))
    heads = ("method", "setting", "seeds", "clean BPC", "cost over ce")
    noises = (f"at {_noise(*point)}" for point in _POINTS)
    return markdown_table((*heads, *noises, "excess at 0.5 RMS, of ce's"), rows)


def kinds_table(noise: Sequence[Row]) -> str:
    """Write the degradation of the tuned settings under every other kind of noise."""
    labels, tuned = read_labels(), tuned_settings(noise, range(TUNING_SEEDS))
    points = sorted(
        {
            (str(row["kind"]), str(row["unit"]), float(row["level"]))
            for row in noise
            if row["kind"] != "gaussian" and row["level"] > 0
        }
    )
    rows = []
    for kind, unit, level in points:
        at = {"kind": kind, "unit": unit, "level": level}
        worse = (
            interval(by_seed(noise, "degradation", method, setting, **at).values())
            for method, setting in tuned.items()
        )
        rows.append((kind, _noise(unit, level), *(shown(each, 3) for each in worse)))
    return markdown_table(("noise", "level", *(labels.get(each, each) for each in tuned)), rows)


def sensitivity_table(results: Results) -> str:
    """Write margins after training, and how they compare with the harm of noise; no heads."""
    labels = read_labels()
    figures = {
        "smallest margin": (results.margins, "smallest", {}, 1),
        "median margin": (results.margins, "median", {}, 1),
        "positions of negative margin, %": (results.margins, "negative", {}, 100),
    }
    for statistic, described in {
        "margin": "rank correlation of margin and increase of the loss",
        "embedding_margin": "rank correlation of first-order embedding margin and increase of "
        "the loss",
        "support": "increase at support tokens less that elsewhere, nats",
    }.items():
        for within, among in {"text": "", "token": ", among tokens of one symbol"}.items():
            where = {"statistic": statistic, "within": within}
            figures[described + among] = (results.comparisons, "estimate", where, 1)
    columns = [
        name for name in of_stages(results.margins, "median") if not name[2].startswith("layer")
    ]
    rows = []
    for described, (table, column, where, unit) in figures.items():
        found = of_stages(table, column, **where)
        scaled = (
            Interval(unit * found[name].mean, unit * found[name].half_width, found[name].seeds)
            for name in columns
        )
        rows.append((described, *(shown(each, 2 if unit > 1 else 3) for each in scaled)))
    heads = (f"{labels.get(method, method)}, {stage}" for method, _, stage in columns)
    return markdown_table(("what", *heads), rows)


def heads_table(margins: Sequence[Row]) -> str:
    """Write what the barrier does to margins of the first layer's heads, apart from it."""

    def of_head(method: str, setting: str, stage: str, column: str, unit: int) -> dict[int, float]:
        wanted = (method, setting, stage)
        return {
            int(row["seed"]): unit * float(row[column])
            for row in margins
            if (row["method"], row["setting"], row["stage"]) == wanted
        }

    ce, margin = PAPER
    figures = {
        "smallest margin": ("smallest", 1),
        "median margin": ("median", 1),
        "positions of negative margin, %": ("negative", 100),
    }
    stages = list(dict.fromkeys(str(row["stage"]) for row in margins))
    heads = [stage for stage in stages if stage.startswith("layer")]
    rows = []
    for described, figure in figures.items():
        found = (
            paired_difference(of_head(*margin, head, *figure), of_head(*ce, head, *figure))
            for head in heads
        )
        digits = 2 if figure[1] > 1 else 3
        rows.append((described, *(shown(each, digits, signed=True) for each in found)))
    return markdown_table(("what", *heads), rows) if heads else ""


def _noise(unit: str, level: float) -> str:
    return {"absolute": f"sigma {level:g}", "relative": f"{level:g} RMS"}.get(unit, f"{level:g}")


def _percent(found: Interval) -> str:
    """Return a cost with its unit between the mean and the interval."""
    return shown(found, 1, signed=True, unit=" %")
