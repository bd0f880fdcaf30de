"""Sampled posteriors as runs and as DataTrees: what is in them, and that ArviZ takes them."""

import dataclasses
import importlib
import shutil
import subprocess
import sys
from functools import partial

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from numpyro.handlers import seed, substitute, trace

from probattn import log_det, stability_margin
from probattn.inference import (
    SampleConfig,
    SampleError,
    SampleRunConfig,
    evaluate,
    generate,
    guide_draws,
    load_posterior,
    load_run,
    sample,
    sample_run,
    sensitivity,
    text_margins,
    to_datatree,
)
from probattn.inference.cli import main
from probattn.inference.config_files import format_config
from probattn.inference.export.diagnostics import divergence_margin, summarise
from probattn.inference.figures import posterior as posterior_plots
from probattn.inference.runs.files import RunError
from probattn.inference.runs.folder import check_target
from probattn.inference.sampling import posterior_runs as posterior
from probattn.inference.sampling.posterior_runs import posterior_model
from probattn.inference.sampling.result import PosteriorResult
from probattn.models import LanguageModelConfig, ObjectiveConfig
from probattn.models.coupling import attention_weights_of
from probattn.text.corpora import DataConfig, load_corpus
from tests.support.tiny_run import files_of, tiny_text

SEQUENCES, LENGTH, WIDTH, SYMBOLS = 3, 6, 2, 6
FLAGS = [
    *("--data.tokenizer", f"frequent:{SYMBOLS}", "--latent.width", str(WIDTH)),
    *("--latent.sequences", str(SEQUENCES), "--latent.length", str(LENGTH)),
    *("--sample.chains", "2", "--sample.warmup", "30", "--sample.draws", "20"),
]


@pytest.fixture(scope="module", name="folder")
def folder_fixture(tmp_path_factory):
    """A latent run by the command line, on a text of its own."""
    folder = tmp_path_factory.mktemp("posterior")
    (folder / "text.txt").write_text(tiny_text(), encoding="utf-8")
    command = ["sample", "--data", str(folder / "text.txt"), "--model", "latent"]
    assert main([*command, "--out", str(folder / "run"), *FLAGS]) == 0
    return folder


@pytest.fixture(scope="module", name="run")
def run_fixture(folder):
    return load_run(folder / "run")


@pytest.fixture(scope="module", name="tree")
def tree_fixture(run):
    return to_datatree(run, log_likelihood=True, posterior_predictive=True, prior=7, seed=1)


def traced(run, draw):
    """Sites of the run's model at one draw, without any batching."""
    result = load_posterior(run)
    values = {name: jnp.asarray(value[draw]) for name, value in result.draws.items()}
    model = seed(substitute(result.model, values), 0)
    return trace(model).get_trace(*result.model_args)


def test_what_the_command_leaves(folder, run):
    files = files_of(run.path)
    assert {"config.toml", "data.json", "posterior.nc"} < set(files)
    assert {"figures/smallest_margin.png", "figures/support_probability.png"} < set(files)
    assert [name for name in files if name.startswith("segments/")] == [
        "segments/00000000-00000030.npz",
        "segments/00000030-00000050.npz",
    ]
    assert run.config.latent.width == WIDTH
    assert run.config.data.source == str(folder / "text.txt")
    with xr.open_datatree(run.path / "posterior.nc") as stored:
        assert {"posterior", "sample_stats", "log_likelihood"} < set(stored.children)
        assert stored.attrs["corpus_sha256"] == run.data["sha256"]


def test_dimensions_are_named(tree):
    posterior = tree["posterior"].to_dataset()
    sizes = {"chain": 2, "draw": 20}
    expected = {
        "embeddings": {"sequence": SEQUENCES, "position": LENGTH, "embed": WIDTH},
        "coupling": {"key_embed": WIDTH, "query_embed": WIDTH},
        "coupling_eigenvalues": {"eigenvalue": WIDTH},
        "emission": {"embed": WIDTH, "vocab": SYMBOLS},
        "margin": {"sequence": SEQUENCES, "position": LENGTH},
        "log_det": {"sequence": SEQUENCES, "position": LENGTH},
        "sequence_margin": {"sequence": SEQUENCES},
        "smallest_margin": {},
    }
    for name, own in expected.items():
        assert dict(posterior[name].sizes) == sizes | own, name
    assert dict(tree["log_likelihood"]["tokens"].sizes) == sizes | {"sequence": SEQUENCES}
    assert dict(tree["support_tokens"]["support_probability"].sizes) == expected["margin"]
    assert dict(tree["posterior_predictive"]["tokens"].sizes) == sizes | expected["margin"]
    assert tree["prior"].sizes["draw"] == 7
    symbols = list(posterior.coords["vocab"].values)
    assert symbols[-1] == "\ufffd"
    assert symbols[:-1] == sorted(symbols[:-1])


