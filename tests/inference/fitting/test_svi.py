"""Steps of a fit: the loss, NumPyro's own loop, and the step that would cross the boundary."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta
from numpyro.infer.initialization import init_to_value
from numpyro.infer.util import log_density
from scipy.optimize import brentq
from scipy.special import logsumexp

from probattn.inference import FitConfig
from probattn.inference.fitting.optimizers import default_optimizer
from probattn.inference.fitting.svi import Trainer
from probattn.inference.fitting.train_state import training_keys
from probattn.inference.runs.checkpoints import named_leaves
from probattn.models import language_model
from probattn.models.transformer import embed, logits
from tests.support.tiny_run import BLOCK, FIT, MODEL, RANK, WIDTH
from tests.support.tiny_trainer import (
    CE,
    FULL,
    SEQUENCES,
    TOKENS,
    VOCABULARY,
    assert_close,
    draw,
    log_prior,
    state_at,
)

OPTIMIZER = "svi.optim_state.1.1."  # of its state in the names of the state's leaves


@pytest.fixture(scope="module")
def ce():
    return Trainer(CE, TOKENS, VOCABULARY.size)


@pytest.fixture(scope="module")
def full():
    """Its optimizer does what its state says: a push, minus a rate times the gradient."""

    def init(parameters):
        return {"push": jax.tree.map(jnp.zeros_like, parameters), "rate": jnp.zeros(())}

    def update(gradient, state, _):
        step = jax.tree.map(lambda push, g: push - state["rate"] * g, state["push"], gradient)
        return step, state

    optimizer = optax.GradientTransformation(init, update)
    return Trainer(FULL, TOKENS, VOCABULARY.size, optimizer)


def parameters_of(trainer, state):
    return trainer.guide.median(trainer.guide_params(state))


def descend(trainer, parameters, *, rate=0.0, push=(), stop=1):
    """Parameters after some steps, how many were rejected, and where the call stopped."""
    told = {f"{OPTIMIZER}push.{name}_auto_loc": jnp.array(v) for name, v in dict(push).items()}
    told[f"{OPTIMIZER}rate"] = jnp.asarray(rate, jnp.float64)
    state, progress = trainer.advance(state_at(trainer, parameters, **told), 0, stop)
    return as_numpy(parameters_of(trainer, state)), int(state.rejected), progress


def as_numpy(parameters):
    return {name: np.asarray(value) for name, value in parameters.items()}


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


# The loop


def scaled_model(config):
    model = partial(
        language_model,
        vocabulary_size=VOCABULARY.size,
        config=MODEL,
        objective=config.objective,
        num_sequences=SEQUENCES,
    )
    return numpyro.handlers.scale(model, 1 / (SEQUENCES * BLOCK))


def test_steps_are_those_of_numpyros_own_loop(ce):
    start = draw(CE)
    model = scaled_model(CE)
    guide = AutoDelta(model, init_loc_fn=init_to_value(values=start))
    svi = SVI(model, guide, default_optimizer(FIT), Trace_ELBO())
    state = jax.jit(svi.init)(jax.random.key(5), *ce.minibatch(TOKENS, 0))
    update, losses = jax.jit(svi.update), []
    for step in range(5):
        state, loss = update(state, *ce.minibatch(TOKENS, step))
        losses.append(float(loss))

    ours, progress = ce.advance(state_at(ce, start), 0, 5)
    assert (int(progress.step), int(ours.loss_count), int(ours.rejected)) == (5, 5, 0)
    assert float(progress.loss) == pytest.approx(losses[-1], rel=1e-13)
    assert float(ours.loss_sum) == pytest.approx(sum(losses), rel=1e-13)
    expected = guide.median(svi.get_params(state))
    assert np.abs(expected["token_embedding"] - start["token_embedding"]).max() > 0.05
    assert_close(parameters_of(ce, ours), expected)


def test_cutting_the_calls_elsewhere_changes_no_digit(ce):
    outcomes = []
    for stops in ([6], [1, 2, 3, 4, 5, 6], [4, 6]):
        state, step = state_at(ce, draw(CE)), 0
        for stop in stops:
            state, _ = ce.advance(state, step, stop)
            step = stop
        plain = state._replace(
            svi=state.svi._replace(rng_key=jax.random.key_data(state.svi.rng_key))
        )
        outcomes.append(as_numpy(named_leaves(plain)))
    assert_equal(outcomes[1], outcomes[0])
    assert_equal(outcomes[2], outcomes[0])


def test_minibatches_are_functions_of_seed_and_step(ce):
    for step in (0, 1, 199):
        inputs, targets = ce.minibatch(TOKENS, step)
        assert inputs.shape == targets.shape == (FIT.batch, BLOCK)
        np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
        np.testing.assert_array_equal(inputs, ce.minibatch(TOKENS, jnp.int32(step))[0])
    assert not np.array_equal(ce.minibatch(TOKENS, 0)[0], ce.minibatch(TOKENS, 1)[0])
    same, other = (
        ce.minibatch(TOKENS, 0, training_keys(np.uint32(seed))) for seed in (FIT.seed, FIT.seed + 1)
    )
    np.testing.assert_array_equal(same[0], ce.minibatch(TOKENS, 0)[0])
    assert not np.array_equal(other[0], same[0])


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_call(full):
    _, _, progress = descend(full, draw(FULL), rate=np.nan, stop=10)
    assert (int(progress.step), bool(progress.finite)) == (2, False)
    assert math.isnan(progress.loss)


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_the_default_optimizer_warms_up_and_decays_to_a_tenth(warmup):
    config = FitConfig(steps=20, warmup=warmup, learning_rate=0.2)
    optimizer = default_optimizer(config)
    gradient = jnp.array([3.0, -1e-2])  # constant, so that Adam moves by the learning rate
    state, rates = optimizer.init(gradient), []
    step = jax.jit(optimizer.update)
    for _ in range(21):
        update, state = step(gradient, state)
        np.testing.assert_allclose(update[0], -update[1], rtol=1e-5)
        rates.append(-float(update[0]))
    steps = np.arange(21)
    falling = 0.02 + 0.18 * (1 + np.cos(np.pi * (steps - warmup) / (20 - warmup))) / 2
    start = 0.2 / max(warmup, 1)  # not zero: the first step is to move
    rising = start + (0.2 - start) * steps / max(warmup, 1)
    np.testing.assert_allclose(rates, np.where(steps < warmup, rising, falling), rtol=1e-5)


# The loss


def determinants(parameters, inputs):
    """det D_t = det(I - Sigma_t A) of every token, from the definition."""
    x = np.asarray(embed(parameters, inputs))
    coupling = parameters["w_key"] @ parameters["w_query"].T / math.sqrt(RANK)
    results = np.ones(x.shape[:2])
    for sequence, t in np.ndindex(*x.shape[:2]):
        if t >= 2:
            past, alpha = attended(x[sequence, : t + 1], parameters)
            centred = past - alpha @ past
            covariance = (alpha[:, None] * centred).T @ centred
            results[sequence, t] = np.linalg.det(np.eye(WIDTH) - covariance @ coupling)
    return results


def attended(tokens, parameters):
    """Past of the last token, and the weights of its attention."""
    past, last = tokens[:-1], tokens[-1]
    scores = past @ parameters["w_key"] @ (last @ parameters["w_query"]) / math.sqrt(RANK)
    return past, np.exp(scores - logsumexp(scores))


def energies(parameters, inputs):
    """||e_t||^2 / 2 of every token."""
    x = np.asarray(embed(parameters, inputs))
    results = (x**2).sum(-1) / 2
    for sequence, t in np.ndindex(*x.shape[:2]):
        if t >= 1:
            past, alpha = attended(x[sequence, : t + 1], parameters)
            results[sequence, t] = ((x[sequence, t] - alpha @ past) ** 2).sum() / 2
    return results


def objective(parameters, inputs, targets):
    """CE + 0.7 barrier + 0.3 ||e||^2 / (2 0.5^2) - log prior / N, where all determinants are > 0.

    N counts the tokens of whole blocks.
    """
    network = jax.jit(partial(logits, heads=MODEL.heads))
    scores = np.asarray(network(parameters, embed(parameters, inputs)))
    picked = np.take_along_axis(scores, np.asarray(targets)[..., None], -1)[..., 0]
    return (
        np.mean(logsumexp(scores, axis=-1) - picked)
        - 0.7 * np.mean(np.log(determinants(parameters, inputs)))
        + 0.3 * np.mean(energies(parameters, inputs)) / 0.5**2
        - log_prior(parameters) / (SEQUENCES * BLOCK)
    )


def test_the_loss_is_the_objective_per_token(full):
    parameters = draw(FULL)
    inputs, targets = full.minibatch(TOKENS, 0)
    assert determinants(parameters, inputs).min() > FULL.objective.delta
    _, _, progress = descend(full, parameters)
    assert float(progress.loss) == pytest.approx(objective(parameters, inputs, targets), rel=1e-12)


# The boundary


@pytest.fixture(scope="module")
def gradient(full):
    """Gradient of the loss of the first minibatch, from NumPyro's log density."""
    batch = full.minibatch(TOKENS, 0)
    model = numpyro.handlers.seed(scaled_model(FULL), 0)  # of the plate, whose indices are not used

    def loss(parameters):
        return -log_density(model, batch, {}, parameters)[0]

    compiled = jax.jit(jax.grad(loss))
    return lambda parameters: as_numpy(compiled(parameters))


