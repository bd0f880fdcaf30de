"""Does a margin predict fragility: the statistics against SciPy, and the committed results."""

import numpy as np
import pytest
from scipy import stats

from tests.support.fragility_tables import FOLDER, table_of, tokens_of
from tests.support.project import ROOT, scripts_fixture

COMMITTED = sorted(path.parent for path in FOLDER.glob("results/**/tokens.csv.gz"))


scripts = scripts_fixture(FOLDER, ("questions", "associations", "summarise"))


def drawn(tokens=300, types=12, documents=7, seed=0):
    """Harms, predictors, documents and types, with ties and things that are not known."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, types, tokens)
    loss, entropy = rng.normal(size=(2, tokens)) + 0.3 * kind
    harm = loss + rng.normal(size=tokens) + 0.2 * kind
    lacking = np.where(rng.random(tokens) < 0.3, np.nan, rng.normal(size=tokens) - entropy)
    margin = np.round(0.5 * harm + rng.normal(size=tokens), 1)  # with ties
    margin[:5] = -np.inf
    predictors = {"loss": loss, "entropy": entropy, "margin": margin, "type_mean": kind * 2.0}
    predictors["place"] = harm + rng.normal(size=tokens)
    return {"harm": harm, "lacking": lacking}, predictors, np.arange(tokens) % documents, kind


def computed(scripts, resamples=20, **changes):
    harms, predictors, document, kind = drawn(**changes)
    controls = ("loss", "entropy")
    found = scripts["associations"].associations(
        harms,
        predictors,
        document,
        kind,
        rivals=controls,
        controls=controls,
        place="place",
        worst=0.05,
        resamples=resamples,
    )
    return harms, predictors, kind, {(each.harm, each.predictor): each for each in found}


def residuals(ranks, kind, controls):
    """What types and controls do not explain of ranks, by least squares."""
    dummies = (kind[:, None] == np.unique(kind)).astype(float)
    design = np.column_stack([dummies, *controls])
    return ranks - design @ np.linalg.lstsq(design, ranks)[0]


def test_statistics_are_those_of_scipy_and_of_least_squares(scripts):
    harms, predictors, kind, found = computed(scripts)
    assert len(found) == len(harms) * len(predictors)
    for (harm, predictor), each in found.items():
        known = ~np.isnan(harms[harm])
        y, x, types = harms[harm][known], predictors[predictor][known], kind[known]
        assert each.tokens == len(y)
        expected = stats.spearmanr(x, y).statistic
        assert each.rank_correlation.value == pytest.approx(expected, abs=1e-12)
        worst = y >= np.quantile(y, 0.95)
        u = stats.mannwhitneyu(x[worst], x[~worst]).statistic
        assert each.auc.value == pytest.approx(u / worst.sum() / (~worst).sum(), abs=1e-12)
        if predictor == "margin":
            ranked = [stats.rankdata(v[known]) for v in (predictors["loss"], predictors["entropy"])]
            left = [residuals(stats.rankdata(v), types, ranked) for v in (x, y)]
            expected = np.corrcoef(*left)[0, 1]
            assert each.partial.value == pytest.approx(expected, abs=1e-10)
            ranked.append(stats.rankdata(predictors["place"][known]))
            left = [residuals(stats.rankdata(v), types, ranked) for v in (x, y)]
            assert each.partial_placed.value == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-10)
            assert abs(each.partial_placed.value - expected) > 0.01
        else:  # a control, or the same at all tokens of a type
            assert np.isnan(each.partial.value) == (predictor != "place")
            assert np.isnan(each.partial_placed.value)
    best = max(abs(found["harm", name].rank_correlation.value) for name in ("loss", "entropy"))
    margin = found["harm", "margin"]
    assert margin.beyond.value == pytest.approx(abs(margin.rank_correlation.value) - best)
    assert np.isnan(found["harm", "loss"].beyond.value)


def test_ranks_within_a_type_leave_the_types_out(scripts):
    harms, predictors, kind, found = computed(scripts, types=2)
    inside = [np.empty(len(kind)) for _ in range(2)]
    for each in (0, 1):
        at = kind == each
        for of_all, values in zip(inside, (harms["harm"], predictors["margin"]), strict=True):
            of_all[at] = (stats.rankdata(values[at]) - (at.sum() + 1) / 2) / at.sum()
    expected = np.corrcoef(*inside)[0, 1]
    assert found["harm", "margin"].within_type.value == pytest.approx(expected, abs=1e-12)
    assert np.isnan(found["harm", "type_mean"].within_type.value)
    # Of a single type they are the ranks of all tokens.
    *_, found = computed(scripts, types=1)
    one = found["harm", "margin"]
    assert one.within_type.value == pytest.approx(one.rank_correlation.value, abs=1e-12)


def test_resamples_repeat_whole_documents(scripts):
    harms, predictors, document, kind = drawn()
    group = scripts["associations"]._Group(
        {"harm": harms["harm"]},
        predictors,
        document,
        kind,
        ("loss",),
        ("loss", "entropy"),
        (),
        0.05,
    )
    counts = np.array([2, 0, 1, 3, 0, 0, 1])
    found = group.statistic(counts[None])[:, 0].reshape(6, len(predictors))
    rows = np.repeat(np.arange(len(kind)), counts[document])
    y, x = harms["harm"][rows], predictors["margin"][rows]
    assert found[0, 2] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    worst = y >= np.quantile(harms["harm"], 0.95)
    u = stats.mannwhitneyu(x[worst], x[~worst]).statistic
    assert found[1, 2] == pytest.approx(u / worst.sum() / (~worst).sum(), abs=1e-12)
    ranked = [stats.rankdata(predictors[name][rows]) for name in ("loss", "entropy")]
    left = [residuals(stats.rankdata(v), kind[rows], ranked) for v in (x, y)]
    assert found[2, 2] == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-10)


def test_intervals_hold_what_is_there_in_most_texts(scripts):
    truth, inside = 6 / np.pi * np.arcsin(0.3 / 2), 0  # Spearman's of a normal pair
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=200)
        y = 0.3 * x + np.sqrt(1 - 0.3**2) * rng.normal(size=200)
        columns = {"loss": x, "entropy": rng.normal(size=200)}
        [found, _] = scripts["associations"].associations(
            {"harm": y},
            columns,
            np.arange(200) // 2,
            np.zeros(200, int),
            rivals=("entropy",),
            controls=("entropy",),
            worst=0.05,
            resamples=60,
            seed=seed,
        )
        inside += found.rank_correlation.low <= truth <= found.rank_correlation.high
    assert stats.binom.cdf(inside, 40, 0.92) > 1e-3
    assert inside < 40


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
@pytest.mark.slow
def test_the_committed_table_is_that_of_the_committed_tokens(scripts, folder):
    columns = tokens_of(folder / "tokens.csv.gz")
    committed = table_of(folder / "table.csv")
    found = scripts["summarise"].compute(columns, resamples=2)
    assert [(each.harm, each.predictor) for each in found] == list(committed)
    for each in found:
        row = committed[each.harm, each.predictor]
        for name in scripts["associations"].STATISTICS:
            expected = pytest.approx(float(row[name]), abs=1e-4, nan_ok=True)
            assert getattr(each, name).value == expected, (each.harm, each.predictor, name)
    check_intervals(columns, committed)
    permuted = [row for (_, predictor), row in committed.items() if predictor.startswith("permut")]
    assert permuted
    inside = [float(row["low"]) <= 0 <= float(row["high"]) for row in permuted]
    # One permutation serves all harms, whose intervals therefore miss zero together.
    assert np.mean(inside) > 0.5
    assert max(abs(float(row["rank_correlation"])) for row in permuted) < 0.1


def test_the_page_of_results_has_the_committed_numbers():
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    section = page.partition("## On a real model")[2].partition("\n## ")[0]
    answers = (FOLDER / "results/answers.md").read_text(encoding="utf-8")
    shown, committed = ([cells(line) for line in text.splitlines()] for text in (section, answers))
    shown = [row for row in shown if len(row) > 1][2:]
    assert len(shown) == len(committed) - 2 == 15
    for row, found in zip(shown, committed[2:], strict=True):
        rival = found[6].replace("token_constraint_bound", "Token Constraint Bound")
        assert row[1:] == [found[1], found[3], found[5], rival.replace("_", " ")], row[0]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def check_intervals(columns, committed):
    """Draw articles anew for some cells: percentiles of so few resamples vary by a sixth."""
    rng, documents = np.random.default_rng(1), np.unique(columns["document"])
    rows_of = [np.flatnonzero(columns["document"] == each) for each in documents]
    for predictor in ("sigma_min_worst", "entropy"):
        x, y = columns[predictor], columns["harm_noise_0.25"]
        resamples = []
        for _ in range(200):
            chosen = rng.integers(len(documents), size=len(documents))
            rows = np.concatenate([rows_of[each] for each in chosen])
            resamples.append(stats.spearmanr(x[rows], y[rows]).statistic)
        low, high = np.percentile(resamples, (2.5, 97.5))
        row = committed["noise_0.25", predictor]
        found = float(row["low"]), float(row["high"])
        np.testing.assert_allclose(found, (low, high), atol=0.3 * (high - low))
