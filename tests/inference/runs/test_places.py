"""The texts of a run are found from every working directory."""

import dataclasses

import pytest

from probattn.inference import FitConfig, RunConfig, load_run
from probattn.inference.config_files import format_config
from probattn.inference.runs.checks import with_absolute_paths
from probattn.inference.runs.files import RunError
from probattn.inference.runs.opening import find_run, open_run
from probattn.inference.runs.run import Run
from probattn.text.corpora import DataConfig, load_corpus
from tests.support.made_runs import CONFIG, TEXT
from tests.support.refusals import refusal

RELATIVE = dataclasses.replace(CONFIG, data=DataConfig("book.txt", validation="./pydoc"))


@pytest.fixture(name="desk")
def desk_fixture(tmp_path, monkeypatch):
    """A working directory with two texts, one of them with the name of a source."""
    folder = tmp_path / "desk"
    folder.mkdir()
    (folder / "book.txt").write_text(TEXT, encoding="utf-8")
    (folder / "pydoc").write_text(TEXT[::-1], encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder


def found(path, config, *, resume):
    run, _ = find_run(Run, path, config, resume=resume, overwrite=False)
    return run


def test_a_run_names_its_texts_absolutely(desk, tmp_path, monkeypatch):
    with open_run(found(tmp_path / "run", RELATIVE, resume=False)) as run:
        pass
    assert found(run.path, RELATIVE, resume=True) == run  # from where it was made
    monkeypatch.chdir(tmp_path)
    data = load_run(run.path).config.data
    assert (data.source, data.validation) == (str(desk / "book.txt"), str(desk / "pydoc"))
    assert load_corpus(data).sha256 == run.data["sha256"]
    assert found(run.path, run.config, resume=True) == run
    (tmp_path / "book.txt").write_text("another")
    (tmp_path / "pydoc").write_text("another")
    message = refusal(RunError, found, run.path, RELATIVE, resume=True)
    assert "cannot resume with a changed configuration: data.source: " in message


def test_a_run_of_an_earlier_version_goes_on_from_its_working_directory(desk, tmp_path):
    with open_run(found(tmp_path / "run", RELATIVE, resume=False)) as run:
        (run.path / "config.toml").write_text(format_config(RELATIVE), encoding="utf-8")
    for config in (RELATIVE, run.config):
        assert found(run.path, config, resume=True).config == RELATIVE


def test_names_of_sources_are_no_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    for given, expected in (
        ("pydoc", "pydoc"),
        ("wikitext-2", "wikitext-2"),
        ("~/book.txt", "/home/somebody/book.txt"),
    ):
        config = RunConfig(DataConfig(given))
        assert with_absolute_paths(config) == RunConfig(DataConfig(expected))


def test_a_fit_of_too_many_reports_is_refused():
    """Their file would be too large to be read."""
    FitConfig(steps=20_000, eval_every=1)
    assert refusal(ValueError, FitConfig, steps=20_001, eval_every=1) == (
        "fit.eval_every is 1 and fit.steps 20001, which makes 20001 reports: expected at most 20000"
    )