def test_values_are_those_of_the_model_at_each_draw(run, tree):
    posterior = tree["posterior"].to_dataset()
    for draw in ((0, 0), (1, 19)):
        sites = traced(run, draw)
        for name in ("coupling", "coupling_eigenvalues", "margin", "log_det"):
            np.testing.assert_allclose(posterior[name].values[draw], sites[name]["value"])
        likelihood = sites["tokens"]["fn"].log_prob(sites["tokens"]["value"])
        found = tree["log_likelihood"]["tokens"].values[draw]
        np.testing.assert_allclose(found, likelihood)
        x = posterior["embeddings"].values[draw]
        weights = attention_weights_of(jnp.asarray(posterior["coupling"].values[draw]))
        bound = run.config.latent.context_bound
        margin = stability_margin(x, *weights, bound=bound)
        np.testing.assert_allclose(posterior["margin"].values[draw], margin)
        log_abs = log_det(x, *weights, bound=bound)[1]
        np.testing.assert_allclose(posterior["log_det"].values[draw], log_abs)


def test_support_probability_counts_the_smallest_margin_of_each_sequence(tree):
    margin = tree["posterior"]["margin"].values.reshape(-1, SEQUENCES, LENGTH)
    expected = np.zeros((SEQUENCES, LENGTH))
    for draw in margin:
        for sequence, values in enumerate(draw):
            expected[sequence, 2 + int(np.argmin(values[2:]))] += 1 / len(margin)
    found = tree["support_tokens"]["support_probability"].values
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(found.sum(-1), 1)
    assert np.all(found[:, :2] == 0)
    assert np.all(tree["support_tokens"]["certified_probability"].values <= 1)
    smallest = tree["posterior"]["smallest_margin"].values
    np.testing.assert_allclose(smallest.ravel(), margin[:, :, 2:].min((1, 2)))


def test_predictions_differ_from_what_was_observed_and_follow_the_seed(run, tree):
    predicted = tree["posterior_predictive"]["tokens"].values
    observed = tree["observed_data"]["tokens"].values
    assert predicted.min() >= 0
    assert predicted.max() < SYMBOLS
    assert 0 < np.mean(predicted == observed) < 1
    again = to_datatree(run, posterior_predictive=True, seed=1)
    np.testing.assert_array_equal(again["posterior_predictive"]["tokens"].values, predicted)
    other = to_datatree(run, posterior_predictive=True, seed=2)
    assert not np.array_equal(other["posterior_predictive"]["tokens"].values, predicted)
    assert "log_likelihood" not in again.children


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto distribution")
def test_arviz_takes_it_as_it_is(tree):
    names = ["coupling_trace", "coupling_eigenvalues", "smallest_margin"]
    table = az.summary(tree, var_names=names)
    assert len(table) == 2 + WIDTH
    loo = az.loo(tree)
    assert loo.n_data_points == SEQUENCES
    assert len(az.compare({"one": tree, "other": tree})) == 2
    az.plot_trace(tree, var_names=["coupling_trace"])
    az.plot_dist(tree, var_names=["smallest_margin"])


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part")
def test_files_hold_the_same(tree, tmp_path):
    tree.to_netcdf(tmp_path / "tree.nc")
    tree.to_zarr(tmp_path / "tree.zarr")
    for opened in (
        xr.open_datatree(tmp_path / "tree.nc"),
        xr.open_datatree(tmp_path / "tree.zarr", engine="zarr", consolidated=False),
    ):
        assert dict(opened.attrs) == dict(tree.attrs)
        for name, group in tree.children.items():
            xr.testing.assert_equal(opened[name].to_dataset().load(), group.to_dataset())
        opened.close()
    # Numbers and text alone: what could be pickled is not there, nor anything that unpickles it.
    for group in tree.subtree:
        assert {variable.dtype.kind for variable in group.variables.values()} <= set("biufU")
    for name, data in files_of(tmp_path).items():
        assert b"pickle" not in data.lower(), name
    marked = tree.copy()
    marked.attrs["data"] = "<script>alert(1)</script>"
    page = marked._repr_html_()
    assert "&lt;script&gt;" in page
    assert "<script>alert" not in page


