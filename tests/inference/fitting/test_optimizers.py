"""Optimizers of optax's in a fit: what they ask for, what their state holds, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro.infer.svi import SVIState

from probattn.inference import fit
from probattn.inference.fitting.optimizers import OptaxOptimizer, check_step, svi_optimizer
from probattn.inference.fitting.train_state import TrainState, with_key_data, with_keys
from probattn.inference.runs.checkpoints import named_leaves
from tests.support.refusals import refusal
from tests.support.tiny_run import FIT
from tests.support.whole_fit import with_fit

TARGET = np.array([3.0, -1.0, 0.5])
SCALES = np.array([1.0, 30.0, 900.0])


def quadratic(params):
    return jnp.sum(SCALES * (params["w"] - TARGET) ** 2), "auxiliary"


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_in_a_state_become_numbers_and_keys_again(impl):
    key, other = jax.random.key(3), jax.random.key(7, impl=impl)
    optimizer_state = {"mean": jnp.ones(2), "noise": jax.random.split(other, 4)}
    state = TrainState(SVIState(optimizer_state, None, key), jnp.zeros(()), 0, 0)
    state = jax.tree.map(jnp.asarray, state)
    plain = with_key_data(state)
    for name, leaf in named_leaves(plain).items():
        assert np.asarray(leaf).dtype.kind in "fui", name
    back = with_keys(plain, state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for found, expected in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(*map(with_numbers, (found, expected)))


def with_numbers(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


@pytest.mark.parametrize("name", ["lbfgs", "reduce_on_plateau", "noisy_sgd", "adam"])
def test_a_step_that_can_be_taken_is_let_pass(name):
    optimizers = {
        "lbfgs": optax.lbfgs(),
        "reduce_on_plateau": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
        "noisy_sgd": optax.noisy_sgd(0.1, key=jax.random.key(0)),
        "adam": optax.adam(0.1),
    }
    check_step(OptaxOptimizer(optimizers[name]), {"w": jax.ShapeDtypeStruct((3,), jnp.float32)})


def test_what_no_step_gives_is_refused_by_name():
    sharp = svi_optimizer(optax.lbfgs(), dataclasses.replace(FIT, sam_rho=0.1))
    message = refusal(ValueError, check_step, sharp, {"w": jnp.zeros(3)})
    assert "the optimizer cannot take a step (scale_by_zoom_linesearch" in message
    assert "missing 3 required keyword-only arguments" in message

    def update(gradient, state, params=None, *, hessian, **others):
        return gradient, state

    own = optax.GradientTransformationExtraArgs(lambda params: (), update)
    message = refusal(ValueError, check_step, OptaxOptimizer(own), {"w": jnp.zeros(3)})
    assert "update() missing 1 required keyword-only argument: 'hessian'" in message


@pytest.mark.slow
def test_lbfgs_finds_the_minimum_that_gradient_descent_does_not():
    found = {}
    for name, optimizer in (("lbfgs", optax.lbfgs()), ("sgd", optax.sgd(1e-3))):
        optim = OptaxOptimizer(optimizer)
        state = optim.init({"w": jnp.zeros(3)})
        step = jax.jit(lambda state, optim=optim: optim.eval_and_update(quadratic, state)[1])
        for _ in range(20):
            state = step(state)
        found[name] = optim.get_params(state)["w"]
    np.testing.assert_allclose(found["lbfgs"], TARGET, rtol=1e-6)
    assert np.abs(found["sgd"] - TARGET).max() > 1


@pytest.mark.slow
def test_a_fit_whose_optimizer_draws_noise_is_saved_and_goes_on(config, tmp_path):
    def optimizer():
        return optax.noisy_sgd(1e-3, key=jax.random.key(5))

    short = with_fit(config, steps=6, warmup=0, eval_every=3, checkpoint_every=3)
    whole = fit(short, tmp_path / "whole", optimizer=optimizer()).run
    begun = dataclasses.replace(short, fit=dataclasses.replace(short.fit, steps=3))
    fit(begun, tmp_path / "cut", optimizer=optimizer())
    config_file = tmp_path / "cut" / "config.toml"
    config_file.write_text((tmp_path / "whole" / "config.toml").read_text())
    resumed = fit(short, tmp_path / "cut", resume=True, optimizer=optimizer()).run
    for name, value in whole.parameters.items():
        np.testing.assert_array_equal(resumed.parameters[name], value, err_msg=name)


@pytest.mark.slow
def test_a_fit_by_lbfgs(config, tmp_path):
    short = with_fit(config, steps=20, eval_every=10, checkpoint_every=10)
    rows = fit(short, tmp_path / "run", optimizer=optax.lbfgs()).run.metrics()
    assert rows[1]["loss"] < rows[0]["loss"]


@pytest.mark.slow
def test_an_optimizer_that_is_refused_leaves_no_run(config, tmp_path):
    sharp = with_fit(config, sam_rho=0.1)
    message = refusal(ValueError, fit, sharp, tmp_path / "run", optimizer=optax.lbfgs())
    assert "scale_by_zoom_linesearch" in message
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    refusal(ValueError, fit, sharp, tmp_path / "run", optimizer=optax.lbfgs())
    assert {entry.name for entry in (tmp_path / "run").iterdir()} <= {"lock"}
