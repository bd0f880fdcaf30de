"""Kinds of noise on what enters the stack: their size, their laws, and worst-case directions."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from probattn.inference.evaluation.perturbations import (
    Ascent,
    Gaussian,
    Substitution,
    Uniform,
    perturbation,
)
from probattn.models.transformer import embed, logits
from tests.support.tiny_run import BLOCK, HEADS, WIDTH, embedded
from tests.support.tiny_scorer import PARAMETERS, SIZE, scorer_of, text

KEY = jax.random.key(5)
SIGMA = 0.3
RADIUS = SIGMA * WIDTH**0.5
INPUTS = text(4 * BLOCK).reshape(4, BLOCK)
TARGETS = text(4 * BLOCK, seed=9).reshape(4, BLOCK)
CLEAN = embedded(SimpleNamespace(parameters=PARAMETERS), INPUTS)
FREQUENCIES = np.array([5.0, 0.0, 1.0, 3.0, 0.5, 0.5])


@jax.jit
def losses(x):
    predicted = logits(PARAMETERS, x, heads=HEADS)
    return optax.softmax_cross_entropy_with_integer_labels(predicted, TARGETS)


@jax.jit
def seen(disturbed, inputs, key):
    """What enters the stack."""
    return disturbed(key, functools.partial(embed, PARAMETERS), inputs, losses)


def moved(disturbed, inputs=INPUTS, key=KEY):
    """Displacement of what enters the stack."""
    return np.asarray(seen(disturbed, inputs, key)) - embedded(
        SimpleNamespace(parameters=PARAMETERS), inputs
    )


def window_losses(displacement):
    return np.asarray(losses(CLEAN + displacement)).sum(1)


@pytest.fixture(scope="module")
def ascents():
    return {steps: moved(Ascent(SIGMA, steps)) for steps in (1, 10)}


# Random noise


def test_gaussian_noise_is_the_draw_of_its_key():
    """Results of runs from before there were other kinds are those of this draw."""
    expected = SIGMA * np.asarray(jax.random.normal(KEY, CLEAN.shape))
    np.testing.assert_allclose(moved(Gaussian(SIGMA)), expected, atol=1e-12)


def test_uniform_noise_has_the_standard_deviation_of_gaussian_noise_of_its_level():
    inputs = text(2000 * BLOCK).reshape(-1, BLOCK)
    noise = moved(Uniform(SIGMA), inputs)
    assert noise.std() == pytest.approx(SIGMA, rel=0.01)
    assert np.abs(noise).max() <= np.sqrt(3) * SIGMA
    law = stats.uniform(-np.sqrt(3) * SIGMA, 2 * np.sqrt(3) * SIGMA)
    assert stats.kstest(noise.ravel(), law.cdf).pvalue > 1e-3
    correlation = np.corrcoef(noise.reshape(len(inputs), -1), rowvar=False)
    np.fill_diagonal(correlation, 0)  # every coordinate of every position has a draw of its own
    assert np.abs(correlation).max() < 6 / np.sqrt(len(inputs))


def tokens_after(disturbed, inputs, key=KEY):
    """Tokens whose embeddings these are, each the nearest."""
    x = np.asarray(seen(disturbed, inputs, key)) - PARAMETERS["position_embedding"]
    table = np.asarray(PARAMETERS["token_embedding"])
    distance = np.linalg.norm(x[..., None, :] - table, axis=-1)
    assert distance.min(-1).max() < 1e-12
    return distance.argmin(-1)


@pytest.mark.parametrize("probability", [0.1, 1.0])
def test_substitution_draws_tokens_by_their_frequencies(probability):
    inputs = np.full((3000, BLOCK), 1)  # a symbol of frequency 0, which no draw brings back
    found = tokens_after(Substitution(probability, FREQUENCIES), inputs)
    replaced = found != 1
    assert stats.binomtest(int(replaced.sum()), found.size, probability).pvalue > 1e-3
    counts = np.bincount(found[replaced], minlength=SIZE)
    expected = FREQUENCIES / FREQUENCIES.sum() * replaced.sum()
    assert counts[1] == 0
    kept = FREQUENCIES > 0
    assert stats.chisquare(counts[kept], expected[kept]).pvalue > 1e-3


def test_more_substitution_replaces_what_less_does_and_none_nothing():
    inputs = text(500 * BLOCK).reshape(-1, BLOCK)
    none, some, more = (
        tokens_after(Substitution(probability, FREQUENCIES), inputs)
        for probability in (0.0, 0.2, 0.6)
    )
    np.testing.assert_array_equal(none, inputs)
    changed = some != inputs
    assert 0.05 < changed.mean() < 0.2  # a draw may be the token itself
    np.testing.assert_array_equal(more[changed], some[changed])
    assert (more != inputs).sum() > 2 * changed.sum()


# Worst-case directions


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("sigma", [SIGMA, 30.0])
def test_every_token_stays_in_its_ball(steps, sigma):
    lengths = np.linalg.norm(moved(Ascent(sigma, steps)), axis=-1)
    assert lengths.max() <= sigma * WIDTH**0.5 * (1 + 1e-12)
    assert lengths.max() > 0


def test_the_ball_has_the_size_of_gaussian_noise():
    lengths = np.linalg.norm(moved(Gaussian(SIGMA), text(800).reshape(-1, BLOCK)), axis=-1)
    assert np.sqrt(np.mean(lengths**2)) == pytest.approx(RADIUS, rel=0.05)


def test_one_step_goes_along_the_gradient_of_finite_differences_to_the_sphere(ascents):
    shift = 1e-6 * np.eye(BLOCK * WIDTH).reshape(-1, BLOCK, WIDTH)
    gradient = np.empty_like(CLEAN)
    one_window = jax.jit(
        lambda x, targets: optax.softmax_cross_entropy_with_integer_labels(
            logits(PARAMETERS, x, heads=HEADS), jnp.broadcast_to(targets, x.shape[:2])
        ).sum(1)
    )
    for row, (x, targets) in enumerate(zip(CLEAN, TARGETS, strict=True)):
        ends = [one_window(x + sign * shift, targets) for sign in (1, -1)]
        gradient[row] = np.reshape((ends[0] - ends[1]) / 2e-6, (BLOCK, WIDTH))
    expected = RADIUS * gradient / np.linalg.norm(gradient, axis=-1, keepdims=True)
    rose = window_losses(expected) > window_losses(0)
    assert rose.any()
    np.testing.assert_allclose(ascents[1][rose], expected[rose], rtol=1e-5, atol=1e-7)
    assert np.all(ascents[1][~rose] == 0)


def test_ten_steps_are_projected_gradient_ascent_step_by_step(ascents):
    gradient_of = jax.jit(jax.grad(lambda x: losses(x).sum()))
    at, visited = np.zeros_like(CLEAN), [np.zeros_like(CLEAN)]
    for _ in range(10):
        gradient = np.asarray(gradient_of(CLEAN + at))
        at = at + RADIUS / 4 * gradient / np.linalg.norm(gradient, axis=-1, keepdims=True)
        for token in at.reshape(-1, WIDTH):  # views: shortened in place, one by one
            if np.linalg.norm(token) > RADIUS:
                token *= RADIUS / np.linalg.norm(token)
        visited.append(at.copy())
    best = np.argmax([window_losses(each) for each in visited], axis=0)
    expected = np.stack(visited)[best, np.arange(len(CLEAN))]
    np.testing.assert_allclose(ascents[10], expected, atol=1e-9)
    assert (best > 1).all()


def largest_of_random(radius):
    """Largest loss of each window among 40 random directions of that length for every token."""
    directions = np.random.default_rng(0).normal(size=(40, *CLEAN.shape))
    random = radius * directions / np.linalg.norm(directions, axis=-1, keepdims=True)
    return np.max([window_losses(each) for each in random], axis=0)


def test_a_worst_case_is_worse_than_random_noise_of_the_same_length(ascents):
    one, ten = (window_losses(ascents[steps]) for steps in (1, 10))
    assert np.all(ten > largest_of_random(RADIUS))
    assert np.all(ten > one)
    # A single step is the worst of a linear loss, which this one is near the clean point.
    near = window_losses(moved(Ascent(SIGMA / 10)))
    assert np.all(near > largest_of_random(RADIUS / 10))


@pytest.mark.parametrize("sigma", [0.0, 1e-12, 1e4])
def test_no_window_gains_at_any_size(sigma):
    """A single step of an enormous length goes anywhere: then the window keeps its clean point."""
    for steps in (1, 10):
        displacement = moved(Ascent(sigma, steps))
        assert np.all(window_losses(displacement) >= window_losses(0) - 1e-12)
    if sigma == 0:
        assert np.all(np.isfinite(displacement))
        assert np.abs(displacement).max() < 1e-14


@pytest.mark.slow
def test_a_scorer_looks_for_the_directions_of_its_own_losses():
    scorer = scorer_of(text(4 * BLOCK + 1, seed=4))
    clean = scorer.losses(PARAMETERS).sum(1)
    one, ten = (scorer.losses(PARAMETERS, Ascent(SIGMA, steps)).sum(1) for steps in (1, 10))
    assert np.all(clean < one)
    assert np.all(one < ten)


# All of them


@pytest.mark.slow
def test_levels_of_a_kind_share_a_compiled_program(caplog):
    jax.clear_caches()  # another test may have compiled some
    scorer = scorer_of(text(2 * BLOCK + 1))
    for kind in ("gaussian", "uniform", "substitution", "ascent-1"):
        compiled = []
        for level in (0.1, 0.2):
            caplog.clear()
            with jax.log_compiles():
                scorer.losses(PARAMETERS, perturbation(kind, level, frequencies=FREQUENCIES))
            compiled.append(caplog.text.count("Compiling"))
        assert compiled[0] > compiled[1] == 0, kind


def test_kinds_by_name():
    assert perturbation("gaussian", 0.5) == Gaussian(0.5)
    assert perturbation("uniform", 0.5) == Uniform(0.5)
    assert perturbation("ascent-1", 0.5) == Ascent(0.5, 1)
    assert perturbation("ascent-10", 0.5) == Ascent(0.5, 10)
    with pytest.raises(ValueError, match="noise kind: got 'salt', expected one of gaussian, unif"):
        perturbation("salt", 0.5)
    with pytest.raises(ValueError, match="substitution: got no frequencies, expected those of"):
        perturbation("substitution", 0.5)


@pytest.mark.parametrize(("steps", "given"), [(0, losses), (1, None)])
def test_an_ascent_needs_a_step_and_losses(steps, given):
    with pytest.raises(ValueError, match=f"ascent: got {steps} steps on .* expected at least one"):
        Ascent(0.1, steps)(KEY, functools.partial(embed, PARAMETERS), INPUTS, given)