def moved(parameters, direction, size=1.0):
    return {
        name: value + size * direction[name] if name in direction else value
        for name, value in parameters.items()
    }


def attractive(scale):
    """Parameters with a coupling A that is positive semidefinite: the larger, the less stable."""
    parameters = draw(FULL, 2, w_query=0.3, token_embedding=4)
    return parameters | {"w_key": scale * parameters["w_query"]}


def smallest(parameters, inputs):
    return determinants(parameters, inputs).min()


@pytest.mark.parametrize("rate", [0.3, 1.0, 5.0])
def test_a_step_over_the_boundary_is_halved_until_it_stays_inside(full, gradient, rate):
    start = attractive(10.0)
    inputs, _ = full.minibatch(TOKENS, 0)
    step = {name: -rate * slope for name, slope in gradient(start).items()}
    assert smallest(start, inputs) > 0
    assert smallest(moved(start, step), inputs) < 0  # plain gradient descent would leave
    halvings = next(n for n in range(10) if smallest(moved(start, step, 2.0**-n), inputs) > 0)

    got, rejected, _ = descend(full, start, rate=rate)
    assert rejected == 1
    assert_close(got, moved(start, step, 2.0**-halvings))


def test_a_step_that_no_halving_brings_inside_is_not_taken(full):
    inputs, _ = full.minibatch(TOKENS, 0)
    edge = brentq(lambda scale: smallest(attractive(scale), inputs), 8.0, 100.0)
    start = attractive(edge * (1 - 1e-9))
    push = {"w_key": start["w_key"] / 2}
    assert smallest(start, inputs) > 0
    assert all(smallest(moved(start, push, 2.0**-n), inputs) < 0 for n in range(11))
    got, rejected, _ = descend(full, start, push=push)
    assert rejected == 1
    assert_equal(got, start)


