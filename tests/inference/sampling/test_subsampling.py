"""Plates that take minibatches: scaled as NumPyro does, and refused where they cannot be."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import log_density

from probattn.inference import SampleConfig, sample, to_datatree
from probattn.inference.sampling.subsampling import Subsample, check_rows, rows_of

SGLD = SampleConfig(method="sgld", chains=2, warmup=4, draws=4)
DATA = np.random.default_rng(0).normal(size=(7, 2))


def model(observed, size=7, batch=3):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("rows", size, subsample_size=batch) as rows:
        numpyro.factor("term", jnp.sum(observed[rows] ** 2, -1) * mean[0])
        numpyro.sample("observed", dist.Normal(mean, 1.0).to_event(1), obs=observed[rows])


def density(rows, mean):
    values = {"mean": mean}
    return log_density(rows_of(model, "rows", rows), (jnp.asarray(DATA),), {}, values)[0]


def test_the_mean_over_all_minibatches_is_the_gradient_of_the_whole():
    """Each of the 35 minibatches of 3 rows in 7, factor included."""
    mean = jnp.array([0.3, -0.4])
    rows = np.array([[i, j, k] for i in range(7) for j in range(i) for k in range(j)])
    gradient = jax.grad(density, argnums=1)
    gradients = jax.jit(jax.vmap(gradient, (0, None)))(rows, mean)
    whole = jax.jit(gradient)(jnp.arange(7), mean)
    np.testing.assert_allclose(gradients.mean(0), whole, rtol=1e-12)
    expected = np.sum(DATA - np.asarray(mean), 0) - mean + np.array([np.sum(DATA**2), 0.0])
    np.testing.assert_allclose(whole, expected, rtol=1e-12)
    assert np.ptp(gradients, axis=0).min() > 1


def discrete():
    numpyro.sample("kind", dist.Bernoulli(0.5))


def local(observed):
    with numpyro.plate("rows", 7, subsample_size=3) as rows:
        shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
        numpyro.sample("observed", dist.Normal(shift, 1.0), obs=observed[rows, 0])


def two(observed):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    for name in ("first", "second"):
        with numpyro.plate(name, 7, subsample_size=3) as rows:
            numpyro.sample(f"{name}_y", dist.Normal(mean, 1.0), obs=observed[rows, 0])


def whole(observed):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("rows", 7):
        numpyro.sample("observed", dist.Normal(mean, 1.0).to_event(1), obs=observed)


def heedless(observed):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("rows", 7, subsample_size=3):
        numpyro.sample("observed", dist.Normal(mean, 1.0).to_event(1), obs=observed[:3])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (local, "the latent site shift is in the plate rows, which has other rows in every step"),
        (two, "with a subsample_size are: first, second; sample.method sgld takes minibatches of"),
        (whole, "the plates of the model with a subsample_size are: none; sample.method sgld"),
        (heedless, "the model makes nothing of the rows that the plate rows takes"),
        (
            partial(model, size=9),
            "the plate rows has 9 rows, and an array of 7 is indexed by them at 0 to 8: expected",
        ),
        (
            partial(model, size=6),
            "the plate rows has 6 rows, and an array of 7 is indexed by them at 0 to 5: expected",
        ),
    ],
)
def test_models_that_have_no_minibatches(given, message):
    with pytest.raises(ValueError, match=message):
        sample(given, model_args=(DATA,), config=SGLD)


@pytest.mark.parametrize("method", ["nuts", "mclmc"])
def test_other_methods_refuse_a_plate_that_takes_a_minibatch(method):
    config = SampleConfig(method=method, chains=2, warmup=60, draws=4)
    message = f"the plate rows takes 3 of 7 rows, and sample.method {method} would keep to those"
    with pytest.raises(ValueError, match=message):
        sample(model, model_args=(DATA,), config=config)


@pytest.mark.parametrize("method", ["nuts", "mclmc", "sgld"])
def test_a_discrete_site(method):
    config = SampleConfig(method=method, chains=2, warmup=60, draws=4)
    with pytest.raises(ValueError, match="the latent site kind is discrete: expected continuous"):
        sample(discrete, config=config)


def grouped(rows, *, groups=2):
    """The rows choose groups of the data, and these effects: of no length of the plate."""
    of_row = jnp.arange(7) % groups
    return jnp.sum(jnp.linspace(0.0, 1.0, groups)[of_row[rows]])


@pytest.mark.parametrize(
    "function",
    [
        grouped,
        jax.jit(grouped),
        lambda rows: jnp.sum(jnp.take(jnp.asarray(DATA), rows, axis=0)),
        lambda rows: jnp.sum(jnp.asarray(DATA)[rows + 1 - 1, 0]),
        lambda rows: jnp.sum(jax.nn.one_hot(rows, 7) @ DATA),
        lambda rows: jnp.sum(jax.vmap(lambda row: jnp.asarray(DATA)[row])(rows)),
    ],
)
def test_rows_are_followed_through_programs(function):
    check_rows(Subsample("rows", 7, 3), function)


SERIES = jnp.asarray(np.random.default_rng(2).normal(size=8))  # one more than the plate has rows


def shifted(*shifts, series=SERIES):
    """A term of autoregression: the series at every row, and at rows further on."""
    return lambda rows: jnp.sum(jnp.prod(jnp.stack([series[rows + s] for s in shifts]), 0))


@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize(
    "function",
    [
        shifted(0, 1),
        jax.jit(shifted(0, 1)),
        shifted(0, 1, 2, series=jnp.arange(9.0)),
        shifted(0, 2, series=jnp.arange(9.0)),
        shifted(-1, 0, series=SERIES[:-1]),  # NumPy's index of the last
        lambda rows: jnp.sum(SERIES[:-1][rows] * SERIES[1:][rows]),
        lambda rows: jnp.sum(SERIES[rows] * SERIES[rows + jnp.sum(jnp.ones(1, int))]),
        lambda rows: jnp.sum(jnp.take(SERIES, rows) * jnp.take(SERIES, rows + 1)),
        lambda rows: jnp.sum(
            jax.vmap(lambda row: jax.lax.dynamic_slice(SERIES, (row,), (2,)))(rows)
        ),
    ],
)
def test_rows_and_their_neighbours_may_read_a_longer_array(function, batch):
    check_rows(Subsample("rows", 7, batch), function)


@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize(
    ("function", "found"),
    [
        (shifted(0), "an array of 8 is indexed by them at 0 to 6"),
        (shifted(1), "an array of 8 is indexed by them at 1 to 7"),
        (shifted(0, 1, series=SERIES[:-1]), "an array of 7 is indexed by them at 0 to 7"),
        (shifted(1, series=SERIES[:-1]), "an array of 7 is indexed by them at 1 to 7"),
        (shifted(0, 1, series=SERIES[:5]), "an array of 5 is indexed by them at 0 to 7"),
        (shifted(0, 1, series=jnp.arange(9.0)), "an array of 9 is indexed by them at 0 to 7"),
        (shifted(-2, series=SERIES), "an array of 8 is indexed by them at 0 to 7"),
        # Two arrays of which each is read in part.
        (
            lambda rows: shifted(0)(rows) + shifted(1, series=2 * SERIES)(rows),
            "an array of 8 is indexed by them at 0 to 6",
        ),
        (
            lambda rows: jnp.sum(
                jax.vmap(lambda row: jax.lax.dynamic_slice(SERIES[1:], (row,), (2,)))(rows)
            ),
            "an array of 7 is indexed by them at 0 to 7",
        ),
    ],
)
def test_rows_that_read_a_part_of_an_array_or_beyond_it(function, found, batch):
    message = re.escape(found) + ": expected a plate as large.* as in `y"
    with pytest.raises(ValueError, match=message):
        check_rows(Subsample("rows", 7, batch), function)


def test_two_axes_of_one_array_are_two_arrays():
    square = jnp.arange(49.0).reshape(7, 7)
    check_rows(Subsample("rows", 7, 3), lambda rows: jnp.sum(square[rows] @ square[:, rows]))
    wide = jnp.ones((7, 8))
    with pytest.raises(ValueError, match="an array of 8 is indexed by them at 0 to 6"):
        check_rows(
            Subsample("rows", 7, 3), lambda rows: jnp.sum(wide[rows]) + jnp.sum(wide[:, rows])
        )


def autoregression(series):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    with numpyro.plate("steps", len(series) - 1, subsample_size=3) as rows:
        numpyro.sample("next", dist.Normal(slope * series[rows], 1.0), obs=series[rows + 1])


@pytest.mark.slow
def test_an_autoregression_is_of_all_steps():
    result = sample(autoregression, model_args=(np.asarray(SERIES),), config=SGLD)
    tree = to_datatree(result, log_likelihood=True)
    slopes = result.draws["slope"][..., None]
    expected = -((SERIES[1:] - slopes * SERIES[:-1]) ** 2) / 2 - np.log(2 * np.pi) / 2
    np.testing.assert_allclose(tree["log_likelihood"]["next"], expected, rtol=1e-12)


@pytest.mark.parametrize(
    "function",
    [
        lambda rows: jnp.sum(jnp.take(jnp.asarray(DATA)[:5], rows, axis=0)),
        jax.jit(lambda rows: jnp.sum(jnp.asarray(DATA)[:5][rows])),
    ],
)
def test_rows_of_other_data_are_found(function):
    with pytest.raises(ValueError, match="the plate rows has 7 rows, and an array of 5"):
        check_rows(Subsample("rows", 7, 3), function)
