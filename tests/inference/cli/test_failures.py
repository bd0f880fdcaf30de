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
from probattn.inference.cli import commands, main, text_commands
from probattn.inference.cli import demo as demo_module
from probattn.inference.figures.report import REPORTS
from probattn.inference.paper import report as paper_report
from probattn.inference.runtime.signals import Interrupted
from tests.support.command_line import error_line
from tests.support.small import FLAGS
from tests.support.tiny_run import files_of

ERRORS = {
    "no command": ([], ["fit", "evaluate", "margins", "generate", "demo"]),
    "unknown command": (
        ["fti"],
        ["fti", "compare, generate, import, export, figures, demo"],
    ),
    "an empty run": (["sample", "--out", "out", "--from", ""], ["valid parse", "--from"]),
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
    "a page of a posterior without margins": (
        ["sample", "--kind", "language", "--objective", "ce", "--html", "HTML", "--out", "OUT"],
        ["--html: objective ce has no attention stage", "expected objective margin or full"],
    ),
    "resume by another command": (
        ["sample", "--out", "RUN", "--resume"],
        ["is a run of `probattn fit`: resume it with that command"],
    ),
    "not a run": (["evaluate", "nowhere"], ["nowhere", "expected a run directory"]),
    "margins of what is not a run": (["margins", ".", "--out", "OUT"], ["a run directory"]),
    "negative noise": (
        ["evaluate", "RUN", "--noise-relative", "0.5", "-1"],
        ["noise_relative: got -1.0", "expected finite numbers >= 0"],
    ),
    "noise seed": (["evaluate", "RUN", "--seed", 2**40], ["seed: got 10995116", "expected"]),
    "unknown character": (
        ["evaluate", "RUN", "--text", "UTOPIAN"],
        ["utopian.txt", "unknown character 'U' (U+0055) at position 2"],
    ),
    "text of margins": (["margins", "RUN", "--out", "OUT", "--text", "no.txt"], ["no.txt", "file"]),
    "stride": (
        ["margins", "RUN", "--out", "OUT", "--stride", "9"],
        ["stride is 9", "expected 1 <= stride <= block = 8"],
    ),
    "length": (["generate", "RUN", "--prompt", "a", "--length", "0"], ["length: got 0", "from 1"]),
    "temperature": (
        ["generate", "RUN", "--prompt", "a", "--temperature", "-1"],
        ["temperature: got -1.0", "expected a finite number >= 0"],
    ),
    "a length that no position has": (
        ["generate", "RUN", "--prompt", "a", "--length", 2**31],
        ["length: got 2147483648, expected an integer from 1 to 2^31 - 1"],
    ),
    "seed": (["generate", "RUN", "--prompt", "a", "--seed", 2**40], ["seed: got 109951", "expect"]),
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
    places |= {
        "HTML": tmp_path / "page.html",
        "RUN": tiny_run.path,
        "OUT": tmp_path / "out",
        "FOLDER": tmp_path / "folder",
    }
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


def outputs():
    """Every file that a command writes outside a run, with the command."""
    commands_of = {
        "margins": ["margins", "RUN", "--out", "out"],
        "sensitivity": ["sensitivity", "RUN", "--out", "out"],
        "compared": ["compare", "RUN", "--out", "out"],
    }
    for report, arguments in commands_of.items():
        for name in REPORTS[report]:
            yield arguments, f"out/{name}"
    for name in (*REPORTS["comparison"], *REPORTS["margins"]):
        yield ["demo", "--out", "out"], f"out/figures/{name}"
    yield ["demo", "--out", "out"], "out/excerpt.txt"
    for name in ("figure_1_1.png", "figure_3_2.csv", "proper_region.csv", "paper.csv"):
        yield ["figures", "--out", "out"], f"out/{name}"
    yield ["generate", "RUN", "--prompt", "a", "--out", "out/a.csv"], "out/a.csv"


@pytest.mark.parametrize(("arguments", "name"), list(outputs()))
def test_an_output_is_refused_before_the_work(probattn, tiny_run, monkeypatch, arguments, name):
    def work(*arguments, **options):
        raise AssertionError("the work had begun")

    for module, function in (
        (commands, "generate"),
        *((text_commands, name) for name in ("text_margins", "sensitivity", "compare")),
        (demo_module, "fit"),
        (paper_report.data, "trajectory"),
    ):
        monkeypatch.setattr(module, function, work)
    Path(name).mkdir(parents=True)
    before = sorted(Path().rglob("*"))
    status, out, err = probattn(*(tiny_run.path if each == "RUN" else each for each in arguments))
    assert (status, out) == (2, "")
    assert error_line(err) == f"{name}: is a folder: expected a file, a pipe or a new name"
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "--out", ""],
        ["fit", "--out="],
        ["fit", "--out", "", "--resume"],
        ["fit", "--out", "out", "--config", ""],
        ["margins", "RUN", "--out", ""],
        ["margins", "RUN", "--out", "out", "--text", ""],
        ["generate", "RUN", "--prompt", "a", "--out", ""],
        ["generate", "", "--prompt", "a"],
        ["demo", "--out", ""],
        ["figures", "--out", ""],
    ],
)
def test_an_empty_path_is_not_the_working_directory(probattn, tiny_run, monkeypatch, arguments):
    monkeypatch.chdir(tiny_run.path)  # where a run would be found
    before = files_of(tiny_run.path)
    status, out, err = probattn(*(tiny_run.path if each == "RUN" else each for each in arguments))
    assert (status, out) == (2, "")
    assert "got an empty path" in error_line(err)
    assert files_of(tiny_run.path) == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--fit.steps", "1_0_0"),
        ("--fit.steps", "\N{ARABIC-INDIC DIGIT THREE}"),
        ("--fit.learning-rate", "1_0.5"),
        ("--fit.learning-rate", "\N{FULLWIDTH DIGIT ONE}"),
        ("--num-processes", "1_0"),
    ],
)
def test_a_number_has_plain_digits(probattn, option, value):
    status, out, err = probattn("fit", "--out", "out", option, value)
    assert (status, out) == (2, "")
    assert f"got '{value}', expected" in error_line(err)
    assert option in err


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["fit", "--out", "out"], "--fit.steps"),
        (["fit", "--out", "out"], "--model.layers"),
        (["fit", "--out", "out"], "--process-id"),
        (["generate", "RUN", "--prompt", "a"], "--length"),
        (["generate", "RUN", "--prompt", "a"], "--top-k"),
        (["margins", "RUN", "--out", "out"], "--stride"),
        (["sensitivity", "RUN", "--out", "out"], "--draws"),
        (["evaluate", "RUN"], "--seed"),
    ],
)
@pytest.mark.parametrize("value", ["1" + 25 * "0", "-" + 5000 * "9"])
def test_an_integer_that_no_array_holds(probattn, tiny_run, arguments, option, value):
    given = (tiny_run.path if each == "RUN" else each for each in arguments)
    status, out, err = probattn(*given, option, value)
    assert (status, out) == (2, "")
    assert f"{len(value.lstrip('-'))} digits, expected at most 63 bits" in error_line(err)
    assert option in err


