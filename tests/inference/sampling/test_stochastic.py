"""SGLD and SGHMC: moments with the bias that a step of finite size has, and what is refused."""

import hashlib
from dataclasses import replace
from functools import partial

import arviz as az
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import log_density
from scipy.stats import norm

from probattn.inference import SampleConfig, sample, to_datatree
from probattn.inference.runtime.signals import Interrupted
from probattn.inference.sampling.chains import SampleError
from probattn.inference.sampling.sample import fingerprint
from tests.support.conjugate import (
    NOISE,
    PRIOR,
    location,
    posterior_mean,
    stationary_variance,
)

DATA = np.random.default_rng(5).normal([1.0, -2.0], [1.0, 2.0], (12, 2))
FEW = SampleConfig(method="sghmc", chains=2, warmup=20, draws=12, seed=3)
PLAIN = {"preconditioned": False, "chain_method": "vectorized"}


def assert_moments(result, variance):
    """Means and variances of a Gaussian, each within three Monte Carlo errors."""
    for axis in range(2):
        draws = result.draws["mean"][..., axis]
        error = float(az.mcse(draws, method="mean"))
        assert abs(draws.mean() - posterior_mean(DATA)[axis]) < 3 * error
        error = float(az.mcse(draws, method="sd"))
        assert abs(draws.std() - np.sqrt(variance[axis])) < 3 * error, (axis, variance, error)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sgld", "sghmc"])
@pytest.mark.parametrize(
    ("batch", "step_size"),
    [
        (12, 0.1),
        (3, 0.025),
        *(pytest.param(*pair, marks=pytest.mark.nightly) for pair in ((12, 0.025), (3, 0.1))),
    ],
)
def test_the_bias_is_the_known_one_of_the_step_and_shrinks_with_it(method, batch, step_size):
    """A minibatch of all rows is the limit of the whole batch, whose gradients have no noise."""
    known = {"batch": batch, "step_size": step_size}
    variance = stationary_variance(method, DATA, **known)
    config = SampleConfig(
        **PLAIN, method=method, step_size=step_size, chains=4, warmup=200, draws=12_000
    )
    result = sample(partial(location, batch=batch), model_args=(DATA,), config=config)
    assert_moments(result, variance)
    exact = stationary_variance(method, DATA, batch=12, step_size=1e-9)
    if step_size == 0.1 and (batch == 3 or method == "sgld"):  # the bias is there to be seen
        error = max(float(az.mcse(result.draws["mean"][..., i], method="sd")) for i in range(2))
        assert np.all(np.sqrt(variance) - np.sqrt(exact) > 5 * error)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sgld", "sghmc"])
