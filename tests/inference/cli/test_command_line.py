"""The command line: what it takes, and what it prints and leaves."""

import dataclasses
import functools
import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

import probattn as probattn_package
from probattn.inference import RunConfig, generate, load_run, sensitivity
from probattn.inference.cli import commands, console, main, showing_commands, text_commands
from probattn.inference.cli import demo as demo_module
from probattn.inference.config_files import format_config
from probattn.inference.evaluation.evaluate import EvaluateResult, MarginSummary
from probattn.inference.evaluation.generation import Generated
from probattn.inference.evaluation.noise_sweeps import NoisePoint
from probattn.inference.evaluation.token_margins import TextMargins, TokenMargins
from probattn.inference.figures.report import REPORTS
from probattn.models import LanguageModelConfig, ObjectiveConfig
from probattn.text.corpora import DataConfig
from tests.support.command_line import error_line
from tests.support.tiny_posterior import fitted_by_hand
from tests.support.tiny_run import (
    ESCAPE,
    FIT,
    LABELS,
    files_of,
    fold,
    tiny_config,
    tiny_text,
)

FIGURES = {"margin_text.png", "margin_sequence.png", "margin_distribution.png"}


@pytest.fixture
def fitted(monkeypatch):
    """Calls of `fit` by the command line, noted instead of carried out."""
    calls = []

    def note(config, out, **options):
        calls.append((config, out, options))
        return types.SimpleNamespace(
            validation_bpc=2.5,
            validation_cross_entropy=1.75,
            run=types.SimpleNamespace(step=8),
            table_certificate=None,
        )

    monkeypatch.setattr(commands, "fit", note)
    return calls


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
    "margins": {"PATH", "--text", "--out", "--html", "--overwrite", "--stride"},
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


def test_the_version_is_named(probattn):
    assert probattn("--version") == (0, f"probattn {probattn_package.__version__}\n", "")


