"""One writer at a time: on file systems with locks, and on those that have none."""

import errno
import fcntl
import os
import shutil
import socket
import subprocess
import sys

import pytest

from probattn.inference import load_run
from probattn.inference.runs.files import RunError
from tests.support.made_runs import CONFIG, CORPUS, VOCABULARY, create_run
from tests.support.tiny_run import files_of


@pytest.fixture(
    params=["ENOSYS", *(pytest.param(e, marks=pytest.mark.slow) for e in ("EOPNOTSUPP", "ENOLCK"))]
)
def without_locks(request, monkeypatch):
    """A file system that knows no locks, as the system tells of it."""

    def refused(descriptor, operation):
        number = getattr(errno, request.param)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)


def owner_of(run):
    return run.path / "lock.owner"


def refused_lock(run):
    with pytest.raises(RunError) as raises, run.lock():
        pass
    return str(raises.value)


def process_that_is_gone():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_copied_run_is_free_where_there_are_no_locks(run, without_locks):
    """Its lock file is there already, and stays as it is."""
    (run.path / "lock").write_text("")
    before = files_of(run.path)
    with run.lock():
        run.update_summary(evaluate={"bpc": 2.0})
        with run.lock():  # a thread may hold it twice
            pass
        assert owner_of(run).exists()
    assert files_of(run.path).keys() == before.keys()
    assert load_run(run.path).summary()["evaluate"] == {"bpc": 2.0}


def test_a_run_can_be_made_where_there_are_no_locks(tmp_path, without_locks):
    run = create_run(tmp_path / "run", CONFIG, CORPUS, VOCABULARY)
    create_run(tmp_path / "run", CONFIG, CORPUS, VOCABULARY, overwrite=True)
    assert load_run(run.path).config == CONFIG


def test_a_living_owner_is_named_where_there_are_no_locks(run, without_locks):
    code = (
        "import errno, fcntl, sys\n"
        "from pathlib import Path\n"
        "from probattn.inference.runs.locks import hold\n"
        "def refused(*arguments):\n"
        "    raise OSError(errno.ENOSYS, 'Function not implemented')\n"
        "fcntl.flock = refused\n"
        "with hold(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    input()\n"
    )
    command = [sys.executable, "-c", code, str(run.path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert refused_lock(run) == (
            f"{run.path}: another process is writing to this run: process {other.pid} on "
            f"{socket.gethostname()}; if it is gone, remove {owner_of(run)}"
        )
        other.communicate(b"\n")
    with run.lock():
        pass


def test_an_owner_that_was_killed_does_not_block(run, without_locks):
    with owner_of(run).open("w") as stream:
        inode = os.fstat(stream.fileno()).st_ino
        stream.write(f"{process_that_is_gone()} {inode} {socket.gethostname()}")
    with run.lock():
        pass
    assert not owner_of(run).exists()


def test_an_owner_on_another_host_may_live(run, without_locks):
    with owner_of(run).open("w") as stream:
        inode = os.fstat(stream.fileno()).st_ino
        stream.write(f"{process_that_is_gone()} {inode} elsewhere")
    assert f"on elsewhere; if it is gone, remove {owner_of(run)}" in refused_lock(run)
    shutil.copytree(run.path, run.path.with_name("copy"))
    with load_run(run.path.with_name("copy")).lock():  # which nobody writes to
        pass


def test_a_lock_that_is_removed_with_its_run_is_not_held(run, monkeypatch):
    """Else two processes could hold the locks of two files of the same name."""
    flock, lock = fcntl.flock, run.path / "lock"
    lock.write_text("")

    def removed_first(descriptor, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        lock.unlink()
        lock.write_text("")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with run.lock(wait=10):
        descriptor = os.open(lock, os.O_RDWR)
        with pytest.raises(BlockingIOError):
            flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
