"""Diagnostics of trees with values that are not known, several sites and few draws."""

import arviz as az
import numpy as np
import pytest
import xarray as xr

from probattn.inference.export.diagnostics import leave_one_out, stack_chains, summarise

CHAINS, DRAWS, ENTRIES = 4, 250, 8


def tree_of(likelihoods, posterior=None):
    """A tree of log likelihoods by site and draws by name, by default the same."""
    groups = {"log_likelihood": likelihoods, "posterior": posterior or likelihoods}
    return xr.DataTree.from_dict({name: xr.Dataset(values) for name, values in groups.items()})


def log_likelihoods(chains, draws, seed=0):
    """Of entries whose importance weights have a tail, and whose draws depend on each other."""
    noise = np.random.default_rng(seed).normal(size=(chains, draws + 4, ENTRIES))
    value = sum(noise[:, lag : lag + draws] for lag in range(5)) / np.sqrt(5)
    return ("chain", "draw", "sequence"), -40 - 0.6 * value**2


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")  # of the oracle's
@pytest.mark.parametrize("others", [0.0, -np.inf, np.nan, "slow"])
def test_leave_one_out_asks_the_likelihoods_alone_how_independent_draws_are(others):
    likelihood = log_likelihoods(CHAINS, DRAWS)
    margins = np.random.default_rng(1).normal(size=(CHAINS, DRAWS, 30))
    if others == "slow":
        margins = margins.cumsum(1)
    else:
        margins[1, 5] = others
    tree = tree_of({"tokens": likelihood}, {"margin": (("chain", "draw", "position"), margins)})
    own = xr.Dataset({"tokens": likelihood})
    efficiency = float(az.ess(own, method="mean")["tokens"].mean()) / (CHAINS * DRAWS)
    assert efficiency < 0.5
    expected = az.loo(tree, reff=efficiency, pointwise=True)
    found = leave_one_out(tree)
    assert found.elpd_loo == pytest.approx(float(expected.elpd), rel=1e-12)
    assert found.elpd_loo_se == pytest.approx(float(expected.se), rel=1e-12)
    assert found.pareto_k == pytest.approx(float(expected.pareto_k.max()), rel=1e-12)


@pytest.mark.parametrize("chains", [1, 2, 5])
def test_fewer_than_thirty_draws_have_no_pareto_k(chains):
    """Those of ArviZ itself say where it begins."""
    few = tree_of({"tokens": log_likelihoods(chains, (30 - 1) // chains)})
    enough = tree_of({"tokens": log_likelihoods(chains, 30 // chains)})
    assert leave_one_out(few) is None
    found = leave_one_out(enough)
    assert np.isfinite([found.elpd_loo, found.elpd_loo_se, found.pareto_k]).all()


def test_chains_of_thirty_draws_can_be_weighed():
    with pytest.raises(ValueError, match=r"2 chains of 29 draws: expected .* of 30 draws or m"):
        stack_chains(tree_of({"tokens": log_likelihoods(2, 29)}))
    found = stack_chains(tree_of({"tokens": log_likelihoods(2, 30)}))
    assert np.isfinite([chain.pareto_k for chain in found]).all()


def test_sites_of_the_same_rows_are_left_out_together():
    dims, first = log_likelihoods(2, 40)
    _, second = log_likelihoods(2, 40, seed=1)
    both = tree_of({"x": (dims, first), "y": (dims, second)})
    added = tree_of({"x": (dims, first + second)})
    assert leave_one_out(both) == leave_one_out(added)
    assert stack_chains(both) == stack_chains(added)


@pytest.mark.parametrize("function", [leave_one_out, stack_chains])
def test_sites_of_other_rows_are_refused(function):
    dims, values = log_likelihoods(2, 40)
    tree = tree_of({"x": (dims, values), "y": ((*dims[:2], "word"), values[..., :3])})
    message = r"log likelihoods of x \(chain, draw, sequence\) and y \(chain, draw, word\): expect"
    with pytest.raises(ValueError, match=message) as raised:
        function(tree)
    assert "\n" not in str(raised.value)


def test_a_quantity_with_unknown_draws_stays_in_the_summary():
    draws = np.random.default_rng(0).normal(size=(2, 50, 4))
    draws[..., 0] = 1.0  # of every draw
    smallest = draws.min(-1)
    draws[1, 7, 3] = draws[0, 2, 3] = smallest[1, 7] = np.nan
    scale = np.full((2, 50), np.nan)
    tree = xr.DataTree.from_dict(
        {
            "posterior": xr.Dataset(
                {
                    "margin": (("chain", "draw", "position"), draws),
                    "smallest_margin": (("chain", "draw"), smallest),
                    "scale": (("chain", "draw"), scale),
                }
            )
        }
    )
    rows = {row.name: row for row in summarise(tree)}
    assert set(rows) == {"scale", "smallest_margin", "margin, worst of 2"}
    for name, unknown in (("scale", 100), ("smallest_margin", 1)):
        row = rows[name]
        assert row.unknown == unknown
        assert np.isnan([row.mean, row.sd, row.r_hat, row.ess_bulk, row.ess_tail]).all()
    row = rows["margin, worst of 2"]
    known = [draws[..., entry] for entry in (1, 2)]
    assert row.unknown == 2
    assert row.r_hat == pytest.approx(max(float(az.rhat(entry)) for entry in known))
    assert row.ess_bulk == pytest.approx(min(float(az.ess(entry)) for entry in known))


def test_many_entries_with_unknown_draws_each_have_no_worst():
    draws = np.random.default_rng(0).normal(size=(2, 50, 3))
    draws[1, 7] = np.nan
    margin = {"margin": (("chain", "draw", "position"), draws)}
    (row,) = summarise(xr.DataTree.from_dict({"posterior": xr.Dataset(margin)}))
    assert (row.name, row.unknown) == ("margin, worst of 0", 3)
    assert np.isnan([row.r_hat, row.ess_bulk, row.ess_tail]).all()
