"""The post-hoc attention prior: a maximum of the exact density, fitted once and stored."""

import dataclasses
import io
import os
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probattn import _reference as reference
from probattn.inference import PostHocPrior, load_run, post_hoc_prior
from probattn.inference.evaluation import post_hoc
from probattn.inference.evaluation.post_hoc import fit_attention_prior
from probattn.models.priors import attention_prior
from tests.support.tiny_run import (
    RANK,
    WIDTH,
    embedded,
    files_of,
    store_prior,
)

FAKE = PostHocPrior(
    w_query=np.linspace(-1, 1, WIDTH * RANK).reshape(WIDTH, RANK),
    w_key=np.linspace(0, 3, WIDTH * RANK).reshape(WIDTH, RANK),
    scale=0.25,
    log_density=-1.5,
    converged=False,
    steps=7,
    tokens=80,
    gradient_norm=0.5,
    disagreement=0.25,
)


# The fit


def log_density(x, w_query, w_key, scale):
    """Mean over the tokens of log Normal(e_t; 0, scale^2 I) + log det D_t, the slow way."""

    def of_sequence(sequence):
        sign, log_abs = reference.log_det(sequence, w_query, w_key)
        scaled = reference.residual(sequence, w_query, w_key) / scale
        normal = -(scaled**2) / 2 - jnp.log(scale * jnp.sqrt(2 * jnp.pi))
        return normal.sum(-1) + jnp.where(sign > 0, log_abs, -jnp.inf)

    return jax.vmap(of_sequence)(x).mean()


@jax.jit
def log_posterior(params, x):
    w_query, w_key, log_scale = params
    prior, unit = attention_prior(*w_query.shape), jnp.sqrt(jnp.mean(x**2))
    log_prior = prior.log_prob(w_query * unit) + prior.log_prob(w_key * unit)
    return log_density(x, w_query, w_key, jnp.exp(log_scale)) + log_prior / post_hoc.PRIOR_TOKENS


def params_of(prior):
    return prior.w_query, prior.w_key, np.log(prior.scale)


def norm(arrays):
    return float(np.sqrt(sum(np.sum(np.square(array)) for array in arrays)))


def slopes(params, x):
    """Gradient of the log posterior by central differences: no derivative of ours takes part."""
    sizes = [param.size for param in params]
    flat = np.concatenate([np.ravel(param) for param in params])

    def value(flat):
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        shaped = [part.reshape(p.shape) for part, p in zip(parts, params, strict=True)]
        return float(log_posterior(tuple(shaped), x))

    steps = 1e-5 * np.eye(flat.size)
    return [(value(flat + step) - value(flat - step)) / 2e-5 for step in steps]


@pytest.fixture(scope="module")
def x():
    """Embeddings whose later tokens depend on the earlier ones, and on where they stand."""
    rng = np.random.default_rng(5)
    steps = rng.standard_normal((60, 5, 3))
    return jnp.asarray(0.3 * steps + 0.4 * np.cumsum(steps, axis=1) + np.arange(5)[:, None] / 5)


@pytest.fixture(scope="module")
def fitted(x):
    return fit_attention_prior(x, rank=2, seed=0)


def test_fit_rests_where_the_exact_log_posterior_is_flat(x, fitted):
    keys = jax.random.split(jax.random.key(1))
    start = (*(attention_prior(3, 2).sample(key) for key in keys), np.log(fitted.scale))
    assert norm(slopes(params_of(fitted), x)) < 1e-4 * norm(slopes(start, x))
    assert fitted.gradient_norm < 1e-4
    assert fitted.disagreement < 1e-3
    assert fitted.converged


def test_no_neighbour_is_better(x, fitted):
    best = float(log_posterior(params_of(fitted), x))
    rng = np.random.default_rng(0)
    for size in (0.001, 0.01, 0.1, 1.0):
        for _ in range(10):
            moved = tuple(p + size * rng.standard_normal(p.shape) for p in params_of(fitted))
            assert log_posterior(moved, x) < best


