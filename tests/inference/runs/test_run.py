"""Run directories: made, opened, replaced, refused, damaged. No fit is needed."""

import contextlib
import dataclasses
import json
import os
import pickle
import pickletools
import threading

import pytest

from probattn.inference import FitConfig, RunConfig, SampleRunConfig, load_run
from probattn.inference.cli import main
from probattn.inference.runs.checkpoints import (
    CheckpointError,
)
from probattn.inference.runs.checks import check_same_corpus
from probattn.inference.runs.files import RunError, write_text
from probattn.inference.runs.opening import new_run, open_run
from probattn.inference.runs.run import PosteriorRun, Run
from probattn.models import LatentEmbeddingsConfig, ObjectiveConfig
from probattn.text.corpora import Corpus
from probattn.text.vocabulary import BytePairVocabulary
from tests.support.made_runs import (
    CONFIG,
    CORPUS,
    ROWS,
    TEXT,
    VOCABULARY,
    assert_same,
    create_run,
    draw,
    make_run,
)
from tests.support.refusals import refusal
from tests.support.tiny_run import MODEL, files_of, held_by_another_process

# What is there


def test_a_run_opens_as_it_was_made(made):
    run = load_run(str(made.path))
    assert (run.config, run.vocabulary, run.data) == (CONFIG, VOCABULARY, made.data)
    assert run.data == {
        "name": "book.txt",
        "description": 'file "book".txt',
        "sha256": CORPUS.sha256,
        "train_characters": len(TEXT),
        "validation_characters": len(TEXT),
    }
    assert (run.step, run.latest.step) == (8, 8)
    assert (run.metrics(), run.summary()) == (ROWS, {"fit": {"steps": 8}})
    assert_same(run.parameters, draw(run.parameter_shapes()))


def with_description(run, changes):
    """Change the fields of data.json; None removes one."""
    path = run.path / "data.json"
    fields = json.loads(path.read_text("utf-8")) | changes
    kept = {name: value for name, value in fields.items() if value is not None}
    path.write_text(json.dumps(kept), "utf-8")


def test_a_run_of_an_earlier_version_names_no_format(run):
    assert json.loads((run.path / "data.json").read_text("utf-8"))["format"] == 2
    with_description(run, {"format": None})
    assert load_run(run.path) == run


def test_a_run_of_a_newer_version_is_refused_whatever_it_holds(run, capsys):
    with_description(run, {"format": 3, "vocabulary": None})
    (run.path / "config.toml").write_text("[tomorrow]\n")
    expected = (
        f"{run.path}: is a run of format 3, and this version of probattn reads formats up to 2; "
        "update probattn to use it"
    )
    assert refusal(RunError, load_run, run.path) == expected
    for command in (["fit", "--out", str(run.path), "--resume"], ["evaluate", str(run.path)]):
        assert main(command) == 2
        assert capsys.readouterr() == ("", f"probattn: error: {expected}\n")


LATENT = LatentEmbeddingsConfig(width=2, sequences=2, length=4)
OF_FIT = RunConfig(model=dataclasses.replace(MODEL, bound=0.5), objective=ObjectiveConfig("latent"))


@pytest.mark.parametrize(
    ("kind", "config", "other"),
    [
        (Run, OF_FIT, dataclasses.replace(OF_FIT, model=MODEL)),
        (Run, OF_FIT, dataclasses.replace(OF_FIT, objective=ObjectiveConfig("margin"))),
        (
            PosteriorRun,
            SampleRunConfig(latent=LATENT),
            SampleRunConfig(latent=dataclasses.replace(LATENT, coupling="repulsive")),
        ),
    ],
    ids=["unbounded fit", "bounded barrier", "repulsive posterior"],
)
@pytest.mark.parametrize("format", [None, 1])
def test_an_earlier_run_is_refused_where_its_bounded_coupling_would_be_misread(
    tmp_path, capsys, kind, config, other, format
):
    for path, each in ((tmp_path / "bounded", config), (tmp_path / "other", other)):
        with open_run(new_run(kind, path, each, CORPUS, VOCABULARY)) as run:
            assert load_run(path) == run
        with_description(run, {"format": format})
    assert load_run(tmp_path / "other").config == other
    expected = (
        f"{tmp_path / 'bounded'}: was made by an earlier version of probattn, to which the "
        "parameters of a bounded coupling meant another coupling; fit or sample it again with "
        "--overwrite"
    )
    assert refusal(RunError, load_run, tmp_path / "bounded") == expected
    assert main(["evaluate", str(tmp_path / "bounded")]) == 2
    assert capsys.readouterr() == ("", f"probattn: error: {expected}\n")
    with open_run(
        new_run(kind, tmp_path / "bounded", config, CORPUS, VOCABULARY), overwrite=True
    ) as run:
        assert load_run(run.path).config == config


@pytest.mark.parametrize("given", ["2", 1.5, True, -1])
def test_a_format_that_is_no_number_is_damaged(run, given):
    with_description(run, {"format": given})
    assert "data.json: damaged: format is" in refusal(RunError, load_run, run.path)


