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

TRAINING_TOKENS = 5000
FAKE = PostHocPrior(
    w_query=np.linspace(-1, 1, WIDTH * RANK).reshape(WIDTH, RANK),
    w_key=np.linspace(0, 3, WIDTH * RANK).reshape(WIDTH, RANK),
    scale=0.25,
    log_density=-1.5,
    converged=False,
    steps=7,
    tokens=80,
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
def log_posterior(params, x, training_tokens):
    w_query, w_key, log_scale = params
    prior = attention_prior(*w_query.shape)
    log_prior = prior.log_prob(w_query) + prior.log_prob(w_key)
    return log_density(x, w_query, w_key, jnp.exp(log_scale)) + log_prior / training_tokens


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
        return float(log_posterior(tuple(shaped), x, TRAINING_TOKENS))

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
    return fit_attention_prior(x, rank=2, training_tokens=TRAINING_TOKENS, seed=0)


def test_fit_rests_where_the_exact_log_posterior_is_flat(x, fitted):
    keys = jax.random.split(jax.random.key(1))
    start = (*(attention_prior(3, 2).sample(key) for key in keys), np.log(fitted.scale))
    assert norm(slopes(params_of(fitted), x)) < 0.03 * norm(slopes(start, x))
    assert fitted.converged


@pytest.fixture(scope="module")
def best(x, fitted):
    return float(log_posterior(params_of(fitted), x, TRAINING_TOKENS))


def test_no_neighbour_is_better(x, fitted, best):
    rng = np.random.default_rng(0)
    for size in (0.01, 0.1, 1.0):
        for _ in range(10):
            moved = tuple(p + size * rng.standard_normal(p.shape) for p in params_of(fitted))
            assert log_posterior(moved, x, TRAINING_TOKENS) < best + 2e-3


@pytest.mark.slow
def test_no_other_start_ends_elsewhere(x, fitted, best):
    other = fit_attention_prior(x, rank=2, training_tokens=TRAINING_TOKENS, seed=1)
    assert not np.allclose(other.w_query, fitted.w_query, atol=0.1)  # another gauge at least
    found = float(log_posterior(params_of(other), x, TRAINING_TOKENS))
    assert found == pytest.approx(best, abs=1e-2)


def test_scale_is_the_rms_of_the_residual(x, fitted):
    matrices = fitted.w_query, fitted.w_key
    of_sequence = jax.jit(jax.vmap(reference.residual, in_axes=(0, None, None)))
    residuals = of_sequence(x, *matrices)
    assert fitted.scale == pytest.approx(np.sqrt(np.mean(np.square(residuals))), rel=1e-12)


def test_log_density_is_that_of_the_definition(x, fitted):
    expected = jax.jit(log_density)(x, fitted.w_query, fitted.w_key, fitted.scale)
    assert fitted.log_density == pytest.approx(float(expected), abs=1e-9)
    assert fitted.tokens == 60 * 5


def test_a_shorter_text_lets_the_prior_weigh_more(x, fitted):
    short = fit_attention_prior(x, rank=2, training_tokens=100, seed=0)
    size, short_size = (norm((prior.w_query, prior.w_key)) for prior in (fitted, short))
    assert short_size < 0.9 * size


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 2])
def test_fit_recovers_a_repulsive_process(width):
    strength, sigma = 0.6, 0.8
    x = simulate(np.random.default_rng(8), 400, 8, width, strength, sigma)
    prior = fit_attention_prior(x, rank=width, training_tokens=10**6, seed=0)
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
        "training_tokens": 3600,
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
