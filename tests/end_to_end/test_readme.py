"""Every command and every piece of code in the README runs, at a tiny size."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from probattn.inference.cli import main
from probattn.inference.exchange import import_decoder
from probattn.inference.pretrained.checkpoint import open_checkpoint
from tests.support.project import ROOT
from tests.support.shown import blocks, run_commands
from tests.support.small import (
    FLAGS,
    SAMPLE_FLAGS,
    SENSITIVITY_FLAGS,
    cheap_figures,
    cheap_post_hoc,
    quick_compilation,
    short_reference,
)
from tests.support.tiny_decoder import write_folder

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in README.split("\n## ")}


@pytest.fixture(scope="module", name="folder")
def folder_fixture(tmp_path_factory):
    """One folder with what the README's paths name, to run its commands in as its reader does.

    A section finds the runs of those before it, and makes by `have` those that it takes for given.
    """
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(ROOT / "README.md", folder)
    shutil.copytree(ROOT / "examples", folder / "examples")
    with pytest.MonkeyPatch.context() as patch, quick_compilation():
        patch.chdir(folder)
        cheap_post_hoc(patch)
        cheap_figures(patch)
        yield folder


def have(run, *arguments):
    if not (Path("runs") / run).exists():
        assert main([*arguments, "--out", f"runs/{run}"]) == 0


def have_fit(run):
    objective = run if run in ("ce", "full") else "margin"
    have(run, "fit", "--data", "README.md", "--objective", objective, *FLAGS)


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_use_it(capsys, monkeypatch):
    short_reference(monkeypatch)
    commands, names = run_commands(SECTIONS["Use it"])
    assert commands == {"fit", "evaluate", "margins", "sensitivity", "generate", "figures"}
    assert "bits per character" in capsys.readouterr().out
    assert names["weakest"].shape == (3,)
    assert names["sequences"].shape == (100, 16, 8)
    assert names["mass"] == pytest.approx(1.98, abs=0.005)
    assert names["result"].losses.shape == (20,)
    assert names["smallest"].sizes == {"stage": 4}


@pytest.mark.slow
def test_your_own_model(folder, capsys, monkeypatch):
    """With a tiny model in the place of the hub's."""
    tiny = write_folder(folder / "tiny", "smollm")
    monkeypatch.setattr(import_decoder, "open_checkpoint", lambda source: open_checkpoint(tiny))
    have_fit("readme")
    commands, _ = run_commands(SECTIONS["Your own model"])
    assert commands == {"import", "margins", "generate", "fit", "export"}
    assert "bits per character" in capsys.readouterr().out
    exported = {path.name for path in (folder / "runs" / "readme-gpt2").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= exported


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_the_page_on_your_own_model(folder, monkeypatch):
    """Its code, with a tiny model; its commands are those of the README."""
    page = (ROOT / "docs" / "your-own-model.md").read_text(encoding="utf-8")
    shown = [line for block in blocks("bash", page) for line in block.splitlines()]
    of_readme = "".join(blocks("bash", SECTIONS["Your own model"])).splitlines()
    assert sorted(shown) == sorted(of_readme)
    write_folder(folder / "model", "smollm")
    (folder / "text.txt").write_text(README[:2000])
    names = {}
    for block in blocks("python", page):
        exec(compile(block, "your-own-model.md", "exec"), names)
    assert names["margins"].stages[0].label == "layer 1 head 1"


@pytest.mark.slow
def test_how_sure_are_we(folder, capsys):
    commands, names = run_commands(SECTIONS["How sure are we?"])
    assert commands == {"fit", "sample", "compare"}
    printed = capsys.readouterr().out
    assert "r_hat" in printed
    assert "bits per character" in printed
    assert (folder / "runs" / "compared" / "smallest_margin.png").exists()
    assert names["likely"].sizes == {"sequence": 2, "position": 6}
    assert names["probability"].sizes == {"sequence": 4, "position": 8}
    assert names["probability"].sum("position").values == pytest.approx(1)


@pytest.mark.slow
def test_the_page_on_margin_pages(folder):
    """Its commands, on the runs of the README."""
    for name in ("readme", "ce", "full"):
        have_fit(name)
    have("posterior", "sample", "--from", "runs/full", *SAMPLE_FLAGS)
    page = (ROOT / "docs" / "margin-page.md").read_text(encoding="utf-8")
    (folder / "text.txt").write_text("The class of an instance is its type.\n" * 20)
    page = page.replace("runs/start", "runs/readme").replace("LICENSE", "text.txt")
    for line in "".join(blocks("bash", page)).splitlines():
        command = shlex.split(line)[1:]
        assert main(command + SENSITIVITY_FLAGS * (command[0] == "sensitivity")) == 0, command
    written = {path.name for path in folder.glob("*.html")}
    of_readme = {"margin.html"}  # which is there if the commands of "Use it" ran before
    assert written - of_readme == {"page.html", "noise.html", "compared.html", "posterior.html"}


def test_every_command_and_all_code_belong_to_a_section_that_is_run():
    shown = "".join(SECTIONS[name] for name in ("Use it", "Your own model", "How sure are we?"))
    assert blocks("python", README) == blocks("python", shown)
    lines = [line for block in blocks("bash", README) for line in block.splitlines()]
    rest = [line for line in lines if line not in shown.splitlines()]
    assert rest == ["make demo", "make test"]


def test_make_targets_exist():
    targets = re.findall(r"^make (\w+)$", "\n".join(blocks("bash", README)), re.MULTILINE)
    assert targets == ["demo", "test"]
    subprocess.run(["make", "-n", *targets], cwd=ROOT, check=True, capture_output=True)


def test_linked_files_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
