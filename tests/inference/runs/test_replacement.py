"""A run that replaces another: which of them is there afterwards, whatever ends it."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from probattn.inference import FitConfig, load_run
from probattn.inference.runs import opening
from probattn.inference.runs.checkpoints import CheckpointError
from probattn.inference.runs.files import RunError, WriteError
from probattn.inference.runs.folder import is_replacing, locked
from probattn.inference.runs.opening import find_run, new_run, open_run
from probattn.inference.runs.run import Run
from tests.support.made_runs import (
    CONFIG,
    CORPUS,
    VOCABULARY,
    create_run,
)
from tests.support.refusals import refusal
from tests.support.tiny_run import files_of, held_by_another_process

ENDING = ValueError("no more")
OTHER = dataclasses.replace(CONFIG, fit=FitConfig(seed=1))


class Killed(BaseException):
    """The process is gone: it does nothing any more."""


def replace_run(path, *, saved=None, resume=False, ending=ENDING):
    """Run a command that replaces a run, or goes on with the replacing, up to an error."""
    other = new_run(Run, path, OTHER, CORPUS, VOCABULARY)
    with open_run(other, resume=resume, overwrite=not resume) as run:
        assert run.config == OTHER
        if saved:
            (path / saved).parent.mkdir(parents=True, exist_ok=True)
            (path / saved).write_text("new")
        if ending is not None:
            raise ending


def killed_early(run):
    """A run that replaces another, as a kill leaves it before the first checkpoint."""
    with open_run(new_run(Run, run.path, OTHER, CORPUS, VOCABULARY), overwrite=True):
        return Path(shutil.copytree(run.path, run.path.with_name("killed")))


@pytest.mark.parametrize("saved", [None, "checkpoints/latest/3", "segments/0-10.npz"])
def test_the_old_run_stays_until_the_new_one_has_something_to_go_on_from(run, saved):
    before = files_of(run.path)
    assert refusal(ValueError, replace_run, run.path, saved=saved) == "no more"
    if saved:
        assert load_run(run.path).config == OTHER
        assert files_of(run.path).keys() == {"config.toml", "data.json", saved}
    else:
        assert files_of(run.path) == before
    assert not (run.path / "replaced").exists()


def test_a_run_that_cannot_be_described_leaves_the_old_one(run):
    """The name of its corpus is no UTF-8."""
    before = files_of(run.path)
    corpus = dataclasses.replace(CORPUS, name="\udcff.txt")
    with pytest.raises(UnicodeEncodeError):
        create_run(run.path, CONFIG, corpus, VOCABULARY, overwrite=True)
    assert files_of(run.path) == before


@pytest.mark.parametrize(
    ("saved", "ending"),
    [
        (None, KeyboardInterrupt()),
        ("segments/0-10.npz", KeyboardInterrupt()),
        ("segments/0-10.npz", None),
    ],
)
def test_a_kill_at_any_moment_loses_neither_run(run, tmp_path, monkeypatch, saved, ending):
    """The moments are those before and after each change to the folder."""
    old = files_of(run.path)
    where = set()
    for moment in range(100):
        path = Path(shutil.copytree(run.path, tmp_path / f"copy{moment}"))
        changes = 0

        def counted(change, last=moment):
            def call(*arguments, **options):
                nonlocal changes
                if changes == last:
                    raise Killed
                changes += 1
                return change(*arguments, **options)

            return call

        killed = False
        with monkeypatch.context() as patch:
            for owner, name in (
                (Path, "mkdir"),
                (Path, "rename"),
                (Path, "unlink"),
                (Path, "rmdir"),
                (shutil, "rmtree"),
                (os, "replace"),
            ):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                replace_run(path, saved=saved, ending=ending)
            except Killed:
                killed = True
            except KeyboardInterrupt:
                pass
        with locked(path):
            found = files_of(path)
        if found == old:
            where.add("in its place")
            continued = {"resume": False}
        else:
            assert load_run(path).config == OTHER
            begun = saved in found
            aside = files_of(path / "replaced") if (path / "replaced").exists() else {}
            assert begun or not killed or aside == old
            where.add("aside" if aside == old else "dropped")
            continued = {"resume": True}
        replace_run(path, saved="segments/0-20.npz", ending=None, **continued)  # copes with it
        assert load_run(path).config == OTHER
        assert not (path / "replaced").exists()
        if not killed:
            break
    assert not killed
    assert where >= {"in its place", "aside"}
    assert ("dropped" in where) == (saved is not None)


def test_after_a_kill_it_is_the_new_run_that_is_resumed(run):
    before = files_of(run.path)
    path = killed_early(run)
    with load_run(path).lock():  # a command of another kind
        assert load_run(path).config == OTHER
    assert files_of(load_run(path / "replaced").path) == before
    replace_run(path, resume=True, saved="checkpoints/latest/3", ending=None)
    assert files_of(path).keys() == {"config.toml", "data.json", "checkpoints/latest/3"}


def test_a_new_run_without_parameters_names_the_one_that_it_replaces(run):
    path = killed_early(run)
    message = refusal(CheckpointError, lambda: load_run(path).parameters)
    assert message.endswith(f"; the run that it replaces lies in {path / 'replaced'}")


def put_aside(run, names):
    """A run as a kill leaves it that comes while, or just after, it is put aside."""
    (run.path / "replaced").mkdir()
    for name in names:
        (run.path / name).rename(run.path / "replaced" / name)


@pytest.mark.parametrize("all_of_it", [False, True])
def test_a_run_that_a_kill_left_aside_is_opened_and_resumed(run, all_of_it, monkeypatch):
    before = files_of(run.path)
    moved = {path.name for path in run.path.iterdir()} - {"lock"}
    put_aside(run, moved if all_of_it else moved - {"config.toml", "data.json"})
    opened = load_run(run.path)  # as `generate` and others open it
    assert opened == run
    assert opened.parameters.keys() == run.parameter_shapes().keys()
    assert files_of(run.path) == before
    put_aside(run, moved)
    monkeypatch.setattr(opening, "load_corpus", lambda config: CORPUS)
    found, _ = find_run(Run, run.path, CONFIG, resume=True, overwrite=False)
    assert found == run
    assert files_of(run.path) == before


def test_a_run_that_is_just_being_replaced_is_not_brought_back(run):
    put_aside(run, {path.name for path in run.path.iterdir()} - {"lock"})
    with held_by_another_process(run):
        message = refusal(RunError, load_run, run.path)
    assert message == f"{run.path}: another process is writing to this run"


def test_after_a_kill_the_old_run_comes_back_if_the_new_one_fails_again(run):
    before = files_of(run.path)
    path = killed_early(run)
    assert is_replacing(path)
    assert refusal(ValueError, replace_run, path, resume=True) == "no more"
    assert files_of(path) == before


def test_after_a_kill_a_second_replacement_keeps_the_run_that_has_results(run):
    before = files_of(run.path)
    path = killed_early(run)
    assert refusal(ValueError, replace_run, path) == "no more"
    assert files_of(path) == before


def test_after_a_later_kill_a_second_replacement_keeps_the_newer_run(run):
    path = killed_early(run)
    checkpoint = path / "checkpoints" / "latest" / "3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "array").write_text("new")
    expected = {k: v for k, v in files_of(path).items() if not k.startswith("replaced/")}
    assert refusal(ValueError, replace_run, path) == "no more"
    assert files_of(path) == expected


@pytest.mark.parametrize("aside", ["put-aside", "replaced"])
def test_what_a_kill_of_an_older_version_left_is_brought_back(run, aside):
    """It moved the configuration first, into one folder, and renamed that when all was there."""
    before = files_of(run.path)
    moved = [path for path in run.path.iterdir() if path.name != "lock"]
    if aside == "put-aside":
        moved = [path for path in moved if path.name in ("config.toml", "data.json")]
    (run.path / aside).mkdir()
    for path in moved:
        path.rename(run.path / aside / path.name)
    if aside == "replaced":
        (run.path / "data.json").write_text("of the run that was to come")
    with locked(run.path):
        assert files_of(run.path) == before


def test_what_is_no_run_is_not_kept(tmp_path):
    (tmp_path / "data.json").write_text("of a start that was killed")
    assert refusal(ValueError, replace_run, tmp_path) == "no more"
    assert load_run(tmp_path).config == OTHER


def test_an_entry_that_cannot_be_moved_leaves_the_run_as_it_was(run, monkeypatch):
    before = files_of(run.path)
    rename = Path.rename

    def refused(self, target):
        if self.name == "checkpoints":
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(WriteError, match="Permission denied"):
        create_run(run.path, OTHER, CORPUS, VOCABULARY, overwrite=True)
    assert files_of(run.path) == before


def test_results_are_not_written_into_another_run(run):
    create_run(run.path, OTHER, CORPUS, VOCABULARY, overwrite=True)
    with pytest.raises(RunError, match="holds another run than when it was opened"), run.lock():
        pass
