"""Losses on a text, bits per character, noise, and the margins that a fit watches."""

import dataclasses
import functools
import math
import tracemalloc
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probattn.inference import RunConfig
from probattn.inference.evaluation import scoring
from probattn.inference.evaluation.perturbations import Gaussian
from probattn.inference.evaluation.scoring import Scorer
from probattn.inference.fitting.monitor import Monitor
from probattn.models import ObjectiveConfig
from probattn.models.networks import TransformerNetwork
from tests.support.tiny_run import (
    BLOCK,
    HEADS,
    MODEL,
    RANK,
    WIDTH,
    all_logits,
    embedded,
    log_softmax,
)
from tests.support.tiny_scorer import CHARACTERS, LONG, PARAMETERS, SIZE, draw, scorer_of, text


def window_starts(length):
    """Where the window of each predicted token begins, and so its context.

    Windows do not overlap, but for the last, which is moved back to end with the text.
    """
    inputs = length - 1
    size = min(BLOCK, inputs)
    return [min(position // BLOCK * BLOCK, inputs - size) for position in range(inputs)]


def window_rows(length):
    """Where the losses of the predicted tokens stand among those of all windows."""
    starts = window_starts(length)
    rows = [sorted(set(starts)).index(start) for start in starts]
    return tuple(rows), tuple(position - start for position, start in enumerate(starts))


def expected_losses(tokens):
    """Loss of every token but the first, one after the other, by a network of its own."""
    run = SimpleNamespace(parameters=PARAMETERS)
    return [
        -log_softmax(all_logits(run, tokens[start : position + 1])[-1])[tokens[position + 1]]
        for position, start in enumerate(window_starts(len(tokens)))
    ]


@pytest.fixture(scope="module")
def long():
    return scorer_of(text(LONG))


@pytest.mark.parametrize("length", [2, BLOCK, BLOCK + 1, BLOCK + 2, LONG])
def test_every_token_but_the_first_is_predicted_once(length):
    tokens = text(length, seed=2)
    score = scorer_of(tokens).score(PARAMETERS)
    assert score.tokens == length - 1
    assert score.cross_entropy == pytest.approx(np.mean(expected_losses(tokens)), rel=1e-12)


def test_bits_are_per_character_that_the_predicted_tokens_stand_for(long):
    tokens = text(LONG)
    score = long.score(PARAMETERS)
    assert score.characters == sum(CHARACTERS[token] for token in tokens[1:])
    assert score.characters > 1.5 * score.tokens
    bits = sum(expected_losses(tokens)) / math.log(2)
    assert score.bpc == pytest.approx(bits / score.characters, rel=1e-12)


def test_one_character_a_token_makes_bits_of_nats():
    score = Scorer(
        TransformerNetwork(MODEL),
        SimpleNamespace(size=SIZE, token_characters=np.ones(SIZE, int)),
        text(50),
    ).score(PARAMETERS)
    assert score.bpc == pytest.approx(score.cross_entropy / math.log(2), rel=1e-14)


def test_a_part_of_the_tokens_is_spread_over_the_text():
    tokens = text(100 * BLOCK + 1)
    part = scorer_of(tokens, most_tokens=10 * BLOCK + 3)
    score = part.score(PARAMETERS)
    assert score.tokens == 10 * BLOCK
    starts = [round(99 * number / 9) * BLOCK for number in range(10)]
    np.testing.assert_array_equal(part.inputs, [tokens[s : s + BLOCK] for s in starts])
    losses = np.array(expected_losses(tokens)).reshape(100, BLOCK)[np.array(starts) // BLOCK]
    assert score.cross_entropy == pytest.approx(losses.mean(), rel=1e-12)


def test_a_part_larger_than_the_text_is_all_of_it(long):
    part = scorer_of(text(LONG), most_tokens=10**9)
    np.testing.assert_array_equal(part.inputs, long.inputs)


def test_a_text_with_nothing_to_predict():
    with pytest.raises(ValueError, match="the text has 0 positions: expected at least 1"):
        scorer_of(text(1))


def test_a_text_whose_predicted_tokens_begin_no_character():
    """As of one character that a byte-pair vocabulary cuts into two tokens."""
    nothing = int(np.flatnonzero(CHARACTERS == 0)[0])
    with pytest.raises(ValueError, match="character"):
        scorer_of(np.array([0, nothing])).score(PARAMETERS)


def test_bfloat16_products_change_the_losses_little(long):
    exact = long.score(PARAMETERS).cross_entropy
    rounded = scorer_of(text(LONG), precision="bfloat16").score(PARAMETERS).cross_entropy
    assert 0 < abs(rounded - exact) < 0.02 * exact


def test_a_score_holds_nothing_as_long_as_the_text(monkeypatch):
    """So that texts may be longer than the memory; the tokens lie in a file."""
    tokens = np.zeros(2**20, np.uint8)
    monkeypatch.setattr(
        scoring, "perturbed_losses", lambda _a, _b, inputs, *_c, **_d: np.ones(inputs.shape)
    )
    monkeypatch.setattr(scoring, "_TOGETHER", 2**12)
    scorer = Scorer(
        TransformerNetwork(MODEL),
        SimpleNamespace(size=SIZE, token_characters=np.ones(SIZE, int)),
        tokens,
    )
    scorer.score(PARAMETERS)  # compiled, before memory is counted
    scorer.embedding_rms(PARAMETERS)
    tracemalloc.start()
    try:
        score = scorer.score(PARAMETERS)
        scorer.embedding_rms(PARAMETERS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert score.cross_entropy == 1
    assert score.tokens == len(tokens) - 1
    windows = len(tokens) / BLOCK
    assert peak < 4 * 8 * windows + 2**20  # a few numbers for each window


# Noise


def test_no_noise_is_no_change(long):
    clean = long.losses(PARAMETERS)
    np.testing.assert_array_equal(
        long.losses(PARAMETERS, Gaussian(0.0), rng_key=jax.random.key(7)), clean
    )
    assert long.score(PARAMETERS, Gaussian(0.0)) == long.score(PARAMETERS)


def test_the_key_determines_the_noise(long):
    one, same, other = (
        long.losses(PARAMETERS, Gaussian(0.5), rng_key=jax.random.key(key)) for key in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert np.all(one != other)


def test_noise_is_normal_and_independent_on_every_coordinate(long):
    """Seen through a network whose layers add nothing to what enters the stack."""
    parameters = draw(attention_out=0, mlp_out=0)
    sigma, keys = 0.7, map(jax.random.key, range(40))
    losses = [long.losses(parameters, Gaussian(sigma), rng_key=key) for key in keys]
    losses = np.stack(losses)[:, *window_rows(LONG)]
    assert len(np.unique(losses)) == losses.size  # two calls, and windows, do not share it

    tokens, run = text(LONG), SimpleNamespace(parameters=parameters)
    x = np.array(
        [
            embedded(run, tokens[start : position + 1])[-1]
            for position, start in enumerate(window_starts(LONG))
        ]
    )
    x = x + sigma * np.random.default_rng(0).normal(size=(1000, *x.shape))
    centred = x - x.mean(-1, keepdims=True)
    x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    scores = x * np.asarray(parameters["final_norm"]) @ np.asarray(parameters["token_embedding"]).T
    expected = -np.take_along_axis(log_softmax(scores), tokens[None, 1:, None], -1)
    for moment in (1, 2, 3):
        error = 5 * (losses**moment).std() / math.sqrt(losses.size)
        assert (losses**moment).mean() == pytest.approx((expected**moment).mean(), abs=error)


@pytest.mark.parametrize("length", [4, LONG])
def test_embedding_rms_is_that_of_every_input_counted_once(length):
    tokens = text(length)
    run = SimpleNamespace(parameters=PARAMETERS)
    entries = [
        embedded(run, tokens[start : position + 1])[-1]
        for position, start in enumerate(window_starts(length))
    ]
    expected = np.sqrt(np.mean(np.square(entries)))
    assert scorer_of(tokens).embedding_rms(PARAMETERS) == pytest.approx(expected, rel=1e-13)


# What a fit watches


def reduced_blocks(x, w_query, w_key):
    """R_t = I - Cov(q, k) / sqrt(r) at positions 2 on, (T - 2, r, r), from the definition."""
    queries, keys = x @ w_query, x @ w_key
    rank = w_query.shape[1]
    blocks = []
    for t in range(2, len(x)):
        alpha = np.exp(log_softmax(keys[:t] @ queries[t] / math.sqrt(rank)))
        past = queries[:t] - alpha @ queries[:t], keys[:t] - alpha @ keys[:t]
        blocks.append(np.eye(rank) - (alpha[:, None] * past[0]).T @ past[1] / math.sqrt(rank))
    return np.array(blocks)


def expected_watch(blocks):
    sigma = np.linalg.svd(blocks, compute_uv=False)[..., -1]
    values = np.linalg.eigvals(blocks)
    outside = np.any((np.abs(values.imag) < 1e-12) & (values.real <= 0), axis=-1)
    margins = np.where(outside, -sigma, sigma)
    sign, log_abs = np.linalg.slogdet(blocks)
    return {
        "min_margin": margins.min(),
        "mean_margin": margins.mean(),
        "mean_log_det": log_abs[sign > 0].mean(),
        "infeasible_fraction": outside.mean(),
    }


def expected_eigenvalues(pairs):
    """Extremes of A + A^T over the heads, from the definition of A."""
    values = []
    for w_query, w_key in pairs:
        matrix = w_key @ w_query.T / math.sqrt(w_query.shape[1])
        values += np.linalg.eigvals(matrix + matrix.T).real.tolist()
    return {"coupling_eigenvalue_min": min(values), "coupling_eigenvalue_max": max(values)}


@functools.cache
def monitor(rank):
    """Of 16 windows of text; those of zeros after them are not watched."""
    inputs = np.concatenate([scorer_of(text(16 * BLOCK + 1)).inputs, np.zeros((5, BLOCK), int)])
    model = dataclasses.replace(MODEL, prior_rank=rank)
    return Monitor(RunConfig(model=model, objective=ObjectiveConfig("full")), inputs)


def watched_as(watched, kind, expected):
    assert watched.pop("min_margin_kind") == kind
    assert watched == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("scale", "rank"), [(0.3, RANK), (20, RANK), (-2, 1)])
def test_the_separate_stage_is_watched(scale, rank):
    """A coupling that is weak, one that folds, and a repulsive one, whose margins all exceed 1."""
    w_query = np.random.default_rng(3).normal(size=(WIDTH, rank)) / 4
    parameters = draw() | {"w_query": jnp.asarray(w_query), "w_key": jnp.asarray(scale * w_query)}
    inputs = scorer_of(text(16 * BLOCK + 1)).inputs
    x = embedded(SimpleNamespace(parameters=parameters), inputs)
    blocks = [reduced_blocks(window, w_query, scale * w_query) for window in x]
    expected = expected_watch(np.concatenate(blocks))
    assert (expected["min_margin"] > 1) == (scale < 0)
    assert (0 < expected["infeasible_fraction"] < 1) == (scale == 20)

    expected |= expected_eigenvalues([(w_query, scale * w_query)])
    watched_as(monitor(rank)(parameters), "reduced, separate", expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", [ObjectiveConfig("ce"), ObjectiveConfig("margin", attention="first_layer")]
)
def test_the_heads_of_the_first_layer_are_watched(objective):
    parameters = draw(attention_in=1.5)
    inputs = scorer_of(text(5 * BLOCK)).inputs
    x = embedded(SimpleNamespace(parameters=parameters), inputs)
    centred = x - x.mean(-1, keepdims=True)
    gain = np.asarray(parameters["attention_norm"][0])
    x = gain * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    columns = np.split(np.asarray(parameters["attention_in"][0]), 3 * HEADS, axis=1)
    blocks = [
        reduced_blocks(window, columns[head], columns[HEADS + head])
        for window in x
        for head in range(HEADS)
    ]
    expected = expected_watch(np.concatenate(blocks))
    assert 0 < expected["infeasible_fraction"] < 1
    expected |= expected_eigenvalues(
        (columns[head], columns[HEADS + head]) for head in range(HEADS)
    )
    watched = Monitor(RunConfig(model=MODEL, objective=objective), inputs)(parameters)
    watched_as(watched, "reduced, first layer", expected)


@pytest.mark.slow
def test_where_every_determinant_is_negative_there_is_no_mean_of_their_logarithms():
    """A strong attractive coupling of rank 1 folds every position whose past is two tokens."""
    w_query = jnp.ones((WIDTH, 1))
    parameters = draw() | {"w_query": w_query, "w_key": 100 * w_query}
    parameters["position_embedding"] = jnp.zeros_like(parameters["position_embedding"])
    parameters["token_embedding"] = jnp.zeros((SIZE, WIDTH)).at[1].set(1.0).at[2].set(-1.0)
    config = RunConfig(model=dataclasses.replace(MODEL, prior_rank=1))
    watched = Monitor(config, np.array([[1, 2, 0]]))(parameters)
    assert watched["min_margin"] < 0
    assert watched["mean_log_det"] is None
    assert watched["coupling_eigenvalue_max"] == pytest.approx(2 * 100 * WIDTH)


def test_what_is_watched_are_numbers_for_json():
    watched = monitor(RANK)(PARAMETERS)
    assert {name: type(value) for name, value in watched.items()} == {
        "min_margin": float,
        "min_margin_kind": str,
        "mean_log_det": float,
        "mean_margin": float,
        "infeasible_fraction": float,
        "coupling_eigenvalue_min": float,
        "coupling_eigenvalue_max": float,
    }
    score = dataclasses.asdict(scorer_of(text(50)).score(PARAMETERS))
    assert [type(value) for value in score.values()] == [float, float, int, int]
