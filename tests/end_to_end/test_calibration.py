"""Simulation-based calibration, small: the posterior of the process agrees with its simulation."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probattn import residual
from probattn.models.coupling import attention_weights_of
from tests.support.project import BENCHMARKS, benchmark

REPLICATIONS = 80
# Fewer steps than of the benchmark: ranks stay uniform where they should, and others do not.
STEPS = {"warmup": 200, "thin": 4}


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