def test_attributes_tell_where_it_comes_from(run, tree):
    assert tree.attrs["inference_method"] == "nuts"
    assert tree.attrs["seed"] == 0
    assert tree.attrs["tuning_steps"] == 30
    assert tree.attrs["configuration"] == format_config(run.config)
    assert tree.attrs["sampling_time"] > 0
    assert {f"{name}_version" for name in ("probattn", "numpyro", "jax")} <= set(tree.attrs)


def test_summary_has_identified_quantities_alone(tree):
    rows = {row.name: row for row in summarise(tree)}
    assert set(rows) == {
        "coupling_trace",
        "coupling_norm",
        "coupling_eigenvalues[0]",
        "coupling_eigenvalues[1]",
        "smallest_margin",
        f"sequence_margin, worst of {SEQUENCES}",
        f"margin, worst of {SEQUENCES * (LENGTH - 2)}",
        f"tokens, worst of {SEQUENCES}",
    }
    trace_draws = tree["posterior"]["coupling_trace"].values
    row = rows["coupling_trace"]
    assert (row.mean, row.sd) == (
        pytest.approx(trace_draws.mean()),
        pytest.approx(trace_draws.std()),
    )
    assert row.r_hat == pytest.approx(float(az.rhat(trace_draws)))
    dataset = tree["posterior"].to_dataset()[["coupling_trace"]]
    tail = az.ess(dataset, method="tail")["coupling_trace"]
    assert row.ess_tail == pytest.approx(float(tail))
    worst = rows[f"sequence_margin, worst of {SEQUENCES}"]
    margins = np.moveaxis(tree["posterior"]["sequence_margin"].values, -1, 0)
    assert worst.ess_bulk == pytest.approx(min(float(az.ess(m, method="bulk")) for m in margins))
    with pytest.raises(ValueError, match="has no posterior: expected draws"):
        summarise(xr.DataTree())


def test_margin_at_which_draws_diverged(tree):
    assert divergence_margin(tree) is None
    copy = tree.copy(deep=True)
    diverging = copy["sample_stats"]["diverging"].values
    diverging[1, 3] = diverging[0, 7] = True
    margins = tree["posterior"]["smallest_margin"].values
    assert divergence_margin(copy) == min(margins[1, 3], margins[0, 7])