def test_the_temperature_multiplies_the_variance(method):
    config = SampleConfig(
        **PLAIN, method=method, step_size=0.05, chains=4, warmup=200, draws=12_000, temperature=0.25
    )
    result = sample(partial(location, batch=12), model_args=(DATA,), config=config)
    known = stationary_variance(method, DATA, batch=12, step_size=0.05)
    assert_moments(result, known / 4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sgld", "sghmc"])
def test_preconditioned_steps_are_in_units_of_the_posterior(method):
    """Scales from 0.01 to 0.5, of which one step would suit none but the smallest."""
    scales = np.array([0.01, 0.05, 0.5])
    data = np.random.default_rng(0).normal(0.0, 4 * scales, (16, 3))

    def model(observed):
        mean = numpyro.sample("mean", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
        with numpyro.plate("rows", 16, subsample_size=4) as rows:
            numpyro.sample(
                "observed", dist.Normal(mean, 4 * scales).to_event(1), obs=observed[rows]
            )

    config = SampleConfig(method=method, chains=4, warmup=500, draws=3000, step_size=0.05)
    result = sample(model, model_args=(data,), config=config, init_values={"mean": data.mean(0)})
    draws = result.draws["mean"]
    for axis, scale in enumerate(scales):
        # The bias of the variance is at most half of the step, see docs/mathematics.md.
        error = 3 * float(az.mcse(draws[..., axis], method="sd")) / scale
        assert 1 - error < draws[..., axis].std() / scale < np.sqrt(1.05) + error
        error = float(az.mcse(draws[..., axis]))
        assert abs(draws[..., axis].mean() - data[:, axis].mean()) < 3 * error


@pytest.mark.slow
def test_a_start_of_large_gradients_is_left_in_the_warmup():
    """A standard deviation that starts at a fiftieth of the data's; against quadrature."""
    data = np.random.default_rng(1).normal(0.0, 2.0, 48)

    def model(observed):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with numpyro.plate("rows", 48, subsample_size=48) as rows:
            numpyro.sample("observed", dist.Normal(0.0, scale), obs=observed[rows])

    config = SampleConfig(
        method="sghmc", chains=2, warmup=100, draws=500, chain_method="vectorized", step_size=0.1
    )
    result = sample(model, model_args=(data,), config=config, init_values={"scale": 0.04})
    logs = np.linspace(-1, 3, 4001)
    log_p = -(logs**2) / 2 - 48 * logs - (data**2).sum() * np.exp(-2 * logs) / 2
    p = np.exp(log_p - log_p.max())
    mean = np.sum(p * logs) / p.sum()
    sd = np.sqrt(np.sum(p * (logs - mean) ** 2) / p.sum())
    found = np.log(result.draws["scale"])
    assert abs(found.mean() - mean) < 3 * float(az.mcse(found)) < sd
    np.testing.assert_allclose(found.std(), sd, rtol=0.1)


@pytest.mark.slow
def test_cyclical_steps_end_at_small_ones_and_so_have_less_bias():
    config = SampleConfig(
        **PLAIN, method="sgld", step_size=0.2, steps=40, chains=4, warmup=100, draws=10_000
    )
    model = partial(location, batch=3)
    plain = sample(model, model_args=(DATA,), config=config)
    result = sample(model, model_args=(DATA,), config=replace(config, cyclical=True))
    exact = np.sqrt(stationary_variance("sgld", DATA, batch=12, step_size=1e-9))
    constant = np.sqrt(stationary_variance("sgld", DATA, batch=3, step_size=0.2))
    found = result.draws["mean"].std((0, 1))
    np.testing.assert_allclose(plain.draws["mean"].std((0, 1)), constant, rtol=0.03)
    assert np.all(found - exact < (constant - exact) / 3)
    assert result.statistics["step_size"].max() < 0.2 / 100


@pytest.fixture(scope="module", name="whole")
def whole_fixture():
    return sample(partial(location, batch=5), model_args=(DATA,), config=FEW)


@pytest.mark.slow
def test_lp_is_the_log_density_of_all_the_data(whole):
    """Of 12 rows in minibatches of 5, 5 and 2."""
    draws = whole.draws["mean"].reshape(-1, 2)
    expected = [log_density(location, (jnp.asarray(DATA),), {}, {"mean": d})[0] for d in draws[:5]]
    np.testing.assert_allclose(whole.statistics["lp"].reshape(-1)[:5], expected, rtol=1e-12)
    assert whole.method == "sghmc"


@pytest.mark.slow
def test_without_the_density_of_all_the_data_lp_is_that_of_the_first_minibatch(whole):
    """And the draws are the same, where nothing is refused."""
    config = replace(FEW, full_density=False)
    result = sample(partial(location, batch=5), model_args=(DATA,), config=config)
    np.testing.assert_array_equal(result.draws["mean"], whole.draws["mean"])
    draw = result.draws["mean"][0, 0]
    rows = norm(draw, NOISE).logpdf(DATA[:5]).sum()
    expected = norm(0, PRIOR).logpdf(draw).sum() + rows * 12 / 5
    np.testing.assert_allclose(result.statistics["lp"][0, 0], expected, rtol=1e-12)
    np.testing.assert_array_equal(whole.statistics["n_steps"], 16)


@pytest.mark.slow
def test_interrupted_and_resumed_ends_as_uninterrupted(
    whole, tmp_path, monkeypatch, interrupt_after
):
    arguments = {"model_args": (DATA,), "config": FEW, "out": tmp_path}
    model = partial(location, batch=5)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(Interrupted):
            sample(model, **arguments)
    result = sample(model, **arguments, resume=True)
    np.testing.assert_array_equal(result.draws["mean"], whole.draws["mean"])
    np.testing.assert_array_equal(result.statistics["lp"], whole.statistics["lp"])


@pytest.mark.slow
def test_the_export_is_of_all_rows_and_not_of_a_minibatch(whole):
    tree = to_datatree(whole, log_likelihood=True)
    likelihood = tree["log_likelihood"]["observed"].values
    assert likelihood.shape == (2, 12, 12, 2)
    apart = (DATA - whole.draws["mean"][:, :, None]) / 1.5
    expected = -(apart**2) / 2 - np.log(1.5 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(likelihood, expected, rtol=1e-9)
    assert tree.attrs["inference_library"] == "blackjax"
    assert "tree_depth" not in tree["sample_stats"]


def wall(observed, batch):
    """Half of the line has density zero, where only the last row says so."""
    mean = numpyro.sample("mean", dist.Normal(0.5, 1.0))
    with numpyro.plate("rows", len(observed), subsample_size=batch) as rows:
        last = (rows == len(observed) - 1) & (mean < 0)
        numpyro.factor("wall", jnp.where(last, -jnp.inf, 0.0) + 0 * observed[rows])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sgld", "sghmc"])
def test_no_draw_has_density_zero(method):
    """A minibatch without the last row takes chains beyond the boundary."""
    config = SampleConfig(
        **PLAIN, method=method, chains=2, warmup=50, draws=400, step_size=0.1, steps=4
    )
    result = sample(
        partial(wall, batch=2),
        model_args=(np.zeros(6, int),),
        config=config,
        init_values={"mean": 0.5},
    )
    assert result.draws["mean"].min() > 0
    assert result.divergences > 0
    assert np.all(np.isfinite(result.statistics["lp"]))
    refused = result.statistics["diverging"][:, 1:]  # the chain stays where it was
    stays = result.draws["mean"][:, 1:] == result.draws["mean"][:, :-1]
    np.testing.assert_array_equal(stays, refused)


@pytest.mark.slow
def test_a_start_of_density_zero_for_a_row_of_no_first_minibatch():
    message = "chain 0, 1: 100 draws of the prior with the initial values have no finite"
    with pytest.raises(SampleError, match=message):
        sample(
            partial(wall, batch=2),
            model_args=(np.zeros(6, int),),
            config=FEW,
            init_values={"mean": -0.5},
        )


def test_settings_of_nuts_are_what_the_segments_of_older_versions_were_made_with():
    """Their digest knows no settings of the other methods."""
    digest = fingerprint(SampleConfig(draws=7), location, ())
    expected = (
        "SampleConfig(chains=4, warmup=1000, draws=1, seed=0, target_accept=0.8, "
        "max_tree_depth=10, sequences=16, chain_method='parallel', precision='float64')"
    )
    known = hashlib.sha256(expected.encode() + b"location")
    assert digest.tobytes() == known.digest()
    other = fingerprint(replace(FEW, step_size=0.1), location, ())
    assert not np.array_equal(other, fingerprint(FEW, location, ()))
