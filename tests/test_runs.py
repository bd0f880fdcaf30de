"""Run directories and checkpoints: made, opened, replaced, refused, damaged. No fit is needed."""

import dataclasses
import json
import os
import pickle
import pickletools
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import MODEL, files_of, held_by_another_process

from probattn.corpora import Corpus
from probattn.inference import FitConfig, RunConfig, checkpoints, load_run
from probattn.inference.checkpoints import (
    CheckpointError,
    CheckpointFolder,
    named_leaves,
    with_leaves,
)
from probattn.inference.run_files import RunError, write_text
from probattn.inference.runs import check_same_corpus, create_run
from probattn.models import ObjectiveConfig
from probattn.vocabulary import BytePairVocabulary, CharacterVocabulary

TEXT = 'text with a quote ", a backslash \\, é, 🦞, \u2028 and\na newline'
CORPUS = Corpus("book.txt", TEXT, TEXT[::-1], 'file "book".txt')
VOCABULARY = CharacterVocabulary.from_text(TEXT)
CONFIG = RunConfig(model=MODEL, objective=ObjectiveConfig("margin"), fit=FitConfig(steps=300))
ROWS = [{"step": 4, "loss": 3.25, "tokens_per_s": None}, {"step": 8, "loss": 1e-300}]


def draw(shapes, seed=0):
    """Arrays of given shapes and dtypes, each entry different."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for name, leaf in shapes.items()
    }


def make_run(path, **options):
    """A run as a fit of eight steps leaves it."""
    run = create_run(path, CONFIG, CORPUS, VOCABULARY, **options)
    for row in ROWS:
        run.append_metrics(row)
    run.best.save(8, draw(run.parameter_shapes()))
    run.latest.save(8, {"svi.count": jnp.int32(8), "svi.rng_key": jnp.array([1, 2], jnp.uint32)})
    run.update_summary(fit={"steps": 8})
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "made")


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run, to do anything with."""
    return load_run(shutil.copytree(made.path, tmp_path / "run"))


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape)
        assert np.asarray(got[name]).tobytes() == np.asarray(value).tobytes(), name


def refusal(kind, function, *arguments, **options):
    with pytest.raises(kind) as raises:
        function(*arguments, **options)
    assert "\n" not in str(raises.value)
    return str(raises.value)


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


def test_a_configuration_cut_off_anywhere_is_refused(run):
    whole = (run.path / "config.toml").read_bytes()
    for end in range(len(whole)):
        (run.path / "config.toml").write_bytes(whole[:end])
        assert f"{run.path / 'config.toml'}: " in refusal(RunError, load_run, run.path), end


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
    ],
)
def test_damaged_metrics_are_refused(run, line, reason):
    path = run.path / "metrics.jsonl"
    path.write_text(path.read_text() + line + "\n")
    expected = f"{path}, line {len(ROWS) + 1}: {reason}"
    assert refusal(RunError, run.metrics).startswith(expected)


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


# Checkpoints

ARRAYS = {
    "a.b": jnp.asarray(np.random.default_rng(0).normal(size=(90, 70))),
    "single": jnp.array([[1.5, -0.0, jnp.inf]], jnp.float32),
    "count": jnp.int32(2**31 - 1),
    "key": jnp.array([1, 2**32 - 1], jnp.uint32),
}


@pytest.fixture
def place(tmp_path):
    return tmp_path / "checkpoints" / "latest"


@pytest.fixture
def folder(place):
    folder = CheckpointFolder(place)
    folder.save(3, ARRAYS)
    return folder


def test_a_checkpoint_comes_back_to_the_last_bit(folder):
    assert folder.step == 3
    assert_same(folder.load(ARRAYS), ARRAYS)
    shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in ARRAYS.items()}
    assert_same(folder.load(shapes), ARRAYS)


def test_what_is_saved_last_is_what_stays(folder):
    """Also where a fit that goes on takes steps again that a killed one had taken."""
    other = ARRAYS | {"count": jnp.int32(7)}
    folder.save(2, other)
    assert folder.step == 2
    assert_same(folder.load(other), other)


def test_a_checkpoint_that_is_replaced_while_it_is_read(folder, monkeypatch):
    other, stored = ARRAYS | {"count": jnp.int32(7)}, checkpoints._stored

    def replaced_meanwhile(path, expected):
        if path.parent.name == "3":
            folder.save(4, other)
        return stored(path, expected)

    monkeypatch.setattr(checkpoints, "_stored", replaced_meanwhile)
    assert_same(folder.load(other), other)


def test_only_the_newest_checkpoint_is_kept(folder, place):
    newer = ARRAYS | {"count": jnp.int32(0)}
    folder.save(20, newer)
    assert folder.step == 20
    assert [path.name for path in place.iterdir()] == ["20"]
    assert_same(folder.load(ARRAYS), newer)


def test_a_step_that_is_saved_already_is_left_as_it_is(folder, place):
    before = files_of(place)
    folder.save(3, ARRAYS)
    assert files_of(place) == before


