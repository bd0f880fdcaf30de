"""Runs made by hand that the tests of run directories share."""

import shutil

import pytest

from probattn.inference import load_run
from tests.support.made_runs import make_run


@pytest.fixture(name="made", scope="session")
def made_fixture(tmp_path_factory):
    """A run as a fit of eight steps leaves it: read it, never write to it."""
    return make_run(tmp_path_factory.mktemp("runs") / "made")


@pytest.fixture(name="run")
def run_fixture(made, tmp_path):
    """A copy of the run, to do anything with."""
    return load_run(shutil.copytree(made.path, tmp_path / "run"))


@pytest.fixture(name="place")
def place_fixture(tmp_path):
    """Where a folder of checkpoints may be made."""
    return tmp_path / "checkpoints" / "latest"