def test_a_run_has_a_name_in_utf8(probattn, own_run):
    """Checkpoints can have no other: found out before anything is fitted, and nothing is left."""
    name = os.fsdecode(b"caf\xe9")
    for arguments in (["fit", "--out", name], ["sample", "--out", f"{name}/run"]):
        status, out, err = probattn(*arguments, "--data", own_run.config.data.source)
        assert (status, out) == (2, "")
        assert "its path is not UTF-8" in error_line(err)
    assert not Path(name).exists()
    moved = own_run.path.rename(name)
    before = files_of(moved)
    for arguments in (
        ["fit", "--resume", "--out", name],
        ["evaluate", name],
        ["generate", name, "--prompt", "a"],
        ["compare", name, "--out", "out"],
        ["sample", "--from", name, "--out", "out"],
    ):
        status, out, err = probattn(*arguments)
        assert (status, out) == (2, "")
        assert "its path is not UTF-8" in error_line(err)
    assert files_of(moved) == before
    assert not Path("out").exists()


@pytest.mark.parametrize("option", ["--data", "--data.validation"])
def test_a_text_of_a_run_has_a_name_in_utf8(probattn, option):
    name = os.fsdecode(b"caf\xe9.txt")
    Path(name).write_text("a text that is long enough to be split")
    status, out, err = probattn("fit", "--out", "out", option, name)
    assert (status, out) == (2, "")
    assert "whose name is not UTF-8: expected" in error_line(err)
    assert not Path("out").exists()


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


# Runs a command that hears a signal, which nohup, for one, makes its children ignore.
HEARING = """
import os, signal, sys
signal.signal(int(sys.argv[1]), signal.SIG_DFL)
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.usefixtures("text")
@pytest.mark.parametrize(("sent", "status"), ENDS)
def test_a_burst_of_signals_leaves_a_saved_fit_and_a_line(sent, status):
    command = [sys.executable, "-c", HEARING, str(int(sent)), *SMALL_FIT, "--fit.steps", "80000"]
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
