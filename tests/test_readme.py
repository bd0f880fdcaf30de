"""Every command and every piece of code in the README runs, at a tiny size."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from small import FLAGS, cheap_figures, cheap_post_hoc

from probattn.inference.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what the README's paths name, in which its commands have run."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(ROOT / "README.md", folder)
    shutil.copytree(ROOT / "examples", folder / "examples")
    return folder


def test_commands_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    cheap_post_hoc(monkeypatch)
    cheap_figures(monkeypatch)
    commands = [
        shlex.split(line)[1:]
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("probattn ")
    ]
    assert {command[0] for command in commands} == {
        "fit",
        "evaluate",
        "margins",
        "generate",
        "figures",
    }
    for command in commands:
        assert main(command + FLAGS if command[0] == "fit" else command) == 0, command
    assert "bits per character" in capsys.readouterr().out
    # The code below opens the run that the commands above made.
    namespace = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["weakest"].shape == (3,)
    assert namespace["sequences"].shape == (100, 16, 8)
    assert namespace["mass"] == pytest.approx(1.98, abs=0.005)
    assert namespace["result"].losses.shape == (20,)
    assert namespace["smallest"].sizes == {"stage": 4}


def test_make_targets_exist():
    targets = re.findall(r"^make (\w+)$", "\n".join(blocks("bash")), re.MULTILINE)
    assert targets == ["demo", "test"]
    subprocess.run(["make", "-n", *targets], cwd=ROOT, check=True, capture_output=True)


def test_linked_files_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
