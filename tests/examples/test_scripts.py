"""The scripts of `examples` run as they stand, at a tiny size."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from probattn.inference import read_config
from probattn.inference.cli import main
from tests.support.project import ROOT
from tests.support.small import FLAGS, cheap_post_hoc, short_reference

EXAMPLES = ROOT / "examples"


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    return runpy.run_path(str(EXAMPLES / script), run_name="__main__")


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.slow
def test_fit_map_lowers_the_loss(monkeypatch, capsys):
    short_reference(monkeypatch)
    names = run(monkeypatch, "fit_map.py", "--steps", "20", "--width", "8")
    first = float(capsys.readouterr().out.split("loss ")[1].split()[0])
    assert float(names["losses"].mean()) < first
    assert names["margin"].shape == (12, 64)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.slow
def test_fit_and_inspect_ends_in_a_margin_figure(monkeypatch, tmp_path, capsys):
    cheap_post_hoc(monkeypatch)
    short_reference(monkeypatch)
    out = tmp_path / "runs" / "inspect"
    run(monkeypatch, "fit_and_inspect.py", "--steps", "20", "--width", "8", "--out", str(out))
    printed = capsys.readouterr().out
    assert "support token" in printed
    written = {path.name for path in (out / "figures").iterdir()}
    assert {"margins.csv", "margin_text.png", "margin_sequence.png"} <= written


def test_tinyshakespeare_is_the_setting_that_the_readme_reports():
    config = read_config(EXAMPLES / "tinyshakespeare.toml")
    model, fit = config.model, config.fit
    assert (model.layers, model.heads, model.width, model.block) == (4, 4, 128, 64)
    assert (fit.batch, fit.steps, config.data.validation_fraction) == (12, 2000, 0.1)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.slow
def test_tinyshakespeare_fits_another_text(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copy(EXAMPLES / "tinyshakespeare.toml", tmp_path)
    Path("input.txt").write_text("First Citizen: speak, speak.\n" * 100, encoding="utf-8")
    flags = ["--config", "tinyshakespeare.toml", "--objective", "full", "--out", "run"]
    assert main(["fit", *flags, *FLAGS]) == 0
    assert read_config("run/config.toml").objective.name == "full"


@pytest.mark.slow
def test_every_theorem_runs_and_says_what_it_measured(capsys):
    rows = runpy.run_path(str(EXAMPLES / "theorems.py"))["table"]()
    results = {row.result for row in rows}
    assert results == {
        *("Proposition 1", "Theorem 1", "Lemma B.1", "Corollary 3.1", "Theorem 2"),
        *("Proposition 2", "Theorem 3", "Proposition 3", "Corollary 6.1"),
    }
    for row in rows:
        if row.expected == "0":
            assert row.measured < 1e-13, row
        elif row.expected == "1":
            assert abs(row.measured - 1) < max(4 * row.error, 1e-7), row
        elif row.expected == "not 1":
            assert abs(row.measured - 1) > 0.1, row
        elif row.expected != "finite":
            assert row.measured == pytest.approx(float(row.expected.split()[0]), abs=1e-4), row


SMALL = ["--sequences", "2", "--length", "5", "--steps", "20", "--warmup", "20", "--draws", "10"]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.slow
def test_posterior_simulated_tells_the_truth_beside_the_posterior(monkeypatch, tmp_path, capsys):
    names = run(monkeypatch, "posterior_simulated.py", *SMALL, "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert "rank of truth" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"posterior.nc", "smallest_margin.png"}
    drawn = names["tree"]["posterior"]["coupling_norm"].values
    assert drawn.shape == (4, 10)
    assert f"{drawn.mean():.3f}" in printed


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.slow
def test_posterior_text_names_support_tokens(monkeypatch, tmp_path, capsys):
    out = tmp_path / "run"
    names = run(monkeypatch, "posterior_text.py", *SMALL, "--out", str(out))
    printed = capsys.readouterr().out
    assert "is the support token with probability" in printed
    assert "coupling_trace: prior" in printed
    assert (out / "posterior.nc").exists()
    assert names["probability"].shape == (2, 5)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.slow
def test_posterior_language_model_weighs_the_modes_of_its_posterior(monkeypatch, tmp_path, capsys):
    cheap_post_hoc(monkeypatch)
    few = ["--steps", "60", "--warmup", "50", "--draws", "30", "--weights", "0.1"]
    few += ["--starts", "2"]
    names = run(monkeypatch, "posterior_language_model.py", *few, "--out", str(tmp_path))
    assert set(names["runs"]) == {"ce", "full", "margin 0.1"}
    printed = capsys.readouterr().out
    assert printed.count("bits per character, smallest margin") == 4
    assert sum(names["weights"]) == pytest.approx(1)
    assert {"modes.csv", "modes.png", "comparison.csv", "smallest_margin.png"} <= {
        path.name for path in tmp_path.iterdir()
    }


@pytest.mark.parametrize(
    "page", ["posterior_simulated", "posterior_text", "posterior_language_model"]
)
def test_pages_show_the_code_of_their_example(page):
    script = (EXAMPLES / f"{page}.py").read_text(encoding="utf-8")
    text = (EXAMPLES.parent / "docs" / f"{page}.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(shown) >= 4
    for block in shown:
        assert block in script
    for figure in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (EXAMPLES.parent / "docs" / figure).exists()
