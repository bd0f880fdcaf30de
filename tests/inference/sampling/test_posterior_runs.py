"""Sampled posteriors as runs and as DataTrees: what is in them, and that ArviZ takes them."""

import dataclasses
import re
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
from scipy import stats

from probattn import log_det, stability_margin, table_certificate
from probattn.inference import (
    SampleError,
    SampleRunConfig,
    evaluate,
    generate,
    guide_draws,
    load_posterior,
    load_run,
    sample_run,
    sensitivity,
    text_margins,
    to_datatree,
)
from probattn.inference.cli import commands, main
from probattn.inference.config_files import format_config
from probattn.inference.export.diagnostics import divergence_margin, summarise
from probattn.inference.figures import posterior as posterior_plots
from probattn.inference.runs.files import RunError
from probattn.inference.runs.folder import check_target
from probattn.inference.sampling import posterior_runs as posterior
from probattn.inference.sampling.posterior_runs import posterior_model
from probattn.inference.sampling.result import PosteriorResult
from probattn.models import (
    LanguageModelConfig,
    LatentEmbeddingsConfig,
    ObjectiveConfig,
    latent_embeddings,
)
from probattn.models.coupling import attention_weights_of
from probattn.text.corpora import DataConfig, load_corpus
from tests.support.tiny_posterior import (
    CHAINS,
    DRAWS,
    LANGUAGE,
    LATENT_FLAGS,
    LENGTH,
    SEQUENCES,
    WARMUP,
    WIDTH,
)
from tests.support.tiny_run import files_of, tiny_text

SYMBOLS = len(set(tiny_text()))


@pytest.fixture(scope="module", name="run")
def run_fixture(latent_run):
    return latent_run


@pytest.fixture(scope="module", name="tree")
def tree_fixture(run):
    return to_datatree(run, log_likelihood=True, posterior_predictive=True, prior=7, seed=1)


def traced(run, draw):
    """Sites of the run's model at one draw, without any batching."""
    result = load_posterior(run)
    values = {name: jnp.asarray(value[draw]) for name, value in result.draws.items()}
    model = seed(substitute(result.model, values), 0)
    return trace(model).get_trace(*result.model_args)


def test_what_the_command_leaves(tiny_run, run):
    files = files_of(run.path)
    assert {"config.toml", "data.json", "posterior.nc"} < set(files)
    assert {"figures/smallest_margin.png", "figures/support_probability.png"} < set(files)
    assert [name for name in files if name.startswith("segments/")] == [
        "segments/00000000-00000030.npz",
        "segments/00000030-00000050.npz",
    ]
    assert run.config.latent.width == WIDTH
    assert run.config.data.source == tiny_run.config.data.source
    with xr.open_datatree(run.path / "posterior.nc") as stored:
        assert {"posterior", "sample_stats", "log_likelihood"} < set(stored.children)
        assert stored.attrs["corpus_sha256"] == run.data["sha256"]


def test_draws_are_those_of_the_segments_after_the_warm_up(run, tree):
    """Chain by chain, draw by draw, up to the last digit."""
    warmed, drawn = run.segments.load()
    assert (warmed.stop, drawn.stop) == (WARMUP, WARMUP + DRAWS)
    posterior = tree["posterior"].to_dataset()
    for name, values in drawn.draws.items():
        assert warmed.draws[name].shape[1] == 0
        np.testing.assert_array_equal(posterior[name].values, values)
        assert not np.array_equal(values[0], values[1]), name
    np.testing.assert_array_equal(tree["sample_stats"]["lp"].values, drawn.statistics["lp"])


def test_dimensions_are_named(tree):
    posterior = tree["posterior"].to_dataset()
    sizes = {"chain": CHAINS, "draw": DRAWS}
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
        assert list(posterior[name].sizes.items()) == list((sizes | own).items()), name
    assert dict(tree["log_likelihood"]["tokens"].sizes) == sizes | {"sequence": SEQUENCES}
    assert dict(tree["support_tokens"]["support_probability"].sizes) == expected["margin"]
    assert dict(tree["posterior_predictive"]["tokens"].sizes) == sizes | expected["margin"]
    assert tree["prior"].sizes["draw"] == 7
    assert list(posterior.coords["vocab"].values) == sorted(set(tiny_text()))


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert tree.attrs["tuning_steps"] == WARMUP
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

    draws = {"slope": np.random.default_rng(0).normal(size=(1, 10, 2))}
    result = PosteriorResult(method="nuts", draws=draws, model=model, model_args=(np.arange(4.0),))
    tree = to_datatree(result, log_likelihood=True, dims={"slope": ["side"]})
    assert set(tree["posterior"].data_vars) == {"slope", "twice"}
    assert tree["posterior"]["slope"].dims == ("chain", "draw", "side")
    assert tree["posterior"]["twice"].dims == ("chain", "draw", "twice_dim_0")
    assert set(tree["observed_data"].data_vars) == set(tree["log_likelihood"].data_vars) == {"data"}
    assert tree["log_likelihood"]["data"].shape == (1, 10, 4)
    mean = draws["slope"].sum(-1)[..., None]
    expected = stats.norm.logpdf(np.arange(4.0), mean)
    np.testing.assert_allclose(tree["log_likelihood"]["data"].values, expected)
    np.testing.assert_array_equal(tree["posterior"]["twice"].values, 2 * draws["slope"])
    assert "support_tokens" not in tree.children
    with pytest.raises(ValueError, match=r"dims of slope are \('a', 'b'\): expected 1 names"):
        to_datatree(result, dims={"slope": ["a", "b"]})


@pytest.mark.slow
def test_non_centred_draws_have_embeddings_too():
    """Made from draws of the prior: what is exported depends on the model alone."""
    config = LatentEmbeddingsConfig(width=2, sequences=2, length=4, centred=False)
    tokens = np.zeros((2, 4), int)
    model = partial(latent_embeddings, vocabulary_size=3, config=config)

    @jax.jit
    def drawn():
        sites = trace(seed(model, 0)).get_trace(tokens)
        return (
            {
                name: site["value"][None, None]
                for name, site in sites.items()
                if site["type"] == "sample" and not site["is_observed"]
            },
            sites["embeddings"]["value"],
        )

    draws, expected = jax.tree.map(np.asarray, drawn())
    assert "embeddings_base" in draws
    tree = to_datatree(PosteriorResult("nuts", draws, model, (tokens,)))
    posterior = tree["posterior"].to_dataset()
    assert posterior["embeddings"].dims == posterior["embeddings_base"].dims
    found = posterior["embeddings"].values[0, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.slow
def test_a_non_centred_run_is_sampled_by_the_command(run, tmp_path, capsys):
    out, data = tmp_path / "run", run.config.data
    command = ["sample", "--data", data.source, "--out", str(out), *LATENT_FLAGS]
    assert main([*command, "--latent.no-centred", "--sample.chains", "1"]) == 0
    posterior = to_datatree(load_run(out))["posterior"].to_dataset()
    assert posterior["embeddings"].dims == posterior["embeddings_base"].dims
    assert list(posterior.coords["vocab"].values)[-1] == "\ufffd"  # of the symbols that are rare
    assert f"of {DRAWS} draws diverged" in capsys.readouterr().out


@pytest.mark.slow
def test_the_network_of_a_fitted_run_is_sampled(tiny_run, language_run, tmp_path):
    """With the sites, shapes and statistics of the run that other tests make by hand."""
    config = posterior.config_of_fit(tiny_run, LANGUAGE)
    run, _ = sample_run(config, tmp_path / "run", init_values=tiny_run.parameters)
    found, by_hand = load_posterior(run), load_posterior(language_run)
    for kind in ("draws", "statistics"):
        sampled, made = getattr(found, kind), getattr(by_hand, kind)
        assert {name: value.shape for name, value in sampled.items()} == {
            name: value.shape for name, value in made.items()
        }
    for name, value in found.draws.items():
        assert np.all(np.isfinite(value)), name
        assert not np.array_equal(value[0], value[1]), name
    assert np.mean(found.statistics["acceptance_rate"]) > 0.3


@pytest.mark.slow
def test_from_a_fitted_run(tiny_run, language_run, tmp_path, capsys, monkeypatch):
    """The posterior of a fitted language model, on its text, from its parameters on."""
    maps, draw_map, asked = [], posterior_plots.support_map, []

    def noting(probability, symbols):
        maps.append((probability, symbols))
        return draw_map(probability, symbols)

    def sampled(config, out, *, init_values, **options):
        asked.append((config, init_values, options))
        return load_run(shutil.copytree(language_run.path, out)), None

    monkeypatch.setattr(posterior_plots, "support_map", noting)
    monkeypatch.setattr(commands, "sample_run", sampled)
    out = tmp_path / "run"
    few = ["--sample.chains", "2", "--sample.warmup", str(LANGUAGE.warmup)]
    few += ["--sample.draws", "15", "--sample.sequences", "4", "--sample.max-tree-depth", "3"]
    assert main(["sample", "--from", str(tiny_run.path), "--out", str(out), *few]) == 0
    assert "r_hat" in capsys.readouterr().out
    [(config, start, options)] = asked
    assert config == language_run.config
    assert options == {"resume": False, "overwrite": False, "progress": True}
    for given in (start, start_of(language_run.path)):
        assert given.keys() == tiny_run.parameters.keys()
        for name, value in tiny_run.parameters.items():
            np.testing.assert_array_equal(given[name], value)
    run = load_run(out)
    assert run.config.model == tiny_run.config.model
    assert run.config.objective == tiny_run.config.objective
    with xr.open_datatree(out / "posterior.nc") as opened:
        tree = opened.load()
    posterior = tree["posterior"].to_dataset()
    # The map shows the tokens whose margins they are; observed are those that follow them.
    followers = [list(map(run.vocabulary.decode, row[:, None])) for row in targets_of(tree)]
    [(probability, symbols)] = maps
    assert [row[1:] for row in symbols] == [row[:-1] for row in followers]
    np.testing.assert_array_equal(probability, tree["support_tokens"]["support_probability"].values)
    for draw in ((0, 0), (1, 14)):
        sites = traced(run, draw)
        np.testing.assert_allclose(
            posterior["margin"].values[draw], sites["margin"]["value"], rtol=1e-6
        )
        likelihood = sites["tokens"]["fn"].log_prob(sites["tokens"]["value"])
        np.testing.assert_allclose(
            tree["log_likelihood"]["tokens"].values[draw], likelihood, rtol=1e-6
        )
    assert posterior["attention_in"].dims[2:] == ("layer", "embed", "query_key_value")


def targets_of(tree):
    return tree["observed_data"]["tokens"].values


def start_of(out):
    with np.load(out / "start.npz") as start:
        return dict(start)


@pytest.mark.slow
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


def test_draws_that_no_memory_holds_leave_no_run(tmp_path, run, capsys):
    command = ["sample", "--data", run.config.data.source, "--out", tmp_path / "run"]
    status, error = error_of(capsys, *command, *LATENT_FLAGS, "--sample.draws", 10**9)
    assert status == 2
    assert re.search(r"would take [\d,]+ GiB: expected at most", error)
    assert not (tmp_path / "run").exists()


def test_a_map_run_has_no_draws(tiny_run, capsys):
    with pytest.raises(ValueError, match="is a MAP run, a point without draws: make draws with"):
        to_datatree(tiny_run, log_likelihood=True)
    with pytest.raises(ValueError, match="prior: got -1, expected an integer >= 0"):
        to_datatree(tiny_run, prior=-1)


def test_a_posterior_is_no_fit(run, capsys):
    status, line = error_of(capsys, "evaluate", run.path)
    assert status == 2
    assert line.endswith("is a sampled posterior: expected a run of `probattn fit` or `import`")


def test_errors_of_the_command(run, tiny_run, tmp_path, capsys):
    out = tmp_path / "new"
    data = run.config.data.source
    for arguments, message in (
        (["--sample.chains", 0], "sample.chains is 0: expected an integer >= 1"),
        (["--latent.sequences", 10_000], "expected at least 10000 sequences of 6"),
        (["--resume"], "holds no run to resume; start one without --resume"),
    ):
        flags = LATENT_FLAGS[:-6] if "--sample.chains" in arguments else LATENT_FLAGS
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
        assert options["init_values"] is start
        raise SampleError("no start")

    out, start = tmp_path / "own", {"emission_bias": np.zeros(SYMBOLS)}
    if place != "new":
        out.mkdir()
    if place == "link":
        out = tmp_path / "link"
        out.symlink_to(tmp_path / "own")
    monkeypatch.setattr(posterior, "sample", fail)
    with pytest.raises(SampleError, match="no start"):
        sample_run(run.config, out, init_values=start)
    assert out.exists() == (place != "new")
    assert {path.name for path in tmp_path.rglob("*")} <= {"own", "link", "lock"}
    monkeypatch.undo()
    check_target(out, overwrite=False)  # free to begin again


@pytest.mark.slow
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

    monkeypatch.setattr(commands, "sample_run", note)
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


@pytest.mark.slow
def test_resumed_by_the_command_without_any_other_flag(run, tmp_path):
    copy = shutil.copytree(run.path, tmp_path / "run")
    (copy / "segments" / "00000030-00000050.npz").unlink()
    assert main(["sample", "--out", str(copy), "--resume"]) == 0
    one, other = load_posterior(run), load_posterior(load_run(copy))
    for name, draws in one.draws.items():
        np.testing.assert_array_equal(draws, other.draws[name])


@pytest.mark.slow
def test_numpyro_works_where_arviz_was_imported_first(tmp_path):
    """ArviZ leaves a lazy `numpyro` behind, of which a careless import makes half a package."""
    script = "import arviz, probattn, numpyro\nnumpyro.factor('f', 1.0)\nprint('fine')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.slow
def test_a_posterior_says_what_is_proved_for_all_texts(language_run):
    """By the certificate of each draw's own table: its symbols at all positions but the last."""
    posterior = to_datatree(language_run)["posterior"]
    symbols, length = language_run.vocabulary.size, language_run.config.model.block - 1
    rho = posterior["table_certificate"]
    assert rho.dims == ("chain", "draw")
    for draw in ((0, 0), (1, 14)):
        tokens, positions, w_query, w_key = (
            posterior[name].values[draw]
            for name in ("token_embedding", "position_embedding", "w_query", "w_key")
        )
        table = (tokens[:, None] + positions[None, :length]).reshape(symbols * length, -1)
        place = np.tile(np.arange(length), symbols)
        expected = table_certificate(table, w_query, w_key, position=place).rho
        np.testing.assert_allclose(rho.values[draw], expected, rtol=1e-5)
    np.testing.assert_array_equal(posterior["no_text_folds"].values, rho.values < 1)
