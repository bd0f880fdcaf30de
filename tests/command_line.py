"""The command line, called within the process on a wide terminal."""

import pytest
from tiny_run import (
    own_run_fixture,  # noqa: F401
    tiny_run_fixture,  # noqa: F401
)

from probattn.inference.cli import main


@pytest.fixture(name="terminal", autouse=True)
def terminal_fixture(monkeypatch, tmp_path):
    """A wide terminal, and a folder of our own to stand in."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(name="probattn")
def probattn_fixture(capsys):
    """Call the command line; gives status, standard output and standard error."""

    def call(*arguments):
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call


def error_line(stderr):
    """The one line that an error is."""
    [line] = stderr.splitlines()
    assert line.startswith("probattn: error: ")
    return line.removeprefix("probattn: error: ")
