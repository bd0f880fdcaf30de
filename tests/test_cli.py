"""The command line: what it takes, what it prints, how it fails."""

import dataclasses
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from tiny_run import (
    ESCAPE,
    FIT,
    LABELS,
    files_of,
    fold,
    own_run_fixture,  # noqa: F401
    tiny_config,
    tiny_run_fixture,  # noqa: F401
    tiny_text,
)

from probattn.corpora import DataConfig
from probattn.inference import RunConfig, generate, load_run, sensitivity
from probattn.inference.cli import main
from probattn.inference.config import format_config
from probattn.inference.fit import FitError
from probattn.inference.generate import Generated
from probattn.inference.interrupts import Interrupted
from probattn.models import LanguageModelConfig, ObjectiveConfig

commands = importlib.import_module("probattn.inference.commands")

FIGURES = {"margin_text.png", "margin_sequence.png", "margin_distribution.png"}


@pytest.fixture(autouse=True)
def terminal(monkeypatch, tmp_path):
    """A wide terminal, and a folder of our own to stand in."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def probattn(capsys):
    """Call the command line; gives status, standard output and standard error."""

    def call(*arguments):
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def fitted(monkeypatch):
    """Calls of `fit` by the command line, noted instead of carried out."""
    calls = []

    def note(config, out, **options):
        calls.append((config, out, options))
        return types.SimpleNamespace(
            validation_bpc=2.5, validation_cross_entropy=1.75, run=types.SimpleNamespace(step=8)
        )

    monkeypatch.setattr(commands, "fit", note)
    return calls


def error_line(stderr):
    """The one line that an error is."""
    [line] = stderr.splitlines()
    assert line.startswith("probattn: error: ")
    return line.removeprefix("probattn: error: ")


# Help


def config_flags():
    return {
        f"--{table.name}.{field.name.replace('_', '-')}"
        for table in dataclasses.fields(RunConfig)
        for field in dataclasses.fields(table.type)
    }


HELP = {
    "fit": {"--out", "--config", "--resume", "--overwrite"} | config_flags(),
    "evaluate": {
        *("PATH", "--text", "--noise-absolute", "--noise-relative", "--noise-kinds"),
        *("--substituted", "--ascent-tokens", "--seed"),
    },
    "sensitivity": {
        *("PATH", "--out", "--text", "--noise-kind", "--level", "--draws", "--most-tokens"),
        "--seed",
    },
    "margins": {"PATH", "--text", "--out", "--stride"},
    "generate": {"PATH", "--prompt", "--length", "--temperature", "--top-k", "--seed", "--out"},
    "demo": {"--out"},
}


@pytest.mark.parametrize("command", HELP)
def test_help_names_every_flag(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert not stop.value.code
    out, err = capsys.readouterr()
    named = out.replace(",", " ").split()
    assert HELP[command] <= set(named)
    assert err == ""


def test_help_names_every_command_and_the_short_forms(capsys):
    for arguments in (["--help"], ["-h"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert not stop.value.code
        out, _ = capsys.readouterr()
        assert {*HELP, "--data", "--objective"} <= set(out.split())


def test_config_flags_are_as_many_as_there_are_fields():
    assert {"--data.source", "--model.prior-rank", "--objective.barrier-weight"} <= config_flags()
    assert "--fit.checkpoint-every" in config_flags()


# What fit is asked to do


def test_without_flags_it_is_the_default_configuration(probattn, fitted):
    status, out, _ = probattn("fit", "--out", "run")
    assert status == 0
    [(config, path, options)] = fitted
    assert (config, path) == (RunConfig(), Path("run"))
    assert not options["resume"]
    assert not options["overwrite"]
    assert "2.5000 bits per character" in out
    assert "1.7500 nats per token" in out


@pytest.mark.parametrize(
    "flags",
    [
        ("--data", "my text.txt", "--objective", "ce"),
        ("--data=my text.txt", "--objective=ce"),
        ("--data.source", "my text.txt", "--objective.name=ce"),
    ],
)
def test_short_forms_are_the_long_ones(probattn, fitted, flags):
    assert probattn("fit", "--out", "run", *flags)[0] == 0
    assert fitted[0][0] == RunConfig(DataConfig("my text.txt"), objective=ObjectiveConfig("ce"))


def test_flags_set_fields_with_either_separator(probattn, fitted):
    flags = {
        "--model.prior-rank": 5,
        "--objective.barrier_weight": 0.25,
        "--fit.learning-rate": 1e-4,
        "--data.tokenizer": "bpe:300",
        "--data.validation": "held out.txt",
    }
    given = [part for pair in flags.items() for part in pair]
    assert probattn("fit", "--out", "run", "--overwrite", *given)[0] == 0
    config, _, options = fitted[0]
    assert config.model == LanguageModelConfig(prior_rank=5)
    assert config.objective == ObjectiveConfig(barrier_weight=0.25)
    assert config.fit.learning_rate == 1e-4
    assert (config.data.tokenizer, config.data.validation) == ("bpe:300", "held out.txt")
    assert options["overwrite"]


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_flags_win_over_the_file_and_the_file_over_defaults(probattn, fitted, form):
    Path("a.toml").write_text('[model]\nlayers = 2\nwidth = 16\n[objective]\nname = "full"\n')
    flags = ["--model.layers", "3", *form.format("a.toml").split()]
    assert probattn("fit", "--out", "run", *flags)[0] == 0
    model = LanguageModelConfig(layers=3, width=16)
    assert fitted[0][0] == RunConfig(model=model, objective=ObjectiveConfig("full"))


def test_resume_takes_the_runs_own_configuration(probattn, fitted, tiny_run):
    assert probattn("fit", "--out", tiny_run.path, "--resume")[0] == 0
    assert probattn("fit", f"--out={tiny_run.path}", "--resume", "--fit.steps", "300")[0] == 0
    own, changed = (config for config, _, _ in fitted)
    assert own == tiny_run.config
    assert changed == dataclasses.replace(own, fit=dataclasses.replace(own.fit, steps=300))
    assert all(options["resume"] for _, _, options in fitted)


# The commands at work


def installed(*arguments):
    """Run the installed command, in the precision in which the run was fitted."""
    command = [Path(sys.executable).parent / "probattn", *arguments]
    environment = os.environ | {"JAX_ENABLE_X64": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_installed_command_works(tiny_run):
    done = installed("generate", tiny_run.path, "--prompt", "the", "--length", "30", "--seed=3")
    assert (done.returncode, done.stderr) == (0, "")
    expected = generate(tiny_run, "the", length=30, seed=3)
    assert f"smallest {expected.margin.min():.3f} at generated token" in done.stdout
    assert done.stdout.startswith(printable("the" + expected.text)[:40])


def test_installed_command_fails_with_its_status():
    done = installed("generate", "nowhere", "--prompt", "the")
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere: expected a run directory" in error_line(done.stderr)


def printable(text):
    """The text with the one character replaced that would steer a terminal."""
    return text.replace("\x1b", "\N{REPLACEMENT CHARACTER}")


def test_fit_from_file_and_flags(probattn, tmp_path):
    config = tiny_config(tmp_path)
    other = dataclasses.replace(FIT, steps=400, eval_every=200, checkpoint_every=200)
    file = tmp_path / "config.toml"
    file.write_text(format_config(dataclasses.replace(config, fit=other)), encoding="utf-8")
    flags = ["--fit.steps", "200", "--fit.eval_every=100", "--fit.checkpoint-every", "100"]
    command = ["fit", "--config", file, *flags, "--out", tmp_path / "run"]
    status, out, _ = probattn(*command)
    assert status == 0
    run = load_run(tmp_path / "run")
    assert run.config == config
    assert [row["step"] for row in run.metrics()] == [100, 200]
    assert f"{run.summary()['fit']['validation_bpc']:.4f} bits per character" in out

    before = files_of(run.path)
    status, out, err = probattn(*command)
    assert (status, out) == (2, "")
    assert "holds another run; continue it with --resume" in error_line(err)
    assert files_of(run.path) == before


def test_resuming_a_finished_run_changes_nothing_of_it(probattn, own_run):
    before = files_of(own_run.path)
    status, out, _ = probattn("fit", "--out", own_run.path, "--resume")
    assert status == 0
    assert f"{own_run.summary()['fit']['validation_bpc']:.4f} bits per character" in out
    assert files_of(own_run.path) == before


def test_evaluate_prints_and_stores(probattn, own_run):
    fold(own_run)
    levels = ["--noise-absolute", "0", "0.3", "--noise-relative", "0.5"]
    kinds = ["--noise-kinds", "gaussian", "substitution", "--substituted", "0.2"]
    status, out, _ = probattn("evaluate", own_run.path, *levels, *kinds)
    assert status == 0
    stored = load_run(own_run.path).summary()["evaluate"]
    rows = [line.split("│")[1:3] for line in out.splitlines() if line.startswith("│")]
    shown = {name.strip(): value.strip() for name, value in rows}
    assert shown["bits per character"] == f"{stored['bpc']:.3f}"
    assert [point["sigma"] for point in stored["noise_absolute"]] == [0, 0.3]
    for name, points in (
        ("noise 0.3", stored["noise_absolute"]),
        ("noise 0.5 RMS", stored["noise_relative"]),
        ("substitution 0.2", stored["noise_substituted"]),
    ):
        low, high = points[1]["degradation_low"], points[1]["degradation_high"]
        expected = f"{points[1]['degradation']:.3f} ± {(high - low) / 2:.3f}"
        assert shown[f"x clean, {name}"] == expected
    for summary in stored["margins"]:
        label = summary["label"]
        assert shown[f"{label}: smallest margin"] == f"{summary['quantiles']['0.0']:.3f}"
        percent = f"{100 * summary['infeasible_fraction']:.2f} %"
        assert shown[f"{label}: infeasible"] == percent
    assert stored["margins"][0]["infeasible_fraction"] > 0


def test_evaluate_leaves_figures_and_the_table_of_noise(probattn, own_run):
    metrics = own_run.path / "metrics.jsonl"
    levels = ["--noise-absolute", "0.3", "--noise-relative"]
    folder = own_run.path / "figures"
    assert probattn("evaluate", own_run.path, *levels)[0] == 0
    always = {"training.png", "noise.png", "noise.csv"}
    assert {path.name for path in folder.iterdir()} == always | {"barrier.png"}
    header, none, some, relative = (folder / "noise.csv").read_text().splitlines()
    assert header.startswith("run,sigma,relative,bpc,degradation,degradation_low,degradation_hi")
    assert none.startswith("run,0,0,")
    assert some.startswith("run,0.3,")
    assert relative == none
    (folder / "mine.png").touch()
    # Of a version that did not watch the coupling yet, and with one kind that is not Gaussian.
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    watched = ("mean_log_det", "mean_margin", "coupling_eigenvalue_min", "coupling_eigenvalue_max")
    old = [{key: row[key] for key in row if key not in watched} for row in rows]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in old))
    assert probattn("evaluate", own_run.path, *levels, "--noise-kinds", "uniform")[0] == 0
    names = {path.name for path in folder.iterdir()}
    assert names == {"training.png", "noise.csv", "noise_kinds.png", "mine.png"}


def test_sensitivity_prints_and_writes(probattn, tiny_run, tmp_path):
    out = tmp_path / "out"
    flags = ["--level", "1", "--draws", "2", "--most-tokens", "160"]
    status, printed, _ = probattn("sensitivity", tiny_run.path, "--out", out, *flags)
    assert status == 0
    expected = sensitivity(tiny_run, level=1, draws=2, most_tokens=160)
    raised = f"from {expected.loss.mean():.3f} to {expected.noisy_loss.mean():.3f} nats per token"
    assert raised in printed
    for each in expected.comparisons:
        assert f"{each.estimate.value:.3f} [" in printed
    for label in LABELS:
        assert printed.count(label) == 3
    for path in out.iterdir():
        assert f"wrote {path}" in printed
    assert len(list(out.iterdir())) == 4


def test_margins_writes_table_and_figures(probattn, tiny_run, tmp_path):
    text = tmp_path / "a [bold] text.txt"
    text.write_text("the [/i] \n[/i] token" + ESCAPE, encoding="utf-8")
    out = tmp_path / "figures of [red]it"
    status, printed, _ = probattn(
        "margins", tiny_run.path, "--text", text, "--out", out, "--stride", "2"
    )
    assert status == 0
    assert {path.name for path in out.iterdir()} == FIGURES | {"margins.csv"}
    for name in FIGURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert f"wrote {out / name}" in printed
    assert f"wrote {out / 'margins.csv'}" in printed
    assert text.name in printed
    for label in LABELS:
        assert label in printed
    assert ESCAPE not in printed


def test_generate_prints_the_text_as_it_is(probattn, tiny_run, monkeypatch, tmp_path):
    monkeypatch.delenv("COLUMNS")  # of a file or a pipe nobody knows the width
    options = ["--length", "300", "--seed", "7", "--temperature", "0.8", "--top-k", "9"]
    table = tmp_path / "new" / "generated.csv"
    status, out, err = probattn(
        "generate", tiny_run.path, "--prompt", "[/i]\nthe", *options, "--out", table
    )
    assert status == 0
    expected = generate(tiny_run, "[/i]\nthe", length=300, seed=7, temperature=0.8, top_k=9)
    assert out.startswith(printable("[/i]\nthe" + expected.text) + "\n")
    assert f"smallest {expected.margin.min():.3f} at generated token" in out
    assert table.exists()
    assert f"wrote {table}" in out
    assert err == ""  # not a terminal: no progress bar between the lines of a script


def test_a_table_that_cannot_be_written_loses_no_text(probattn, tiny_run, tmp_path):
    (tmp_path / "folder").mkdir()
    arguments = ["--prompt", "the", "--length", "20", "--temperature", "0", "--out", "folder"]
    status, out, err = probattn("generate", tiny_run.path, *arguments)
    assert status == 2
    assert out.startswith("the" + generate(tiny_run, "the", length=20, temperature=0).text)
    assert "folder" in error_line(err)
    assert list(tmp_path.rglob("*")) == [tmp_path / "folder"]


def test_nothing_generated_steers_the_terminal(probattn, tiny_run, monkeypatch):
    steering = (ESCAPE, "\x9b2J", "\x07", "\r", "\N{RIGHT-TO-LEFT OVERRIDE}", "\b")
    made = Generated("a" + ESCAPE, "".join(steering), steering, np.full(len(steering), 0.05))
    monkeypatch.setattr(commands, "generate", lambda *arguments, **options: made)
    status, out, _ = probattn("generate", tiny_run.path, "--prompt", "a" + ESCAPE)
    assert status == 0
    for text in steering:
        assert text[0] not in out
    assert out.startswith("a\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}[2J")


def test_demo_fits_compares_and_draws(probattn, monkeypatch, tmp_path):
    config = tiny_config(tmp_path)
    monkeypatch.setattr(commands, "demo", functools.partial(commands.demo, config=config))
    status, out, _ = probattn("demo", "--out", "shown")
    assert status == 0
    for name in ("ce", "margin"):
        run = load_run(Path("shown") / name)
        assert run.config == dataclasses.replace(config, objective=ObjectiveConfig(name))
        assert f"{run.summary()['evaluate']['bpc']:.3f}" in out
        labels = [summary["label"] for summary in run.summary()["evaluate"]["margins"]]
        assert labels == (LABELS if name == "margin" else LABELS[:1] + LABELS[2:])
    figures = {path.name for path in Path("shown/figures").iterdir()}
    drawn = {"training.png", "barrier.png", "noise.png", "noise.csv"}
    assert figures == FIGURES | {"margins.csv"} | drawn
    for name in figures:
        assert f"wrote {Path('shown/figures') / name}" in out
    assert Path("shown/excerpt.txt").read_text(encoding="utf-8") == tiny_text()[3600:]


def test_demo_leaves_alone_what_is_not_its_own(probattn, monkeypatch, tmp_path):
    monkeypatch.setattr(
        commands, "demo", functools.partial(commands.demo, config=tiny_config(tmp_path))
    )
    for name in ("ce", "margin"):
        notes = tmp_path / name / "shown" / name / "notes.txt"
        notes.parent.mkdir(parents=True)
        notes.write_text("mine")
        status, _, err = probattn("demo", "--out", tmp_path / name / "shown")
        assert status == 2
        assert "holds notes.txt, which is no part of a run" in error_line(err)
        # Found out before anything is fitted.
        assert files_of(tmp_path / name) == {f"shown/{name}/notes.txt": b"mine"}


# Failure


ERRORS = {
    "no command": ([], ["fit", "evaluate", "margins", "generate", "demo"]),
    "unknown command": (
        ["fti"],
        ["fti", "fit, sample, evaluate, margins, sensitivity, compare, generate, figures, demo"],
    ),
    "no run directory": (["fit"], ["--out", "run directory"]),
    "no run": (["evaluate"], ["PATH", "run directory"]),
    "no prompt": (["generate", "RUN"], ["--prompt"]),
    "unknown option": (["fit", "--out", "OUT", "--model.layres", "2"], ["--model.layres"]),
    "unknown option of demo": (["demo", "--steps", "2"], ["--steps"]),
    "unknown objective": (
        ["fit", "--out", "OUT", "--objective", "foo"],
        ["foo", "--objective", "'ce', 'margin', 'full', 'latent'"],
    ),
    "ill-typed integer": (["fit", "--out", "OUT", "--fit.steps", "many"], ["many", "--fit.steps"]),
    "ill-typed number": (
        ["evaluate", "RUN", "--noise-absolute", "0", "loud"],
        ["loud", "--noise-absolute"],
    ),
    "value missing": (["fit", "--out", "OUT", "--fit.steps"], ["--fit.steps"]),
    "heads that do not divide": (
        ["fit", "--out", "OUT", "--model.heads", "3"],
        ["model.heads is 3", "model.width 128", "expected heads to divide width"],
    ),
    "rank": (
        ["fit", "--out", "OUT", "--model.prior-rank", "0"],
        ["model.prior_rank is 0", "expected an integer >= 1"],
    ),
    "negative weight": (
        ["fit", "--out", "OUT", "--objective.barrier-weight", "-1"],
        ["objective.barrier_weight is -1.0", "expected a finite number >= 0"],
    ),
    "no such corpus": (
        ["fit", "--out", "OUT", "--data", "nowhere.txt"],
        ["data.source", "nowhere.txt", "no such file", "pydoc"],
    ),
    "an empty corpus": (["fit", "--out", "OUT", "--data", "EMPTY"], ["data.source", "empty file"]),
    "a short corpus": (
        ["fit", "--out", "OUT", "--data", "SHORT"],
        ["the validation text has 8 tokens", "more than one block of 64", "smaller model.block"],
    ),
    "a corpus of one symbol": (
        ["fit", "--out", "OUT", "--data", "SINGLE"],
        ["'single.txt': has one symbol alone: expected two or more"],
    ),
    "a model that no memory holds": (
        ["fit", "--out", "OUT", "--model.width", "1000000000"],
        ["parameters and optimizer state of [model] would take", "of this machine's memory"],
    ),
    "a posterior that no memory holds": (
        ["sample", "--out", "OUT", "--latent.width", "100000000"],
        ["chains of [latent] would take", "of this machine's memory"],
    ),
    "no such configuration": (
        ["fit", "--out", "OUT", "--config", "nowhere.toml"],
        ["nowhere.toml", "cannot read the configuration"],
    ),
    "a configuration that is no TOML": (
        ["fit", "--out", "OUT", "--config", "SHORT"],
        ["short.txt", "expected a TOML file"],
    ),
    "an unknown field in the configuration": (
        ["fit", "--out", "OUT", "--config", "UNKNOWN"],
        ["unknown.toml", "layres", "expected layers, heads"],
    ),
    "an ill-typed field in the configuration": (
        ["fit", "--out", "OUT", "--config", "TYPED"],
        ["typed.toml", "model.layers is '2'", "expected int"],
    ),
    "resume and overwrite": (
        ["fit", "--out", "OUT", "--resume", "--overwrite"],
        ["resume and overwrite exclude each other"],
    ),
    "nothing to resume": (["fit", "--out", "OUT", "--resume"], ["out", "holds no run to resume"]),
    "another run": (["fit", "--out", "RUN"], ["holds another run", "--resume", "--overwrite"]),
    "resume with another configuration": (
        ["fit", "--out", "RUN", "--resume", "--fit.steps", "300", "--objective", "ce"],
        ["fit.steps: 200 -> 300", "objective.name: margin -> ce"],
    ),
    "not a run": (["evaluate", "nowhere"], ["nowhere", "expected a run directory"]),
    "margins of what is not a run": (["margins", ".", "--out", "OUT"], ["a run directory"]),
    "negative noise": (
        ["evaluate", "RUN", "--noise-relative", "0.5", "-1"],
        ["noise_relative: got -1.0", "expected finite numbers >= 0"],
    ),
    "noise seed": (["evaluate", "RUN", "--seed", 2**70], ["seed: got 11805916", "expected"]),
    "unknown character": (
        ["evaluate", "RUN", "--text", "UTOPIAN"],
        ["utopian.txt", "unknown character 'U' (U+0055) at position 2"],
    ),
    "text of margins": (["margins", "RUN", "--out", "OUT", "--text", "no.txt"], ["no.txt", "file"]),
    "stride": (
        ["margins", "RUN", "--out", "OUT", "--stride", "9"],
        ["stride is 9", "expected 1 <= stride <= block = 8"],
    ),
    "length": (["generate", "RUN", "--prompt", "a", "--length", "0"], ["length: got 0", ">= 1"]),
    "temperature": (
        ["generate", "RUN", "--prompt", "a", "--temperature", "-1"],
        ["temperature: got -1.0", "expected a finite number >= 0"],
    ),
    "seed": (["generate", "RUN", "--prompt", "a", "--seed", 2**70], ["seed: got 118059", "expect"]),
    "prompt": (
        ["generate", "RUN", "--prompt", "a token Ω"],
        ["prompt: unknown character 'Ω' (U+03A9) at position 8"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_one_line_and_status_2(probattn, tiny_run, tmp_path, case):
    arguments, fragments = ERRORS[case]
    files = {
        "empty.txt": "",
        "short.txt": "too short, even so much to say of what it holds, by a good deal to split...",
        "utopian.txt": "a Utopian",
        "single.txt": "a" * 2000,
        "unknown.toml": "[model]\nlayres = 2\n",
        "typed.toml": '[model]\nlayers = "2"\n',
        "folder/inside.txt": "mine",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    places = {Path(name).stem.upper(): tmp_path / name for name in files}
    places |= {"RUN": tiny_run.path, "OUT": tmp_path / "out", "FOLDER": tmp_path / "folder"}
    before = files_of(tiny_run.path), files_of(tmp_path)
    status, out, err = probattn(*(places.get(argument, argument) for argument in arguments))
    assert status == 2
    assert out == ""
    message = error_line(err)
    for fragment in fragments:
        assert fragment in message
    assert "Traceback" not in message
    assert not set("╭╮╰╯│─") & set(message)
    assert (files_of(tiny_run.path), files_of(tmp_path)) == before
    assert not (tmp_path / "out").exists()


def test_a_message_is_whole_on_a_narrow_terminal(probattn, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    _, _, err = probattn("fit", "--out", "run", "--objective.barrier-weight", "heavy")
    assert "--objective.barrier-weight" in error_line(err)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (FitError("runs/a: the fit stopped\nat step 7"), 1, "runs/a: the fit stopped at step 7"),
        (ValueError("seed: got -1"), 2, "seed: got -1"),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (OSError(13, "Permission denied"), 2, "[Errno 13] Permission denied"),
        (MemoryError("Unable to allocate 9 TiB"), 1, "Unable to allocate 9 TiB"),
        (ValueError("run \x1b[2Ja\x9b2J: damaged"), 2, "run \ufffd[2Ja\ufffd2J: damaged"),
        (ImportError("needs the library tokenizers"), 2, "needs the library tokenizers"),
        (ValueError(), 2, "ValueError"),
    ],
)
def test_status_tells_bad_input_from_a_failed_fit(probattn, monkeypatch, error, status, line):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(commands, "fit", fail)
    found, out, err = probattn("fit", "--out", "run")
    assert (found, out) == (status, "")
    assert error_line(err) == line


def test_an_interrupt_is_status_130(probattn, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "fit", interrupt)
    assert probattn("fit", "--out", "run") == (130, "", "probattn: interrupted\n")


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_ended_a_fit_is_told_by_name(probattn, monkeypatch, sent, status):
    def interrupt(*arguments, **options):
        raise Interrupted(sent)

    monkeypatch.setattr(commands, "fit", interrupt)
    found, out, err = probattn("fit", "--out", "run")
    assert (found, out) == (status, "")
    [line] = err.splitlines()
    assert sent.name in line
    assert "--resume" in line


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_that_has_nothing_to_save(
    probattn, own_run, monkeypatch, sent, status
):
    """At once, as an exception does: the lock is released."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def evaluate(run, **options):
        with run.lock():
            os.kill(os.getpid(), sent)
            time.sleep(10)
        raise AssertionError("the signal did not end it")

    monkeypatch.setattr(commands, "evaluate", evaluate)
    before = files_of(own_run.path)
    assert probattn("evaluate", own_run.path) == (status, "", f"probattn: ended by {sent.name}\n")
    assert files_of(own_run.path) == before
    with own_run.lock():
        pass
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_names_are_shown_as_they_are(probattn, own_run, monkeypatch):
    """Names of runs and of texts are no markup, and steer no terminal."""
    named = own_run.path.rename(own_run.path.with_name("[red]a" + ESCAPE))
    text = named.with_name("[bold]b" + ESCAPE)
    text.write_text("the token of a margin")
    status, out, _ = probattn("evaluate", named, "--text", text, "--noise-absolute", "0")
    assert status == 0
    for name in ("[red]a", "[bold]b"):
        assert name + "\N{REPLACEMENT CHARACTER}[2J" in out
    assert ESCAPE not in out


def test_a_damaged_run_is_named(probattn, own_run):
    (own_run.path / "data.json").write_text(json.dumps({"name": "corpus"}))
    status, _, err = probattn("evaluate", own_run.path)
    assert status == 2
    assert f"{own_run.path / 'data.json'}: damaged" in error_line(err)
    (own_run.path / "config.toml").write_text("[model")
    status, _, err = probattn("generate", own_run.path, "--prompt", "a")
    assert status == 2
    assert f"{own_run.path / 'config.toml'}: expected a TOML file" in error_line(err)
