"""The targets of `fuzz.py`, with dozens of inputs each, and inputs that found faults."""

import contextlib
import json
import re
import string
import subprocess
import sys
from collections import Counter

import hypothesis
import numpy as np
import pytest
from jaxtyping import TypeCheckError

import probattn as pa
from probattn.inference import load_run
from probattn.inference.cli import main
from probattn.inference.config import RunConfig
from probattn.inference.config_files import read_tables
from probattn.inference.runs.checks import check_same_corpus
from probattn.inference.runs.files import RunError
from probattn.text.corpora import Corpus
from tests.robustness.fuzzing.targets import TARGETS
from tests.support.made_runs import make_run
from tests.support.refusals import refusal

X = np.random.default_rng(0).normal(size=(2, 6, 3))
WEIGHTS = np.random.default_rng(1).normal(size=(2, 3, 2)) / 2


# Of which both what is right and what is refused must occur, or the target would test nothing.
OUTCOMES = {
    "command_line": {"help", "refused", "refused by the parser"},
    "configuration": {"accepted", "ValueError"},
    "vocabulary": {"accepted", "ValueError"},
    "corpus": {"accepted", "DataError", "ValueError"},
    "run": {"accepted", "RunError", "SegmentError"},
    "metrics": {"accepted", "RunError"},
    "pretrained": {"accepted gguf", "accepted bytes", "accepted json", "PretrainedError"},
    "shapes": {"accepted", "ValueError"},
    "values": {"causal", "causal and right"},
}
FEW = {"command_line": 20, "shapes": 40}
MANY = {"command_line": 60, "shapes": 200, "values": 100}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        # Of the values, which take long to compile for, the tests of bad tokens below are fast.
        *((name, FEW.get(name, 60)) for name in OUTCOMES if name != "values"),
        *(pytest.param(name, MANY.get(name, 300), marks=pytest.mark.slow) for name in OUTCOMES),
    ],
)
def test_hostile_input_ends_in_a_right_answer_or_a_documented_error(tmp_path, name, inputs):
    target, found = TARGETS[name](tmp_path), Counter()

    @hypothesis.seed(1)
    @hypothesis.settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(target.inputs)
    def check(value):
        # The tests check annotations too, and so refuse what is no array before the code does.
        with contextlib.suppress(TypeCheckError):
            found[target.check(value)] += 1

    check()
    assert OUTCOMES[name] <= found.keys()


# What was found


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[fit]\nlearning_rate = 0x" + "f" * 300, "fit.learning_rate is an integer of 1200 bits"),
        ("[fit]\nsteps = 0x" + "f" * 5000, "fit.steps is an integer of 20000 bits"),
        ("[fit]\nsteps = " + "9" * 5000, "expected a TOML file: "),
        ("a = " + "[" * 50_000, "expected a TOML file: "),
        ('["a\\nb"]', "unknown tables: a b; expected data"),
    ],
)
def test_numbers_and_names_that_broke_the_configuration_reader(tmp_path, text, reason):
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    assert refusal(ValueError, read_tables, path, RunConfig).startswith(f"{path}: {reason}")


@pytest.mark.parametrize("sha256", [None, 7, {"0": 7}, ["a"]])
def test_a_description_of_other_types_is_damaged(tmp_path, sha256):
    run = make_run(tmp_path / "run")
    path = run.path / "data.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"sha256": sha256}))
    assert refusal(RunError, load_run, run.path).startswith(f"{path}: damaged: sha256 is ")


@pytest.mark.parametrize("sha256", ["", "+\x85\x9b\n", "A" * 64, "0" * 65])
def test_a_checksum_that_is_none_is_damaged(tmp_path, sha256):
    run = make_run(tmp_path / "run")
    path = run.path / "data.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"sha256": sha256}))
    message = refusal(RunError, load_run, run.path)
    assert message.startswith(f"{path}: damaged: sha256 is ")
    assert message.isprintable()


