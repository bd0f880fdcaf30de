"""MCLMC and its ensembles: moments, the boundary of the feasible region, where chains start."""

import sys
from dataclasses import replace
from functools import partial

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.stats import chi2
from scipy.stats import t as student_t

from probattn.inference import SampleConfig, sample, to_datatree
from probattn.inference.runtime.signals import Interrupted
from probattn.inference.sampling import chains as chains_module
from probattn.models import LatentEmbeddingsConfig, observed_embeddings
from tests.support.conjugate import location, posterior_mean, precision

DATA = np.random.default_rng(5).normal([1.0, -2.0], [1.0, 2.0], (12, 2))
FEW = SampleConfig(method="mclmc", chains=2, warmup=60, draws=20, seed=3)
WAYS = pytest.mark.parametrize("adjusted", [False, True])


@pytest.fixture(scope="module", name="whole")
def whole_fixture():
    return sample(location, model_args=(DATA,), config=FEW)


@pytest.mark.slow
def test_moments_of_a_gaussian_and_the_bias_of_the_step():
    """Small steps have no bias to be seen; the bias of large ones shrinks with them."""
    scales = np.geomspace(0.03, 3.0, 12)

    def model():
        numpyro.sample("x", dist.Normal(np.arange(12.0), scales).to_event(1))

    config = SampleConfig(method="mclmc", warmup=600, draws=3000, chain_method="vectorized")
    apart = []
    for wanted in (1e-4, 0.1, 1.0):
        result = sample(model, config=replace(config, energy_variance=wanted))
        assert 0.3 < result.statistics["energy_variance"].mean() / wanted < 3
        draws = result.draws["x"]
        apart.append(np.mean(draws.std((0, 1)) / scales - 1))
        if wanted > 1e-4:
            continue
        for axis, scale in enumerate(scales):
            mean, sd = draws[..., axis].mean(), draws[..., axis].std()
            assert abs(mean - axis) < 3.5 * float(az.mcse(draws[..., axis])), axis
            assert abs(sd - scale) < 3.5 * float(az.mcse(draws[..., axis], method="sd")), axis
    assert abs(apart[0]) < abs(apart[1]) / 2 < abs(apart[2]) / 4, apart


@pytest.mark.slow
@WAYS
def test_large_steps_have_no_bias_where_they_are_adjusted(adjusted):
    """Twelve scales, at an acceptance that lets most energy errors be seen."""
    scales = np.geomspace(0.03, 3.0, 12)

    def model():
        numpyro.sample("x", dist.StudentT(5.0, 0.0, scales).to_event(1))

    settings = {"target_accept": 0.5, "steps": 8} if adjusted else {"energy_variance": 1.0}
    config = SampleConfig(
        method="mclmc", adjusted=adjusted, warmup=600, draws=6000, chain_method="vectorized"
    )
    draws = sample(model, config=replace(config, **settings)).draws["x"]
    inside = (np.abs(draws) < scales).astype(float)
    error = np.array([float(az.mcse(inside[..., axis])) for axis in range(12)])
    apart = (inside.mean((0, 1)) - (2 * student_t(5).cdf(1) - 1)) / error
    assert (np.sum(apart**2) < chi2(12).ppf(0.999)) == adjusted, apart


@pytest.mark.slow
@WAYS
@pytest.mark.parametrize("chain_method", ["parallel", "vectorized"])
def test_moments_of_locations(chain_method, adjusted):
    config = replace(FEW, warmup=300, draws=2000, chain_method=chain_method, temperature=4.0)
    config = replace(config, adjusted=adjusted)
    result = sample(location, model_args=(DATA,), config=config)
    for axis in range(2):
        draws = result.draws["mean"][..., axis]
        apart = draws.mean() - posterior_mean(DATA)[axis]
        assert abs(apart) < 3 * float(az.mcse(draws))
        apart = draws.std() - 2 / np.sqrt(precision(DATA))  # at temperature 4
        assert abs(apart) < 3 * float(az.mcse(draws, method="sd"))


@pytest.mark.slow
@WAYS
def test_a_wall_is_not_crossed_and_does_not_bend_the_density(adjusted):
    """A half-normal coordinate among four: a fresh momentum at the wall would give 0.10."""

    def walled():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        numpyro.factor("wall", jnp.where(x[0] > 0.0, 0.0, -jnp.inf))

    config = SampleConfig(
        method="mclmc", adjusted=adjusted, warmup=500, draws=10_000, chain_method="vectorized"
    )
    result = sample(walled, config=config, init_values={"x": np.full(4, 0.5)})
    x = result.draws["x"][..., 0]
    assert x.min() > 0
    assert result.divergences > 100
    assert np.all(np.isfinite(result.statistics["lp"]))
    near = (x < 0.1).astype(float)
    assert abs(near.mean() - 0.0796557) < 3 * float(az.mcse(near))
    assert abs(x.mean() - np.sqrt(2 / np.pi)) < 3 * float(az.mcse(x))


