"""How the command line fails: in one line, with a status, and nothing changed."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from probattn.inference import FitError, load_run
from probattn.inference.cli import commands, main
from probattn.inference.runtime.signals import Interrupted
from tests.support.command_line import error_line
from tests.support.small import FLAGS
from tests.support.tiny_run import files_of

ERRORS = {
    "no command": ([], ["fit", "evaluate", "margins", "generate", "demo"]),
    "unknown command": (
        ["fti"],
        ["fti", "fit, sample, evaluate, margins, sensitivity, compare, generate, figures, demo"],
    ),
    "no run directory": (["fit"], ["--out", "run directory"]),
    "no run": (["evaluate"], ["PATH", "run directory"]),
    "no runs": (["compare", "--out", "OUT"], ["runs: got none, expected the directories"]),
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
    "flags of a language model for the latent one": (
        ["sample", "--out", "OUT", "--objective", "margin", "--model.layers", "1"],
        [
            "--objective.name, --model.layers with a latent model: expected --latent.*",
            "leave them out, or give --kind language",
        ],
    ),
    "a default of a language model for the latent one": (
        ["sample", "--out", "OUT", "--model", "latent", "--objective=full"],
        ["--objective.name with a latent model", "leave it out, or give --kind language"],
    ),
    "flags of the latent model for a language model": (
        ["sample", "--out", "OUT", "--kind", "language", "--latent.sequences=3"],
        [
            "--latent.sequences with a language model: expected --model.* and --objective.*",
            "leave it out, or give --kind latent",
        ],
    ),
    "flags of a language model beside a file of the latent one": (
        ["sample", "--out", "OUT", "--config", "LATENT", "--model.prior_rank", "3"],
        ["--model.prior_rank with a latent model: expected --latent.*; leave it out"],
    ),
    "flags of the latent model beside a file of a language model": (
        ["sample", "--out", "OUT", "--config", "LANGUAGE", "--latent.width", "3"],
        ["--latent.width with a language model: expected --model.* and --objective.*; leave it"],
    ),
    "a file of the latent model for a language model": (
        ["sample", "--out", "OUT", "--config", "LATENT", "--kind", "language"],
        ["--kind language with", "latent.toml, which describes a latent model"],
    ),
    "a file of a language model for the latent one": (
        ["sample", "--out", "OUT", "--config", "LANGUAGE", "--model=latent"],
        ["--kind latent with", "language.toml, which describes a language model"],
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
        "latent.toml": "[latent]\n",
        "language.toml": "[model]\n[objective]\n",
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


def test_a_message_is_shown_in_any_encoding(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(["evaluate", "nowhere Ω"]) == 2
    stream.flush()
    assert "nowhere ?: expected" in error_line(stream.buffer.getvalue().decode())


@pytest.mark.parametrize(
    "arguments", [["fti"], ["fit", "--out", "run", "--model.width", "2"], ["fit", "--out"]]
)
def test_a_message_has_no_frame_in_any_encoding(probattn, monkeypatch, arguments):
    _, _, framed = probattn(*arguments)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    _, _, plain = probattn(*arguments)
    assert error_line(plain) == error_line(framed)


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


ENDS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("sent", "status"), ENDS)
def test_a_signal_ends_a_command_that_has_nothing_to_save(
    probattn, own_run, monkeypatch, sent, status
):
    """At once, as an exception does: the lock is released."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def evaluate(run, **options):
        try:
            with run.lock():
                os.kill(os.getpid(), sent)
                time.sleep(10)
        finally:  # a burst
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(os.getpid(), number)
        raise AssertionError("the signal did not end it")

    monkeypatch.setattr(commands, "evaluate", evaluate)
    before = files_of(own_run.path)
    assert probattn("evaluate", own_run.path) == (status, "", f"probattn: ended by {sent.name}\n")
    assert files_of(own_run.path) == before
    with own_run.lock():
        pass
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_damaged_run_is_named(probattn, own_run):
    (own_run.path / "data.json").write_text(json.dumps({"name": "corpus"}))
    status, _, err = probattn("evaluate", own_run.path)
    assert status == 2
    assert f"{own_run.path / 'data.json'}: damaged" in error_line(err)
    (own_run.path / "config.toml").write_text("[model")
    status, _, err = probattn("generate", own_run.path, "--prompt", "a")
    assert status == 2
    assert f"{own_run.path / 'config.toml'}: expected a TOML file" in error_line(err)


def no_device():
    raise AssertionError  # as JAX does with JAX_PLATFORMS=cuda and no CUDA


def test_a_device_that_is_not_there_is_named(probattn, monkeypatch):
    monkeypatch.setattr(jax, "devices", no_device)
    status, out, err = probattn("fit", "--out", "run")
    assert (status, out) == (1, "")
    assert error_line(err).startswith("JAX finds no device, and JAX_PLATFORMS is ")


def test_a_fit_under_the_check_for_leaks_is_refused(probattn):
    with jax.checking_leaks():
        status, out, err = probattn("fit", "--out", "run")
    assert (status, out) == (2, "")
    assert "JAX_CHECK_TRACER_LEAKS is set" in error_line(err)


# Processes of their own

SMALL_FIT = [sys.executable, "-m", "probattn", "fit", "--data", "text.txt", "--out", "run", *FLAGS]


@pytest.fixture(name="text")
def text_fixture(tmp_path):
    (tmp_path / "text.txt").write_text("the token of a margin " * 200)


@pytest.mark.slow
@pytest.mark.usefixtures("text")
@pytest.mark.parametrize("redirection", ["2>&1 | head -1", ">&- 2>&-"])
def test_a_fit_goes_on_without_its_outputs(redirection):
    command = f'"$@" {redirection}'
    subprocess.run(["bash", "-o", "pipefail", "-c", command, "bash", *SMALL_FIT], check=True)
    assert load_run("run").latest.step == 8
    assert "fit" in load_run("run").summary()


@pytest.mark.slow
@pytest.mark.usefixtures("text")
@pytest.mark.parametrize(("sent", "status"), ENDS)
def test_a_burst_of_signals_leaves_a_saved_fit_and_a_line(sent, status):
    command = [*SMALL_FIT, "--fit.steps", "100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            while (line := process.stderr.readline()) and not line.startswith("step"):
                pass
            for _ in range(5):
                process.send_signal(sent)
                time.sleep(0.01)
            err = process.stderr.read()
        finally:
            process.kill()
    # A signal may come while Python ends, which is then what ends it.
    assert process.returncode in (status, -sent)
    assert f"ended by {sent.name}; what was done is saved; go on with --resume" in err
    assert "Traceback" not in err
    assert load_run("run").latest.step > 0


@pytest.mark.slow
def test_help_may_be_cut_off():
    command = f'"{sys.executable}" -m probattn fit --help | head -1'
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("usage: probattn fit")
    assert result.stderr == ""
