"""Tasks in this process and in others: all are done, and one that fails says why."""

import os
import signal

import pytest

from probattn.inference.runtime.task_processes import exit_status, run_apart, run_here


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


def fail_at_length(length):
    raise ValueError("x" * length)


@pytest.mark.slow
def test_a_message_longer_than_a_pipe_holds_up_nobody():
    [(_, _, failed)] = run_apart([1_000_000], fail_at_length, jobs=1, command="test")
    assert set(failed) == {"x"}
    assert len(failed) >= 1000


def test_a_script_tells_in_a_line_why_it_ended(capsys):
    def refuse():
        raise ValueError("--tokens: got 0, expected an integer >= 1")

    assert exit_status("study.py", lambda: None) == 0
    assert exit_status("study.py", lambda: 1) == 1
    assert exit_status("study.py", refuse) == 2
    assert capsys.readouterr().err == "study.py: --tokens: got 0, expected an integer >= 1\n"
    assert exit_status("study.py", lambda: signal.raise_signal(signal.SIGTERM)) == 128 + 15
    assert "ended by SIGTERM; the same command goes on from here" in capsys.readouterr().err
