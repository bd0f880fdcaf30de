"""A run that replaces another: which of them is there afterwards, whatever ends it."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from tests.support.made_runs import (
    CONFIG,
    CORPUS,
    VOCABULARY,
)
from tests.support.refusals import refusal
from tests.support.tiny_run import files_of

from probattn.inference import FitConfig, load_run
from probattn.inference.config import DataConfig
from probattn.inference.runs.files import RunError, WriteError
from probattn.inference.runs.folder import is_replacing, locked, room_for_run
from probattn.inference.runs.run import create_run

OTHER = dataclasses.replace(CONFIG, fit=FitConfig(seed=1))


class Killed(BaseException):
    """The process is gone: it does nothing any more."""


@pytest.mark.parametrize("saved", [None, "checkpoints/latest/3", "segments/0-10.npz"])
def test_the_old_run_stays_until_the_new_one_has_something_to_go_on_from(run, saved):
    before = files_of(run.path)

    def fail():
        with locked(run.path), room_for_run(run.path, overwrite=True):
            create_run(run.path, OTHER, CORPUS, VOCABULARY)
            assert load_run(run.path).config == OTHER
            assert is_replacing(run.path)
            if saved:
                (run.path / saved).mkdir(parents=True)
                assert not is_replacing(run.path)
            raise ValueError("no more")

    assert refusal(ValueError, fail) == "no more"
    if saved:
        assert load_run(run.path).config == OTHER
        assert {path.name for path in run.path.iterdir()} == {
            "config.toml",
            "data.json",
            saved.split("/")[0],
            "lock",
        }
    else:
        assert files_of(run.path) == before


def test_a_run_that_cannot_be_described_leaves_the_old_one(run):
    """The name of its text is no UTF-8."""
    before = files_of(run.path)
    config = dataclasses.replace(CONFIG, data=DataConfig(source="\udcff.txt"))
    with pytest.raises(UnicodeEncodeError):
        create_run(run.path, config, CORPUS, VOCABULARY, overwrite=True)
    assert files_of(run.path) == before


@pytest.mark.parametrize("begun", [False, True])
def test_a_kill_at_any_moment_leaves_one_run_whole(run, tmp_path, monkeypatch, begun):
    """The moments are those before and after each change to the folder."""
    old = files_of(run.path)
    new = [{"config.toml": b"new"}, {"config.toml": b"new", "segments/0-10.npz": b"new"}]
    outcomes = set()
    for moment in range(100):
        path = shutil.copytree(run.path, tmp_path / f"copy{moment}")
        changes = 0

        def counted(change, last=moment):
            def call(*arguments, **options):
                nonlocal changes
                if changes == last:
                    raise Killed
                changes += 1
                return change(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for owner, name in (
                (Path, "mkdir"),
                (Path, "rename"),
                (Path, "unlink"),
                (shutil, "rmtree"),
            ):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                with locked(path), room_for_run(path, overwrite=True):
                    (path / "config.toml").write_text("new")
                    if begun:
                        (path / "segments").mkdir()
                        (path / "segments" / "0-10.npz").write_text("new")
                    raise KeyboardInterrupt
            except (Killed, KeyboardInterrupt) as ended:
                finished = isinstance(ended, KeyboardInterrupt)
        with locked(path):
            found = files_of(path)
        outcomes.add("old" if found == old else "new")
        assert found in (old, *new)
        if finished:
            break
    assert finished
    assert found == (new[-1] if begun else old)
    assert outcomes == {"old", "new"}


def test_after_a_kill_it_is_the_new_run_that_is_resumed(run):
    with locked(run.path), room_for_run(run.path, overwrite=True):
        create_run(run.path, OTHER, CORPUS, VOCABULARY)
        shutil.copytree(run.path, run.path.with_name("killed"))
    killed = load_run(run.path.with_name("killed"))
    assert killed.config == OTHER
    with killed.lock():
        assert load_run(killed.path).config == OTHER
    assert files_of(killed.path).keys() == {"config.toml", "data.json"}


def test_what_is_no_run_is_not_kept(tmp_path):
    (tmp_path / "data.json").write_text("of a start that was killed")

    def fail():
        with locked(tmp_path), room_for_run(tmp_path, overwrite=False):
            create_run(tmp_path, OTHER, CORPUS, VOCABULARY)
            raise ValueError("no more")

    assert refusal(ValueError, fail) == "no more"
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
