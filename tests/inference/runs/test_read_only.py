"""Runs that may only be read: a colleague's, or on a disk that is mounted so."""

import errno
import json
import os
import subprocess
import sys

import pytest

from probattn.inference import post_hoc_prior
from probattn.inference.evaluation import post_hoc
from probattn.inference.runs.files import RunError, WriteError
from tests.support.mounts import ALONE, may_mount
from tests.support.refusals import refusal
from tests.support.tiny_run import files_of, held_by_another_process

STORY = """
import contextlib, io, json, subprocess, sys
from probattn.inference.cli import main

run, folder = sys.argv[1:]
subprocess.run(["mount", "--bind", run, run], check=True)
subprocess.run(["mount", "-o", "remount,ro,bind", run], check=True)
told = []
for arguments in (
    ["evaluate", run, "--noise-absolute", "0.5", "--noise-relative", "0.5"],
    ["generate", run, "--prompt", "the", "--length", "2", "--out", folder + "/generated.csv"],
    ["margins", run, "--out", folder + "/margins"],
):
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = main(arguments)
    told.append([status, out.getvalue(), error.getvalue()])
print(json.dumps(told))
"""


def told_when_opened(monkeypatch, number):
    """What the system says when the lock file is opened."""

    def refused(path, flags, *mode):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("probattn.inference.runs.locks.os.open", refused)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_run_whose_lock_cannot_be_opened_is_read_only(run, monkeypatch, number):
    assert run.is_writable()
    told_when_opened(monkeypatch, number)
    assert not run.is_writable()


def test_a_folder_that_may_not_be_written_to_is_read_only(run, monkeypatch):
    """Its lock file may be one that could be."""
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (run.path, os.W_OK))
    assert not run.is_writable()


def test_a_full_disk_or_another_writer_is_no_reason_to_go_on(run, monkeypatch):
    with held_by_another_process(run):
        assert "another process is writing" in refusal(RunError, run.is_writable)
    told_when_opened(monkeypatch, errno.ENOSPC)
    assert "No space left on device" in refusal(WriteError, run.is_writable)


def test_the_prior_of_a_read_only_run_is_fitted_and_not_stored(own_run, monkeypatch):
    stored = post_hoc_prior(own_run)
    (own_run.path / "post_hoc_prior.npz").unlink()
    before = files_of(own_run.path)
    monkeypatch.setattr(post_hoc, "fit_attention_prior", lambda x, **options: stored)
    told_when_opened(monkeypatch, errno.EROFS)
    assert post_hoc_prior(own_run) is stored
    assert files_of(own_run.path) == before


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="needs mounts in a namespace of its own")
def test_commands_work_on_a_read_only_run(own_run, tmp_path):
    """Without a post-hoc prior, which each of them then fits for itself."""
    for name in ("post_hoc_prior.npz", "lock"):
        (own_run.path / name).unlink()
    before = files_of(own_run.path)
    child = subprocess.run(
        [*ALONE, sys.executable, "-c", STORY, str(own_run.path), str(tmp_path)],
        env={**os.environ, "JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    told = json.loads(child.stdout)
    assert [status for status, _, _ in told] == [0, 0, 0], told
    (_, shown, error), *_ = told
    assert "bits per character" in shown
    assert f"{own_run.path}: is read-only, so nothing is stored in it" in error.splitlines()
    assert (tmp_path / "generated.csv").exists()
    assert (tmp_path / "margins" / "margins.csv").exists()
    assert files_of(own_run.path) == before