def coupling_of(prior):
    return prior.w_key @ prior.w_query.T


@pytest.mark.parametrize("changes", [{"seed": 1}, {"seed": 2}, {"seed": 0, "steps": 2000}])
def test_neither_seed_nor_more_work_changes_what_is_fitted(x, fitted, changes):
    other = fit_attention_prior(x, rank=2, **changes)
    np.testing.assert_allclose(coupling_of(other), coupling_of(fitted), rtol=0, atol=1e-3)


def test_the_fit_knows_no_unit(x, fitted):
    other = fit_attention_prior(100 * x, rank=2, seed=0)
    np.testing.assert_allclose(100**2 * coupling_of(other), coupling_of(fitted), rtol=0, atol=1e-3)
    assert other.scale == pytest.approx(100 * fitted.scale, rel=1e-4)


@pytest.mark.slow
def test_twice_the_text_does_not_move_what_is_fitted(x, fitted):
    """Its prior counts with the tokens, so the coupling does not grow with their number."""
    other = fit_attention_prior(jnp.concatenate([x, x]), rank=2, seed=0)
    np.testing.assert_allclose(coupling_of(other), coupling_of(fitted), rtol=0, atol=1e-3)


def test_a_fit_that_is_cut_short_says_so(x):
    prior = fit_attention_prior(x, rank=2, seed=0, steps=3)
    assert not prior.converged
    assert prior.steps <= 3 * post_hoc.STARTS
    assert prior.gradient_norm > 1e-3


def test_fits_that_disagree_are_repeated_and_named(x, fitted, monkeypatch):
    monkeypatch.setattr(post_hoc, "_AGREES", -1.0)
    prior = fit_attention_prior(x, rank=2, seed=0)
    assert not prior.converged
    assert prior.steps > 1.5 * fitted.steps  # four starts rather than two
    np.testing.assert_allclose(coupling_of(prior), coupling_of(fitted), rtol=0, atol=1e-3)


def test_scale_is_the_rms_of_the_residual(x, fitted):
    matrices = fitted.w_query, fitted.w_key
    of_sequence = jax.jit(jax.vmap(reference.residual, in_axes=(0, None, None)))
    residuals = of_sequence(x, *matrices)
    assert fitted.scale == pytest.approx(np.sqrt(np.mean(np.square(residuals))), rel=1e-12)


def test_log_density_is_that_of_the_definition(x, fitted):
    expected = jax.jit(log_density)(x, fitted.w_query, fitted.w_key, fitted.scale)
    assert fitted.log_density == pytest.approx(float(expected), abs=1e-9)
    assert fitted.tokens == 60 * 5


def test_a_prior_that_counts_more_often_weighs_more(x, fitted):
    heavy = fit_attention_prior(x, rank=2, seed=0, prior_tokens=1)
    size, heavy_size = (norm((prior.w_query, prior.w_key)) for prior in (fitted, heavy))
    assert heavy_size < 0.9 * size


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 2])
def test_fit_recovers_a_repulsive_process(width):
    strength, sigma = 0.6, 0.8
    x = simulate(np.random.default_rng(8), 400, 8, width, strength, sigma)
    prior = fit_attention_prior(x, rank=width, seed=0, prior_tokens=10**6)
    a = prior.w_key @ prior.w_query.T / np.sqrt(width)
    assert prior.converged
    assert np.trace(a) == pytest.approx(-strength * width, rel=0.2)
    assert prior.scale == pytest.approx(sigma, rel=0.05)