@pytest.mark.parametrize("command", [[], ["fit"], ["compare"]])
def test_help_is_a_command_too(capsys, command):
    helps = []
    for arguments in (["help", *command], [*command, "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert not stop.value.code
        helps.append(capsys.readouterr())
    assert helps[0] == helps[1]


def test_a_few_steps_are_enough_to_ask_for(probattn, fitted):
    """The default warm-up was of more."""
    assert probattn("fit", "--out", "run", "--fit.steps", "50")[0] == 0
    assert fitted[0][0].fit.warmup_steps == 5


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


@pytest.mark.slow
def test_installed_command_works(tiny_run):
    done = installed("generate", tiny_run.path, "--prompt", "the", "--length", "30", "--seed=3")
    assert (done.returncode, done.stderr) == (0, "")
    expected = generate(tiny_run, "the", length=30, seed=3)
    assert f"smallest {expected.margin.min():.3f} at generated token" in done.stdout
    assert done.stdout.startswith(printable("the" + expected.text)[:40])


@pytest.mark.slow
def test_installed_command_fails_with_its_status():
    done = installed("generate", "nowhere", "--prompt", "the")
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere: expected a run directory" in error_line(done.stderr)


def printable(text):
    """The text with the one character replaced that would steer a terminal."""
    return text.replace("\x1b", "\N{REPLACEMENT CHARACTER}")


@pytest.mark.slow
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


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing_of_it(probattn, own_run):
    before = files_of(own_run.path)
    status, out, _ = probattn("fit", "--out", own_run.path, "--resume")
    assert status == 0
    assert f"{own_run.summary()['fit']['validation_bpc']:.4f} bits per character" in out
    assert files_of(own_run.path) == before


def table_of(out):
    """What is printed of one run, by its row."""
    rows = [line.split("│")[1:3] for line in out.splitlines() if line.startswith("│")]
    return {name.strip(): value.strip() for name, value in rows}


@pytest.mark.slow
def test_evaluate_prints_and_stores(probattn, own_run):
    fold(own_run)
    levels = ["--noise-absolute", "0", "0.3", "--noise-relative", "0.5"]
    kinds = ["--noise-kinds", "gaussian", "substitution", "--substituted", "0.2"]
    status, out, _ = probattn("evaluate", own_run.path, *levels, *kinds)
    assert status == 0
    stored = load_run(own_run.path).summary()["evaluate"]
    shown = table_of(out)
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
    assert stored["table_certificate"] < 1
    proved = f"proved (rho {stored['table_certificate']:.2f})"
    assert shown["trained: no text folds it"] == proved


def noise_points(**kind):
    """Made up: what is printed and drawn of noise is what it is given."""
    levels = ((0.0, 0.0, 2.25, 1.0, 1.0, 1.0), (0.3, 0.4, 3.375, 1.5, 1.4, 1.65))
    return tuple(NoisePoint(*level, **kind) for level in levels)


EVALUATION = EvaluateResult(
    text="made up",
    step=200,
    cross_entropy=1.5,
    bpc=2.25,
    tokens=399,
    embedding_rms=0.75,
    noise_absolute=noise_points(),
    noise_relative=noise_points(),
    noise_substituted=(
        NoisePoint(None, None, 2.25, 1.0, 1.0, 1.0, "substitution", 0.0),
        NoisePoint(None, None, 2.7, 1.2, 1.1, 1.35, "substitution", 0.2),
    ),
    margins=tuple(
        MarginSummary(label, "sigma_min", {0.0: number / 8, 0.5: 0.9}, -1.0, number / 100, 1.0, 99)
        for number, label in enumerate(LABELS)
    ),
    post_hoc_converged=True,
)


@pytest.fixture(name="evaluated")
def evaluated_fixture(monkeypatch):
    """Calls of `evaluate` by the command line, noted and answered by what was made up."""
    calls = []

    def note(run, **options):
        calls.append((run.path, options))
        kind, *others = options["noise_kinds"]
        points = noise_points(kind=kind)
        return dataclasses.replace(
            EVALUATION,
            noise_absolute=points,
            noise_relative=points,
            noise_substituted=EVALUATION.noise_substituted if others else (),
        )

    monkeypatch.setattr(commands, "evaluate", note)
    return calls


@pytest.fixture(name="undrawn")
def undrawn_fixture(evaluated, monkeypatch):
    """No figures of it: drawing them takes a second."""
    monkeypatch.setattr(
        commands, "comparison_figures", lambda runs, results, folder: [folder / "noise.png"]
    )
    return evaluated


@pytest.mark.usefixtures("undrawn")
def test_evaluate_prints_what_was_found(probattn, own_run):
    flags = ["--noise-kinds", "gaussian", "substitution"]
    status, out, _ = probattn("evaluate", own_run.path, *flags)
    assert status == 0
    shown = table_of(out)
    assert shown["bits per character"] == "2.250"
    assert shown["x clean, noise 0.3"] == "1.500 ± 0.125"
    assert shown["x clean, noise 0.4 RMS"] == "1.500 ± 0.125"
    assert shown["x clean, substitution 0.2"] == "1.200 ± 0.125"
    for number, label in enumerate(LABELS):
        assert shown[f"{label}: smallest margin"] == f"{number / 8:.3f}"
        assert shown[f"{label}: infeasible"] == f"{number:.2f} %"


def test_evaluate_is_asked_for_what_the_flags_say(probattn, undrawn, own_run):
    flags = ["--text", "a.txt", "--noise-absolute", "0.1", "0.3", "--noise-relative", "0.5"]
    flags += ["--noise-kinds", "uniform", "ascent-1", "--substituted", "0.2", "--seed", "7"]
    assert probattn("evaluate", own_run.path, *flags, "--ascent-tokens", "64")[0] == 0
    [(path, options)] = undrawn
    assert path == own_run.path
    assert options == {
        "text": Path("a.txt"),
        "noise_absolute": (0.1, 0.3),
        "noise_relative": (0.5,),
        "noise_kinds": ("uniform", "ascent-1"),
        "substituted": (0.2,),
        "ascent_tokens": 64,
        "seed": 7,
        "progress": True,
    }


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("handler", ["strict", "surrogateescape"])
def test_evaluate_prints_in_any_encoding(own_run, monkeypatch, handler):
    """Of a locale or a pipe that holds ASCII alone."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=handler)
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["evaluate", str(own_run.path)]) == 0
    stream.flush()
    printed = stream.buffer.getvalue().decode("ascii")
    assert "1.500 ? 0.125" in printed
    assert f"wrote {own_run.path / 'figures' / 'noise.png'}" in printed


@pytest.mark.slow
@pytest.mark.usefixtures("evaluated")
def test_evaluate_leaves_figures_and_the_table_of_noise(probattn, own_run):
    metrics = own_run.path / "metrics.jsonl"
    folder = own_run.path / "figures"
    assert probattn("evaluate", own_run.path)[0] == 0
    always = {"training.png", "noise.png", "noise.csv"}
    assert {path.name for path in folder.iterdir()} == always | {"barrier.png"}
    header, none, some, *relative = (folder / "noise.csv").read_text().splitlines()
    assert header.startswith("run,sigma,relative,bpc,degradation,degradation_low,degradation_hi")
    assert none.startswith("run,0,0,2.25,1,1,1,gaussian")
    assert some.startswith("run,0.3,0.4,3.375,1.5,1.4,1.65,gaussian")
    assert relative == [none, some]
    (folder / "mine.png").touch()
    # Of a version that did not watch the coupling yet, and with one kind that is not Gaussian.
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    watched = ("mean_log_det", "mean_margin", "coupling_eigenvalue_min", "coupling_eigenvalue_max")
    old = [{key: row[key] for key in row if key not in watched} for row in rows]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in old))
    assert probattn("evaluate", own_run.path, "--noise-kinds", "uniform")[0] == 0
    names = {path.name for path in folder.iterdir()}
    assert names - {"mine.png"} | always | {"barrier.png"} == set(REPORTS["comparison"])
    assert names == {"training.png", "noise.csv", "noise_kinds.png", "mine.png"}


@pytest.mark.slow
def test_sensitivity_prints_and_writes(probattn, tiny_run, tmp_path, monkeypatch):
    out, found = tmp_path / "out", []

    def noting(run, text, **options):
        found.append(sensitivity(run, text, **options))
        assert (run.path, text, options["progress"]) == (tiny_run.path, None, True)
        assert (options["level"], options["draws"], options["most_tokens"]) == (1, 2, 160)
        return found[-1]

    monkeypatch.setattr(text_commands, "sensitivity", noting)
    flags = ["--level", "1", "--draws", "2", "--most-tokens", "160"]
    status, printed, _ = probattn("sensitivity", tiny_run.path, "--out", out, *flags)
    assert status == 0
    [expected] = found
    raised = f"from {expected.loss.mean():.3f} to {expected.noisy_loss.mean():.3f} nats per token"
    assert raised in printed
    for each in expected.comparisons:
        assert f"{each.estimate.value:.3f}" in printed
        assert f"{each.estimate.low:.3f}, {each.estimate.high:.3f}" in printed
    for label in LABELS:
        assert printed.count(label) == 3
    for path in out.iterdir():
        assert f"wrote {path}" in printed
    assert {path.name for path in out.iterdir()} == set(REPORTS["sensitivity"])


def test_margins_writes_table_and_figures(probattn, tiny_run, tmp_path):
    text = tmp_path / "a [bold] text.txt"
    text.write_text("the [/i] \n[/i] token" + ESCAPE, encoding="utf-8")
    out = tmp_path / "figures of [red]it"
    status, printed, _ = probattn(
        "margins", tiny_run.path, "--text", text, "--out", out, "--stride", "2"
    )
    assert status == 0
    assert {path.name for path in out.iterdir()} == FIGURES | {"margins.csv"}
    assert {path.name for path in out.iterdir()} == set(REPORTS["margins"])
    for name in FIGURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert f"wrote {out / name}" in printed
    assert f"wrote {out / 'margins.csv'}" in printed
    assert text.name in printed
    for label in LABELS:
        assert label in printed
    assert ESCAPE not in printed


@pytest.mark.slow
@pytest.mark.parametrize("command", ["margins", "sensitivity"])
def test_a_page_needs_no_folder_and_replaces_only_on_request(probattn, tiny_run, tmp_path, command):
    page = tmp_path / "new" / "page.html"
    flags = [] if command == "margins" else ["--draws", "1", "--most-tokens", "80"]
    arguments = [command, tiny_run.path, "--html", page, *flags]
    status, printed, _ = probattn(*arguments)
    assert status == 0
    assert f"wrote {page}" in printed
    made = page.read_text("ascii")
    assert made.startswith("<!doctype html>")
    assert list(page.parent.iterdir()) == [page]
    page.write_text("mine")
    status, _, err = probattn(*arguments)
    assert status == 2
    assert err == (
        f"probattn: error: {page}: exists: name another file, or replace it with --overwrite\n"
    )
    assert page.read_text() == "mine"
    assert probattn(*arguments, "--overwrite")[0] == 0
    assert page.read_text("ascii") == made


@pytest.mark.parametrize("command", ["margins", "sensitivity", "compare"])
def test_pages_that_cannot_be_written_are_refused_before_the_work(
    probattn, tiny_run, tmp_path, command
):
    arguments = [command, tiny_run.path]
    status, _, err = probattn(*arguments)
    assert status == 2
    assert "--out: got none, expected a directory, or a file for --html, or both" in err
    status, _, err = probattn(*arguments, "--html", tmp_path)
    assert status == 2
    assert f"{tmp_path}: is a folder: expected a file" in err
    status, _, err = probattn(*arguments, "--out", tmp_path / "out", "--overwrite")
    assert status == 2
    assert "--overwrite: it replaces the file of --html" in err
    assert list(tmp_path.iterdir()) == []


def test_generate_prints_the_text_as_it_is(probattn, tiny_run, monkeypatch, tmp_path):
    monkeypatch.delenv("COLUMNS")  # of a file or a pipe nobody knows the width
    options = ["--length", "60", "--seed", "7", "--temperature", "0.8", "--top-k", "9"]
    table = tmp_path / "new" / "generated.csv"
    status, out, err = probattn(
        "generate", tiny_run.path, "--prompt", "[/i]\nthe", *options, "--out", table
    )
    assert status == 0
    expected = generate(tiny_run, "[/i]\nthe", length=60, seed=7, temperature=0.8, top_k=9)
    assert out.startswith(printable("[/i]\nthe" + expected.text) + "\n")
    assert f"smallest {expected.margin.min():.3f} at generated token" in out
    assert table.exists()
    assert f"wrote {table}" in out
    assert err == ""  # not a terminal: no progress bar between the lines of a script


def test_a_table_that_cannot_be_written_loses_no_text(probattn, tiny_run, monkeypatch, tmp_path):
    def slow(*arguments, **options):  # so that a folder is made in the table's place meanwhile
        (tmp_path / "folder").mkdir()
        return generate(*arguments, **options)

    monkeypatch.setattr(commands, "generate", slow)
    arguments = ["--prompt", "the", "--length", "20", "--temperature", "0", "--out", "folder"]
    status, out, err = probattn("generate", tiny_run.path, *arguments)
    assert status == 2
    assert out.startswith("the" + generate(tiny_run, "the", length=20, temperature=0).text)
    assert "folder" in error_line(err)
    assert list(tmp_path.rglob("*")) == [tmp_path / "folder"]


def test_a_character_of_several_tokens_is_generated_whole(probattn, tiny_run, monkeypatch):
    made = Generated(
        "the", "caf\ufffd", ("caf", "é", "", "<0xC3>"), np.array([1, 1, -0.5, 1]), True
    )
    monkeypatch.setattr(commands, "generate", lambda *arguments, **options: made)
    status, out, _ = probattn("generate", tiny_run.path, "--prompt", "the")
    assert status == 0
    assert out.startswith("thecafé<0xC3>\n")
    assert "smallest -0.500 at generated token 2, 'é'" in out
    screen = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print_generated(screen, made)
    assert "\x1b[31mé\x1b[0m" in screen.file.getvalue()  # red, as the smaller of its margins is


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        (["\n", "a long", " word", " and", " so", " é", "", "!"], "'!' after 'long word and so é'"),
        (["the", " 中文", "字", "字", "字", "🦞🦞", "é", "\n"], "'\\n' after 'e 中文字字字🦞🦞é'"),
        (["a"] * 6 + ["é", ""], "'é' after 'aaaaaa'"),
        (["a"] * 7 + ["of a very very very long token"], "'of a very very very long tok…"),
    ],
)
def test_a_row_of_margins_is_one_line_of_a_narrow_terminal(tokens, shown):
    count = len(tokens)
    margin = np.linspace(1, -0.25, count)
    stages = tuple(
        TokenMargins(label, margin, margin, margin, margin, margin < 0, margin)
        for label in ("post hoc", "trained", "layer 1 head 1")
    )
    position = np.arange(count)
    screen = Console(file=io.StringIO(), width=80)
    found = TextMargins("text", tokens, position, 0 * position, np.zeros(1, int), stages, (), True)
    console.print_margins(screen, found)
    title, *lines = screen.file.getvalue().splitlines()
    assert title.startswith("margins of text")
    assert len(lines) == 2 * (3 + len(stages) + 1) + 1
    assert {cell_len(line) for line in lines} <= set(range(81))
    for stage, line in zip(stages, lines[3:], strict=False):
        assert stage.label in line
        assert "-0.250" in line
        assert shown in line


def test_nothing_generated_steers_the_terminal(probattn, tiny_run, monkeypatch):
    steering = (ESCAPE, "\x9b2J", "\x07", "\r", "\N{RIGHT-TO-LEFT OVERRIDE}", "\b")
    made = Generated("a" + ESCAPE, "".join(steering), steering, np.full(len(steering), 0.05), True)
    monkeypatch.setattr(commands, "generate", lambda *arguments, **options: made)
    status, out, _ = probattn("generate", tiny_run.path, "--prompt", "a" + ESCAPE)
    assert status == 0
    for text in steering:
        assert text[0] not in out
    assert out.startswith("a\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}[2J")


def test_a_post_hoc_fit_that_has_not_converged_is_named(probattn, tiny_run, monkeypatch):
    for converged in (True, False):
        made = Generated("a", "b", ("b",), np.full(1, 0.05), converged)
        monkeypatch.setattr(commands, "generate", lambda *arguments, made=made, **options: made)
        _, out, _ = probattn("generate", tiny_run.path, "--prompt", "a")
        assert ("has not converged" in " ".join(out.split())) is not converged


def test_demo_compares_what_it_fits(probattn, tiny_run, monkeypatch, tmp_path):
    """With runs made by hand in place of its fits, and evaluations that are made up."""
    fits, evaluations = [], []

    def fit(config, out, *, overwrite, progress):
        fits.append((config, out, overwrite))
        run = fitted_by_hand(tiny_run, out, name=config.objective.name)
        (run.path / "post_hoc_prior.npz").write_bytes(
            (tiny_run.path / "post_hoc_prior.npz").read_bytes()
        )
        return types.SimpleNamespace(run=run)

    def evaluate(run, *, progress):
        bpc = 2.5 + len(evaluations)
        evaluations.append(dataclasses.replace(EVALUATION, bpc=bpc, noise_substituted=()))
        return evaluations[-1]

    config = tiny_run.config
    monkeypatch.setattr(demo_module, "fit", fit)
    monkeypatch.setattr(demo_module, "evaluate", evaluate)
    monkeypatch.setattr(
        showing_commands, "demo", functools.partial(showing_commands.demo, config=config)
    )
    status, out, _ = probattn("demo", "--out", "shown")
    assert status == 0
    assert fits == [
        (dataclasses.replace(config, objective=ObjectiveConfig(name)), Path("shown") / name, True)
        for name in ("ce", "margin")
    ]
    assert "2.500" in out
    assert "3.500" in out
    figures = {path.name for path in Path("shown/figures").iterdir()}
    drawn = {"training.png", "barrier.png", "noise.png", "noise.csv"}
    assert figures == FIGURES | {"margins.csv"} | drawn
    for name in figures:
        assert f"wrote {Path('shown/figures') / name}" in out
    assert Path("shown/excerpt.txt").read_text(encoding="utf-8") == tiny_text()[3600:]


@pytest.mark.slow
def test_demo_fits_compares_and_draws(probattn, monkeypatch, tmp_path):
    config = tiny_config(tmp_path)
    monkeypatch.setattr(
        showing_commands, "demo", functools.partial(showing_commands.demo, config=config)
    )
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
        showing_commands,
        "demo",
        functools.partial(showing_commands.demo, config=tiny_config(tmp_path)),
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


@pytest.mark.usefixtures("undrawn")
def test_names_are_shown_as_they_are(probattn, own_run):
    """Names of runs and of texts are no markup, and steer no terminal."""
    named = own_run.path.rename(own_run.path.with_name("[red]a" + ESCAPE))
    status, out, _ = probattn("evaluate", named)
    assert status == 0
    assert "[red]a\N{REPLACEMENT CHARACTER}[2J" in out
    assert ESCAPE not in out


@pytest.mark.slow
def test_names_of_texts_are_shown_as_they_are(probattn, own_run):
    text = own_run.path.with_name("[bold]b" + ESCAPE)
    text.write_text("the token of a margin")
    status, out, _ = probattn("evaluate", own_run.path, "--text", text, "--noise-absolute", "0")
    assert status == 0
    assert "[bold]b\N{REPLACEMENT CHARACTER}[2J" in out
    assert ESCAPE not in out
