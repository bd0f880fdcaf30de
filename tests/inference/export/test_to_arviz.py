"""The export: a point estimate that says so, with named dimensions, as files hold it."""

import dataclasses

import arviz as az
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

from probattn import stability_margin
from probattn.inference import post_hoc_prior, read_config, to_datatree
from probattn.inference.export import site_values as site_values_module
from probattn.inference.export.diagnostics import leave_one_out
from probattn.inference.export.site_values import site_values
from probattn.inference.export.to_arviz import _symbols
from probattn.inference.sampling.result import PosteriorResult
from probattn.text.vocabulary import CharacterVocabulary, build_vocabulary
from tests.support.made_runs import make_run
from tests.support.tiny_run import (
    BLOCK,
    LABELS,
    RANK,
    WIDTH,
    copy_of,
    fold,
    stage_arguments,
    tiny_text,
)

SEQUENCES = 6
SIZES = {
    "token_embedding": {"vocab": len(set(tiny_text())), "embed": WIDTH},
    "position_embedding": {"position": BLOCK, "embed": WIDTH},
    "final_norm": {"embed": WIDTH},
    "attention_norm": {"layer": 1, "embed": WIDTH},
    "attention_in": {"layer": 1, "embed": WIDTH, "query_key_value": 3 * WIDTH},
    "attention_out": {"layer": 1, "value": WIDTH, "embed": WIDTH},
    "mlp_norm": {"layer": 1, "embed": WIDTH},
    "mlp_in": {"layer": 1, "embed": WIDTH, "hidden": 4 * WIDTH},
    "mlp_out": {"layer": 1, "hidden": 4 * WIDTH, "embed": WIDTH},
    "w_query": {"embed": WIDTH, "rank": RANK},
    "w_key": {"embed": WIDTH, "rank": RANK},
}


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A copy of the run whose post-hoc prior folds some positions, so that log det is -inf."""
    copy = copy_of(tiny_run, tmp_path_factory.mktemp("export") / "run")
    fold(copy)
    return copy


@pytest.fixture(scope="module")
def tree(run):
    return to_datatree(run, sequences=SEQUENCES)


def test_parameters_are_there_by_name_with_named_dimensions(run, tree):
    group = tree["point_estimate"].dataset
    assert set(group.data_vars) == set(SIZES) == set(run.parameters)
    for name, sizes in SIZES.items():
        assert dict(group[name].sizes) == sizes
        np.testing.assert_array_equal(group[name].values, run.parameters[name])


def test_nothing_looks_like_draws(tree):
    assert "posterior" not in tree.children
    assert "log_likelihood" not in tree.children
    for group in tree.subtree:
        assert not {"chain", "draw"} & set(group.dims)


def test_diagnostics_of_draws_are_refused(tree):
    with pytest.raises(ValueError, match="posterior"):
        az.summary(tree)
    with pytest.raises(TypeError, match="log likelihood not found"):
        az.loo(tree)


def test_attributes_say_what_it_is_and_where_it_came_from(run, tree, tmp_path):
    attributes = tree.attrs
    assert "MAP" in attributes["inference_method"]
    assert "point estimate" in attributes["inference_method"]
    assert "MAP" in tree["point_estimate"].attrs["point_estimate"]
    assert attributes["inference_library"] == "numpyro"
    assert attributes["step"] == run.step
    assert attributes["seed"] == run.config.fit.seed
    assert attributes["corpus_sha256"] == run.data["sha256"]
    assert tree["margins"].attrs["margin_kind"] == "sigma_min"
    config = tmp_path / "config.toml"
    config.write_text(attributes["configuration"], encoding="utf-8")
    assert read_config(config) == run.config


def test_observed_tokens_are_windows_of_the_validation_text(run, tree):
    tokens = tree["observed_data"]["tokens"]
    assert dict(tokens.sizes) == {"sequence": SEQUENCES, "position": BLOCK}
    validation = tiny_text()[3600:]
    starts = tokens["sequence"].values
    assert starts[0] == 0
    assert starts[-1] == len(validation) - BLOCK
    for start, window in zip(starts, tokens.values, strict=True):
        assert run.vocabulary.decode(window) == validation[start : start + BLOCK]


def test_margins_are_those_of_the_observed_tokens(run, tree):
    margins = tree["margins"].dataset
    assert set(margins.data_vars) == {
        "margin",
        "log_det",
        "embedding_margin",
        "certificate",
        "infeasible",
        "table_certificate",
    }
    assert margins["table_certificate"].dims == ("stage",)
    for variable in margins.drop_vars("table_certificate").data_vars.values():
        assert dict(variable.sizes) == {"stage": 4, "sequence": SEQUENCES, "position": BLOCK}
    assert list(margins["stage"].values) == LABELS
    tokens = tree["observed_data"]["tokens"]
    np.testing.assert_array_equal(margins["sequence"], tokens["sequence"])
    for label, arguments in stage_arguments(run, tokens.values).items():
        expected = stability_margin(*map(jnp.asarray, arguments))
        found = margins["margin"].sel(stage=label).values
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_post_hoc_prior_is_there_as_a_constant(run, tree):
    constants, prior = tree["constant_data"].dataset, post_hoc_prior(run)
    for name, value in (
        ("post_hoc_w_query", prior.w_query),
        ("post_hoc_w_key", prior.w_key),
        ("post_hoc_scale", prior.scale),
        ("post_hoc_converged", prior.converged),
    ):
        np.testing.assert_array_equal(constants[name], value)


@pytest.mark.parametrize("format", ["netcdf", "zarr"])
def test_a_file_gives_the_same_tree_back(tree, tmp_path, format):
    path = tmp_path / f"run.{format}"
    if format == "netcdf":
        tree.to_netcdf(path)
        engine = "netcdf4"
    else:
        tree.to_zarr(path, consolidated=False)
        engine = "zarr"
    options = {} if engine == "netcdf4" else {"consolidated": False}
    with xr.open_datatree(path, engine=engine, **options) as opened:
        back = opened.load()
    assert back.identical(tree)
    margins = back["margins"].dataset
    assert np.isneginf(margins["log_det"].sel(stage="post hoc")).any()
    assert np.isposinf(margins["embedding_margin"].isel(position=[0, 1])).all()
    assert margins["infeasible"].dtype == bool


def test_a_short_text_is_all_of_it(run):
    assert to_datatree(run)["margins"].sizes["sequence"] == len(tiny_text()[3600:]) // BLOCK


@pytest.mark.parametrize("sequences", [0, -1])
def test_fewer_than_one_sequence_is_refused(run, sequences):
    with pytest.raises(ValueError, match=f"sequences: got {sequences}, expected an integer >= 1"):
        to_datatree(run, sequences=sequences)


@pytest.mark.parametrize(("chains", "draws"), [(1, 1), (1, 2), (2, 1), (1, 29), (2, 14)])
def test_too_few_draws_have_no_leave_one_out(chains, draws):
    assert leave_one_out(of_draws(chains, draws)) is None


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")  # of the oracle's
def test_leave_one_out_of_enough_draws():
    tree = of_draws(2, 50)
    elpd, error, *_ = leave_one_out(tree)
    found = az.loo(tree)
    assert (elpd, error) == (found.elpd, found.se)


def of_draws(chains, draws):
    """A tree of log likelihoods of six sequences."""
    values = np.random.default_rng(0).uniform(size=(chains, draws, SEQUENCES))
    tokens = xr.Dataset({"tokens": (("chain", "draw", "sequence"), values)})
    return xr.DataTree.from_dict({"posterior": tokens, "log_likelihood": tokens})


@pytest.mark.slow
@pytest.mark.parametrize("budget", [2**24, 2**30])
def test_draws_go_together_as_far_as_memory_allows(monkeypatch, budget):
    """Each takes 4 MiB to sort a million numbers; the values are the same in any case."""

    def model():
        value = numpyro.sample("value", dist.Normal(0.0, 1.0))
        ordered = jnp.sort(value * jnp.arange(2.0**20))
        numpyro.deterministic("median", ordered[2**19])

    draws = np.random.default_rng(0).normal(size=(2, 15)).astype(np.float32)
    result = PosteriorResult(method="nuts", draws={"value": draws}, model=model)
    monkeypatch.setattr(site_values_module, "BYTES_AT_ONCE", budget)
    parts = list(site_values(result))
    largest = max(rows.stop - rows.start for rows, _ in parts)
    assert 1 <= largest <= 4 if budget == 2**24 else largest == 16
    medians = np.concatenate([values.deterministic["median"] for _, values in parts])
    positions = np.where(draws.ravel() > 0, 2**19, 2**19 - 1)  # of negative ones the order turns
    np.testing.assert_allclose(medians, draws.ravel() * positions, rtol=1e-6)


def test_draws_of_several_types():
    """Double precision and whole numbers beside the single precision that a result is of."""

    def model():
        value = numpyro.sample("value", dist.Normal(0.0, 1.0))
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        count = numpyro.sample("count", dist.Poisson(3.0))
        numpyro.deterministic("product", value * scale * count)

    rng = np.random.default_rng(0)
    draws = {
        "value": rng.normal(size=(2, 5)).astype(np.float32),
        "scale": rng.random((2, 5)),
        "count": rng.integers(9, size=(2, 5)),
    }
    result = PosteriorResult(method="nuts", draws=draws, model=model)
    ((_, values),) = site_values(result)
    product = values.deterministic["product"]
    assert product.dtype == np.float32
    np.testing.assert_allclose(product, np.prod([*draws.values()], 0).ravel(), rtol=1e-6)


def test_symbols_that_are_rare_have_one_label(tmp_path):
    run = make_run(tmp_path / "run")
    run = dataclasses.replace(run, vocabulary=build_vocabulary("frequent:4", "aaabbbcccd"))
    assert _symbols(run) == ["a", "b", "c", "\N{REPLACEMENT CHARACTER}"]


def test_a_vocabulary_with_the_character_nul_can_be_saved(tmp_path):
    run = make_run(tmp_path / "run")
    run = dataclasses.replace(run, vocabulary=CharacterVocabulary(("\0", "a")))
    labels = _symbols(run)
    tree = xr.DataTree(xr.Dataset(coords={"vocab": labels}))
    tree.to_netcdf(tmp_path / "tree.nc")
    assert list(xr.open_datatree(tmp_path / "tree.nc").vocab.values) == ["\N{SYMBOL FOR NULL}", "a"]
