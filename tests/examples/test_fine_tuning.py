"""Fine-tuning with and without the barrier: the plan, the measures against an oracle, and runs."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest

from probattn.inference import load_run
from probattn.models import ObjectiveConfig
from tests.support.numpy_llama import NumpyLlama, jacobian
from tests.support.project import ROOT, scripts_fixture
from tests.support.tiny_decoder import imported
from tests.support.tiny_run import tiny_text

FOLDER = ROOT / "examples" / "fine_tuning"
NAMES = ("tuning_plan", "one_tuning", "tuning_report", "fine_tune")
RESULTS = FOLDER / "results"
OPTIONS = {
    "steps": 2,
    "batch": 2,
    "seeds": 1,
    "train": 600,
    "held-out": 200,
    "tokens": 64,
    "margin-tokens": 32,
}


scripts = scripts_fixture(FOLDER, NAMES)


@pytest.fixture(scope="module", name="model")
def model_fixture(tmp_path_factory):
    """A run of a tiny published model, and two texts."""
    folder = tmp_path_factory.mktemp("fine_tuning")
    run = imported(folder / "model", "smollm").run
    for seed, name in enumerate(("text", "other")):
        (folder / f"{name}.txt").write_text(tiny_text(900, seed=seed), encoding="utf-8")
    return run, folder


def made(scripts, model, out):
    """All tasks of a plan of tiny sizes."""
    run, folder = model
    sizes = scripts["tuning_plan"].Sizes(
        **{name.replace("-", "_"): value for name, value in OPTIONS.items()}
    )
    texts = folder / "text.txt", folder / "other.txt"
    return list(scripts["tuning_plan"].tasks(run.path, *texts, sizes, out))


def test_settings_differ_in_the_objective_alone(scripts, model, tmp_path):
    first, *fits = made(scripts, model, tmp_path)
    assert first.setting == "published"
    assert first.config is None
    assert len({task.out for task in fits}) == len(fits) == 3
    ce = ObjectiveConfig("ce")
    assert len({replace(task.config, objective=ce) for task in fits}) == 1
    weights = [task.config.objective.barrier_weight for task in fits]
    assert [task.config.objective.name for task in fits] == ["ce", "margin", "margin"]
    assert {task.config.objective.attention for task in fits[1:]} == {"first_layer"}
    assert weights[2] == 10 * fits[1].config.objective.weights[0]
    whole = (model[1] / "text.txt").read_text(encoding="utf-8")
    parts = [(tmp_path / "texts" / f"{n}.txt").read_text() for n in ("train", "held_out")]
    assert parts == [whole[:600], whole[-200:]]


def test_measures_of_the_published_model_are_those_of_float64(scripts, model, tmp_path):
    run, _ = model
    task, *_ = made(scripts, model, tmp_path)
    task = replace(task, sizes=replace(task.sizes, tokens=10**6, margin_tokens=10**6))
    found = scripts["one_tuning"].measure(task, run)
    oracle = NumpyLlama(run.checkpoint.config, dict(run.checkpoint.tensors))
    for name, path in (("bpc", task.held_out), ("other", task.other)):
        tokens = run.vocabulary.encode(path.read_text(encoding="utf-8"))
        losses = {}  # of windows without overlap, the last of which ends with the text
        for start in [*range(0, len(tokens) - 17, 16), len(tokens) - 17]:
            of_window = oracle.losses(tokens[start : start + 17])
            for place, loss in enumerate(of_window):
                losses.setdefault(start + place, loss)
        characters = run.vocabulary.characters(tokens[1:])
        expected = sum(losses.values()) / math.log(2) / characters
        assert found[name] == pytest.approx(expected, rel=1e-5)
    tokens = run.vocabulary.encode(task.held_out.read_text(encoding="utf-8"))
    sizes = []
    for start in [*range(0, len(tokens) - 17, 16), len(tokens) - 17]:
        n, residuals = oracle.first_stage(tokens[start : start + 16])
        for position in range(2, 16):
            for residual in residuals:
                block = jacobian(lambda token, f=residual, t=position: f(token, t), n[position])
                values = np.linalg.eigvals(block)
                folded = np.any((abs(values.imag) < 1e-9) & (values.real <= 0))
                sizes.append(np.linalg.svd(block)[1][-1] * (-1 if folded else 1))
    assert found["smallest"] == pytest.approx(min(sizes), abs=2e-4)
    assert found["median"] == pytest.approx(np.median(sizes), abs=2e-4)
    assert found["folded"] == pytest.approx(np.mean(np.array(sizes) <= 0), abs=1e-9)
    assert len({found[name] for name in ("bpc", "noise_0.25", "noise_0.5", "rounded")}) == 4


@pytest.mark.skipif(not RESULTS.exists(), reason="no results are committed")
def test_the_committed_table_is_that_of_the_committed_runs(scripts):
    rows = scripts["tuning_report"].read_table(RESULTS / "runs.csv")
    made = scripts["tuning_report"].runs_table(rows)
    assert made == (RESULTS / "table.md").read_text(encoding="utf-8")


def test_the_report_shows_what_disturbances_add(scripts, tmp_path):
    heads = ("setting", "seed", "bpc", "noise_0.25", "noise_0.5", "rounded", "other")
    heads = (*heads, "smallest", "median", "folded", "fit_seconds", "seconds")
    lines = [("published", "", 1, 1.25, 2, 3, 4, -0.5, 0.5, 0.01, 1, 2)]
    with (tmp_path / "runs.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([heads, *lines])
    assert scripts["tuning_report"].main([str(tmp_path)]) == 2  # settings are missing
    lines += [(name, 0, *lines[0][2:]) for name in ("ce", "margin_0.05", "margin_0.5")]
    with (tmp_path / "runs.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([heads, *lines])
    table, figure = scripts["tuning_report"].write_report(tmp_path)
    cells = table.read_text(encoding="utf-8").splitlines()[2].split(" | ")
    assert cells[2:9] == [
        "1.0000",
        "4.0000",
        "0.2500",
        "1.0000",
        "2.0000",
        "\N{MINUS SIGN}0.500",
        "0.500",
    ]
    assert figure.stat().st_size > 1000


@pytest.mark.slow
def test_the_command_makes_every_model_once(scripts, model, tmp_path, capsys):
    run, folder = model
    options = [f"--{name}={value}" for name, value in OPTIONS.items()]
    texts = [f"--text={folder / 'text.txt'}", f"--other={folder / 'other.txt'}"]
    arguments = [f"--base={run.path}", *texts, f"--out={tmp_path}", *options]
    assert scripts["fine_tune"].main(arguments) == 0
    with (tmp_path / "runs.csv").open(newline="") as stream:
        rows = {row["setting"]: row for row in csv.DictReader(stream)}
    assert list(rows) == ["published", "ce", "margin_0.05", "margin_0.5"]
    assert len({row["bpc"] for row in rows.values()}) == 4
    tuned = load_run(tmp_path / "runs" / "ce-0" / "fit")
    assert tuned.step == 2
    task = next(each for each in made(scripts, model, tmp_path) if each.setting == "ce")
    found = scripts["one_tuning"].measure(task, tuned)
    assert float(rows["ce"]["bpc"]) == pytest.approx(found["bpc"], rel=1e-5)
    before = (tmp_path / "runs.csv").read_bytes()
    capsys.readouterr()
    assert scripts["fine_tune"].main(arguments) == 0
    assert "4 models, 4 of them done before" in capsys.readouterr().out
    assert (tmp_path / "runs.csv").read_bytes() == before
    task = next(each for each in made(scripts, model, tmp_path) if each.setting == "ce")
    changed = replace(task, checksums=(*task.checksums[:2], "of another text"))
    assert scripts["one_tuning"].measured(task)
    assert scripts["one_tuning"].measured(changed) is None
    assert scripts["fine_tune"].main([*arguments, "--train=100000"]) == 2
    assert "expected at least 100200" in capsys.readouterr().err
    assert scripts["fine_tune"].main([*arguments, "--steps=0"]) == 2
    assert "--steps: got 0, expected an integer >= 1" in capsys.readouterr().err
    assert scripts["fine_tune"].main([*arguments, f"--base={tuned.path}"]) == 2
    assert "is no imported model: expected one" in capsys.readouterr().err
