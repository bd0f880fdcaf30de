"""Models whose plates take minibatches, as draws that NumPyro made, and arguments of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import HMCECS, MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from scipy.stats import norm

from probattn.inference import SampleConfig, sample, to_datatree
from probattn.inference.export.diagnostics import leave_one_out
from tests.support.refusals import refusal

# Sorted, so that rows in another order are other data.
Y = jnp.sort(jnp.asarray(np.random.default_rng(0).normal(2.0, 1.0, 50)))


def rows_of(y, batch=10):
    mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
    numpyro.deterministic("twice", 2 * mean)
    with numpyro.plate("rows", 50, subsample_size=batch) as rows:
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=y[rows])


def subsampled(y, batch=10):
    """The same by NumPyro's own `subsample`."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
    with numpyro.plate("rows", 50, subsample_size=batch):
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=numpyro.subsample(y, event_dim=0))


def assert_of_all_rows(tree):
    np.testing.assert_array_equal(tree["observed_data"]["y"], Y)
    means = tree["posterior"]["mean"].values[..., None]
    found = tree["log_likelihood"]["y"]
    assert found.dims == ("chain", "draw", "rows")
    np.testing.assert_allclose(found, norm.logpdf(np.asarray(Y), means, 1.0), rtol=1e-9)


@pytest.mark.parametrize("model", [rows_of, subsampled])
@pytest.mark.parametrize("batch", [1, 10, 50])
def test_samples_have_the_likelihood_of_all_rows(model, batch):
    draws = {"mean": np.random.default_rng(1).normal(2.0, 0.2, (2, 40))}
    export = {"model": model, "log_likelihood": True, "posterior_predictive": True, "prior": 3}
    tree = to_datatree(draws, model_args=(Y, batch), **export)
    assert_of_all_rows(tree)
    assert tree["posterior_predictive"]["y"].shape == (2, 40, 50)
    whole = to_datatree(draws, model_args=(Y, None), **export)
    assert leave_one_out(tree) == leave_one_out(whole)
    assert tree["prior"].to_dataset().identical(whole["prior"].to_dataset())


def test_several_plates_and_arrays_of_numpy():
    """NumPy's arrays remain NumPy's: a model may count its groups with them."""

    def crossed(y, group):
        means = numpyro.sample("means", dist.Normal(0.0, 5.0).expand([int(group.max()) + 1]))
        with numpyro.plate("first", 5, subsample_size=2) as first:
            of_first = jnp.asarray(means)[group[first]]
            with numpyro.plate("second", 3, dim=-2, subsample_size=2) as second:
                data = jnp.asarray(y)[second[:, None], first]
                numpyro.sample("y", dist.Normal(of_first, 1.0), obs=data)

    rng = np.random.default_rng(4)
    y, group, draws = rng.normal(size=(3, 5)), np.array([0, 1, 0, 1, 1]), rng.normal(size=(6, 2))
    tree = to_datatree({"means": draws}, model=crossed, model_args=(y, group), log_likelihood=True)
    np.testing.assert_array_equal(tree["observed_data"]["y"], y)
    expected = norm.logpdf(y, draws[:, None, group], 1.0)
    np.testing.assert_allclose(tree["log_likelihood"]["y"][0], expected, rtol=1e-9)


def test_a_latent_site_of_each_row_is_refused():
    def local(y, batch):
        with numpyro.plate("rows", 50, subsample_size=batch) as rows:
            shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(shift, 1.0), obs=y[rows])

    for size in (10, 50):
        draws = {"shift": np.zeros((4, size))}
        message = refusal(ValueError, to_datatree, draws, model=local, model_args=(Y, 10))
        assert "the latent site shift is in the plate rows, which takes 10 of 50 rows" in message
    # The way that the message names.
    tree = to_datatree(draws, model=local, model_args=(Y, None), log_likelihood=True)
    assert tree["log_likelihood"]["y"].shape == (1, 4, 50)


@pytest.mark.slow
def test_guides_and_chains_that_saw_minibatches():
    guide = AutoNormal(rows_of)
    svi = SVI(rows_of, guide, numpyro.optim.Adam(0.05), Trace_ELBO())
    result = svi.run(jax.random.key(0), 200, Y, progress_bar=False)
    assert_of_all_rows(
        to_datatree(result, guide=guide, model_args=(Y,), draws=40, log_likelihood=True)
    )
    mcmc = MCMC(
        HMCECS(NUTS(rows_of), num_blocks=2), num_warmup=20, num_samples=40, progress_bar=False
    )
    mcmc.run(jax.random.key(0), Y)
    assert_of_all_rows(to_datatree(mcmc, log_likelihood=True))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_arrays_of_jax_remain_arrays_of_jax(precision):
    def model(y, scale):
        mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
        with numpyro.plate("rows", 50) as rows:
            data = y.at[0].set(0.0)[rows]
            numpyro.sample("y", dist.Normal(mean, scale.at[0].set(2)[rows]), obs=data)

    config = SampleConfig(chains=1, warmup=20, draws=5, precision=precision)
    result = sample(model, model_args=(Y, jnp.ones(50)), config=config)
    tree = to_datatree(result, log_likelihood=True, prior=2)
    data = np.concatenate([[0.0], Y[1:]]).astype(precision)
    assert tree["observed_data"]["y"].dtype == precision
    np.testing.assert_array_equal(tree["observed_data"]["y"], data)
    scales = np.concatenate([[2.0], np.ones(49)])
    expected = norm.logpdf(data, result.draws["mean"][..., None], scales)
    tolerance = {"float32": 1e-5, "float64": 1e-9}[precision]
    np.testing.assert_allclose(tree["log_likelihood"]["y"], expected, rtol=tolerance)
