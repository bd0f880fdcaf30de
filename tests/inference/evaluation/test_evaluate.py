"""Evaluation: bits per character, noise, margins, and what is left in the run."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from probattn import certificate, log_det, stability_margin
from probattn.inference import evaluate, text_margins
from probattn.inference.evaluation.attention_stages import StageMargins
from probattn.inference.evaluation.evaluate import _summary
from probattn.inference.evaluation.intervals import ratio
from probattn.inference.evaluation.perturbations import Ascent, Substitution
from probattn.inference.evaluation.scoring import Scorer
from tests.support.tiny_run import (
    BLOCK,
    LABELS,
    all_logits,
    copy_of,
    embedded,
    files_of,
    fold,
    held_by_another_process,
    log_softmax,
    logits_after,
    stage_arguments,
    tiny_text,
)

VALIDATION = tiny_text()[3600:]


@pytest.fixture(scope="module")
def evaluated(tiny_run, tmp_path_factory):
    """A copy of the run that has infeasible positions, with its evaluation."""
    run = copy_of(tiny_run, tmp_path_factory.mktemp("evaluated") / "run")
    fold(run)
    return run, evaluate(run, noise_absolute=(0.5, 0.1), noise_relative=(0, 0.25, 2))


def windows_of(run, text=VALIDATION):
    """Tokens of the text in windows that fill it exactly."""
    return run.vocabulary.encode(text).reshape(-1, BLOCK)


# Bits per character and noise


def test_bpc_is_that_of_predicting_each_character_once(evaluated):
    run, result = evaluated
    tokens = run.vocabulary.encode(VALIDATION)
    losses = {}
    for start in [*range(0, len(tokens) - 1 - BLOCK, BLOCK), len(tokens) - 1 - BLOCK]:
        predicted = log_softmax(all_logits(run, tokens[start : start + BLOCK]))
        for offset, target in enumerate(tokens[start + 1 : start + 1 + BLOCK]):
            losses.setdefault(start + 1 + offset, -predicted[offset, target])
    assert result.tokens == len(losses) == len(VALIDATION) - 1
    assert result.cross_entropy == pytest.approx(np.mean(list(losses.values())), rel=1e-9)
    assert result.bpc == pytest.approx(result.cross_entropy / math.log(2), rel=1e-12)


def test_clean_losses_are_those_of_the_fit_and_of_a_scorer(evaluated):
    run, result = evaluated
    fit = run.summary()["fit"]
    scorer = Scorer(run.network, run.vocabulary, run.vocabulary.encode(VALIDATION))
    score = scorer.score(run.parameters)
    assert result.bpc == fit["validation_bpc"] == score.bpc
    assert result.cross_entropy == fit["validation_cross_entropy"] == score.cross_entropy
    assert result.text == "validation text of corpus.txt"


def test_embedding_rms_is_that_of_what_enters_the_stack(evaluated):
    run, result = evaluated
    # Every token but the last is an input, once: the one that two windows share counts in one.
    tokens = run.vocabulary.encode(VALIDATION)[:-1]
    x = embedded(run, tokens[: BLOCK * 49].reshape(-1, BLOCK)), embedded(run, tokens[-BLOCK:])[1:]
    rms = np.sqrt(np.mean(np.concatenate([part.ravel() for part in x]) ** 2))
    assert result.embedding_rms == pytest.approx(rms, rel=1e-9)


def test_noise_levels_are_absolute_and_multiples_of_the_rms(evaluated):
    _, result = evaluated  # asked for without 0 and in another order
    assert [point.sigma for point in result.noise_absolute] == [0, 0.1, 0.5]
    assert [point.relative for point in result.noise_relative] == pytest.approx([0, 0.25, 2])
    for point in (*result.noise_absolute, *result.noise_relative):
        assert point.sigma == pytest.approx(point.relative * result.embedding_rms)
        assert point.degradation == pytest.approx(point.bpc / result.bpc)


def test_noise_zero_degrades_nothing_and_more_noise_degrades_more(evaluated):
    _, result = evaluated
    for points in (result.noise_absolute, result.noise_relative):
        assert points[0].degradation == 1.0
        assert points[0].bpc == result.bpc
        assert 1.0 < points[1].degradation < points[2].degradation


def test_noise_is_one_draw_scaled(evaluated, tmp_path):
    run, result = evaluated
    copy = copy_of(run, tmp_path / "run")
    level = result.noise_relative[1].sigma
    again = evaluate(copy, noise_absolute=(level,), noise_relative=())
    other = evaluate(copy, noise_absolute=(level,), noise_relative=(), seed=1)
    assert again.noise_absolute[1].bpc == result.noise_relative[1].bpc
    assert other.noise_absolute[1].bpc != result.noise_relative[1].bpc


# Other kinds of noise

KINDS = ("ascent-1", "gaussian", "uniform", "ascent-10", "substitution")


@pytest.fixture(scope="module")
def all_kinds(tiny_run, tmp_path_factory):
    """An evaluation under noise of every kind, worst-case directions in 10 windows."""
    run = copy_of(tiny_run, tmp_path_factory.mktemp("kinds") / "run")
    return run, evaluate(
        run,
        noise_absolute=(0.1,),
        noise_relative=(1.0,),
        noise_kinds=KINDS,
        substituted=(0.3, 0.1),
        ascent_tokens=10 * BLOCK,
    )


def by_kind(points):
    found = {}
    for point in points:
        found.setdefault(point.kind, []).append(point)
    return found


@pytest.mark.slow
def test_every_kind_has_its_levels_from_none_on(all_kinds):
    _, result = all_kinds
    for points, level in ((result.noise_absolute, 0.1), (result.noise_relative, 1.0)):
        found = by_kind(points)
        assert list(found) == [kind for kind in KINDS if kind != "substitution"]
        for none, some in found.values():
            assert (none.sigma, none.relative, none.degradation) == (0, 0, 1)
            assert none.degradation_low == pytest.approx(1) == none.degradation_high
            assert level == pytest.approx(some.sigma if level == 0.1 else some.relative)
            assert some.sigma == pytest.approx(some.relative * result.embedding_rms)
            assert some.probability is None
            assert 1 < some.degradation_low < some.degradation < some.degradation_high
    assert [point.probability for point in result.noise_substituted] == [0, 0.1, 0.3]
    assert {point.sigma for point in result.noise_substituted} == {None}
    degradations = [point.degradation for point in result.noise_substituted]
    assert degradations == sorted(degradations)


@pytest.mark.slow
def test_gaussian_noise_is_what_it_is_without_other_kinds(all_kinds, tmp_path):
    run, result = all_kinds
    alone = evaluate(copy_of(run, tmp_path / "run"), noise_absolute=(0.1,), noise_relative=(1.0,))
    assert list(alone.noise_absolute) == by_kind(result.noise_absolute)["gaussian"]
    assert list(alone.noise_relative) == by_kind(result.noise_relative)["gaussian"]
    assert alone.noise_substituted == ()


def window_sums(run, noise):
    """Summed losses of windows by a network of its own, each token but the first counted once."""
    tokens = run.vocabulary.encode(VALIDATION)
    starts = [*range(0, 392, BLOCK), 391]
    inputs = np.stack([tokens[start : start + BLOCK] for start in starts])
    sums = []
    for start, x in zip(starts, embedded(run, inputs) + noise(inputs.shape), strict=True):
        losses = -log_softmax(logits_after(run, x))[
            np.arange(BLOCK), tokens[start + 1 : start + BLOCK + 1]
        ]
        sums.append(losses[start == 391 :].sum())
    return np.array(sums)


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_degradation_is_recomputed_with_its_interval(all_kinds, kind):
    run, result = all_kinds
    key = jax.random.key(0)
    edge = math.sqrt(3)

    def noise(shape):
        # The draws of two calls of 32 windows, the second filled up.
        parts = []
        for call in (0, 1):
            of_call = jax.random.fold_in(key, call), (32, *shape[1:], 8)
            parts.append(
                jax.random.normal(*of_call)
                if kind == "gaussian"
                else jax.random.uniform(*of_call, minval=-edge, maxval=edge)
            )
        return 0.1 * np.concatenate(parts)[: shape[0]]

    noisy, clean = window_sums(run, noise), window_sums(run, lambda shape: 0.0)
    point = by_kind(result.noise_absolute)[kind][1]
    assert point.degradation == pytest.approx(noisy.sum() / clean.sum(), rel=1e-9)
    expected = ratio(noisy, clean)
    ends = point.degradation_low, point.degradation_high
    assert ends == pytest.approx((expected.low, expected.high), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 10])
def test_worst_cases_are_of_windows_spread_over_the_text(all_kinds, steps):
    run, result = all_kinds
    scorer = Scorer(
        run.network,
        run.vocabulary,
        run.vocabulary.encode(VALIDATION),
        most_tokens=10 * BLOCK,
    )
    point = by_kind(result.noise_relative)[f"ascent-{steps}"][1]
    noisy = scorer.score(run.parameters, Ascent(point.sigma, steps))
    clean = scorer.score(run.parameters)
    assert clean.bpc != result.bpc
    assert point.bpc == pytest.approx(noisy.bpc, rel=1e-12)
    assert point.degradation == pytest.approx(noisy.bpc / clean.bpc, rel=1e-12)
    assert point.degradation > by_kind(result.noise_relative)["gaussian"][1].degradation


def test_substitutes_have_the_frequencies_of_the_training_text(all_kinds):
    run, result = all_kinds
    train = tiny_text()[:3600]
    frequencies = np.array(
        [train.count(run.vocabulary.decode([symbol])) for symbol in range(run.vocabulary.size)]
    )
    scorer = Scorer(run.network, run.vocabulary, run.vocabulary.encode(VALIDATION))
    disturbed = Substitution(0.3, frequencies / frequencies.sum())
    expected = scorer.score(run.parameters, disturbed, rng_key=jax.random.key(0))
    assert result.noise_substituted[2].bpc == pytest.approx(expected.bpc, rel=1e-12)


def test_summary_holds_every_point(all_kinds):
    run, result = all_kinds
    stored = json.loads((run.path / "summary.json").read_text())["evaluate"]
    for name in ("noise_absolute", "noise_relative", "noise_substituted"):
        assert stored[name] == [dataclasses.asdict(point) for point in getattr(result, name)]


# Margins


def folded(x, w_query, w_key):
    """Where R_t has a real eigenvalue <= 0, position by position."""
    rank, found = w_query.shape[1], []
    for t in range(2, len(x)):
        queries, keys = x[:t] @ w_query, x[:t] @ w_key
        weights = np.exp(log_softmax(keys @ (x[t] @ w_query) / np.sqrt(rank)))
        centred = (queries - weights @ queries).T * weights @ (keys - weights @ keys)
        values = np.linalg.eigvals(np.eye(rank) - centred / np.sqrt(rank))
        found.append(any(abs(value.imag) == 0 and value.real <= 0 for value in values))
    return found


@jax.jit
def quantities(*stage):
    return stability_margin(*stage), *log_det(*stage), certificate(*stage)


@pytest.mark.parametrize(
    "label",
    [pytest.param(x, marks=[pytest.mark.slow] * (x == "layer 1 head 1")) for x in LABELS],
)
def test_margins_are_those_of_every_window(evaluated, label):
    run, result = evaluated
    summary = next(summary for summary in result.margins if summary.label == label)
    x, w_query, w_key = stage_arguments(run, windows_of(run))[label]
    margin, sign, log_abs, rho = (np.asarray(part)[:, 2:] for part in quantities(x, w_query, w_key))
    assert summary.kind == "sigma_min"
    assert summary.positions == margin.size == len(VALIDATION) * (BLOCK - 2) // BLOCK
    ordered = np.sort(margin, axis=None)
    assert summary.quantiles[0.0] == pytest.approx(ordered[0], abs=1e-9)
    for level, quantile in summary.quantiles.items():
        place = level * (margin.size - 1)
        between = ordered[math.floor(place)], ordered[math.ceil(place)]
        assert between[0] - 1e-9 <= quantile <= between[1] + 1e-9
    assert summary.mean_log_det == pytest.approx(log_abs[sign > 0].mean(), abs=1e-9)
    assert summary.certified_fraction == pytest.approx((rho < 1).mean())
    outside = [folded(sequence, w_query, w_key) for sequence in x]
    assert summary.infeasible_fraction == pytest.approx(np.mean(outside))


def test_margins_that_are_not_known_are_counted_and_leave_the_others():
    margin = np.array([[1, 1, 0.5, np.nan, -0.25], [1, 1, 0.75, 0.5, 0.5]])
    ones = np.ones_like(margin)
    found = StageMargins("stage", margin, ones, ones, ones, ~(margin > 0))
    everywhere = np.ones((2, 3), bool)
    summary = _summary(found, everywhere)
    assert (summary.unknown, summary.positions) == (1, 6)
    assert summary.quantiles[0.0] == -0.25
    assert summary.quantiles[0.5] == 0.5
    assert summary.infeasible_fraction == pytest.approx(2 / 6)
    assert _summary(dataclasses.replace(found, margin=ones), everywhere).unknown == 0
    unknown = _summary(dataclasses.replace(found, margin=np.nan * ones), everywhere)
    assert math.isnan(unknown.quantiles[0.0])


def test_positions_that_windows_share_count_once(own_run, tmp_path):
    """Two windows of a block read a text that is longer than a block by two tokens."""
    text = tmp_path / "text.txt"
    text.write_text(tiny_text()[: BLOCK + 2], encoding="utf-8")
    margins = text_margins(own_run, text, stride=BLOCK)
    found = evaluate(own_run, text, noise_absolute=(), noise_relative=(), noise_kinds=())
    for stage, summary in zip(margins.stages, found.margins, strict=True):
        of_text = stage.margin[margins.position >= 2]
        assert summary.positions == of_text.size == BLOCK
        for level, quantile in summary.quantiles.items():
            assert quantile == pytest.approx(np.quantile(of_text, level), abs=1e-6)


def test_every_stage_is_there_and_the_folded_one_is_seen_to_be(evaluated):
    _, result = evaluated
    assert [summary.label for summary in result.margins] == LABELS
    by_label = {summary.label: summary for summary in result.margins}
    post_hoc = by_label["post hoc"]
    assert 0 < post_hoc.infeasible_fraction < 1
    assert 0 < post_hoc.certified_fraction < 1
    assert post_hoc.quantiles[0.0] < 0
    assert by_label["trained"].infeasible_fraction == 0


# The text


def test_a_file_is_evaluated_as_the_same_text_of_the_corpus_is(evaluated, tmp_path):
    run, result = evaluated
    copy, text = copy_of(run, tmp_path / "run"), tmp_path / "held out.txt"
    text.write_text(VALIDATION, encoding="utf-8")
    found = evaluate(copy, text=text, noise_absolute=(0, 0.1, 0.5), noise_relative=(0, 0.25, 2))
    assert found == dataclasses.replace(result, text="held out.txt")


@pytest.mark.slow
def test_a_text_shorter_than_a_block_has_one_window(own_run, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("the to", encoding="utf-8")
    result = evaluate(own_run, text=text, noise_absolute=(), noise_relative=())
    tokens = own_run.vocabulary.encode("the to")
    predicted = log_softmax(all_logits(own_run, tokens[:-1]))
    expected = -predicted[np.arange(5), tokens[1:]].mean()
    assert result.cross_entropy == pytest.approx(expected, rel=1e-9)
    assert [summary.positions for summary in result.margins] == [4] * 4


# What it leaves in the run


def test_summary_keeps_the_fit_and_holds_the_result(evaluated):
    run, result = evaluated

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    stored = json.loads((run.path / "summary.json").read_text(), parse_constant=refuse)
    assert stored["fit"]["steps"] == run.config.fit.steps
    evaluation = stored["evaluate"]
    assert evaluation["bpc"] == result.bpc
    assert evaluation["noise_relative"] == [
        dataclasses.asdict(point) for point in result.noise_relative
    ]
    for written, summary in zip(evaluation["margins"], result.margins, strict=True):
        assert written["label"] == summary.label
        assert {float(q): v for q, v in written["quantiles"].items()} == summary.quantiles


def test_what_json_cannot_hold_becomes_null(own_run):
    result = evaluate(own_run, noise_absolute=(1e308,), noise_relative=())
    assert not math.isfinite(result.noise_absolute[1].bpc)
    text = (own_run.path / "summary.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["evaluate"]["noise_absolute"][1]["bpc"] is None


BAD = {
    "a seed too large": ({"seed": 2**70}, "seed: got 1180591620717411303424, expected"),
    "negative absolute noise": ({"noise_absolute": (0.1, -0.5)}, "noise_absolute: got -0.5, exp"),
    "infinite relative noise": ({"noise_relative": (math.inf,)}, "noise_relative: got inf, expec"),
    "noise that is no number": ({"noise_absolute": (math.nan,)}, "noise_absolute: got nan, expec"),
    "an unknown kind": ({"noise_kinds": ("salt",)}, "noise_kinds: got 'salt', expected one of gau"),
    "a probability above 1": ({"substituted": (1.5,)}, "substituted: got 1.5, expected probabilit"),
    "no tokens to ascend": ({"ascent_tokens": 0}, "ascent_tokens: got 0, expected an integer >= 1"),
    "no such file": ({"text": "nowhere.txt"}, "nowhere.txt': no such file"),
    "a folder of other files": ({"text": "."}, "not UTF-8: byte"),
    "an empty file": ({"text": ""}, "got an empty file"),
    "one character": ({"text": "t"}, "text.txt: has 1 tokens: expected at least 2"),
    "no UTF-8": ({"text": b"the \xff"}, "not UTF-8: byte 0xff at offset 4"),
    "an unknown character": (
        {"text": "the tokén é"},
        "text.txt: unknown character 'é' (U+00E9) at position 7 ",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_leaves_the_run_as_it_was(
    own_run,
    tmp_path,
    monkeypatch,
    case,
):
    monkeypatch.chdir(tmp_path)
    (own_run.path / "post_hoc_prior.npz").unlink()  # would be fitted, were the input good
    options, message = BAD[case]
    text = options.get("text")
    if text is not None and text not in (".", "nowhere.txt"):
        path = tmp_path / "text.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        options = {"text": path}
    before = files_of(own_run.path)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the message is compared below)
        evaluate(own_run, **options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert files_of(own_run.path) == before


def test_a_run_that_another_process_writes_to_is_left_alone(own_run):
    before = files_of(own_run.path)
    with (
        held_by_another_process(own_run),
        pytest.raises(ValueError, match="another process is writing"),
    ):
        evaluate(own_run, noise_absolute=(), noise_relative=())
    assert files_of(own_run.path) == before
