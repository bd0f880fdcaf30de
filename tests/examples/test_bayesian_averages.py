"""The comparison of Bayesian averages: its plan and tables, then runs of it at a small budget."""

import csv
import json
import math

import numpy as np
import pytest

from probattn.inference import compare, load_run
from tests.support.project import ROOT, scripts_fixture

FOLDER = ROOT / "examples" / "bayesian_averages"
NAMES = ("averages", "averages_plan", "averages_report", "one_average")


scripts = scripts_fixture(FOLDER, NAMES)


def test_committed_tables_are_made_from_the_committed_results(scripts):
    report, results = scripts["averages_report"], FOLDER / "results"
    made = report.tables(report.read_results(results))
    assert made == (results / "table.md").read_text(encoding="utf-8")


def test_every_method_has_the_gradients_of_the_scale(scripts, tmp_path):
    plan = scripts["averages_plan"]
    scale = plan.SCALES["small"]
    every = list(plan.tasks(scale, text=None, out=tmp_path))
    assert len({task.out for task in every}) == len(every)
    assert {task.method.name for task in every} == plan.read_methods().keys()
    pooled = [task.method.pooled is not None for task in every]
    assert pooled == sorted(pooled)  # they need the others
    for task in every:
        configs = [task.fit_config(number).fit for number in range(task.method.members)]
        assert len({fit.seed for fit in configs}) == task.method.members
        assert all(fit.eval_every == fit.steps > fit.warmup_steps for fit in configs)
        if task.method.pooled:
            assert len(task.others) == scale.seeds - 1
            assert task.out.name not in {path.name for path in task.others}
        elif not task.method.of_file:
            steps = sum(fit.steps for fit in configs)
            assert steps == task.method.start * scale.gradients
            assert (steps == scale.gradients) == (task.method.sample is None)


def test_bad_requests_are_refused_in_a_line(scripts, tmp_path, capsys):
    main = scripts["averages"].main
    for arguments, line in (
        (["tinyshakespeare"], "--text is missing: expected the text of tinyshakespeare.toml"),
        (["small", "--only", "sgd"], "--only names sgd: expected some of map, map_of_file"),
    ):
        assert main([*arguments, "--out", str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith(f"averages.py: {line}")
    with pytest.raises(ValueError, match=r"has no \*/runs\.csv"):
        scripts["averages_report"].write_report(tmp_path)


def test_costs_are_paired_by_seed_and_missing_runs_are_counted(scripts):
    report = scripts["averages_report"]
    bpc = {("ce", "map"): (2.0, 4.0), ("ce", "ensemble"): (1.9, 3.6), ("full", "map"): (2.2, 4.0)}
    runs = [
        {"objective": objective, "method": method, "seed": str(seed), "bpc": str(value)}
        | {"noise": str(1.5 - value / 10), "calibration_error": str(value / 20), "members": "1"}
        | dict.fromkeys(("gradients", "accuracy", "cpu_seconds", "memory_mib"), "1")
        | {
            f"{stage}_{n}": ""
            for stage in ("first_layer_margin", "trained_margin")
            for n in (5, 95)
        }
        | {"first_layer_margin_50": "-0.5", "trained_margin_50": "0.5"}
        for (objective, method), values in bpc.items()
        for seed, value in enumerate(values)
    ]
    measured = report.Measured(runs, [])
    row = report.methods_table(measured, "ce").splitlines()[3]
    assert row.startswith("| 4 MAPs, a quarter of the steps each | 2 | 1 | 2.750 ± ")
    assert "| \N{MINUS SIGN}7.5 ± 31.8 |" in row  # 5 and 10 % less
    assert "| MAP | full | +5.0 ± " in report.barrier_table(runs)
    missing = report.missing_runs("tinyshakespeare", measured)
    assert missing["ce", "map"] == 1  # of three seeds
    assert missing["ce", "sghmc"] == 3
    assert not {("ce", "nuts"), ("full", "mean_field")} & missing.keys()


@pytest.mark.slow
def test_runs_are_made_once_and_measured_as_compare_does(scripts, tmp_path, capsys):
    main, out = scripts["averages"].main, tmp_path / "out"
    methods = ("map", "ensemble", "pooled", "mean_field", "nuts")
    sizes = ("--gradients", "400", "--seeds", "2", "--objectives", "full")
    assert main(["small", "--out", str(out), *sizes, "--only", *methods]) == 0
    assert "full nuts seed 1: " in capsys.readouterr().out
    with (out / "small" / "runs.csv").open(encoding="utf-8") as stream:
        rows = {(r["objective"], r["method"], r["seed"]): r for r in csv.DictReader(stream)}
    assert len(rows) == 2 * len(methods)
    assert {row["gradients"] for (_, method, _), row in rows.items() if method != "nuts"} == {"400"}
    assert {row["members"] for (_, method, _), row in rows.items() if method == "ensemble"} == {"4"}
    for (_, method, _), row in rows.items():
        assert 1 < float(row["bpc"]) < math.log2(9), row
        assert 0 < float(row["accuracy"]) < 1
        assert float(row["cpu_seconds"]) > 0
        if method == "nuts":
            assert 100 < int(row["gradients"]) <= 400
        assert float(row["first_layer_margin_50"]) < 1

    # What the public comparison says of the same run.
    path = out / "small" / "runs" / "full" / "map" / "seed-0"
    run = load_run(path / "fit-0")
    [found] = compare({"map": run})
    row = rows["full", "map", "0"]
    assert float(row["bpc"]) == pytest.approx(found.predictions.bpc, rel=1e-6)
    assert float(row["calibration_error"]) == pytest.approx(found.predictions.reliability.error)
    one = {name: np.asarray(value)[None] for name, value in run.parameters.items()}
    margin = scripts["one_average"].smallest_margins(run, one, run.config.objective, 64)
    assert margin == pytest.approx([found.smallest_margin], rel=1e-5)
    # An average of one other run is that run.
    assert rows["full", "pooled", "1"]["bpc"] == row["bpc"]

    # Again: nothing is made anew, but for a run that was measured in another way.
    other = path.parent / "seed-1" / "measured.json"
    stale = json.loads(other.read_text(encoding="utf-8"))
    stale["plan"]["gradients"] = 1
    other.write_text(json.dumps(stale), encoding="utf-8")
    assert main(["small", "--out", str(out), *sizes, "--only", *methods]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert [line.partition("] ")[2].partition(":")[0] for line in told] == ["full map seed 1"]