def simulate(rng, sequences, length, width, strength, sigma):
    """Draw from the process with A = -strength I: x_t - mu_t(x_t) = e_t, solved for x_t.

    With this A the left side is the gradient of |x|^2 / 2 + log sum_s exp(-strength x.x_s) /
    strength, which is strictly convex: gradient descent of step 1 / (1 + bound on the covariance)
    finds its one minimum.
    """
    x = sigma * rng.standard_normal((sequences, length, width))
    for t in range(1, length):
        noise, past, now = x[:, t].copy(), x[:, :t], x[:, t]
        spread = np.sum((past.max(1) - past.min(1)) ** 2, axis=-1, keepdims=True) / 4
        for _ in range(2000):
            scores = -strength * np.einsum("bd,bsd->bs", now, past)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            error = now - np.einsum("bs,bsd->bd", weights, past) - noise
            now = now - error / (1 + strength * spread)
        assert np.abs(error).max() < 1e-8
        x[:, t] = now
    return jnp.asarray(x)


# What a run keeps of it


@pytest.fixture
def unfitted_run(own_run):
    (own_run.path / "post_hoc_prior.npz").unlink()
    return own_run


def refuse(*arguments, **options):
    raise AssertionError("the prior was fitted again")


def test_first_call_fits_the_training_text_and_later_calls_read(unfitted_run, monkeypatch):
    asked = []

    def fake(x, **options):
        asked.append((x, options))
        return FAKE

    monkeypatch.setattr(post_hoc, "fit_attention_prior", fake)
    assert post_hoc_prior(unfitted_run) is FAKE
    [(x, options)] = asked
    train = unfitted_run.vocabulary.encode(text_of(unfitted_run))[:3600]
    np.testing.assert_allclose(x, embedded(unfitted_run, train.reshape(-1, 8)), rtol=1e-12)
    assert options == {
        "rank": RANK,
        "bound": None,
        "seed": 3,
        "steps": post_hoc.STEPS,
        "progress": False,
    }

    monkeypatch.setattr(post_hoc, "fit_attention_prior", refuse)
    before = files_of(unfitted_run.path)
    for run in (unfitted_run, load_run(unfitted_run.path)):
        stored = post_hoc_prior(run)
        for field in dataclasses.fields(PostHocPrior):
            value, expected = getattr(stored, field.name), getattr(FAKE, field.name)
            np.testing.assert_array_equal(value, expected)
            assert type(value) is type(expected)
    assert files_of(unfitted_run.path) == before


def test_of_two_that_fit_at_once_the_first_to_end_is_kept(unfitted_run, monkeypatch):
    other = dataclasses.replace(FAKE, scale=0.75)

    def overtaken(x, **options):
        monkeypatch.setattr(post_hoc, "fit_attention_prior", lambda x, **options: other)
        assert post_hoc_prior(load_run(unfitted_run.path)) is other
        return FAKE

    monkeypatch.setattr(post_hoc, "fit_attention_prior", overtaken)
    assert post_hoc_prior(unfitted_run).scale == 0.75
    assert post_hoc_prior(load_run(unfitted_run.path)).scale == 0.75


def test_parameters_of_a_later_step_get_a_prior_of_their_own(own_run, monkeypatch):
    # Evaluated when it was interrupted, then resumed: its best parameters are others by then.
    monkeypatch.setattr(post_hoc, "fit_attention_prior", lambda x, **options: FAKE)
    own_run.best.save(own_run.step + 1, {k: 2 * v for k, v in own_run.parameters.items()})
    resumed = load_run(own_run.path)
    assert post_hoc_prior(resumed) is FAKE
    monkeypatch.setattr(post_hoc, "fit_attention_prior", refuse)
    np.testing.assert_array_equal(post_hoc_prior(resumed).w_key, FAKE.w_key)


def test_a_prior_of_an_earlier_version_is_fitted_again(own_run, monkeypatch):
    """Those were fitted for 1,000 steps of Adam, which measured how long one fits."""
    path = own_run.path / "post_hoc_prior.npz"
    with np.load(path) as stored:
        added = {"gradient_norm", "disagreement"}
        np.savez(path, **{name: stored[name] for name in stored.files if name not in added})
    monkeypatch.setattr(post_hoc, "fit_attention_prior", lambda x, **options: FAKE)
    assert post_hoc_prior(own_run) is FAKE
    monkeypatch.setattr(post_hoc, "fit_attention_prior", refuse)
    assert post_hoc_prior(load_run(own_run.path)).disagreement == FAKE.disagreement


