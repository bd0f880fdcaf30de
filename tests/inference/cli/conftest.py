"""The command line, called within the process on a wide terminal."""

import pytest

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
