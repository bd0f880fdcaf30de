"""A location of known posterior, with data in a plate, and the bias of steps on a Gaussian."""

import numpy as np
import numpyro
import numpyro.distributions as dist

PRIOR, NOISE = 2.0, 1.5  # standard deviations


def location(observed, *, batch=None):
    """Two independent locations, each with its column of the data."""
    with numpyro.plate("axes", 2, dim=-1):
        mean = numpyro.sample("mean", dist.Normal(0.0, PRIOR))
        with numpyro.plate("rows", len(observed), subsample_size=batch, dim=-2) as rows:
            shown = observed if batch is None else observed[rows]
            numpyro.sample("observed", dist.Normal(mean, NOISE), obs=shown)


def precision(observed):
    return 1 / PRIOR**2 + len(observed) / NOISE**2


def posterior_mean(observed):
    return observed.sum(0) / NOISE**2 / precision(observed)


def gradient_noise(observed, batch):
    """Variance of the gradient of a minibatch without replacement, by column."""
    rows = len(observed)
    finite = 1 - batch / rows
    return rows**2 / batch * np.var(observed, axis=0, ddof=1) / NOISE**4 * finite


def stationary_variance(method, observed, *, batch, step_size, friction=1.0):
    """Variance of the chain's stationary distribution, by column: exact, steps of finite size."""
    k, s, h = precision(observed), gradient_noise(observed, batch), step_size
    if method == "sgld":
        return (2 * h + h**2 * s) / (1 - (1 - h * k) ** 2)
    a = friction * h
    return (1 + h * s / (2 * friction)) / k * (2 - a) / (2 - a - h**2 * k / 2)
