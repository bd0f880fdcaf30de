"""What is compared: margins, log-determinants and predictions, of draws and of points."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from numpyro.handlers import substitute, trace

QUANTITIES = ("smallest margin", "median margin", "mean log det", "held-out log density")
_BATCH = 50  # draws at once


class Diagnosis(NamedTuple):
    """The worst diagnostics of several quantities.

    Attributes:
        r_hat: the largest rank-normalised split R-hat.
        ess_bulk: the smallest effective sample size of the bulk.
        ess_tail: the smallest of the tails.
    """

    r_hat: float
    ess_bulk: float
    ess_tail: float


class Measured(NamedTuple):
    """What is compared of every draw.

    Attributes:
        quantities: each of QUANTITIES by name, (...). Margins are of kind sigma_min, over positions
            >= 2 of the training sequences, as the mean log det is, in nats for each position. The
            held-out log density is in nats for each token.
        margins: every margin (..., positions) that is not 1 by construction.
    """

    quantities: dict[str, np.ndarray]
    margins: np.ndarray


def measure(
    model: Callable, draws: Mapping[str, np.ndarray], train: np.ndarray, held_out: np.ndarray
) -> Measured:
    """Measure draws of the model `observed_embeddings`.

    Args:
        model: the model of the training sequences; it takes as many held-out ones.
        draws: values of its sample sites, (..., *shape) with any leading axes, the same for all.
        train: embeddings (N, T, d).
        held_out: embeddings (N, T, d).
    """
    leading = np.shape(draws["scale"])

    def of_one(values):
        sites = trace(substitute(model, values)).get_trace(jnp.asarray(train))
        others = trace(substitute(model, values)).get_trace(jnp.asarray(held_out))
        density = others["embeddings"]["fn"].log_prob(jnp.asarray(held_out))
        return (
            sites["margin"]["value"][:, 2:].reshape(-1),
            jnp.mean(sites["log_det"]["value"][:, 2:]),
            jnp.sum(density) / held_out[..., 0].size,
        )

    rows = {
        name: jnp.asarray(value).reshape(-1, *np.shape(value)[len(leading) :])
        for name, value in draws.items()
    }
    found = jax.jit(lambda rows: jax.lax.map(of_one, rows, batch_size=_BATCH))(rows)
    margins, log_det, density = (
        np.asarray(part).reshape(*leading, *part.shape[1:]) for part in found
    )
    values = (margins.min(-1), np.median(margins, -1), log_det, density)
    return Measured(dict(zip(QUANTITIES, values, strict=True)), margins)


def diagnose(values: np.ndarray) -> Diagnosis:
    """Diagnose quantities (chain, draw, ...) by the worst of them.

    One that is the same in all draws has no diagnostics and is left out.
    """
    columns = np.asarray(values).reshape(*np.shape(values)[:2], -1)
    columns = columns[..., np.ptp(columns, axis=(0, 1)) > 0]
    one = xr.Dataset({"value": (("chain", "draw", "entry"), columns)})
    r_hat, bulk, tail = (
        found["value"].values
        for found in (az.rhat(one), az.ess(one, method="bulk"), az.ess(one, method="tail"))
    )
    return Diagnosis(float(r_hat.max()), float(bulk.min()), float(tail.min()))


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean and the ends of the central 90 % of draws."""
    low, high = np.quantile(values, [0.05, 0.95])
    return float(np.mean(values)), float(low), float(high)


def mixture(densities: np.ndarray, tokens: int) -> float:
    """Return the log predictive density of the whole posterior, in nats for each token.

    Args:
        densities: log densities of the held-out sequences in nats for each token, of every draw.
        tokens: how many tokens they have.
    """
    total = tokens * np.ravel(densities)
    most = total.max()
    return float((most + math.log(np.mean(np.exp(total - most)))) / tokens)


def converged(diagnoses: Mapping[str, Diagnosis], divergences: int) -> bool:
    """Tell whether r_hat <= 1.01 and ess >= 400 hold for all of them, and no draw diverged."""
    return divergences == 0 and all(
        each.r_hat <= 1.01 and min(each.ess_bulk, each.ess_tail) >= 400
        for each in diagnoses.values()
    )
