"""What a fit adds to a step: noise on the embeddings, weight decay, sharpness-aware gradients."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import logsumexp

from probattn.inference import fit
from probattn.inference.fitting.optimizers import default_optimizer
from probattn.inference.fitting.svi import Trainer, training_noise
from probattn.inference.runs.checkpoints import named_leaves
from probattn.models.transformer import embed, logits
from tests.support.tiny_run import BLOCK, FIT, MODEL, WIDTH, tiny_config
from tests.support.tiny_trainer import (
    CE,
    SEQUENCES,
    TOKENS,
    VOCABULARY,
    assert_close,
    draw,
    log_prior,
    state_at,
)

SCALE, RHO, DECAY = 0.8, 0.3, 5.0
ALL = dataclasses.replace(FIT, embedding_noise=SCALE, sam_rho=RHO, weight_decay=DECAY)
CONFIG = dataclasses.replace(CE, fit=ALL)
STEPS = 3


@pytest.fixture(scope="module")
def trainer():
    return Trainer(CONFIG, TOKENS, VOCABULARY.size)


@pytest.fixture(scope="module")
def start():
    return draw(CE, seed=4)


def unit_noise(trainer, step):
    """The noise of a step in units of the embeddings' root mean square, off the trainer's own."""
    ones = jnp.ones((FIT.batch, BLOCK, WIDTH))
    return np.asarray(trainer.noise(step)["perturb"](ones)) - 1


def losses_of(trainer):
    """Loss of a step as a function of the parameters, of plain arrays and JAX alone.

    The network is `transformer.logits`, the noise is relative to the root mean square of what it
    is added to, and the priors are Normal as `log_prior` writes them out.
    """
    zero = draw(CE, seed=0)
    origin = {name: 0 * value for name, value in zero.items()}
    curvature = {}  # of minus the log prior, a parabola in every entry
    for name, value in zero.items():
        one = {**origin, name: np.ones_like(value)}
        centre = 1.0 if "norm" in name else 0.0
        gap = log_prior({**origin, name: np.full_like(value, centre)}) - log_prior(
            {**one, name: np.full_like(value, centre + 1.0)}
        )
        curvature[name] = (centre, 2 * gap / value.size)

    def loss(parameters, inputs, targets, noise):
        x = embed(parameters, inputs)
        x = x + noise * jnp.sqrt(jnp.mean(x**2))
        scores = logits(parameters, x, heads=MODEL.heads)
        error = optax.softmax_cross_entropy_with_integer_labels(scores, targets).mean()
        prior = sum(
            factor / 2 * jnp.sum((parameters[name] - centre) ** 2)
            for name, (centre, factor) in curvature.items()
        )
        return error + prior / (SEQUENCES * BLOCK)

    return loss


def test_the_noise_is_that_of_its_own_key_and_no_other_step(trainer):
    noise = [unit_noise(trainer, step) for step in (0, 1, 0)]
    np.testing.assert_array_equal(noise[0], noise[2])
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 5 / math.sqrt(noise[0].size)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(FIT.seed), 2), 1)
    expected = SCALE * jax.random.normal(key, noise[1].shape)
    np.testing.assert_allclose(noise[1], expected, rtol=1e-12, atol=1e-14)


def test_the_loss_is_that_under_noise_in_units_of_the_embeddings(trainer, start):
    inputs, targets = trainer.minibatch(TOKENS, 0)
    x = np.asarray(embed(start, inputs))
    x = x + np.sqrt(np.mean(x**2)) * unit_noise(trainer, 0)
    scores = np.asarray(jax.jit(partial(logits, heads=MODEL.heads))(start, x))
    picked = np.take_along_axis(scores, np.asarray(targets)[..., None], -1)[..., 0]
    expected = np.mean(logsumexp(scores, axis=-1) - picked)
    expected -= log_prior(start) / (SEQUENCES * BLOCK)
    _, progress = trainer.advance(state_at(trainer, start), 0, 1)
    assert float(progress.loss) == pytest.approx(expected, rel=1e-12)


def test_steps_are_those_of_optaxs_sam_and_adamw_on_a_plain_loss(trainer, start):
    """Its transparent form, which the trainer does not use: two updates make a step."""
    decayed = {name: value.ndim > 1 and "norm" not in name for name, value in start.items()}
    assert set(decayed.values()) == {True, False}
    plain = dataclasses.replace(ALL, weight_decay=0.0)
    first = FIT.learning_rate / FIT.warmup
    rate = [first + (FIT.learning_rate - first) * step / FIT.warmup for step in range(STEPS)]
    sam = optax.contrib.sam(
        default_optimizer(plain),
        optax.chain(optax.contrib.normalize(), optax.sgd(RHO)),
        sync_period=2,
    )
    gradient = jax.jit(jax.grad(losses_of(trainer)))
    update = jax.jit(sam.update)
    parameters = {name: jnp.asarray(value) for name, value in start.items()}
    state = sam.init(parameters)
    for step in range(STEPS):
        before = parameters
        batch = (*trainer.minibatch(TOKENS, step), unit_noise(trainer, step))
        for _ in range(2):
            change, state = update(gradient(parameters, *batch), state, parameters)
            parameters = optax.apply_updates(parameters, change)
        # Decoupled decay, by hand.
        parameters = {
            name: value - rate[step] * DECAY * before[name] if decayed[name] else value
            for name, value in parameters.items()
        }
    ours, _ = trainer.advance(state_at(trainer, start), 0, STEPS)
    found = trainer.guide.median(trainer.guide_params(ours))
    got = {name: np.asarray(value) for name, value in found.items()}
    assert_close(got, parameters, rtol=1e-6, atol=1e-7)  # optax's rate is of single precision


def test_cutting_the_calls_elsewhere_changes_no_digit(trainer, start):
    outcomes = []
    for stops in ([STEPS], range(1, STEPS + 1)):
        state, step = state_at(trainer, start), 0
        for stop in stops:
            state, _ = trainer.advance(state, step, stop)
            step = stop
        outcomes.append({k: np.asarray(v) for k, v in named_leaves(state.svi.optim_state).items()})
    assert outcomes[0].keys() == outcomes[1].keys()
    for name, value in outcomes[0].items():
        np.testing.assert_array_equal(outcomes[1][name], value, err_msg=name)


def test_neftune_is_uniform_and_of_its_own_scale():
    """alpha / sqrt(T d) times uniform on [-1, 1], whatever the embeddings (Jain et al. 2023)."""
    config = dataclasses.replace(FIT, neftune_alpha=5.0)
    perturb = training_noise(config, jax.random.key(0))["perturb"]
    largest = 5.0 / math.sqrt(16 * 32)
    x = jax.random.normal(jax.random.key(1), (40, 16, 32))
    noise = np.asarray(perturb(x) - x) / largest
    np.testing.assert_allclose(noise, (perturb(100 * x) - 100 * x) / largest, atol=1e-12)
    assert np.abs(noise).max() <= 1 + 1e-12
    fractions = np.histogram(noise, bins=4, range=(-1, 1))[0] / noise.size
    np.testing.assert_allclose(fractions, 0.25, atol=5 * math.sqrt(0.25 * 0.75 / noise.size))


@pytest.mark.parametrize("kind", ["embedding_noise", "neftune_alpha"])
def test_noise_of_some_sequences_leaves_the_others_alone(kind):
    """Those that are perturbed are perturbed whole, as without the option, and are so many."""
    always = dataclasses.replace(FIT, **{kind: 2.0})
    config = dataclasses.replace(always, noise_probability=0.2)
    x = jax.random.normal(jax.random.key(1), (500, 4, 8))
    key = jax.random.key(0)
    noise = np.asarray(training_noise(config, key)["perturb"](x) - x)
    noisy = np.any(noise != 0, axis=(1, 2))
    assert np.all(noise[noisy] != 0)
    assert abs(noisy.mean() - 0.2) < 5 * math.sqrt(0.2 * 0.8 / 500)
    full = np.asarray(training_noise(always, key)["perturb"](x) - x)
    assert noise[noisy].std() == pytest.approx(full.std(), rel=0.05)


def test_no_noise_is_no_option():
    assert training_noise(FIT, jax.random.key(0)) == {}


def test_a_decay_that_the_given_optimizer_would_not_know_of_is_refused(tmp_path):
    config = dataclasses.replace(tiny_config(tmp_path), fit=ALL)
    with pytest.raises(ValueError, match=r"^fit\.weight_decay is 5\.0 and an optimizer is given"):
        fit(config, tmp_path / "run", optimizer=optax.sgd(0.1))
    assert not (tmp_path / "run").exists()


def test_an_optimizer_beside_ivon_is_refused(tmp_path):
    config = dataclasses.replace(tiny_config(tmp_path), fit=dataclasses.replace(FIT, guide="ivon"))
    with pytest.raises(ValueError, match=r"^fit\.guide is ivon and an optimizer is given"):
        fit(config, tmp_path / "run", optimizer=optax.sgd(0.1))
    assert not (tmp_path / "run").exists()