@pytest.mark.slow
def test_no_draw_of_a_free_coupling_is_infeasible():
    """The paper's density is zero where a determinant is not positive."""
    config = LatentEmbeddingsConfig(width=1, sequences=2, length=4, coupling="free")
    x = np.array([[0.4, -1.1, 0.9, 1.4], [-0.2, 1.3, 0.1, -0.8]])[..., None]
    result = sample(
        partial(observed_embeddings, config=config),
        model_args=(x,),
        config=replace(FEW, draws=500, steps=4, energy_variance=0.5),
    )
    assert result.divergences > 0
    assert to_datatree(result)["posterior"]["smallest_margin"].values.min() > 0


@pytest.mark.slow
@WAYS
def test_interrupted_and_resumed_ends_as_uninterrupted(
    adjusted, whole, tmp_path, monkeypatch, interrupt_after
):
    """In the warm-up: what it has found so far is in the segments."""
    config = replace(FEW, adjusted=adjusted)
    if adjusted:
        whole = sample(location, model_args=(DATA,), config=config)
    arguments = {"model_args": (DATA,), "config": config, "out": tmp_path}
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        patch.setattr(chains_module, "_ITERATIONS", 7)
        with pytest.raises(Interrupted):
            sample(location, **arguments)
    result = sample(location, **arguments, resume=True)
    np.testing.assert_array_equal(result.draws["mean"], whole.draws["mean"])
    for name, values in whole.statistics.items():
        np.testing.assert_array_equal(result.statistics[name], values)


# Ensembles


@pytest.mark.slow
def test_an_ensemble_starts_every_chain_at_its_own_point():
    values = {"mean": np.array([[0.5, 1.0], [-3.0, 2.0], [7.0, 8.0]])}
    config = replace(FEW, method="ensemble", chains=3)
    with jax.enable_x64(True):
        state = chains_module.Chains(location, ((DATA,), {}), config, values).saved()
    np.testing.assert_array_equal(state["position"], values["mean"])
    result = sample(location, model_args=(DATA,), config=config, init_values=values)
    assert result.method == "ensemble"
    assert result.draws["mean"].shape == (3, 20, 2)


def test_ensembles_of_wrong_starts():
    config = replace(FEW, method="ensemble", chains=3)
    with pytest.raises(ValueError, match="ensemble without initial values: expected init_values"):
        sample(location, model_args=(DATA,), config=config)
    message = r"mean of shape \(2,\): expected \(3, 2\), values for each of 3 chains"
    with pytest.raises(ValueError, match=message):
        sample(location, model_args=(DATA,), config=config, init_values={"mean": np.zeros(2)})


@pytest.mark.slow
def test_a_start_of_one_chain_outside_the_feasible_region():
    config = LatentEmbeddingsConfig(width=1, sequences=1, length=4, coupling="free")
    x = np.array([[[-4.0], [4.0], [0.0], [0.1]]])
    values = {"free_coupling": np.array([-0.1, 0.3])[:, None, None], "scale": np.ones(2)}
    message = r"initial values of chain 1 have a log density of -inf: 2 tokens have a determinant"
    with pytest.raises(ValueError, match=message):
        sample(
            partial(observed_embeddings, config=config),
            model_args=(x,),
            config=replace(FEW, method="ensemble"),
            init_values=values,
        )


# Refusals


def test_a_single_number_and_a_short_warmup():
    def one():
        numpyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"one unconstrained number, and sample\.method mclmc"):
        sample(one, config=FEW)
    with pytest.raises(ValueError, match=r"sample\.warmup is 10 with sample\.method mclmc"):
        sample(location, model_args=(DATA,), config=replace(FEW, warmup=10))


def test_without_blackjax(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "blackjax"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "blackjax", None)
    with pytest.raises(ImportError, match=r"blackjax is not installed.*'probattn\[samplers\]'"):
        sample(location, model_args=(DATA,), config=FEW)


@pytest.mark.slow
def test_draws_of_another_temperature_are_named_and_have_no_leave_one_out():
    result = sample(location, model_args=(DATA,), config=replace(FEW, temperature=0.5))
    assert "mclmc at temperature 0.5" in repr(result)
    assert to_datatree(result).attrs["temperature"] == 0.5
    message = "log_likelihood of draws by mclmc at temperature 0.5: leave-one-out takes draws of"
    with pytest.raises(ValueError, match=message):
        to_datatree(result, log_likelihood=True)
