"""What ArviZ says of an exported posterior: r_hat, effective sample sizes, leave-one-out."""

import operator
import warnings
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

_FEWEST = 30  # draws for PSIS: their tail is a fifth, and ArviZ fits no Pareto k to 5 or fewer

# Group, site, and whether each entry is of interest rather than the worst of them.
_IDENTIFIED = (
    ("posterior", "coupling_trace", True),
    ("posterior", "coupling_norm", True),
    ("posterior", "coupling_eigenvalues", True),
    ("posterior", "table_certificate", True),
    ("posterior", "scale", True),
    ("posterior", "smallest_margin", True),
    ("posterior", "sequence_margin", False),
    ("posterior", "margin", False),
    ("log_likelihood", "tokens", False),
)


@dataclass(frozen=True)
class QuantitySummary:
    """One identified quantity of a posterior, or the worst of many entries.

    Attributes:
        name: name of the quantity, with the number of entries where the worst of them is told.
        mean: posterior mean; NaN for the worst of many.
        sd: posterior standard deviation, likewise.
        r_hat: rank-normalised split R-hat; the largest. NaN of one chain: it compares chains.
        ess_bulk: effective sample size of the bulk; the smallest.
        ess_tail: effective sample size of the tails; the smallest.
        unknown: how many draws are NaN, which leaves all of the above NaN; the worst of many is
            that of the entries without such draws.
    """

    name: str
    mean: float
    sd: float
    r_hat: float
    ess_bulk: float
    ess_tail: float
    unknown: int = field(default=0, kw_only=True)


def summarise(tree: "xr.DataTree") -> list[QuantitySummary]:
    """Summarise and diagnose what is identified: nothing that a rotation would change.

    Of margins and log likelihoods, which are many, the worst diagnostics are given. Entries that
    are the same in all draws, such as the margins of positions 0 and 1, have none and are left out.
    Draws may be NaN, such as a margin that is not known. A single quantity then has no diagnostics,
    the worst of many is that of the other entries, and `unknown` counts such draws.

    Args:
        tree: tree of a posterior, from `to_datatree`.

    Raises:
        ValueError: if the tree holds no draws.
    """
    import arviz as az  # takes a second
    import xarray as xr

    if "posterior" not in tree.children:
        raise ValueError("the tree has no posterior: expected draws, such as those of `sample`")
    rows = []
    for group, name, each in _IDENTIFIED:
        found = values_of(tree, group, name)
        if found is None:
            continue
        draws = found.reshape(*found.shape[:2], -1)
        draws = draws[..., (draws != draws[:1, :1]).any((0, 1))]  # NaN is equal to nothing
        if not draws.shape[2]:
            continue
        unknown = np.isnan(draws).sum((0, 1))
        one = xr.Dataset({"value": (("chain", "draw", "entry"), draws)})
        r_hat, bulk, tail = (
            each_of["value"].values
            for each_of in (az.rhat(one), az.ess(one, method="bulk"), az.ess(one, method="tail"))
        )
        if not each:
            known = unknown == 0
            label, worst = f"{name}, worst of {known.sum()}", (np.nan, np.nan, np.nan)
            if known.any():
                worst = (r_hat[known].max(), bulk[known].min(), tail[known].min())
            row = QuantitySummary(
                label, np.nan, np.nan, *map(float, worst), unknown=int(unknown.sum())
            )
            rows.append(row)
            continue
        mean, sd = draws.mean((0, 1)), draws.std((0, 1))
        for entry in range(r_hat.size):
            label = name if r_hat.size == 1 else f"{name}[{entry}]"
            values = (column[entry] for column in (mean, sd, r_hat, bulk, tail))
            row = QuantitySummary(label, *map(float, values), unknown=int(unknown[entry]))
            rows.append(row)
    return rows


@dataclass(frozen=True)
class ChainWeight:
    """What stacking makes of one chain.

    Attributes:
        chain: number of the chain.
        weight: its weight in the mixture of all chains; the weights sum to one.
        elpd: expected log predictive density of the chain's own draws, by PSIS-LOO, nats.
        se: standard error of that.
        pareto_k: the largest Pareto k; above 0.7 the estimate cannot be trusted.
    """

    chain: int
    weight: float
    elpd: float
    se: float
    pareto_k: float


