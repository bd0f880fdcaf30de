"""The commands and the code of the pages for beginners run, at a tiny size."""

import shlex
import shutil

import pytest

from probattn.inference.cli import command_line
from tests.support.project import ROOT
from tests.support.shown import blocks, run_commands
from tests.support.small import cheap_post_hoc

HOW_TO = ("fit", "margins", "posterior", "compare", "devices")
PAGES = ("start", *(f"how-to-{what}" for what in HOW_TO))


def text_of(page):
    return (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")


@pytest.fixture(name="folder")
def folder_fixture(tmp_path, monkeypatch, quick_compilation):
    """A folder with what the pages name, to run their commands in."""
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    cheap_post_hoc(monkeypatch)
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_the_pages_for_beginners():
    """One page after the other, in one folder."""
    text = "".join(map(text_of, PAGES))
    shown = [line for block in blocks("bash", text) for line in block.splitlines()]
    assert {line.split()[0] for line in shown} == {"probattn", "pip"}
    # One device is enough for a mesh.
    commands, names = run_commands(text.replace("--mesh data=4", "--mesh data=1"))
    looked = {"margins", "generate", "evaluate", "sensitivity", "compare"}
    assert commands == {"fit", "sample", *looked}
    assert names["tree"]["posterior"].sizes["draw"] == 50


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_the_page_on_running_it():
    """Its commands are understood; they need several devices, or runs that were interrupted."""
    page = text_of("operations")
    shown = [line for each in ("", "bash") for line in "".join(blocks(each, page)).splitlines()]
    commands = [shlex.split(line)[1:] for line in shown if line.startswith("probattn ")]
    assert len(commands) >= 6
    for command in commands:
        if "--resume" not in command:
            assert command_line._parse(command_line._lengthened(command))
