"""What a fit refuses, in one line, leaving everything as it was.

All but the last few before anything is compiled.
"""

import dataclasses
import shutil

import pytest

from probattn.inference import fit, load_run
from probattn.inference.runs.checkpoints import CheckpointError
from probattn.inference.runs.files import RunError
from probattn.models import LanguageModelConfig, ObjectiveConfig
from tests.support.refusals import refusal
from tests.support.tiny_run import (
    BLOCK,
    HEADS,
    WIDTH,
    files_of,
    held_by_another_process,
    tiny_config,
    tiny_text,
)
from tests.support.whole_fit import (
    with_data,
    with_fit,
)


@pytest.fixture
def unused(tmp_path):
    """Where no run is, and none may be after a refusal."""
    yield tmp_path / "deep" / "run"
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"", "got an empty file"),
        (b"caf\xe9 " * 100, "not UTF-8: byte 0xe9 at offset 3"),
    ],
)
def test_a_text_that_cannot_be_read(config, tmp_path, unused, content, reason):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    for field in ("source", "validation"):
        message = refusal(ValueError, fit, with_data(config, **{field: str(path)}), unused)
        assert message.startswith(f"data.{field}: ")
        assert reason in message
        assert str(path) in message


@pytest.mark.parametrize(("part", "field"), [("training", "source"), ("validation", "validation")])
def test_a_text_that_is_no_longer_than_a_block(config, tmp_path, unused, part, field):
    for name, length in (("long", 500), ("short", BLOCK)):
        (tmp_path / name).write_text("ab" * (length // 2))
    texts = {"source": str(tmp_path / "long"), "validation": str(tmp_path / "long")}
    short = with_data(config, **(texts | {field: str(tmp_path / "short")}))
    message = refusal(ValueError, fit, short, unused)
    assert f"the {part} text has 8 tokens: expected more than one block of 8; give a" in message
    assert "model.block" in message


def test_a_text_of_fewer_blocks_than_a_minibatch(config, tmp_path, unused):
    (tmp_path / "short").write_text("ab" * (3 * BLOCK // 2) + "a")
    short = str(tmp_path / "short")
    message = refusal(ValueError, fit, with_data(config, source=short, validation=short), unused)
    assert "training text has 25 tokens" in message
    assert "fit.batch" in message


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_a_place_that_is_not_for_a_run(config, tmp_path, options):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file", tmp_path / "folder" / "thesis.tex"):
        path.write_text("mine")
    expected = {
        "file": "expected a directory for the run, got a file",
        "folder": "holds thesis.tex, which is no part of a run; expected a new or empty directory",
    }
    before = files_of(tmp_path)
    for name, reason in expected.items():
        message = refusal(RunError, fit, config, tmp_path / name, **options)
        if "resume" in options:
            reason = "holds no run to resume; start one without --resume"
        assert message == f"{tmp_path / name}: {reason}"
    assert files_of(tmp_path) == before


def test_nothing_to_resume(config, unused):
    message = refusal(RunError, fit, config, unused, resume=True)
    assert message == f"{unused}: holds no run to resume; start one without --resume"


def test_resume_and_overwrite_together(whole, config):
    before = files_of(whole.run.path)
    message = refusal(ValueError, fit, config, whole.run.path, resume=True, overwrite=True)
    assert message == "resume and overwrite exclude each other: expected at most one of them"
    assert files_of(whole.run.path) == before


@pytest.fixture
def kept(whole, tmp_path):
    """A copy of a run that every refusal leaves as it was when the test last looked."""
    return load_run(shutil.copytree(whole.run.path, tmp_path / "kept"))


def assert_refused(kind, config, run, **options):
    before = files_of(run.path)
    message = refusal(kind, fit, config, run.path, **options)
    assert files_of(run.path) == before
    return message


def test_a_place_that_holds_a_run(config, kept):
    message = assert_refused(RunError, config, kept)
    assert message.startswith(f"{kept.path}: holds another run; ")
    assert "--resume" in message
    assert "--overwrite" in message


def test_a_run_is_not_replaced_by_one_that_cannot_be(config, kept, tmp_path):
    (tmp_path / "short").write_text("ab")
    short = with_data(config, source=str(tmp_path / "short"))
    assert_refused(ValueError, short, kept, overwrite=True)
    assert_refused(ValueError, with_data(config, source="/no/file"), kept, overwrite=True)


def test_resuming_with_another_configuration_names_the_fields(config, kept):
    other = dataclasses.replace(
        with_fit(config, learning_rate=0.1, steps=300),
        model=LanguageModelConfig(layers=2, heads=HEADS, width=WIDTH, block=BLOCK, prior_rank=2),
        objective=ObjectiveConfig("ce"),
    )
    message = assert_refused(RunError, other, kept, resume=True)
    assert message.startswith(f"{kept.path}: cannot resume with a changed configuration: ")
    for change in (
        "model.layers: 1 -> 2",
        "objective.name: margin -> ce",
        "fit.steps: 200 -> 300",
        "fit.learning_rate: 0.03 -> 0.1",
    ):
        assert change in message
    for same in ("model.width", "data.", "fit.seed"):
        assert same not in message


def test_resuming_after_the_text_has_changed(kept, tmp_path):
    config = tiny_config(tmp_path)
    kept = dataclasses.replace(kept, config=with_fit(config, eval_every=80, checkpoint_every=60))
    text = (kept.path / "config.toml").read_text("utf-8")
    moved = text.replace(load_run(kept.path).config.data.source, config.data.source)
    (kept.path / "config.toml").write_text(moved, "utf-8")
    (tmp_path / "corpus.txt").write_text(tiny_text(seed=1), "utf-8")
    message = assert_refused(RunError, kept.config, kept, resume=True)
    assert "with checksum " + kept.data["sha256"][:12] in message
    assert "restore the text, or start a new run" in message


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}])
def test_a_run_that_another_process_fits(config, kept, options):
    with held_by_another_process(kept):
        message = assert_refused(RunError, config, kept, **options)
        assert message == f"{kept.path}: another process is writing to this run"


@pytest.mark.parametrize("name", ["config.toml", "data.json"])
def test_resuming_a_run_whose_description_is_damaged(config, kept, name):
    whole = (kept.path / name).read_bytes()
    for end in (0, len(whole) // 2, len(whole) - 5):
        (kept.path / name).write_bytes(whole[:end])
        message = assert_refused(RunError, config, kept, resume=True)
        cut_at_a_line = "cannot resume with a changed configuration"  # the rest has its defaults
        assert f"{kept.path / name}: " in message or cut_at_a_line in message


@pytest.mark.parametrize("size", [2.5, 1.0, 0.0, None])
def test_resuming_a_run_whose_metrics_are_damaged(config, kept, size):
    """Cut off within the last line, cut off after the first, empty, or gone."""
    path = kept.path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.unlink()
    if size is not None:
        end = sum(map(len, lines[: int(size)])) + int(size % 1 * len(lines[0]))
        path.write_bytes(b"".join(lines)[:end])
    message = assert_refused(RunError, config, kept, resume=True)
    assert message.startswith(f"{path}")
    assert "--overwrite" in message


def test_resuming_from_a_damaged_checkpoint(config, kept):
    folder = kept.path / "checkpoints" / "latest" / "200"
    largest = max(folder.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    largest.write_bytes(largest.read_bytes()[:-1000])
    message = assert_refused(CheckpointError, config, kept, resume=True)
    assert message.startswith(f"{folder}: the checkpoint is damaged")
