"""Weights of chains that do not mix, against a search over all mixtures."""

import arviz as az
import numpy as np
import pytest
import xarray as xr

from probattn.inference.export.diagnostics import stack_chains

ENTRIES = 24


def tree_of(means, draws=60):
    """Chains whose log likelihoods of each entry lie around the means (chain, entry)."""
    noise = np.random.default_rng(1).normal(scale=0.1, size=(len(means), draws, ENTRIES))
    values = np.asarray(means)[:, None] + noise
    tokens = xr.Dataset({"tokens": (("chain", "draw", "sequence"), values)})
    return xr.DataTree.from_dict({"posterior": tokens, "log_likelihood": tokens})


def pointwise(tree, chain):
    parts = {name: tree[name].to_dataset().isel(chain=[chain]) for name in tree.children}
    return az.loo(xr.DataTree.from_dict(parts), pointwise=True)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")  # of the oracle's
def test_chains_that_predict_different_entries_share_the_weight_that_predicts_best():
    better = np.random.default_rng(0).normal(-2.0, 0.7, size=(2, ENTRIES))
    tree = tree_of(better)
    found = stack_chains(tree)
    own = [pointwise(tree, chain) for chain in range(2)]
    density = np.exp([np.asarray(one.elpd_i) for one in own])
    grid = np.linspace(0, 1, 10_001)
    scores = np.log(grid[:, None] * density[0] + (1 - grid[:, None]) * density[1]).sum(1)
    best = grid[scores.argmax()]
    assert 0.05 < best < 0.95
    assert [one.weight for one in found] == pytest.approx([best, 1 - best], abs=2e-3)
    assert [one.elpd for one in found] == pytest.approx([float(one.elpd) for one in own])
    assert [one.chain for one in found] == [0, 1]
    largest = [float(np.max(one.pareto_k)) for one in own]
    assert [one.pareto_k for one in found] == pytest.approx(largest)


def test_a_chain_that_predicts_everything_better_has_all_the_weight():
    found = stack_chains(tree_of([np.full(ENTRIES, level) for level in (-3.0, -1.0, -2.0)]))
    assert [one.weight for one in found] == pytest.approx([0, 1, 0], abs=1e-6)


@pytest.mark.parametrize(("chains", "draws"), [(1, 60), (2, 24)])
def test_chains_that_cannot_be_weighed_are_refused(chains, draws):
    with pytest.raises(ValueError, match=f"has {chains} chains of {draws} draws: expected two"):
        stack_chains(tree_of(np.zeros((chains, ENTRIES)), draws))


def test_a_tree_without_log_likelihoods_is_refused():
    tree = xr.DataTree.from_dict({"posterior": tree_of(np.zeros((2, ENTRIES)))["posterior"]})
    with pytest.raises(ValueError, match="no log_likelihood: expected one from to_datatree"):
        stack_chains(tree)