def test_a_save_that_fails_keeps_the_checkpoint_before(folder, place):
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        folder.save(4, ARRAYS | {"count": gone})
    assert folder.step == 3
    assert_same(folder.load(ARRAYS), ARRAYS)
    folder.save(4, ARRAYS)
    assert [path.name for path in place.iterdir()] == ["4"]


def test_the_remains_of_an_interrupted_save_are_no_checkpoint(folder, place):
    shutil.copytree(place / "3", place / "9.orbax-checkpoint-tmp")
    assert folder.step == 3
    folder.save(5, ARRAYS)
    assert [path.name for path in place.iterdir()] == ["5"]


def test_no_checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path / "none")
    assert folder.step is None
    assert refusal(CheckpointError, folder.load, ARRAYS).startswith(f"{tmp_path / 'none'}: got no")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("like", "reason"),
    [
        ({"count": jnp.zeros(2, jnp.int32)}, "array count is int32 (), expected int32 (2,)"),
        ({"a.b": jnp.zeros((70, 90))}, "array a.b is float64 (90, 70), expected float64 (70, 90)"),
        ({"key": jnp.zeros(2, jnp.int32)}, "array key is uint32 (2,), expected int32 (2,)"),
        ({"more": jnp.zeros(2)}, "it differs in the arrays more"),
        ({"key": None}, "it differs in the arrays key"),
    ],
)
def test_a_checkpoint_of_another_model(folder, like, reason, place):
    expected = {name: leaf for name, leaf in (ARRAYS | like).items() if leaf is not None}
    message = refusal(CheckpointError, folder.load, expected)
    assert message.startswith(f"{place / '3'}: ")
    assert reason in message


@pytest.mark.parametrize("damage", ["emptied", "halved", "removed", "flipped"])
def test_a_damaged_checkpoint_is_refused(folder, damage, caplog, place):
    for name, whole in files_of(place / "3").items():
        path = place / "3" / name
        middle = len(whole) // 2
        if damage == "removed":
            path.unlink()
        else:
            flipped = whole[:middle] + bytes([whole[middle] ^ 0x55]) + whole[middle + 1 :]
            changed = {"emptied": b"", "halved": whole[:middle], "flipped": flipped}
            path.write_bytes(changed[damage])
        message = refusal(CheckpointError, folder.load, ARRAYS)
        assert message.startswith(f"{place / '3'}: the checkpoint is damaged")
        assert message.endswith("or start again with --overwrite")
        path.write_bytes(whole)
    assert_same(folder.load(ARRAYS), ARRAYS)
    assert [record.getMessage() for record in caplog.records] == []  # the error is one line


def test_a_checkpoint_with_a_file_more_is_refused(folder, place):
    (place / "3" / "arrays" / "more").write_bytes(b"")
    assert "checksums: arrays/more" in refusal(CheckpointError, folder.load, ARRAYS)


def test_a_checkpoint_of_links_is_refused(folder, place, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    file = next(path for path in (place / "3" / "arrays").rglob("*") if path.is_file())
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert f"{file.name} is a link" in refusal(CheckpointError, folder.load, ARRAYS)


def test_checksums_are_those_of_sha256sum(folder, place):
    checks = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(checks, cwd=place / "3", capture_output=True).returncode == 0


def test_parameters_of_a_single_precision_run_open_in_double(tmp_path):
    """A MAP fitted as usual, opened by a script that enabled float64 to sample."""
    run = make_run(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    single = {name: leaf.astype(jnp.float32) for name, leaf in draw(run.parameter_shapes()).items()}
    run.best.save(8, single)
    opened = load_run(tmp_path).parameters
    for name, leaf in single.items():
        np.testing.assert_array_equal(opened[name], leaf)


def test_parameters_of_a_double_precision_run_open_in_single(made):
    code = f"""
        import numpy as np
        from probattn.inference import load_run
        run = load_run({str(made.path)!r})
        values = run.parameters.values()
        print({{str(value.dtype) for value in values}}, sum(np.abs(v).sum() for v in values))
    """
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_ENABLE_X64": "0"},
    )
    assert child.returncode == 0, child.stderr
    dtypes, total = child.stdout.rsplit(maxsplit=1)
    assert dtypes == "{'float32'}"
    expected = sum(np.abs(value).sum() for value in made.parameters.values())
    assert float(total) == pytest.approx(expected, rel=1e-5)


def test_leaves_by_name_and_back():
    tree = {"svi": (jnp.zeros(2), {"w": jnp.ones(3)}), "n": None, "count": jnp.int32(4)}
    leaves = named_leaves(tree)
    assert leaves.keys() == {"svi.0", "svi.1.w", "count"}
    changed = with_leaves(tree, leaves | {"svi.1.w": jnp.arange(3.0)})
    assert jax.tree.structure(changed) == jax.tree.structure(tree)
    np.testing.assert_array_equal(changed["svi"][1]["w"], [0, 1, 2])
    np.testing.assert_array_equal(changed["svi"][0], [0, 0])
