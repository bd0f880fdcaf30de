"""Tasks in this process and in others: all are done, and one that fails says why."""

import os

import pytest

from probattn.inference.runtime.task_processes import run_apart, run_here


def all_but_the_old_are_done(made, folders):
    why = {path.name: failed for path, seconds, failed in made if seconds >= 0}
    return (
        "File exists" in why.pop("old")
        and why == {"new": "", "newer": ""}
        and all(folder.is_dir() for folder in folders)
    )


@pytest.fixture(name="folders")
def folders_fixture(tmp_path):
    (tmp_path / "old").mkdir()
    return [tmp_path / name for name in ("old", "new", "newer")]


def test_tasks_are_done_here(folders):
    assert all_but_the_old_are_done(run_here(folders, os.mkdir), folders)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_tasks_are_done_in_processes_of_their_own(folders, jobs):
    made = run_apart(folders, os.mkdir, jobs=jobs, command="test")
    assert all_but_the_old_are_done(made, folders)


@pytest.mark.slow
def test_a_process_that_dies_is_told(tmp_path):
    [(_, _, failed)] = run_apart([3], os._exit, jobs=1, command="test")
    assert failed == "its process ended with exit status 3"
