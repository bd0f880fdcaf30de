"""Margins of every token of a text: windows, support tokens, and the table of them."""

import csv
import dataclasses
import errno
import os
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from probattn import certificate, certified_radius, embedding_margin, log_det, stability_margin
from probattn.inference import post_hoc_prior, text_margins
from probattn.inference.evaluation import attention_stages, token_margins
from probattn.inference.evaluation.attention_stages import stage_margins, stages
from probattn.inference.evaluation.token_margins import write_csv
from probattn.inference.export.site_values import site_values
from probattn.inference.fitting import monitor
from probattn.inference.runtime import memory, scratch
from probattn.inference.sampling.result import PosteriorResult
from probattn.models import ObjectiveConfig
from tests.support.tiny_run import (
    BLOCK,
    LABELS,
    RANK,
    WIDTH,
    all_logits,
    copy_of,
    files_of,
    fold,
    log_softmax,
    stage_arguments,
    store_prior,
    tiny_text,
)

VALIDATION = tiny_text()[3600:]
TEXT = "the \"so\"\n on, with\n \n\n and [/i] 'and' token"


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A copy of the run whose post-hoc prior folds some positions, so that log det is -inf."""
    copy = copy_of(tiny_run, tmp_path_factory.mktemp("margins") / "run")
    fold(copy)
    return copy


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "given.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def margins(run, text):
    return text_margins(run, text, stride=3)


STARTS = [*range(0, len(TEXT) - BLOCK, 3), len(TEXT) - BLOCK]


@pytest.fixture(scope="module")
def direct(run):
    """By label, every quantity at every position of every window, taken from the windows."""
    tokens = run.vocabulary.encode(TEXT)
    inputs = np.stack([tokens[start : start + BLOCK] for start in STARTS])
    found = {}
    for label, arguments in stage_arguments(run, inputs).items():
        found[label] = quantities(*arguments)
    return found


@partial(jax.jit, static_argnames="bound")
def quantities(x, w_query, w_key, bound=None):
    arguments = x, w_query, w_key
    sign, log_abs = log_det(*arguments, bound=bound)
    return {
        "margin": stability_margin(*arguments, bound=bound),
        "log_det": jnp.where(sign > 0, log_abs, -jnp.inf),
        "embedding_margin": embedding_margin(*arguments, bound=bound),
        "certificate": certificate(*arguments, bound=bound),
    }


def test_every_token_is_reported_once_from_the_first_window_that_holds_it(margins):
    assert margins.name == "given.txt"
    assert "".join(margins.tokens) == TEXT
    assert len(margins.tokens) == len(TEXT)
    assert list(margins.window_starts) == STARTS
    for index, (window, position) in enumerate(zip(margins.window, margins.position, strict=True)):
        first = next(n for n, start in enumerate(STARTS) if start <= index < start + BLOCK)
        assert (window, position) == (first, index - STARTS[first])


@pytest.mark.slow
def test_details_are_the_loss_and_the_past_by_hand(run, text):
    found = text_margins(run, text, stride=3, details=True)
    tokens = run.vocabulary.encode(TEXT)
    for index, (window, position) in enumerate(zip(found.window, found.position, strict=True)):
        inputs = tokens[STARTS[window] : STARTS[window] + BLOCK]
        if index + 1 < len(tokens):
            expected = -log_softmax(all_logits(run, inputs)[position])[tokens[index + 1]]
            assert found.loss[index] == pytest.approx(expected, rel=1e-4)
        arguments = stage_arguments(run, inputs[None])
        for stage in found.stages:
            x, w_query, w_key = (np.asarray(each, np.float64) for each in arguments[stage.label])
            x = x.reshape(BLOCK, WIDTH)
            scores = x[position] @ w_query @ (x[:position] @ w_key).T / np.sqrt(w_key.shape[1])
            attention = np.exp(log_softmax(scores)) if position else scores
            spread = attention * ((x[:position] - attention @ x[:position]) ** 2).sum(-1)
            shares = spread / spread.sum() if position > 1 else np.zeros(position)
            for past, whole in ((stage.covariance, shares), (stage.attention, attention)):
                behind, share = past.behind[index], past.share[index]
                kept = behind > 0
                if whole is shares and position and attention.max() > 0.999:
                    continue  # almost no covariance, of which 32 bits keep few digits
                assert set(position - np.flatnonzero(whole > 1e-4)) <= set(behind[kept])
                np.testing.assert_allclose(share[kept], whole[position - behind[kept]], atol=2e-5)
                assert (np.diff(share) <= 0).all()
                assert not share[~kept].any()
    assert np.isnan(found.loss[-1])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "probattn" / "scratch"


def test_parts_of_a_long_text_are_joined_in_files_without_a_name(
    run, text, margins, cache, monkeypatch
):
    monkeypatch.setattr(token_margins, "_TOGETHER", 8 * BLOCK)
    monkeypatch.setattr(scratch, "_SHORT", 0)
    found = text_margins(run, text, stride=3)
    for name in ("window", "position"):
        np.testing.assert_array_equal(getattr(found, name), getattr(margins, name))
    for stage, expected in zip(found.stages, margins.stages, strict=True):
        for field in dataclasses.fields(stage):
            np.testing.assert_array_equal(getattr(stage, field.name), getattr(expected, field.name))
    assert isinstance(found.stages[0].margin.base, np.memmap)
    assert list(cache.iterdir()) == []


def test_margins_that_fit_nowhere_are_refused_before_the_work(run, text, monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: 10 * len(TEXT))
    monkeypatch.setattr(token_margins, "post_hoc_prior", None)
    with pytest.raises(ValueError, match=r"the margins of one stage would take .* GiB: expected"):
        text_margins(run, text)


@pytest.mark.usefixtures("cache")
def test_a_disk_without_room_is_one_line(run, text, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(scratch, "_SHORT", 0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for .* bytes \(given.txt\): No space left"):
        text_margins(run, text, stride=3)


def test_a_token_beyond_the_first_window_has_the_promised_context(margins):
    assert margins.position[BLOCK:].min() >= BLOCK - 3


@pytest.mark.parametrize("label", LABELS)
def test_values_are_those_of_the_token_in_its_window(margins, direct, label):
    stage = next(stage for stage in margins.stages if stage.label == label)
    for name, values in direct[label].items():
        expected = np.asarray(values)[margins.window, margins.position]
        found = getattr(stage, name)
        if name == "embedding_margin":  # up to 1e12 where the gradient all but vanishes
            found, expected = 1 / found, 1 / expected
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_stages_come_in_order_and_the_folded_one_has_no_log_det_somewhere(margins):
    assert [stage.label for stage in margins.stages] == LABELS
    first = margins.stages[0]
    outside = np.isneginf(first.log_det)
    assert 0 < outside.sum() < len(TEXT)
    assert np.all(first.margin[outside] <= 0)
    # Some positions have two negative eigenvalues, which the determinant does not see.
    assert 0 < np.sum(first.margin[~outside] <= 0) < np.sum(~outside) / 2


@pytest.mark.parametrize("label", LABELS)
def test_support_token_of_a_window_is_its_smallest_margin_from_position_2_on(
    margins, direct, label
):
    stage = next(stage for stage in margins.stages if stage.label == label)
    every = np.asarray(direct[label]["margin"])
    expected = set()
    for start, window in zip(STARTS, every, strict=True):
        first = max(2, ends_before(start) - start)  # a window reports what no earlier one held
        if first < BLOCK:
            expected.add(start + first + int(np.argmin(window[first:])))
    assert set(np.flatnonzero(stage.support)) == expected
    assert len(expected) == len(STARTS)
    inner = margins.position >= 2
    assert stage.support[inner][np.argmin(stage.margin[inner])]


def test_where_all_margins_are_1_the_first_reported_one_from_position_2_on_is_taken(own_run, text):
    store_prior(own_run, w_query=np.zeros((WIDTH, RANK)), w_key=np.zeros((WIDTH, RANK)))
    first = text_margins(own_run, text, stride=BLOCK).stages[0]
    assert np.all(first.margin == 1)
    # The last window is moved back, and reports what is left of the text.
    expected = [*range(2, len(TEXT) - BLOCK, BLOCK), len(TEXT) // BLOCK * BLOCK]
    assert list(np.flatnonzero(first.support)) == expected


def ends_before(start):
    earlier = [other + BLOCK for other in STARTS if other < start]
    return max(earlier, default=0)


def test_without_a_text_it_is_the_validation_text_by_half_blocks(tiny_run):
    found = text_margins(tiny_run)
    assert "".join(found.tokens) == VALIDATION
    assert found.name == "validation text of corpus.txt"
    assert list(found.window_starts) == list(range(0, 393, 4))
    whole = text_margins(tiny_run, stride=BLOCK)
    assert list(whole.window_starts) == list(range(0, 400, 8))
    np.testing.assert_array_equal(whole.position, np.arange(400) % BLOCK)


@pytest.mark.slow
def test_a_text_shorter_than_a_block_is_one_window(run, tmp_path, direct):
    path = tmp_path / "short.txt"
    path.write_text(TEXT[:5], encoding="utf-8")
    found = text_margins(run, path)
    assert list(found.window_starts) == [0]
    assert list(found.position) == [0, 1, 2, 3, 4]
    for stage in found.stages:
        # What follows a token does not change its margin.
        expected = np.asarray(direct[stage.label]["margin"])[0, :5]
        np.testing.assert_allclose(stage.margin, expected, rtol=1e-9)
        assert np.flatnonzero(stage.support) == 2 + np.argmin(expected[2:])


def test_a_long_text_takes_as_many_windows_as_it_needs(run, tmp_path):
    path, content = tmp_path / "long.txt", tiny_text(2001, seed=2)
    path.write_text(content, encoding="utf-8")
    found = text_margins(run, path, stride=BLOCK)
    assert len(found.window_starts) == 251
    assert "".join(found.tokens) == content
    for stage in found.stages:
        assert stage.margin.shape == (2001,)
        assert np.all(np.isfinite(stage.margin))


@pytest.mark.slow
def test_the_radius_is_that_of_each_token_over_the_root_mean_square(run, text, margins, tmp_path):
    assert all(stage.radius is None for stage in margins.stages)  # it was not asked for
    margins = text_margins(run, text, stride=3, radius=True)
    write_csv(margins, tmp_path / "margins.csv")
    _, rows = read(tmp_path / "margins.csv")
    tokens = run.vocabulary.encode(TEXT)
    for stage in margins.stages:
        column = f"{stage.label.replace(' ', '_')}_certified_radius_over_rms"
        written = [float(row[column]) for row in rows]
        np.testing.assert_allclose(written, stage.radius, rtol=1e-6)
        first = margins.window == 0  # its tokens are reported from the window that begins the text
        x, w_query, w_key = stage_arguments(run, tokens[:BLOCK][None])[stage.label]
        expected = certified_radius(x[0], w_query, w_key, joint=False) / np.sqrt(x.shape[-1])
        known = np.isfinite(expected) & (expected > 0)
        ratio = stage.radius[first][known] / expected[known]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)
        assert np.all(np.isinf(stage.radius[first][:2]))
        if stage.label == "trained":  # of the embeddings, each counted at its reported position
            inputs = [
                stage_arguments(run, tokens[start : start + BLOCK][None])[stage.label][0][0]
                for start in margins.window_starts
            ]
            seen = [inputs[w][p] for w, p in zip(margins.window, margins.position, strict=True)]
            rms = np.sqrt(np.mean(np.square(seen)))
            assert ratio[0] == pytest.approx(1 / rms, rel=1e-4)


# The table


def read(path):
    with path.open(encoding="utf-8", newline="") as stream:
        header, *rows = csv.reader(stream)
    return header, [dict(zip(header, row, strict=True)) for row in rows]


def test_table_reads_back_whatever_the_tokens_are(margins, tmp_path):
    path = tmp_path / "new folder" / "margins.csv"
    write_csv(margins, path)
    header, rows = read(path)
    assert {"\n", '"', ",", "'", " "} <= set(margins.tokens)
    assert "".join(row["token"] for row in rows) == TEXT
    assert len(set(header)) == len(header) == 4 + 5 * len(LABELS)
    assert [int(row["index"]) for row in rows] == list(range(len(TEXT)))
    assert [int(row["window"]) for row in rows] == list(margins.window)
    assert [int(row["position"]) for row in rows] == list(margins.position)
    for stage in margins.stages:
        prefix = stage.label.replace(" ", "_")
        for column, values in (
            ("sigma_min", stage.margin),
            ("log_det", stage.log_det),
            ("first_order_embedding_margin", stage.embedding_margin),
            ("certificate", stage.certificate),
        ):
            written = [float(row[f"{prefix}_{column}"]) for row in rows]
            np.testing.assert_allclose(written, values, rtol=1e-6)
        assert [row[f"{prefix}_support"] for row in rows] == [str(int(s)) for s in stage.support]
    assert any(row["post_hoc_log_det"] == "-inf" for row in rows)
    assert rows[0]["post_hoc_first_order_embedding_margin"] == "inf"


# Bad input


@pytest.mark.parametrize("stride", [0, -1, BLOCK + 1])
def test_a_stride_out_of_range_is_refused(run, text, stride):
    with pytest.raises(ValueError, match=rf"stride is {stride}: expected 1 <= stride <= .* = 8"):
        text_margins(run, text, stride=stride)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("th", r"bad\.txt: has 2 tokens: expected at least 3"),
        ("", "got an empty file"),
        ("the €", r"bad\.txt: unknown character '€' \(U\+20AC\) at position 4 "),
    ],
)
def test_a_bad_text_is_named_and_nothing_fitted(
    own_run,
    tmp_path,
    content,
    message,
):
    (own_run.path / "post_hoc_prior.npz").unlink()
    path = tmp_path / "bad.txt"
    path.write_text(content, encoding="utf-8")
    before = files_of(own_run.path)
    with pytest.raises(ValueError, match=message):
        text_margins(own_run, path)
    assert files_of(own_run.path) == before


@pytest.mark.slow
def test_margins_of_a_bounded_context(own_run):
    """Post hoc and trained stages take the run's bound; the heads of the first layer have none."""
    model = dataclasses.replace(own_run.config.model, bound=0.5)
    run = dataclasses.replace(own_run, config=dataclasses.replace(own_run.config, model=model))
    inputs = run.vocabulary.encode(TEXT)[None, :BLOCK]
    prior = post_hoc_prior(own_run)
    arguments = stage_arguments(own_run, inputs)
    for stage in stages(run, prior):
        bound = None if stage.label.startswith("layer") else 0.5
        got = stage_margins(run, stage, inputs)
        expected = quantities(*arguments[stage.label], bound=bound)
        for name in ("margin", "embedding_margin", "certificate"):
            np.testing.assert_allclose(
                getattr(got, name), expected[name], rtol=1e-9, atol=1e-30, err_msg=name
            )


