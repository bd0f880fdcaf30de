"""Simulation-based calibration, small: the posterior of the process agrees with its simulation."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.handlers import seed
from numpyro.infer.util import log_density
from scipy.stats import norm

from probattn import residual
from probattn.inference import SampleConfig, sample, to_datatree
from probattn.models.coupling import attention_weights_of
from tests.support.project import BENCHMARKS, benchmark

REPLICATIONS = 80
# Fewer steps than of the benchmark: ranks stay uniform where they should, and others do not.
STEPS = {"config": SampleConfig(warmup=200), "thin": 4}


@pytest.fixture(scope="module", name="calibration")
def calibration_fixture():
    with benchmark("calibration") as module:
        yield module


def level_of_each(result):
    return 0.05 / len(result["quantities"])


def smallest_p_value(result):
    return min(row["p_value"] for row in result["quantities"].values())


@pytest.mark.slow
def test_ranks_are_uniform_where_the_process_is_proper(calibration):
    setting = calibration.settings("bounded")["observed bounded"]
    result = calibration.calibrate(setting, replications=REPLICATIONS, **STEPS)
    assert result["replications"] == REPLICATIONS
    assert result["diverging_draws"] == 0
    assert smallest_p_value(result) > level_of_each(result)


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["mclmc", "sghmc"])
def test_ranks_of_other_samplers_are_uniform(calibration, method):
    config = SampleConfig(method=method, warmup=200, **calibration.METHODS[method])
    setting = calibration.settings_of(config, without=False)["observed bounded"]
    result = calibration.calibrate(setting, replications=REPLICATIONS // 2, config=config, thin=4)
    assert result["diverging_draws"] == 0
    assert smallest_p_value(result) > level_of_each(result)


@pytest.mark.slow
def test_a_plate_of_rows_changes_no_density(calibration):
    """The setting of the stochastic samplers is the one of the others, in other words."""
    setting = calibration.settings("bounded")["observed bounded"]
    embeddings = calibration.ancestral(setting.model, jax.random.key(2))["embeddings"]
    sites = ("repulsion", "rotation", "scale")
    start = calibration.ancestral(setting.model, jax.random.key(3))
    values = {name: start[name] for name in sites}
    found, expected = (
        log_density(seed(one.model, jax.random.key(0)), (embeddings,), {}, values)[0]
        for one in (calibration.in_a_plate_of_rows(setting), setting)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.fixture(scope="module", name="by_nuts")
def by_nuts_fixture(calibration):
    """The margins of observed embeddings, with the model and its data."""
    setting = calibration.settings("bounded")["observed bounded"]
    with jax.enable_x64(True):
        embeddings = calibration.ancestral(setting.model, jax.random.key(2))["embeddings"]
    return setting, embeddings, margins_of(setting.model, embeddings)


def margins_of(model, embeddings, **settings):
    """Return mean and standard deviation of every margin, by long chains."""
    config = SampleConfig(warmup=500, draws=4000, chain_method="vectorized", **settings)
    result = sample(model, model_args=(embeddings,), config=config)
    margin = to_datatree(result)["posterior"]["margin"].values[..., 2:]
    return margin.mean((0, 1)), margin.std((0, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "mclmc", "energy_variance": 5e-5},
        {"method": "mclmc", "adjusted": True, "steps": 4},
        {"method": "sghmc", "steps": 32, "step_size": 0.1, "friction": 0.2},
        pytest.param({"method": "sgld", "steps": 64, "step_size": 0.03}, marks=pytest.mark.nightly),
    ],
)
def test_other_samplers_have_the_margins_of_nuts(settings, calibration, by_nuts):
    """At steps without a bias to be seen: to 5 %, of which 2 % are the noise of NUTS itself."""
    setting, embeddings, (mean, sd) = by_nuts
    if settings["method"] != "mclmc":
        setting = calibration.in_a_plate_of_rows(setting)
    found, found_sd = margins_of(setting.model, embeddings, **settings)
    np.testing.assert_allclose(found, mean, rtol=0.05)
    assert np.sqrt(np.mean((found_sd / sd - 1) ** 2)) < 0.05


def test_a_lean_of_the_ranks_is_told_in_standard_errors(calibration):
    ranks = np.arange(100).repeat(3)  # uniform: no lean
    assert calibration._uniformity(list(ranks))["p_value"] == pytest.approx(1)
    row = calibration._uniformity([0] * 12 + [99] * 4)
    assert row["standard_errors"] == pytest.approx(
        (99 / 4 - 99 / 2) / np.sqrt(np.var(np.arange(100)) / 16), abs=1e-3
    )
    assert row["p_value"] == pytest.approx(2 * norm.cdf(row["standard_errors"]), rel=1e-2)
    assert row["counts"] == [12, *[0] * 8, 4]


@pytest.mark.nightly
def test_a_simulation_of_another_model_is_noticed(calibration):
    """Embeddings half as large as the fitted model says; a quarter of the replications do."""

    def smaller(model, rng_key):
        sites = calibration.ancestral(model, rng_key)
        return sites | {"embeddings": sites["embeddings"] / 2}

    setting = calibration.settings("bounded")["observed bounded"]._replace(simulate=smaller)
    result = calibration.calibrate(setting, replications=REPLICATIONS // 4, **STEPS)
    assert result["quantities"]["scale"]["p_value"] < level_of_each(result)


@pytest.mark.slow
def test_a_density_without_its_log_determinant_is_noticed(calibration):
    """An eighth of the replications is enough: see docs/calibration.md."""
    setting = calibration.settings("repulsive")["observed repulsive"]
    result = calibration.calibrate(
        calibration.without_log_det(setting), replications=REPLICATIONS // 8, **STEPS
    )
    assert result["quantities"]["sum_of_log_dets"]["p_value"] < level_of_each(result)


@pytest.mark.slow
def test_continuation_solves_the_residual_equation(calibration):
    e = jax.random.normal(jax.random.key(0), (calibration.LENGTH, calibration.WIDTH))
    coupling = 0.4 * jax.random.normal(jax.random.key(1), (2, 2))
    x = calibration._continuation(e, coupling)
    np.testing.assert_allclose(residual(x, *attention_weights_of(coupling)), e, atol=1e-7)
    assert jnp.all(jnp.isfinite(x))


def test_committed_result_is_of_the_stated_size():
    result = json.loads((BENCHMARKS / "results/calibration.json").read_text(encoding="utf-8"))
    assert all(each["replications"] >= 200 for each in result["settings"].values())
    assert result["size"]["width"] == 2
