"""Loss and margins token by token, and what is concluded from them."""

import csv

import numpy as np
import pytest
from scipy import stats

from probattn.inference import sensitivity, text_margins
from probattn.inference.evaluation.intervals import ratio
from probattn.inference.evaluation.margin_comparisons import (
    compare_with_margins,
    increase_by_margin,
    support_characters,
)
from probattn.inference.evaluation.token_margins import TokenMargins
from probattn.inference.figures.report import sensitivity_report
from tests.support.tiny_run import (
    BLOCK,
    HEADS,
    LABELS,
    MODEL,
    all_logits,
    copy_of,
    files_of,
    log_softmax,
    tiny_text,
)

VALIDATION = tiny_text()[3600:]
WITHIN = ["text", "position", "token", "loss"]


@pytest.fixture(scope="module")
def found(tiny_run):
    return sensitivity(tiny_run, level=1.0, draws=3)


@pytest.fixture(scope="module")
def inner(found):
    return found.position >= 2


def test_there_is_a_row_for_every_token_that_has_one_after_it(found):
    assert "".join(found.tokens) == VALIDATION[:-1]
    assert list(found.index) == list(range(399))
    assert list(found.window[:-7]) == [index // BLOCK for index in range(392)]
    assert list(found.position[:-7]) == [index % BLOCK for index in range(392)]
    # The last window is moved back by one token, which the window before it has.
    assert list(found.position[-7:]) == list(range(1, BLOCK))


def test_the_loss_at_a_token_is_that_of_the_token_after_it(tiny_run, found):
    tokens = tiny_run.vocabulary.encode(VALIDATION)
    for start in (0, 5 * BLOCK):
        predicted = log_softmax(all_logits(tiny_run, tokens[start : start + BLOCK]))
        expected = -predicted[np.arange(BLOCK), tokens[start + 1 : start + 1 + BLOCK]]
        np.testing.assert_allclose(found.loss[start : start + BLOCK], expected, rtol=1e-9)
    assert np.mean(found.noisy_loss - found.loss) > 0.1


def test_margins_are_those_of_the_token_in_its_window(tiny_run, found):
    margins = text_margins(tiny_run, stride=BLOCK)
    assert [stage.label for stage in found.stages] == LABELS
    for stage, expected in zip(found.stages, margins.stages, strict=True):
        for name in ("margin", "log_det", "certificate", "support"):
            # Up to the last window, which ends with the text's last token or the one before it.
            got = getattr(stage, name)[:392]
            np.testing.assert_allclose(got, getattr(expected, name)[:392], atol=1e-9)


@pytest.mark.slow
def test_draws_are_averaged_and_more_noise_does_more(tiny_run, found):
    less = sensitivity(tiny_run, level=0.1, draws=3)
    assert less.loss.tolist() == found.loss.tolist()
    assert less.noisy_loss.mean() < found.noisy_loss.mean()
    # The spread between two seeds falls with the draws that are averaged.
    spread = {
        draws: np.std(
            np.subtract(
                *(
                    sensitivity(
                        tiny_run, level=1.0, draws=draws, seed=seed, most_tokens=160
                    ).noisy_loss
                    for seed in (1, 2)
                )
            )
        )
        for draws in (1, 16)
    }
    assert 2 < spread[1] / spread[16] < 8


# What is concluded


def estimates(comparisons, statistic, within="text"):
    return {
        each.stage: each.estimate
        for each in comparisons
        if (each.statistic, each.within) == (statistic, within)
    }


def test_comparisons_are_scipys_correlations_and_differences_of_means(found, inner):
    assert len(found.comparisons) == len(LABELS) * 3 * len(WITHIN)
    increase = (found.noisy_loss - found.loss)[inner]
    for stage in found.stages:
        for name in ("margin", "embedding_margin"):
            expected = stats.spearmanr(increase, getattr(stage, name)[inner]).statistic
            got = estimates(found.comparisons, name)[stage.label]
            assert got.value == pytest.approx(expected, abs=1e-9)
            assert got.low < got.value < got.high
        support = stage.support[inner]
        expected = increase[support].mean() - increase[~support].mean()
        got = estimates(found.comparisons, "support")[stage.label]
        assert got.value == pytest.approx(expected, abs=1e-9)
        assert got.low < got.value < got.high


def planted(seed=0, windows=200, *, share, of_margin=0.0):
    """Increases and margins that have nothing in common but what the tokens of a group share.

    Unless `of_margin` says that the increase falls with the margin.
    """
    rng = np.random.default_rng(seed)
    window, position = (each.ravel() for each in np.indices((windows, BLOCK)))
    symbols = rng.integers(0, 9, len(window))
    loss = rng.gamma(2, 1, len(window))
    common = {
        "position": position,
        "token": symbols % 3 - symbols % 2,
        "loss": loss,
        "none": np.zeros(len(window)),
    }[share]
    margin = common + rng.normal(size=len(window))
    increase = common + rng.normal(size=len(window)) - of_margin * margin
    support = np.zeros((windows, BLOCK), bool)
    weakest = 2 + margin.reshape(windows, BLOCK)[:, 2:].argmin(1)
    support[np.arange(windows), weakest] = True
    ones = np.ones(len(window))
    stage = TokenMargins("planted", margin, ones, margin**3, ones, support.ravel())
    return compare_with_margins(loss, loss + increase, [stage], symbols, window, position, seed=1)


@pytest.mark.parametrize("share", ["position", "token", "loss"])
def test_what_tokens_have_in_common_is_no_effect_of_the_margin_among_them(share):
    compared = planted(share=share)
    for statistic, sign in (("margin", 1), ("embedding_margin", 1), ("support", -1)):
        alike, all_tokens = (
            estimates(compared, statistic, within)["planted"] for within in (share, "text")
        )
        assert min(sign * all_tokens.low, sign * all_tokens.high) > 0.1
        # Within a twentieth by loss a little of what the loss explains is left.
        assert abs(alike.value) < (0.05 if statistic != "support" else 0.2)
        assert alike.high - alike.low < 0.5


def test_an_effect_of_the_margin_is_found_among_any_tokens():
    compared = planted(share="none", of_margin=1.0)
    for within in WITHIN:
        for statistic in ("margin", "embedding_margin"):
            estimate = estimates(compared, statistic, within)["planted"]
            assert -0.8 < estimate.low < estimate.high < -0.6  # of normal numbers: -0.69
        assert estimates(compared, "support", within)["planted"].low > 0.5


@pytest.mark.parametrize("seeds", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_where_there_is_no_effect_19_of_20_intervals_hold_zero(seeds):
    covered = [
        estimate.low <= 0 <= estimate.high
        for seed in range(seeds)
        for compared in [planted(seed, windows=40, share="none")]
        for statistic in ("margin", "support")
        for estimate in estimates(compared, statistic).values()
    ]
    assert stats.binomtest(sum(covered), len(covered), 0.95).pvalue > 1e-3


def test_a_margin_that_is_not_known_counts_for_nothing():
    """The other tokens keep their comparisons, and so do the other stages."""
    rng = np.random.default_rng(0)
    window, position = (each.ravel() for each in np.indices((20, BLOCK)))
    zeros, ones = np.zeros(len(window)), np.ones(len(window))
    increase, margin = rng.normal(size=(2, len(window)))
    lost = (rng.random(len(window)) < 0.1) & (position >= 2)
    support = position == 2
    stages = [
        TokenMargins(label, values, ones, values**3, ones, support)
        for label, values in (("some", np.where(lost, np.nan, margin)), ("all", margin))
    ]
    found = compare_with_margins(zeros, increase, stages, position, window, position, seed=0)
    for label, kept in (("some", ~lost & (position >= 2)), ("all", position >= 2)):
        expected = stats.spearmanr(increase[kept], margin[kept]).statistic
        for name in ("margin", "embedding_margin"):
            estimate = estimates(found, name)[label]
            assert estimate.value == pytest.approx(expected, abs=1e-9)
            assert estimate.low < estimate.value < estimate.high

    groups = increase_by_margin(increase, stages[0].margin, window, position)
    kept = ~lost & (position >= 2)
    smallest = np.argsort(margin[kept])[: kept.sum() // 10]
    assert groups[0, 0] == pytest.approx(increase[kept][smallest].mean(), abs=1e-9)
    assert np.isfinite(groups).all()


def test_margins_that_do_not_vary_have_no_correlation():
    """As of a repulsive or a vanishing coupling, where every margin is 1."""
    window, position = (each.ravel() for each in np.indices((4, BLOCK)))
    increase = np.random.default_rng(0).normal(size=len(window))
    ones = np.ones(len(window))
    stage = TokenMargins("s", ones, ones, np.inf * ones, ones, (position == 2) & (window > 2))
    found = compare_with_margins(0 * ones, increase, [stage], position, window, position, seed=0)
    assert np.isnan(estimates(found, "margin")["s"]).all()
    support = estimates(found, "support")["s"]
    assert np.isfinite(support.value)
    assert np.isnan([support.low, support.high]).all()  # in one window of four, often not drawn


def test_groups_by_margin_are_tenths_with_the_mean_increase_of_each():
    rng = np.random.default_rng(0)
    window, position = (each.ravel() for each in np.indices((50, BLOCK)))
    margin = rng.permutation(len(window)).astype(float)
    increase = 3 - margin / 100 + rng.normal(size=len(window)) / 10
    rows = increase_by_margin(increase, margin, window, position)
    assert rows.shape == (10, 3)
    inner = np.flatnonzero(position >= 2)
    ordered = inner[np.argsort(margin[inner])]
    for row, group in zip(rows, np.split(ordered, 10), strict=True):
        assert row[0] == pytest.approx(increase[group].mean())
        sums, counts = (
            np.bincount(window[group], each, minlength=50)
            for each in (increase[group], np.ones(len(group)))
        )
        assert tuple(row) == pytest.approx(ratio(sums, counts))


def test_equal_margins_are_in_one_group():
    window, position = (each.ravel() for each in np.indices((50, BLOCK)))
    increase = np.random.default_rng(0).normal(size=len(window))
    rows = increase_by_margin(increase, np.ones(len(window)), window, position)
    assert np.isfinite(rows[:, 0]).sum() == 1
    assert np.nanmean(rows[:, 0]) == pytest.approx(increase[position >= 2].mean())


def test_support_characters_are_counted_against_their_frequency(found, inner):
    for stage in found.stages:
        rows = [each for each in found.characters if each.stage == stage.label]
        total = int(stage.support[inner].sum())
        assert sum(each.support for each in rows) == total
        symbols = np.array(found.tokens)[inner]
        for each in rows:
            chosen = symbols == each.token
            assert each.support == np.sum(chosen & stage.support[inner]) > 0
            assert each.positions == chosen.sum()
            assert each.base == pytest.approx(chosen.mean())
            assert each.share.value == pytest.approx(each.support / total)
            # Wilson: the shares whose own standard error reaches the one that was found.
            for end in each.share[1:]:
                error = np.sqrt(end * (1 - end) / total)
                assert abs(end - each.share.value) == pytest.approx(1.96 * error, rel=1e-3)
        assert [each.support for each in rows] == sorted(
            (each.support for each in rows), reverse=True
        )


def test_tokens_at_the_first_two_positions_count_for_no_share():
    ones, position = np.ones(6), np.array([0, 1, 2, 0, 1, 2])
    support = np.array([False, False, True, False, False, True])
    stage = TokenMargins("s", ones, ones, ones, ones, support)
    [row] = support_characters(stage, np.array([0, 0, 1, 0, 0, 1]), position, {1: "b"})
    assert (row.token, row.support, row.positions, row.base) == ("b", 2, 2, 1.0)


# Files


def read(path):
    with path.open(encoding="utf-8", newline="") as stream:
        header, *rows = csv.reader(stream)
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_tables_and_figure(found, tmp_path):
    paths = sensitivity_report(found, tmp_path / "out")
    names = [path.name for path in paths]
    assert names == [
        "sensitivity.csv",
        "sensitivity_comparisons.csv",
        "support_tokens.csv",
        "sensitivity.png",
    ]
    assert paths[-1].read_bytes().startswith(b"\x89PNG")
    rows = read(paths[0])
    assert "".join(row["token"] for row in rows) == VALIDATION[:-1]
    for name, values in (
        ("loss", found.loss),
        ("noisy_loss", found.noisy_loss),
        ("post_hoc_sigma_min", found.stages[0].margin),
        (f"layer_1_head_{HEADS}_support", found.stages[-1].support),
    ):
        np.testing.assert_allclose([float(row[name]) for row in rows], values, rtol=1e-6)
    compared = read(paths[1])
    assert [float(row["estimate"]) for row in compared] == pytest.approx(
        [each.estimate.value for each in found.comparisons], rel=1e-6
    )
    assert {row["within"] for row in compared} == set(WITHIN)
    assert {(row["noise"], row["level"]) for row in compared} == {("gaussian", "1")}
    assert [row["token"] for row in read(paths[2])] == [each.token for each in found.characters]


@pytest.mark.parametrize("kind", ["substitution", "ascent-1"])
def test_other_kinds_of_noise(tiny_run, kind):
    found = sensitivity(tiny_run, noise_kind=kind, level=0.3, most_tokens=20 * BLOCK)
    assert (found.kind, found.level) == (kind, 0.3)
    assert len(set(found.window)) == 20
    assert found.noisy_loss.mean() > found.loss.mean()


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_kind": "salt"}, "noise_kind: got 'salt', expected one of gaussian"),
        ({"level": -1.0}, "level: got -1.0, expected finite numbers >= 0"),
        ({"noise_kind": "substitution", "level": 1.5}, "level: got 1.5, expected probabil"),
        ({"draws": 0}, "draws: got 0, expected an integer >= 1"),
        ({"most_tokens": 0}, "most_tokens: got 0, expected an integer >= 1"),
        ({"seed": -1}, "seed: got -1, expected an integer from 0"),
        (
            {"most_tokens": BLOCK},
            "8 tokens in 1 window: expected at least 2 windows of 8 tokens, .*; raise most_tokens",
        ),
    ],
)
def test_bad_input_is_named_and_nothing_fitted(own_run, options, message):
    (own_run.path / "post_hoc_prior.npz").unlink()
    before = files_of(own_run.path)
    with pytest.raises(ValueError, match=message):
        sensitivity(own_run, **options)
    assert files_of(own_run.path) == before


def test_the_run_is_left_as_it_was(tiny_run, tmp_path):
    run = copy_of(tiny_run, tmp_path / "run")
    before = files_of(run.path)
    sensitivity(run, draws=1, most_tokens=10 * MODEL.block)
    assert files_of(run.path) == before