@pytest.mark.slow
def test_margins_of_normalised_embeddings(own_run):
    """The trained stage of such an objective sees each token divided by its root mean square."""
    objective = ObjectiveConfig("margin", attention="normalised")
    run = dataclasses.replace(
        own_run, config=dataclasses.replace(own_run.config, objective=objective)
    )
    inputs = run.vocabulary.encode(TEXT)[None, :BLOCK]
    (stage,) = [s for s in stages(run, post_hoc_prior(own_run)) if s.label == "trained"]
    x, w_query, w_key = stage_arguments(own_run, inputs)["trained"]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-8)
    expected = quantities(x, w_query, w_key)["margin"]
    assert np.abs(expected - 1).max() > 0.01
    np.testing.assert_allclose(stage_margins(run, stage, inputs).margin, expected, rtol=1e-9)


class NotedError(Exception):
    """Enough was seen."""


@pytest.mark.parametrize("of", ["stages", "monitor", "draws"])
def test_openblas_threads_do_not_wait_for_each_other(own_run, monkeypatch, of):
    """XLA's threads each call LAPACK: threads of OpenBLAS below them are a hundredfold slower."""
    threads = []

    def note(*_, **options):
        threads.append(_blas_threads())

    def note_and_stop(*_, **options):
        note()
        raise NotedError

    inputs = np.zeros((1, 3), int)  # of a length that is compiled here, and nowhere else
    if of == "stages":
        monkeypatch.setattr(attention_stages, "log_det", note_and_stop)
        stage = next(stages(own_run, post_hoc_prior(own_run)))
        call = partial(stage_margins, own_run, stage, inputs)
    elif of == "monitor":
        monkeypatch.setattr(monitor, "stability_margin", note_and_stop)
        call = partial(monitor.Monitor(own_run.config, inputs), own_run.parameters)
    else:

        def model():
            numpyro.sample("value", dist.Normal(0.0, 1.0))
            jax.debug.callback(note)

        result = PosteriorResult(method="nuts", draws={"value": np.zeros((1, 2))}, model=model)
        call = partial(list, site_values(result))
    with threadpool_limits(2, user_api="blas"):  # as on two cores, wherever this runs
        before = _blas_threads()
        with nullcontext() if of == "draws" else pytest.raises(NotedError):
            call()
        jax.effects_barrier()
        after = _blas_threads()
    assert max(before) == 2
    assert threads
    assert all(each == [1] * len(before) for each in threads)
    assert after == before


def _blas_threads():
    return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]
