"""Where a sampler can start: finite gradients, numbers of any kind, priors that are improper."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from probattn.inference import SampleConfig, sample, to_datatree
from probattn.inference.sampling.chains import SampleError
from probattn.inference.sampling.initialisation import floating_values
from tests.support.refusals import refusal

Y = np.random.default_rng(3).normal(2.0, 1.0, 12)
METHODS = {
    "nuts": SampleConfig(chains=2, warmup=20, draws=30),
    "mclmc": SampleConfig(method="mclmc", chains=2, warmup=50, draws=30),
    "adjusted": SampleConfig(method="mclmc", adjusted=True, chains=2, warmup=50, draws=30),
    "sgld": SampleConfig(method="sgld", chains=2, warmup=20, draws=30),
    "sghmc": SampleConfig(method="sghmc", chains=2, warmup=20, draws=30),
}


def rooted(y, batch=None, at=-1.0):
    """The branch that is not taken has the root of `at`, whose gradient is not finite."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
    numpyro.sample("other", dist.Normal(0.0, 5.0))
    term = jnp.where(at > 0, jnp.sqrt(at * jnp.exp(0 * mean)), 0.0)
    with numpyro.plate("rows", len(y), subsample_size=batch) as rows:
        numpyro.sample("y", dist.Normal(mean + term, 1.0), obs=jnp.asarray(y)[rows])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_start_whose_gradient_is_not_finite(method):
    batch = 4 if method in ("sgld", "sghmc") else None
    arguments = {"model_args": (Y, batch), "config": METHODS[method]}
    message = "chain 0, 1: 100 draws of the prior have no finite density or gradient; start from"
    assert message in refusal(SampleError, sample, rooted, **arguments)
    values = {"mean": 1.0, "other": 0.0}
    message = refusal(SampleError, sample, rooted, **arguments, init_values=values)
    assert "the prior with the initial values have no finite density or gradient" in message
    # The model whose gradient is finite moves on.
    arguments["model_args"] = (Y, batch, 1.0)
    result = sample(rooted, **arguments, init_values=values)
    assert np.ptp(result.draws["mean"], axis=1).min() > 0


def plain(y, batch=None):
    mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("rows", len(y), subsample_size=batch) as rows:
        numpyro.sample("y", dist.Normal(mean, scale), obs=jnp.asarray(y)[rows])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("method", ["nuts", "mclmc", "sgld"])
def test_whole_numbers_start_as_the_floating_ones_do(method, precision):
    config = METHODS[method]
    config = SampleConfig(
        method=config.method, chains=2, warmup=50, draws=3, precision=precision, seed=1
    )
    arguments = {"model_args": (Y, 4 if method == "sgld" else None), "config": config}
    expected = sample(plain, **arguments, init_values={"mean": 1.0, "scale": 2.0})
    for values in (
        {"mean": 1, "scale": 2},
        {"mean": np.int32(1), "scale": np.array(2, np.uint8)},
        {"mean": jnp.asarray(1), "scale": np.float64(2)},
    ):
        found = sample(plain, **arguments, init_values=values)
        assert found.draws["mean"].dtype == precision
        for name in ("mean", "scale"):
            np.testing.assert_array_equal(found.draws[name], expected.draws[name])


def test_values_of_lists_are_arrays():
    found = floating_values({"a": [1, 2.5], "b": [[3], [4]]}, "float32")
    assert {name: (value.shape, value.dtype.name) for name, value in found.items()} == {
        "a": ((2,), "float32"),
        "b": ((2, 1), "float32"),
    }


@pytest.mark.parametrize(
    ("value", "described"),
    [
        ("one", "str 'one'"),
        (None, "NoneType None"),
        ([1, [2]], "list"),
        (1j, "complex 1j"),
        ({"a": 1.0}, "dict"),
        (True, "bool True"),
        (np.array(["a", "b"]), "ndarray"),
        (jax.numpy.ones((3, 3), bool), "ArrayImpl"),
    ],
)
def test_values_that_are_no_numbers(value, described):
    message = refusal(ValueError, sample, plain, model_args=(Y,), init_values={"mean": value})
    assert f"init_values has mean of {described}" in message
    assert "expected real numbers, in an array of the site's shape" in message


def improper(y):
    real = dist.constraints.real
    mean = numpyro.sample("mean", dist.ImproperUniform(real, (), ()))
    slope = numpyro.sample("slope", dist.ImproperUniform(real, (), (2,)))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(mean + slope.sum() / 10, 1.0), obs=y)
    numpyro.factor("pull", -jnp.sum(slope**2) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nuts", "mclmc"])
def test_an_improper_prior(method):
    """A normal likelihood with a flat prior: its mean is that of the data, if slopes are zero."""
    config = SampleConfig(method=method, chains=4, warmup=300, draws=400, seed=2)
    result = sample(improper, model_args=(Y,), config=config)
    centre = result.draws["mean"] + result.draws["slope"].sum(-1) / 10
    assert abs(centre.mean() - Y.mean()) < 0.05  # its standard deviation is 0.29
    assert abs(centre.std() - 1 / np.sqrt(len(Y))) < 0.04
    tree = to_datatree(result, log_likelihood=True)
    assert tree["log_likelihood"]["y"].shape == (4, 400, 12)
    message = refusal(ValueError, to_datatree, result, prior=3)
    assert "the prior of the site mean is ImproperUniform, which cannot be drawn from" in message