def text_of(run):
    with open(run.config.data.source, encoding="utf-8") as stream:
        return stream.read()


def test_stored_prior_is_that_of_the_runs_embeddings(tiny_run):
    stored = post_hoc_prior(tiny_run)
    train = tiny_run.vocabulary.encode(text_of(tiny_run))[:3600].reshape(-1, 8)
    matrices = jnp.asarray(stored.w_query), jnp.asarray(stored.w_key)
    expected = jax.jit(log_density)(embedded(tiny_run, train), *matrices, stored.scale)
    assert stored.log_density == pytest.approx(float(expected), abs=1e-9)
    assert stored.tokens == 3600


def test_a_failure_while_writing_leaves_nothing(unfitted_run, monkeypatch):
    def full(*arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(post_hoc, "fit_attention_prior", lambda x, **options: FAKE)
    monkeypatch.setattr(np, "savez", full)
    before = files_of(unfitted_run.path)
    with pytest.raises(OSError, match="no space"):
        post_hoc_prior(unfitted_run)
    assert files_of(unfitted_run.path) == before


def test_a_changed_corpus_is_refused_and_nothing_stored(unfitted_run, tmp_path):
    source = tmp_path / "corpus.txt"
    shutil.copy(unfitted_run.config.data.source, source)
    config = unfitted_run.path / "config.toml"
    config.write_text(config.read_text().replace(unfitted_run.config.data.source, str(source)))
    source.write_text(source.read_text() + "more")
    before = files_of(unfitted_run.path)
    with pytest.raises(ValueError, match=r"checksum .* restore the text, or start a new run"):
        post_hoc_prior(load_run(unfitted_run.path))
    assert files_of(unfitted_run.path) == before


DAMAGE = {
    "other shape": {"w_query": np.zeros((WIDTH, RANK + 1))},
    "swapped axes": {"w_key": np.zeros((RANK, WIDTH))},
    "not a number": {"w_key": np.full((WIDTH, RANK), np.nan)},
    "strings": {"w_key": np.full((WIDTH, RANK), "one")},
    "vector for a number": {"scale": np.ones(3)},
    "text for a number": {"scale": "wide"},
    "negative scale": {"scale": -1.0},
    "infinite scale": {"scale": np.inf},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_prior_is_refused(own_run, damage):
    store_prior(own_run, **DAMAGE[damage])
    check_refused(own_run, own_run.path / "post_hoc_prior.npz")


def test_a_prior_without_a_field_is_refused(own_run):
    path = own_run.path / "post_hoc_prior.npz"
    with np.load(path) as stored:
        np.savez(path, **{name: stored[name] for name in stored.files if name != "scale"})
    check_refused(own_run, path)


BROKEN = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "without its last bytes": lambda content: content[:-10],
    "text": lambda content: b"no archive at all\n" * 20,
    "a flipped byte": lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
    "a single array": lambda content: npy(np.zeros((WIDTH, RANK))),
}


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize("breakage", BROKEN)
def test_a_broken_file_is_refused(own_run, breakage):
    path = own_run.path / "post_hoc_prior.npz"
    path.write_bytes(BROKEN[breakage](path.read_bytes()))
    check_refused(own_run, path)


class _Payload:
    """Unpickled, it makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("as_archive", [True, False], ids=["array of objects", "bare pickle"])
def test_a_pickle_is_refused_and_not_run(own_run, tmp_path, as_archive):
    path, trace = own_run.path / "post_hoc_prior.npz", tmp_path / "was here"
    if as_archive:
        objects = np.array([_Payload(trace)], dtype=object)
        np.savez(path, **(vars(FAKE) | {"w_query": objects}))
    else:
        path.write_bytes(pickle.dumps(_Payload(trace)))
    check_refused(own_run, path)
    assert not trace.exists()


def check_refused(run, path):
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"damaged .* delete it to have it fitted again") as raised:
        post_hoc_prior(run)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert path.read_bytes() == content
