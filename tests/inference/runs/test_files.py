"""Outputs: a file is replaced whole, a link followed, a device or a pipe written through."""

import os
import socket
import threading
import tty
from pathlib import Path

import numpy as np
import pytest

from probattn.inference.runs.csv_tables import write_table
from probattn.inference.runs.files import (
    RunError,
    WriteError,
    check_outputs,
    check_setting,
    replacing,
    write_text,
)
from probattn.inference.runs.npz import read_part
from tests.support.refusals import refusal
from tests.support.tiny_run import files_of


@pytest.fixture(name="here", autouse=True)
def here_fixture(tmp_path, monkeypatch):
    """A folder to stand in: the name of a socket must be short."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(name="terminal")
def terminal_fixture():
    """A terminal as its two ends: what it shows can be read, and the path that is written to."""
    shown, written = os.openpty()
    tty.setraw(written)
    yield shown, Path(os.ttyname(written))
    os.close(shown)
    os.close(written)


@pytest.mark.parametrize("name", ["a.csv", "new/deep/a.csv"])
def test_a_file_is_replaced(here, name):
    for text in ("first", "second"):
        check_outputs(Path(name))
        write_text(Path(name), text)
        assert files_of(here) == {name: text.encode()}


@pytest.mark.parametrize("target", ["there/a.csv", "there/new.csv", "nowhere/new.csv"])
def test_a_link_is_followed(target):
    Path("there").mkdir()
    Path("there/a.csv").write_text("before")
    Path("first").symlink_to("second")
    Path("second").symlink_to(target)
    check_outputs(Path("first"))
    write_text(Path("first"), "new")
    assert Path("first").readlink() == Path("second")
    assert Path("second").readlink() == Path(target)
    assert Path(target).read_text() == "new"
    assert len(list(Path(target).parent.iterdir())) == (1 if target != "there/new.csv" else 2)


@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_is_written_through(linked):
    os.mkfifo("pipe")
    Path("link").symlink_to("pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append(Path("pipe").read_text()), daemon=True)
    reader.start()
    out = Path("link" if linked else "pipe")
    check_outputs(out)
    write_table(out, ["token", "margin"], [("a", 0.5)])
    reader.join(timeout=10)
    assert read == ["token,margin\na,0.5\n"]
    assert Path("pipe").is_fifo()
    assert Path("link").is_symlink()
    assert {path.name for path in Path().iterdir()} == {"pipe", "link"}


@pytest.mark.parametrize("linked", [False, True])
def test_a_device_is_written_through(terminal, linked):
    shown, path = terminal
    Path("link").symlink_to(path)
    out = Path("link") if linked else path
    check_outputs(out)
    write_text(out, "the table")
    assert os.read(shown, 100) == b"the table"
    assert path.is_char_device()
    assert Path("link").readlink() == path


def test_a_closed_pipe_is_one_line():
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)

    def write():
        with replacing(Path("pipe")) as stream:
            os.close(reader)
            stream.write(b"a")

    assert refusal(WriteError, write).startswith("pipe: cannot be written: Broken pipe")


def test_anything_else_is_refused_as_it_is():
    Path("folder").mkdir()
    Path("to_folder").symlink_to("folder")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name, what in (
            ("folder", "a folder"),
            ("to_folder", "a folder"),
            ("socket", "a disk or a socket"),
        ):
            for function in (check_outputs, lambda path: write_text(path, "new")):
                message = refusal(ValueError, function, Path(name))
                assert message == f"{name}: is {what}: expected a file, a pipe or a new name"
        assert Path("socket").is_socket()
    assert list(Path("folder").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("loop", "Too many levels of symbolic links"),
        ("file/a.csv", "Not a directory"),
        ("file/new/a.csv", "Not a directory"),
        ("to_file/a.csv", "Not a directory"),
        ("a" * 300, "File name too long"),
        ("a" * 250, "File name too long"),  # with what makes it a temporary name
    ],
)
def test_what_cannot_be_written_is_found_out_beforehand(here, name, reason):
    Path("loop").symlink_to("loop")
    Path("file").write_text("mine")
    Path("to_file").symlink_to("file")
    for function in (check_outputs, lambda path: write_text(path, "new")):
        message = refusal(WriteError, function, Path(name))
        assert message.startswith(f"{name}: cannot be written: {reason}")
    assert files_of(here) == {"file": b"mine", "to_file": b"mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to_is_found_out_beforehand(here):
    Path("folder").mkdir(mode=0o500)
    for name in ("folder/a.csv", "folder/new/a.csv"):
        message = refusal(WriteError, check_outputs, Path(name))
        assert message.startswith(f"{name}: cannot be written: Permission denied")


def test_a_check_leaves_nothing(here):
    Path("a.csv").write_text("before")
    check_outputs(Path("a.csv"), Path("new.csv"), Path("new/folder/a.csv"))
    assert files_of(here) == {"a.csv": b"before"}
    assert [path.name for path in here.iterdir()] == ["a.csv"]


def test_parts_of_another_study_are_refused(here):
    path = here / "parts" / "setting.json"
    check_setting(path, {"seed": "0", "tokens": "8"})
    check_setting(path, {"seed": "0", "tokens": "8"})
    with pytest.raises(RunError, match="whose seed is '0': expected '1'; name another folder"):
        check_setting(path, {"seed": "1", "tokens": "8"})


def test_a_damaged_part_says_what_to_do(here):
    np.savez_compressed(here / "part.npz", losses=np.arange(9.0))
    np.testing.assert_array_equal(read_part(here / "part.npz")["losses"], np.arange(9.0))
    (here / "part.npz").write_bytes((here / "part.npz").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"part\.npz: damaged: .*; delete it and go on"):
        read_part(here / "part.npz")
