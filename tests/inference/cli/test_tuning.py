"""`fit --from`: what it takes, what contradicts it, and how a run is continued."""

import types

import pytest

from probattn.inference import PriorConfig, TuneConfig, TuneFitConfig
from probattn.inference.cli import exchange_commands, main
from probattn.inference.config_files import format_config
from probattn.inference.config_tuning import BaseConfig
from probattn.models import ObjectiveConfig
from probattn.text.corpora import TextConfig
from tests.support.command_line import error_line


@pytest.fixture(name="tuned")
def tuned_fixture(monkeypatch):
    """Calls of `fit` by the command, noted instead of carried out."""
    calls = []

    def note(config, out, **options):
        calls.append((config, str(out), options))
        return types.SimpleNamespace(
            validation_bpc=0.5,
            validation_cross_entropy=1.5,
            run=types.SimpleNamespace(step=8),
            table_certificate=None,
        )

    monkeypatch.setattr(exchange_commands, "fit", note)
    return calls


def test_flags_make_the_configuration(probattn, tuned):
    flags = ["--data", "t.txt", "--prior.scale", "0.3", "--fit.trainable", "adapters"]
    flags += ["--fit.adapter-matrices", "up|down", "--fit.gradient-accumulation", "2"]
    assert probattn("fit", "--from", "base", "--out", "run", *flags)[0] == 0
    fit = TuneFitConfig(trainable="adapters", adapter_matrices="up|down", gradient_accumulation=2)
    [(config, out, options)] = tuned
    assert config == TuneConfig(TextConfig("t.txt"), prior=PriorConfig(0.3), fit=fit)
    assert config.objective == ObjectiveConfig("margin", attention="first_layer")
    assert out == "run"
    assert {name: str(value) for name, value in options.items()} == {
        "base": "base",
        "resume": "False",
        "overwrite": "False",
        "progress": "True",
    }


def test_the_cross_entropy_alone(probattn, tuned):
    assert probattn("fit", "--from=base", "--out", "run", "--objective", "ce")[0] == 0
    assert tuned[0][0].objective == ObjectiveConfig("ce")


@pytest.mark.parametrize(
    ("written", "flags", "expected"),
    [
        ("[objective]\nbarrier_weight = 0.1", [], ("margin", 0.1, "first_layer")),
        ("[prior]\nscale = 0.2", ["--objective", "ce"], ("ce", None, "separate")),
        ('[objective]\nname = "ce"', [], ("ce", None, "separate")),
        ('[objective]\nname = "ce"', ["--objective", "margin"], ("margin", None, "first_layer")),
    ],
)
def test_a_file_names_what_it_changes(probattn, tuned, tmp_path, written, flags, expected):
    (tmp_path / "tune.toml").write_text(written)
    given = ["--config", str(tmp_path / "tune.toml"), *flags]
    assert probattn("fit", "--from", "base", "--out", "run", *given)[0] == 0
    objective = tuned[0][0].objective
    assert (objective.name, objective.barrier_weight, objective.attention) == expected


def test_a_run_is_continued_with_its_own_configuration(probattn, tuned, tmp_path):
    objective = ObjectiveConfig("margin", 0.2, attention="first_layer")
    base = BaseConfig("/models/base", "0" * 64, 16)
    config = TuneConfig(
        base=base, objective=objective, prior=PriorConfig(0.4), fit=TuneFitConfig(steps=7)
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").write_text(format_config(config))
    assert probattn("fit", "--out", "run", "--resume")[0] == 0
    [(found, _, options)] = tuned
    assert (found.objective, found.prior, found.fit) == (objective, config.prior, config.fit)
    assert options["base"] is None
    assert options["resume"]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--model.width", "8"], "--model.width with --from: the run that --from names brings"),
        (["--data.tokenizer=character"], "--data.tokenizer with --from: the run that --from"),
        (["--objective", "full"], "objective.name is full"),
        (["--objective.attention", "separate"], "objective.attention is separate of a published"),
        (["--fit.adapter-rank", "0"], "fit.adapter_rank is 0"),
    ],
)
def test_what_contradicts_is_one_line(probattn, tuned, flags, line):
    status, _, err = probattn("fit", "--from", "base", "--out", "run", *flags)
    assert status == 2
    assert error_line(err).startswith(line)
    assert tuned == []


def test_help_names_what_moves(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--from", "base", "--help"])
    named = capsys.readouterr().out.replace(",", " ").split()
    assert {"--from", "--prior.scale", "--fit.trainable", "--fit.adapter-rank"} <= set(named)
    assert "--model.width" not in named