def test_a_byte_pair_vocabulary_comes_back(tmp_path):
    vocabulary = BytePairVocabulary(((104, 101), (256, 32)))
    create_run(tmp_path / "run", CONFIG, CORPUS, vocabulary)
    assert load_run(tmp_path / "run").vocabulary == vocabulary


def test_a_run_is_these_files(made):
    entries = {path.name for path in made.path.iterdir()}
    required = {"config.toml", "data.json", "metrics.jsonl", "summary.json", "checkpoints"}
    assert required <= entries <= required | {"lock"}
    lines = (made.path / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == ROWS


def test_a_new_run_has_no_results(tmp_path):
    run = create_run(tmp_path / "a" / "b", CONFIG, CORPUS, VOCABULARY)
    assert (run.step, run.latest.step, run.metrics(), run.summary()) == (None, None, [], {})
    message = refusal(CheckpointError, lambda: run.parameters)
    assert "has not reached its first report" in message
    assert "--resume" in message


def test_results_are_added_by_name(run):
    run.update_summary(evaluate={"bpc": 2.0})
    run.update_summary(fit={"steps": 9})
    assert run.summary() == {"fit": {"steps": 9}, "evaluate": {"bpc": 2.0}}


def test_metrics_are_replaced_or_added_to(run, place):
    run.write_metrics(ROWS[:1])
    run.append_metrics({"step": 5})
    assert run.metrics() == [ROWS[0], {"step": 5}]


def test_metrics_hold_no_number_that_json_lacks(run):
    before = files_of(run.path)
    refusal(ValueError, run.append_metrics, {"step": 9, "loss": float("nan")})
    assert files_of(run.path) == before


def is_pickle(data):
    try:
        *_, (operation, _, position) = pickletools.genops(data)
    except Exception:
        return False
    return operation.name == "STOP" and position == len(data) - 1


def test_nothing_is_pickled(run, monkeypatch):
    assert is_pickle(pickle.dumps(ROWS, 0))
    assert is_pickle(pickle.dumps(ROWS))
    assert [name for name, data in files_of(run.path).items() if is_pickle(data)] == []

    def refuse(*arguments, **options):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert_same(load_run(run.path).parameters, draw(run.parameter_shapes()))


# Where a run may be made


def test_a_run_is_not_made_over_another(run):
    before = files_of(run.path)
    message = refusal(RunError, make_run, run.path)
    assert message.startswith(f"{run.path}: holds another run; continue it with --resume")
    assert "--overwrite" in message
    assert files_of(run.path) == before


def test_overwriting_leaves_nothing_of_the_other_run(run, place):
    (run.path / "figures").mkdir()
    (run.path / "figures" / "margins.png").write_bytes(b"old")
    (run.path / "post_hoc_prior.npz").write_bytes(b"old")
    config = dataclasses.replace(CONFIG, fit=FitConfig(seed=1))
    create_run(run.path, config, CORPUS, VOCABULARY, overwrite=True)
    assert files_of(run.path).keys() == {"config.toml", "data.json"}
    assert load_run(run.path).config == config


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("foreign", ["notes.txt", "data", ".git", ".notes.txt.0123abcd"])
def test_a_directory_with_foreign_files_is_refused(run, foreign, overwrite):
    (run.path / foreign).write_text("mine")
    before = files_of(run.path)
    message = refusal(RunError, make_run, run.path, overwrite=overwrite)
    assert "which is no part of a run; expected a new or empty directory" in message
    assert foreign.removeprefix(".").removesuffix(".0123abcd") in message
    assert files_of(run.path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_place_for_a_run(tmp_path, overwrite, place):
    path = tmp_path / "file"
    path.write_text("mine")
    message = refusal(RunError, make_run, path, overwrite=overwrite)
    assert message == f"{path}: expected a directory for the run, got a file"
    assert path.read_text() == "mine"


def test_below_a_file_is_no_place_for_a_run(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    message = refusal(RunError, make_run, tmp_path / "file" / "run")
    assert message.startswith(f"{tmp_path / 'file' / 'run'}: ")


@pytest.mark.parametrize("left", ["lock", "data.json", ".config.toml.0123abcd"])
def test_what_an_interrupted_start_leaves_is_no_obstacle(tmp_path, left):
    (tmp_path / left).write_text("")
    assert load_run(make_run(tmp_path).path).step == 8


def test_work_that_is_done_waits_for_the_lock(run):
    with held_by_another_process(run) as other:
        threading.Timer(0.5, other.terminate).start()
        with run.lock(wait=60):
            assert other.wait(60) != 0  # it was terminated, and not at the end of this test


def test_a_run_that_another_process_writes_to_is_left_alone(run):
    before = files_of(run.path)
    with held_by_another_process(run):
        message = refusal(RunError, make_run, run.path, overwrite=True)
        assert message == f"{run.path}: another process is writing to this run"
        with pytest.raises(RunError, match="another process is writing"), run.lock():
            pass
        assert files_of(run.path) == before
    with run.lock():  # free again
        pass


# What cannot be opened


def test_what_is_no_run_cannot_be_opened(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name in ("missing", "file", "folder"):
        message = refusal(RunError, load_run, tmp_path / name)
        assert message == f"{tmp_path / name}: expected a run directory, which has a config.toml"


def test_a_configuration_cut_off_anywhere_opens_nothing_that_was_not_there(run):
    """Cut off within a value it is refused, or its end is missing: the rest has its defaults."""
    whole, default = (run.path / "config.toml").read_bytes(), RunConfig()
    for end in range(len(whole)):
        (run.path / "config.toml").write_bytes(whole[:end])
        if not whole[:end].endswith(b"\n"):
            with contextlib.suppress(RunError):
                load_run(run.path)
            continue
        found = load_run(run.path).config
        for table in dataclasses.fields(found):
            for field in dataclasses.fields(getattr(found, table.name)):
                given, own, usual = (
                    getattr(getattr(config, table.name), field.name)
                    for config in (found, CONFIG, default)
                )
                assert given in (own, usual), (end, field.name)
    path = run.path / "config.toml"
    for end in (whole.index(b"\n[model]") + 4, whole.index(b"= ") + 2):
        path.write_bytes(whole[:end])
        assert f"{path}: " in refusal(RunError, load_run, run.path), end


def test_a_configuration_of_an_older_run_has_a_last_line(run):
    with (run.path / "config.toml").open("a") as file:
        file.write("\n# end\n")
    assert load_run(run.path).config == CONFIG


def test_a_field_newer_than_the_run_has_its_default(run):
    path = run.path / "config.toml"
    line = f"weight_decay = {run.config.fit.weight_decay}\n"
    path.write_text(path.read_text().replace(line, ""))
    assert "weight_decay" not in path.read_text()
    assert load_run(run.path).config == run.config


def test_a_description_cut_off_anywhere_is_refused(run):
    whole = (run.path / "data.json").read_bytes()
    for end in range(len(whole) - 1):
        (run.path / "data.json").write_bytes(whole[:end])
        message = refusal(RunError, load_run, run.path)
        assert message.startswith(f"{run.path / 'data.json'}: damaged"), end


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "is missing from the run"),
        ("[]", "damaged: expected an object, got list"),
        ("{}", "damaged"),
        ('{"vocabulary": []}', "damaged"),
        ('{"vocabulary": {"kind": "character", "symbols": ["b", "a"]}}', "damaged"),
        ('{"vocabulary": {"kind": "character", "symbols": ["a"]}}', "damaged"),
    ],
)
def test_a_description_that_is_none(run, content, reason):
    (run.path / "data.json").unlink()
    if content is not None:
        (run.path / "data.json").write_text(content)
    assert f"{run.path / 'data.json'}: {reason}" in refusal(RunError, load_run, run.path)


def test_a_summary_that_is_damaged_is_not_replaced(run, place):
    (run.path / "summary.json").write_text('{"fit": ')
    assert "summary.json: damaged" in refusal(RunError, run.update_summary, evaluate={})
    assert (run.path / "summary.json").read_text() == '{"fit": '


def test_a_line_of_metrics_that_was_cut_off_is_none(run):
    whole = (run.path / "metrics.jsonl").read_bytes()
    for end in range(len(whole)):
        (run.path / "metrics.jsonl").write_bytes(whole[:end])
        assert run.metrics() == ROWS[: whole[:end].count(b"\n")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"step": ', "expected JSON"),
        ("[1]", "expected an object with an integer step"),
        ('{"loss": 1}', "expected an object with an integer step"),
        ('{"step": true}', "expected an object with an integer step"),
        ('{"step": 9, "loss": [[]]}', "loss is list [[]]: expected a number"),
        ('{"step": 9, "loss": "low"}', "loss is str 'low': expected a number"),
        ('{"step": 9, "loss": 1' + "0" * 99 + "}", "loss is int 1000"),
        ('{"step": 9, "validation_bpc": null}', "validation_bpc is NoneType None: expected a nu"),
        ('{"step": 9, "min_margin_kind": 1}', "min_margin_kind is int 1: expected a text"),
    ],
)
def test_damaged_metrics_are_refused(run, line, reason):
    path = run.path / "metrics.jsonl"
    path.write_text(path.read_text() + line + "\n")
    expected = f"{path}, line {len(ROWS) + 1}: {reason}"
    assert refusal(RunError, run.metrics).startswith(expected)


def test_a_line_of_metrics_that_lacks_a_value_is_named(run):
    assert run.metrics("loss") == ROWS
    message = refusal(RunError, run.metrics, "loss", "tokens_per_s", "bpc")
    assert message == (
        f"{run.path / 'metrics.jsonl'}: the line of step 4 lacks bpc; restore the file from a copy"
    )


def test_another_text_is_refused(run):
    check_same_corpus(run, CORPUS)
    changed = Corpus("book.txt", TEXT, TEXT[1::-1], "")
    message = refusal(RunError, check_same_corpus, run, changed)
    for part in (str(run.path), 'file "book".txt', CORPUS.sha256[:12], changed.sha256[:12]):
        assert part in message


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file"
    write_text(path, "old é\n")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert files_of(tmp_path) == {"folder/file": "old é\n".encode()}