def test_a_model_of_ones_own_keeps_its_names_and_its_factors_out():
    def model(data):
        numpyro.factor("potential", -1.0)
        slope = numpyro.sample("slope", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.deterministic("twice", 2 * slope)
        with numpyro.plate("rows", 4):
            numpyro.sample("data", dist.Normal(slope.sum(), 1.0), obs=data)

    config = SampleConfig(chains=1, warmup=20, draws=10)
    result = sample(model, model_args=(np.arange(4.0),), config=config)
    assert isinstance(result, PosteriorResult)
    tree = to_datatree(result, log_likelihood=True, dims={"slope": ["side"]})
    assert set(tree["posterior"].data_vars) == {"slope", "twice"}
    assert tree["posterior"]["slope"].dims == ("chain", "draw", "side")
    assert tree["posterior"]["twice"].dims == ("chain", "draw", "twice_dim_0")
    assert set(tree["observed_data"].data_vars) == set(tree["log_likelihood"].data_vars) == {"data"}
    assert tree["log_likelihood"]["data"].shape == (1, 10, 4)
    assert "support_tokens" not in tree.children
    with pytest.raises(ValueError, match=r"dims of slope are \('a', 'b'\): expected 1 names"):
        to_datatree(result, dims={"slope": ["a", "b"]})


def test_non_centred_run_has_embeddings_too(folder, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["sample", "--data", str(folder / "text.txt"), "--out", str(out), *FLAGS]
    assert main([*command, "--latent.no-centred", "--sample.chains", "1"]) == 0
    posterior = to_datatree(load_run(out))["posterior"].to_dataset()
    assert posterior["embeddings"].dims == posterior["embeddings_base"].dims
    assert "of 20 draws diverged" in capsys.readouterr().out


def test_from_a_fitted_run(tiny_run, tmp_path, capsys, monkeypatch):
    """The posterior of a fitted language model, on its text, from its parameters on."""
    maps, draw_map = [], posterior_plots.support_map

    def noting(probability, symbols):
        maps.append(symbols)
        return draw_map(probability, symbols)

    monkeypatch.setattr(posterior_plots, "support_map", noting)
    out = tmp_path / "run"
    command = ["sample", "--from", str(tiny_run.path), "--out", str(out)]
    few = ["--sample.chains", "1", "--sample.warmup", "2", "--sample.draws", "3"]
    few += ["--sample.sequences", "4", "--sample.max-tree-depth", "3"]
    assert main([*command, *few]) == 0
    assert "r_hat" in capsys.readouterr().out
    run = load_run(out)
    assert run.config.model == tiny_run.config.model
    assert run.config.objective == tiny_run.config.objective
    with np.load(out / "start.npz") as start:
        for name, value in tiny_run.parameters.items():
            np.testing.assert_array_equal(start[name], value)
    tree = to_datatree(run)
    posterior = tree["posterior"].to_dataset()
    # The map shows the tokens whose margins they are; observed are those that follow them.
    followers = [list(map(run.vocabulary.decode, row[:, None])) for row in targets_of(tree)]
    assert [row[1:] for row in maps[0]] == [row[:-1] for row in followers]
    near = np.abs(
        posterior["token_embedding"].values - np.asarray(start_of(out)["token_embedding"])
    )
    assert np.median(near) < 0.1  # five short iterations from there
    for draw in range(3):
        sites = traced(run, (0, draw))
        np.testing.assert_allclose(
            posterior["margin"].values[0, draw], sites["margin"]["value"], rtol=1e-6
        )
    assert posterior["attention_in"].dims[2:] == ("layer", "embed", "query_key_value")


def targets_of(tree):
    return tree["observed_data"]["tokens"].values


def start_of(out):
    with np.load(out / "start.npz") as start:
        return dict(start)


def test_model_of_a_run_is_the_public_one(run):
    model = posterior_model(run.config, run.vocabulary)
    assert isinstance(model, partial)
    with jax.enable_x64(True):
        assert "embeddings" in trace(seed(model, 0)).get_trace()


# Bad input


def error_of(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    return status, lines[0].removeprefix("probattn: error: ")


def test_draws_that_no_memory_holds_leave_no_run(folder, tmp_path, capsys):
    command = ["sample", "--data", folder / "text.txt", "--out", tmp_path / "run", *FLAGS]
    status, error = error_of(capsys, *command, "--sample.draws", 10**9)
    assert status == 2
    assert "GiB: expected at most 16 GiB; give a smaller model" in error
    assert not (tmp_path / "run").exists()


def test_a_map_run_has_no_draws(tiny_run, capsys):
    with pytest.raises(ValueError, match="is a MAP run, a point without draws: make draws with"):
        to_datatree(tiny_run, log_likelihood=True)
    with pytest.raises(ValueError, match="prior: got -1, expected an integer >= 0"):
        to_datatree(tiny_run, prior=-1)


def test_a_posterior_is_no_fit(run, capsys):
    status, line = error_of(capsys, "evaluate", run.path)
    assert status == 2
    assert line.endswith("is a sampled posterior: expected a run of `probattn fit`")


def test_errors_of_the_command(folder, run, tiny_run, tmp_path, capsys):
    out = tmp_path / "new"
    data = folder / "text.txt"
    for arguments, message in (
        (["--sample.chains", 0], "sample.chains is 0: expected an integer >= 1"),
        (["--latent.sequences", 10_000], "expected at least 10000 sequences of 6"),
        (["--resume"], "holds no run to resume; start one without --resume"),
    ):
        flags = FLAGS[:-6] if "--sample.chains" in arguments else FLAGS
        status, line = error_of(capsys, "sample", "--data", data, "--out", out, *flags, *arguments)
        assert status == 2
        assert message in line
        assert not out.exists()
    status, line = error_of(capsys, "sample", "--out", run.path)
    assert "holds another run; continue it with --resume" in line
    status, line = error_of(capsys, "sample", "--out", run.path, "--resume", "--sample.chains", 3)
    assert "cannot resume with a changed configuration: sample.chains: 2 -> 3" in line
    config = run.path / "config.toml"
    status, line = error_of(
        capsys, "sample", "--from", tiny_run.path, "--config", config, "--out", out
    )
    assert "--config with --from" in line
    _, line = error_of(capsys, "sample", "--from", tiny_run.path, "--data", data, "--out", out)
    assert "--data with --from" in line
    _, line = error_of(capsys, "sample", "--from", tiny_run.path, "--model", "latent", "--out", out)
    assert "--kind with --from" in line
    status, line = error_of(capsys, "sample", "--from", run.path, "--out", out)
    assert "is a sampled posterior: expected a run of `probattn fit`" in line


@pytest.mark.parametrize("place", ["new", "empty", "link"])
def test_a_sampler_that_cannot_start_leaves_the_place_as_it_was(run, tmp_path, monkeypatch, place):
    def fail(*arguments, **options):
        assert (tmp_path / "own" / "config.toml").exists()
        raise SampleError("no start")

    out = tmp_path / "own"
    if place != "new":
        out.mkdir()
    if place == "link":
        out = tmp_path / "link"
        out.symlink_to(tmp_path / "own")
    monkeypatch.setattr(posterior, "sample", fail)
    with pytest.raises(SampleError, match="no start"):
        sample_run(run.config, out)
    assert out.exists() == (place != "new")
    assert {path.name for path in tmp_path.rglob("*")} <= {"own", "link", "lock"}
    monkeypatch.undo()
    check_target(out, overwrite=False)  # free to begin again


def test_a_sampler_that_cannot_start_leaves_the_run_that_it_was_to_replace(run, tmp_path):
    out = shutil.copytree(run.path, tmp_path / "run")
    before = files_of(out)
    sampler = dataclasses.replace(run.config.sample, draws=10**12)
    config = dataclasses.replace(run.config, sample=sampler)
    with pytest.raises(ValueError, match="GiB"):
        sample_run(config, out, overwrite=True)
    assert files_of(out) == before


def test_a_short_text_gives_the_sequences_that_it_has(tiny_run):
    fitted = load_run(tiny_run.path)
    tokens = fitted.vocabulary.encode(load_corpus(fitted.config.data).train)
    block = fitted.config.model.block
    count = (len(tokens) - 1) // block
    inputs, targets = posterior.training_sequences(fitted, 10**6)
    np.testing.assert_array_equal(inputs.ravel(), tokens[: count * block])
    np.testing.assert_array_equal(targets.ravel(), tokens[1 : count * block + 1])


def test_what_is_for_fits_names_a_posterior(run):
    for call in (evaluate, sensitivity, text_margins, guide_draws, partial(generate, prompt="a")):
        with pytest.raises(RunError, match="is a sampled posterior: expected a run of"):
            call(run)


@pytest.mark.parametrize("by", ["flags", "file"])
def test_the_defaults_of_a_file_are_those_of_the_flags(tmp_path, monkeypatch, by):
    """What neither names: few symbols, and the paper's joint density."""
    asked = []

    def note(config, out, **options):
        asked.append(config)
        raise SampleError("enough")

    monkeypatch.setattr(
        importlib.import_module("probattn.inference.cli.commands"), "sample_run", note
    )
    (tmp_path / "a.toml").write_text("[model]\nlayers = 1\n[objective]\ndelta = 0.5\n")
    given = {
        "flags": ["--model", "language", "--model.layers", "1", "--objective.delta", "0.5"],
        "file": ["--config", str(tmp_path / "a.toml")],
    }[by]
    assert main(["sample", "--out", str(tmp_path / "run"), *given]) == 1
    assert asked == [
        SampleRunConfig(
            DataConfig(tokenizer="frequent:16"),
            model=LanguageModelConfig(layers=1),
            objective=ObjectiveConfig("full", delta=0.5),
        )
    ]


def test_an_unfinished_run_says_so(run, tmp_path):
    copy = shutil.copytree(run.path, tmp_path / "run")
    (copy / "segments" / "00000030-00000050.npz").unlink()
    with pytest.raises(RunError, match="has 30 of 50 iterations; finish it with sample --resume"):
        to_datatree(load_run(copy))


def test_resumed_by_the_command_without_any_other_flag(run, tmp_path):
    copy = shutil.copytree(run.path, tmp_path / "run")
    (copy / "segments" / "00000030-00000050.npz").unlink()
    assert main(["sample", "--out", str(copy), "--resume"]) == 0
    one, other = load_posterior(run), load_posterior(load_run(copy))
    for name, draws in one.draws.items():
        np.testing.assert_array_equal(draws, other.draws[name])


def test_numpyro_works_where_arviz_was_imported_first(tmp_path):
    """ArviZ leaves a lazy `numpyro` behind, of which a careless import makes half a package."""
    script = "import arviz, probattn, numpyro\nnumpyro.factor('f', 1.0)\nprint('fine')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr
