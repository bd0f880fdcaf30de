"""Runs of methods other than NUTS: by the command, from several fits, resumed, compared."""

from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr
from rich.console import Console

from probattn.inference import compare, load_posterior, load_run, to_datatree
from probattn.inference.cli import commands, main
from probattn.inference.cli.console import print_posterior
from probattn.inference.export.diagnostics import summarise
from tests.support.tiny_posterior import fitted_by_hand

CHAINS = ["--sample.chains", "2", "--sample.warmup", "50", "--sample.sequences", "4"]
SHORT = [*CHAINS, "--sample.draws", "15", "--sample.steps", "4"]


@pytest.fixture(scope="module", name="second_fit")
def second_fit_fixture(tiny_run, tmp_path_factory):
    """A fit of the same model and text with other parameters."""
    parameters = {name: np.asarray(value) * 0.9 for name, value in tiny_run.parameters.items()}
    other = SimpleNamespace(
        config=tiny_run.config,
        parameters=parameters,
        step=tiny_run.step,
        metrics=tiny_run.metrics,
        path=tiny_run.path,
    )
    return fitted_by_hand(other, tmp_path_factory.mktemp("fits") / "second")


def error_of(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto distribution")
def test_minibatches_of_a_fitted_network_from_the_command(tiny_run, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["sample", "--from", str(tiny_run.path), "--method", "sghmc", *SHORT]
    arguments += ["--sample.batch", "2", "--sample.temperature", "0.5", "--out", str(out)]
    assert main(arguments) == 0
    capsys.readouterr()
    run = load_run(out)
    result = load_posterior(run)
    assert result.method == "sghmc"
    assert run.config.sample.batch == 2
    tree = to_datatree(run)
    assert tree.attrs["inference_method"] == "sghmc"
    assert tree.attrs["temperature"] == 0.5
    assert tree["posterior"]["margin"].sizes["sequence"] == 4  # of all, and of no minibatch
    [compared] = compare({"run": run})
    assert compared.inference == "sghmc at temperature 0.5"
    assert compared.elpd_loo is None
    # Fewer draws of the same seed are the first of these.
    other = tmp_path / "other"
    again = [argument if argument != str(out) else str(other) for argument in arguments]
    again[again.index("--sample.draws") + 1] = "6"
    assert main(again) == 0
    fewer = load_posterior(load_run(other)).draws["token_embedding"]
    np.testing.assert_array_equal(fewer, result.draws["token_embedding"][:, :6])


def test_an_ensemble_of_fits_from_the_command(tiny_run, second_fit, tmp_path, capsys, monkeypatch):
    """What the command samples: the model of the fits, from the parameters of each."""
    asked = []

    def noting(config, out, *, init_values, **options):
        asked.append((config, init_values))
        raise ValueError("noted")

    monkeypatch.setattr(commands, "sample_run", noting)
    paths = [tiny_run.path, second_fit.path]
    out = ["--out", tmp_path / "run"]
    assert "noted" in error_of(
        capsys, "sample", "--from", *paths, "--method", "ensemble", *SHORT, *out
    )
    [(config, values)] = asked
    assert config.sample.method == "ensemble"
    assert config.model == tiny_run.config.model
    assert config.objective == tiny_run.config.objective
    assert values.keys() == tiny_run.parameters.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(value[0], tiny_run.parameters[name])
        np.testing.assert_array_equal(value[1], second_fit.parameters[name])
    assert not np.array_equal(values["mlp_in"][0], values["mlp_in"][1])


def test_runs_that_chains_cannot_start_from(tiny_run, tmp_path, capsys):
    paths = [tiny_run.path, tiny_run.path]
    out = ["--out", tmp_path / "run"]
    message = error_of(capsys, "sample", "--from", *paths, *out)
    assert "--from names 2 runs with sample.method nuts" in message
    message = error_of(capsys, "sample", "--from", *paths, "--method", "ensemble", *out)
    assert "sample.chains 4: expected a run for each chain" in message
    other = fitted_by_hand(tiny_run, tmp_path / "other", name="ce")
    chains = ["--method", "ensemble", "--sample.chains", "2"]
    message = error_of(capsys, "sample", "--from", tiny_run.path, other.path, *chains, *out)
    assert "differs from" in message
    assert "objective.name: margin -> ce" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_latent_embeddings_have_no_minibatches(tiny_run, tmp_path, capsys):
    data = ["--data", tiny_run.config.data.source, "--data.tokenizer", "character"]
    message = error_of(capsys, "sample", *data, "--method", "sgld", "--out", tmp_path / "run")
    assert "the plates of the model with a subsample_size are: none" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "hmc"], "hmc"),
        (["--method", "mclmc", "--sample.temperature", "0"], "sample.temperature is 0.0: expected"),
        (["--method", "sgld", "--sample.step-size", "-1"], "sample.step_size is -1.0: expected a"),
        (["--method", "sgld", "--sample.friction", "2"], "with sample.method sgld, which has none"),
        (["--method", "sgld", "--sample.adjusted"], "expected it with mclmc or ensemble alone"),
        (
            ["--method", "mclmc", "--sample.adjusted", "--sample.energy-variance", "1"],
            "with sample.method adjusted mclmc, which has none",
        ),
        (
            ["--method", "mclmc", "--sample.max-tree-depth", "5"],
            "leave it out, or take one of",
        ),
        (["--sample.temperature", "0.5"], "sample.temperature is 0.5 with sample.method nuts"),
        (
            ["--method", "sgld", "--sample.steps", "0"],
            "sample.steps is 0: expected an integer",
        ),
    ],
)
def test_settings_that_make_no_sample(tmp_path, capsys, flags, message):
    assert message in error_of(capsys, "sample", *flags, "--out", tmp_path / "run")


def test_one_chain_has_no_r_hat(capsys):
    draws = np.random.default_rng(0).normal(1.0, 0.1, (1, 50))
    posterior = xr.Dataset({"smallest_margin": (("chain", "draw"), draws)})
    tree = xr.DataTree.from_dict({"posterior": posterior})
    [row] = summarise(tree)
    assert np.isnan(row.r_hat)
    assert row.ess_bulk > 10
    print_posterior(Console(), tree)
    printed = " ".join(capsys.readouterr().out.split())
    assert "r_hat compares chains, and there is one" in printed
    assert "nan" not in printed