def stack_chains(tree: "xr.DataTree") -> list[ChainWeight]:
    """Weigh chains that do not mix, by stacking their leave-one-out predictive densities.

    Where each chain stays in a mode of its own, their numbers say nothing of the modes' masses.
    Stacking takes the mixture of chains that predicts best what is left out (Yao, Vehtari and
    Gelman 2022, Stacking for non-mixing Bayesian computations). These weights are not the
    posterior's masses of the modes. PSIS-LOO and the weights are ArviZ's.

    Args:
        tree: tree with log likelihoods, from `to_datatree`. Those of several sites are added where
            they have the same dimensions: what leaves out a row leaves out all sites of it.

    Returns:
        One weight for each chain, in the order of the chains.

    Raises:
        ValueError: if the tree has no log likelihood, or those of sites with other dimensions, one
            chain, or fewer than 30 draws of each.
    """
    import arviz as az

    likelihood = _log_likelihood(tree)
    if likelihood is None:
        raise ValueError(
            "the tree has no log_likelihood: expected one from to_datatree(..., "
            "log_likelihood=True)"
        )
    sizes = likelihood.sizes
    if sizes["chain"] < 2 or sizes["draw"] < _FEWEST:
        raise ValueError(
            f"the tree has {sizes['chain']} chains of {sizes['draw']} draws: expected two chains "
            f"or more to weigh, of {_FEWEST} draws or more; sample more of them"
        )
    found = {
        str(chain): _psis_loo(likelihood.isel(chain=[chain])) for chain in range(sizes["chain"])
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of a large Pareto k, which is returned
        weights = az.compare(found, method="stacking", round_to="none")["weight"]
    return [
        ChainWeight(
            int(name),
            float(weights[name]),
            float(one.elpd),
            float(one.se),
            float(np.max(one.pareto_k)),
        )
        for name, one in found.items()
    ]


class LeaveOneOut(NamedTuple):
    """Expected log predictive density of sequences that are left out, by PSIS-LOO.

    Attributes:
        elpd_loo: its estimate, nats.
        elpd_loo_se: standard error of that, over sequences.
        pareto_k: the largest Pareto k; above 0.7 the estimate cannot be trusted.
        elpd_loo_filter_error: Monte Carlo error, nats, where a particle filter gave the likelihood,
            see `marginal.marginal_leave_one_out`.
    """

    elpd_loo: float
    elpd_loo_se: float
    pareto_k: float
    elpd_loo_filter_error: float | None = None


def leave_one_out(tree: "xr.DataTree") -> LeaveOneOut | None:
    """Estimate the expected log predictive density by PSIS-LOO, its error, and the largest k.

    None where there is no likelihood, or no tail to smooth: fewer than 30 draws of all chains
    together, or draws that hardly moved. A Pareto k above 0.7 means that the estimate cannot be
    trusted (Vehtari et al. 2024); of a model with latent variables of every sequence, all of them
    often are.

    Args:
        tree: tree with log likelihoods, as in `stack_chains`.

    Raises:
        ValueError: if there are log likelihoods of sites with other dimensions.
    """
    likelihood = _log_likelihood(tree)
    if likelihood is None or likelihood.sizes["chain"] * likelihood.sizes["draw"] < _FEWEST:
        return None
    try:
        found = _psis_loo(likelihood)
    except ValueError:
        return None
    return LeaveOneOut(float(found.elpd), float(found.se), float(np.max(found.pareto_k)))


def _log_likelihood(tree: "xr.DataTree") -> "xr.DataArray | None":
    """Return that of all sites together, None where there is none."""
    if "log_likelihood" not in tree.children:
        return None
    sites = tree.children["log_likelihood"].to_dataset().data_vars
    if len({frozenset(site.dims) for site in sites.values()}) > 1:
        named = " and ".join(
            f"{name} ({', '.join(map(str, site.dims))})" for name, site in sites.items()
        )
        raise ValueError(
            f"the tree has log likelihoods of {named}: expected one site, or several with the same "
            "dimensions, which are added; keep one of them, or add up what is left out together"
        )
    return reduce(operator.add, sites.values())


def _psis_loo(likelihood: "xr.DataArray") -> Any:
    """Return what ArviZ says of log likelihoods, by their own effective sample size alone.

    It takes the mean over all variables of the posterior. These may be thousands, such as margins,
    and one -inf or NaN among them leaves none.
    """
    import arviz as az
    import xarray as xr

    dataset = xr.Dataset({"log_likelihood": likelihood})
    tree = xr.DataTree.from_dict({"posterior": dataset, "log_likelihood": dataset})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of a large Pareto k, which is returned
        return az.loo(tree, pointwise=True)


def divergence_margin(tree: "xr.DataTree") -> float | None:
    """Return the smallest margin of a draw whose trajectory diverged; None if there is none."""
    diverging = values_of(tree, "sample_stats", "diverging")
    margins = values_of(tree, "posterior", "smallest_margin")
    if diverging is None or margins is None or not diverging.any():
        return None
    return float(margins[diverging].min())


def values_of(tree: "xr.DataTree", group: str, name: str) -> np.ndarray | None:
    """Return the values of a variable of a tree, None where there is none."""
    if group not in tree.children or name not in tree.children[group].data_vars:
        return None
    return np.asarray(tree.children[group].to_dataset()[name])
