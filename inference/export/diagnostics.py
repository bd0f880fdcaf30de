"""What ArviZ says of an exported posterior: r_hat, effective sample sizes, leave-one-out."""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import xarray as xr


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
    """

    name: str
    mean: float
    sd: float
    r_hat: float
    ess_bulk: float
    ess_tail: float


def summarise(tree: "xr.DataTree") -> list[QuantitySummary]:
    """Summarise and diagnose what is identified: nothing that a rotation would change.

    Of margins and log likelihoods, which are many, the worst diagnostics are given. Entries that
    are the same in all draws, such as the margins of positions 0 and 1, have none and are left out.

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
        draws = draws[..., np.ptp(draws, axis=(0, 1)) > 0]
        if not draws.shape[2]:
            continue
        one = xr.Dataset({"value": (("chain", "draw", "entry"), draws)})
        r_hat, bulk, tail = (
            each_of["value"].values
            for each_of in (az.rhat(one), az.ess(one, method="bulk"), az.ess(one, method="tail"))
        )
        if not each:
            label = f"{name}, worst of {r_hat.size}"
            worst = (r_hat.max(), bulk.min(), tail.min())
            rows.append(QuantitySummary(label, np.nan, np.nan, *map(float, worst)))
            continue
        mean, sd = draws.mean((0, 1)), draws.std((0, 1))
        for entry in range(r_hat.size):
            label = name if r_hat.size == 1 else f"{name}[{entry}]"
            values = (column[entry] for column in (mean, sd, r_hat, bulk, tail))
            rows.append(QuantitySummary(label, *map(float, values)))
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
        tree: tree with log likelihoods of one site, from `to_datatree`.

    Returns:
        One weight for each chain, in the order of the chains.

    Raises:
        ValueError: if the tree has no log likelihood, one chain, or fewer than 25 draws of each.
    """
    import arviz as az
    import xarray as xr

    if "log_likelihood" not in tree.children:
        raise ValueError(
            "the tree has no log_likelihood: expected one from to_datatree(..., "
            "log_likelihood=True)"
        )
    groups = {name: tree[name].to_dataset() for name in ("posterior", "log_likelihood")}
    sizes = groups["log_likelihood"].sizes
    if sizes["chain"] < 2 or sizes["draw"] < 25:
        raise ValueError(
            f"the tree has {sizes['chain']} chains of {sizes['draw']} draws: expected two chains "
            "or more to weigh, of 25 draws or more; sample more of them"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of a large Pareto k, which is returned
        found = {}
        for chain in range(sizes["chain"]):
            own = {name: group.isel(chain=[chain]) for name, group in groups.items()}
            found[str(chain)] = az.loo(xr.DataTree.from_dict(own), pointwise=True)
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
        elpd_loo_filter_error: Monte Carlo error, nats, where a particle filter gave the likelihood.
    """

    elpd_loo: float
    elpd_loo_se: float
    pareto_k: float
    elpd_loo_filter_error: float | None = None


def leave_one_out(tree: "xr.DataTree") -> LeaveOneOut | None:
    """Estimate the expected log predictive density by PSIS-LOO, its error, and the largest k.

    None where there is no likelihood, or no tail to smooth: fewer than 25 draws of all chains
    together, or draws that hardly moved. A Pareto k above 0.7 means that the estimate cannot be
    trusted (Vehtari et al. 2024); of a model with latent variables of every sequence, all of them
    often are.

    Args:
        tree: tree with log likelihoods of one site.
    """
    import arviz as az

    if "log_likelihood" not in tree.children:
        return None
    # The tail is at most a fifth of so few draws and needs 5; where it is empty, of fewer than 5
    # draws, ArviZ raises an IndexError.
    sizes = tree.children["log_likelihood"].sizes
    if sizes["chain"] * sizes["draw"] < 25:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of a large Pareto k, which is returned
        try:
            found = az.loo(tree, pointwise=True)
        except ValueError:
            return None
    return LeaveOneOut(float(found.elpd), float(found.se), float(np.max(found.pareto_k)))


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