def test_a_description_of_several_lines_is_told_in_one(tmp_path):
    run = make_run(tmp_path / "run")
    path = run.path / "data.json"
    text = json.dumps(
        json.loads(path.read_text("utf-8")) | {"sha256": "0" * 64, "description": "a\n\x1b[2Jb"}
    )
    path.write_text(text)
    message = refusal(RunError, check_same_corpus, load_run(run.path), Corpus("", "a", "b", ""))
    assert "was fitted on 'a\\n\\x1b[2Jb' with checksum 000000000000, and" in message


def test_a_folder_in_place_of_a_file_of_a_run(tmp_path):
    run = make_run(tmp_path / "run")
    for name, read in (("summary.json", run.summary), ("metrics.jsonl", run.metrics)):
        (run.path / name).unlink()
        (run.path / name).mkdir()
        assert "cannot be read: Is a directory" in refusal(RunError, read)


def test_the_reason_why_a_fit_stopped_is_a_text(tmp_path):
    run = make_run(tmp_path / "run")
    (run.path / "metrics.jsonl").write_text('{"step": 1, "stopped": {"\\u001b": 1}}\n')
    assert "line 1: expected a text" in refusal(RunError, run.metrics)


@pytest.mark.slow
@pytest.mark.parametrize("bound", [None, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_a_bad_token_changes_nothing_before_it(bad, bound):
    changed = X.copy()
    changed[0, 3, 1] = bad
    for function in (pa.residual, pa.reduced_blocks, pa.jacobian_blocks, pa.embedding_margin):
        before, after = (np.asarray(function(x, *WEIGHTS, bound=bound)) for x in (X, changed))
        np.testing.assert_allclose(after[0, :3], before[0, :3], rtol=1e-9)
        np.testing.assert_allclose(after[1], before[1], rtol=1e-9)
        if np.isnan(bad):
            assert np.all(np.isnan(after[0, 4:]))  # and what it reaches does not look right


def test_what_is_no_array_and_no_number_is_refused_in_one_line():
    """In a process of its own: here the annotations would refuse it first."""
    code = """
import numpy as np, probattn as pa
x, w = np.ones((4, 3)), np.ones((3, 2))
for wrong in ("x", None, [[1.0], [1.0, 2.0]], np.array([[None]]), {}):
    for call in (
        lambda: pa.residual(wrong, w, w),
        lambda: pa.coupling(w, wrong),
        lambda: pa.attention_weights(wrong, x),
    ):
        try:
            call()
        except ValueError as error:
            print(error)
for wrong in ("x", 1j, {}, -1.0):
    for call in (
        lambda: pa.residual(x, w, w, bound=wrong),
        lambda: pa.relaxed_barrier(x, w, w, wrong),
    ):
        try:
            call()
        except ValueError as error:
            print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    starts = ["x ", "w_key ", "queries "] * 5 + ["bound is ", "delta is "] * 4
    lines = run.stdout.splitlines()
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start)
        assert ": expected " in line


def test_sizes_whose_product_no_integer_holds(tmp_path, capsys):
    (tmp_path / "text").write_text(string.ascii_letters * 20)
    out, most = str(tmp_path / "out"), str(2**62)
    sizes = ["--latent.length", most, "--latent.sequences", most, "--latent.width", most]
    assert main(["sample", "--out", out, "--data", str(tmp_path / "text"), *sizes]) == 2
    message = capsys.readouterr().err
    assert re.search(r"would take [\d,]{50,} GiB: expected at most the ", message)
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("function", [pa.stability_margin, pa.embedding_margin])
def test_a_covariance_that_overflows_ends(function):
    """LAPACK's singular values of such blocks did not return."""
    rng = np.random.default_rng(1768515840)
    x = rng.normal(size=(2, 5, 3))
    weights = rng.normal(size=(2, 3, 2))
    x[0, 0] = [1e155, -2.9670774015617384e16, -2.9670774015617384e16]
    found = np.asarray(function(x, *weights))
    np.testing.assert_allclose(found[1], np.asarray(function(x[1], *weights)), rtol=1e-12)
    assert not np.all(np.isfinite(found[0]))
