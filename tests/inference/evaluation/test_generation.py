"""Generation: which token follows, from which context, and with which margin."""

import csv

import jax
import numpy as np
import pytest

from probattn import stability_margin
from probattn.inference import generate
from probattn.inference.evaluation.generation import write_csv
from tests.support.tiny_run import (
    BLOCK,
    copy_of,
    files_of,
    fold,
    log_softmax,
    next_logits,
    stage_arguments,
)

PROMPT = "the"
LONG_PROMPT = 'of a margin "so" the token'


def contexts(run, prompt, generated):
    """The window that each token was generated from, and the token.

    A window grows to a block; then it moves on, and keeps the last half block.
    """
    tokens = [int(token) for token in run.vocabulary.encode(prompt + generated)]
    given = len(run.vocabulary.encode(prompt))
    window = tokens[:given][-(BLOCK - 1) :]
    for token in tokens[given:]:
        if len(window) == BLOCK:
            window = window[-(BLOCK // 2) :]
        yield list(window), token
        window.append(token)


@pytest.mark.parametrize("prompt", [PROMPT, LONG_PROMPT, "t"])
def test_temperature_0_takes_the_most_probable_token_of_the_context(tiny_run, prompt):
    result = generate(tiny_run, prompt, length=3 * BLOCK + 3, temperature=0)
    assert len(result.tokens) == 3 * BLOCK + 3
    for context, token in contexts(tiny_run, prompt, result.text):
        assert token == np.argmax(next_logits(tiny_run, context))


def test_the_seed_determines_the_text(tiny_run):
    one, same, other = (generate(tiny_run, PROMPT, length=30, seed=seed) for seed in (5, 5, 6))
    assert one.text == same.text != other.text
    np.testing.assert_array_equal(one.margin, same.margin)


def test_the_tokens_are_the_text_and_the_prompt_is_kept(tiny_run):
    result = generate(tiny_run, LONG_PROMPT, length=30)
    assert result.prompt == LONG_PROMPT
    assert "".join(result.tokens) == result.text
    assert len(result.tokens) == len(result.margin) == 30


def test_top_1_is_temperature_0(tiny_run):
    greedy = generate(tiny_run, PROMPT, length=20, temperature=0)
    assert generate(tiny_run, PROMPT, length=20, top_k=1, temperature=2.0).text == greedy.text


def test_a_vanishing_temperature_is_temperature_0(tiny_run):
    greedy = generate(tiny_run, PROMPT, length=20, temperature=0)
    for temperature in (1e-4, 1e-310):
        assert generate(tiny_run, PROMPT, length=20, temperature=temperature).text == greedy.text


def test_top_k_never_leaves_the_k_most_probable(tiny_run):
    result = generate(tiny_run, PROMPT, length=60, top_k=3, temperature=5.0)
    ranks = [
        int(np.sum(scores > scores[token]))
        for context, token in contexts(tiny_run, PROMPT, result.text)
        for scores in [next_logits(tiny_run, context)]
    ]
    assert set(ranks) == {0, 1, 2}


def test_top_k_beyond_the_vocabulary_is_all_of_it(tiny_run):
    whole = generate(tiny_run, PROMPT, length=20)
    assert generate(tiny_run, PROMPT, length=20, top_k=10_000).text == whole.text


@pytest.mark.parametrize("temperature", [0.3, pytest.param(1.0, marks=pytest.mark.slow)])
def test_tokens_are_drawn_with_the_networks_probabilities(tiny_run, temperature):
    # The log probability of a draw has expectation minus the entropy: sums over many contexts.
    result = generate(tiny_run, PROMPT, length=400, temperature=temperature, seed=1)
    excess = variance = 0.0
    for context, token in contexts(tiny_run, PROMPT, result.text):
        log_p = log_softmax(next_logits(tiny_run, context) / temperature)
        mean = np.exp(log_p) @ log_p
        excess += log_p[token] - mean
        variance += np.exp(log_p) @ (log_p - mean) ** 2
    assert abs(excess) < 3 * np.sqrt(variance)


@pytest.mark.parametrize("prompt", [PROMPT, LONG_PROMPT])
def test_margins_are_those_in_the_window_of_generation(
    tiny_run,
    tmp_path,
    prompt,
):
    run = copy_of(tiny_run, tmp_path / "run")
    fold(run)
    result = generate(run, prompt, length=3 * BLOCK, seed=2)
    held = [[*context, token] for context, token in contexts(run, prompt, result.text)]
    # What follows does not matter: any token will do there.
    filled = np.array([window + [1] * (BLOCK - len(window)) for window in held])
    arguments = stage_arguments(run, filled)["post hoc"]
    margin = np.asarray(jax.jit(stability_margin)(*arguments))
    expected = [row[len(window) - 1] for row, window in zip(margin, held, strict=True)]
    np.testing.assert_allclose(result.margin, expected, rtol=1e-9)
    assert result.margin.min() < 0 < result.margin.max()


def test_table_reads_back(tiny_run, tmp_path):
    result = generate(tiny_run, PROMPT, length=60, temperature=2.0, seed=4)
    write_csv(result, tmp_path / "generated.csv")
    with (tmp_path / "generated.csv").open(encoding="utf-8", newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["index", "token", "post_hoc_sigma_min"]
    assert [int(row[0]) for row in rows] == list(range(60))
    assert "".join(row[1] for row in rows) == result.text
    assert {"\n", ",", '"'} & set(result.tokens)
    np.testing.assert_allclose([float(row[2]) for row in rows], result.margin, rtol=1e-6)


BAD = {
    "length": ({"length": 0}, r"length: got 0, expected an integer from 1 to"),
    "endless length": ({"length": 10**25}, r"length: got 10+, expected an integer from 1 to"),
    "negative length": ({"length": -3}, r"length: got -3, expected"),
    "temperature": ({"temperature": -0.1}, r"temperature: got -0\.1, expected a finite .* >= 0"),
    "infinite temperature": ({"temperature": float("inf")}, r"temperature: got inf, expected"),
    "temperature not a number": ({"temperature": float("nan")}, r"temperature: got nan, expected"),
    "top_k": ({"top_k": 0}, r"top_k: got 0, expected an integer >= 1"),
    "seed": ({"seed": 2**70}, r"seed: got 1180591620717411303424, expected"),
    "empty prompt": ({"prompt": ""}, r"prompt: got an empty text, expected at least one char"),
    "unknown character": (
        {"prompt": "the Token"},
        r"prompt: unknown character 'T' \(U\+0054\) at position 4 ",
    ),
    "lone surrogate": ({"prompt": "the \udc80"}, r"prompt: unknown character .* at position 4 "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_leaves_the_run_as_it_was(own_run, case):
    (own_run.path / "post_hoc_prior.npz").unlink()  # would be fitted, were the input good
    options, message = BAD[case]
    before = files_of(own_run.path)
    with pytest.raises(ValueError, match=message) as raised:
        generate(own_run, **({"prompt": PROMPT} | options))
    assert "\n" not in str(raised.value)
    assert files_of(own_run.path) == before