def test_a_step_that_stays_inside_is_left_as_it_is(full, gradient):
    start = attractive(5.0)
    step = {name: -1e-3 * slope for name, slope in gradient(start).items()}
    got, rejected, _ = descend(full, start, rate=1e-3)
    assert rejected == 0
    assert_close(got, moved(start, step))


def test_a_minibatch_that_is_infeasible_already_does_not_freeze_the_fit(full, gradient):
    start = attractive(100.0)
    inputs, _ = full.minibatch(TOKENS, 0)
    before = determinants(start, inputs)
    assert before.min() < 0 < before.max()
    slope = gradient(start)
    rate = 1e-3 / max(np.abs(value).max() for value in slope.values())
    step = {name: -rate * value for name, value in slope.items()}
    assert (determinants(moved(start, step), inputs) > 0)[before > 0].all()
    got, rejected, _ = descend(full, start, rate=rate)
    assert rejected == 0
    assert_close(got, moved(start, step))


def test_positions_inside_stay_inside_beside_those_outside(full):
    start = attractive(30.0)
    inputs, _ = full.minibatch(TOKENS, 0)
    inside = determinants(start, inputs) > 0
    assert not inside.all()

    def breaks(size):
        return not (determinants(moved(start, push, size), inputs) > 0)[inside].all()

    push = {"w_key": start["w_key"]}
    halvings = next(n for n in range(10) if not breaks(2.0**-n))
    assert halvings > 0
    got, rejected, _ = descend(full, start, push=push)
    assert rejected == 1
    assert_close(got, moved(start, push, 2.0**-halvings))


def test_every_minibatch_of_a_fit_is_kept_inside(full):
    state = state_at(full, attractive(10.0), **{f"{OPTIMIZER}rate": jnp.asarray(0.3)})
    rejected = [0]
    for step in range(20):
        inputs, _ = full.minibatch(TOKENS, step)
        before = determinants(as_numpy(parameters_of(full, state)), inputs)
        state, progress = full.advance(state, step, step + 1)
        assert bool(progress.finite)
        after = determinants(as_numpy(parameters_of(full, state)), inputs)
        assert (after > 0)[before > 0].all()
        rejected.append(int(state.rejected))
    assert set(np.diff(rejected)) == {0, 1}  # one for a step, however often it is halved
