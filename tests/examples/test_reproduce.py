"""The paper's experiments end to end at a tiny size: interrupted, carried on, drawn from tables."""

import csv
import itertools
import math
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from scipy import stats

from probattn.inference import load_run, sensitivity
from probattn.inference.evaluation import intervals
from probattn.inference.evaluation.perturbations import Gaussian
from probattn.inference.evaluation.scoring import Scorer
from probattn.inference.fitting.svi import Trainer
from probattn.inference.runtime.task_processes import run_apart
from tests.support import tiny_run
from tests.support.project import ROOT, scripts_fixture
from tests.support.tiny_run import tiny_text

FOLDER = ROOT / "examples" / "reproduce"
NAMES = ("collect", "figures", "measure", "plan", "run", "summary", "table")
SCALE = """
[model]
layers = 1
heads = 2
width = 8
block = 8
prior_rank = 2

[fit]
steps = 20
batch = 4
learning_rate = 0.03
warmup = 2
eval_every = 10
checkpoint_every = 10

[noise]
absolute = [0.5]
relative = [0.5, 1.0]
tokens = 100_000
kinds = ["uniform", "substitution"]
kinds_relative = [0.5]
substituted = [0.1]
ascent_tokens = 64
sensitivity_tokens = 800
sensitivity_draws = 2
"""
METHODS = """
[ce]
label = "ce"
set = { "objective.name" = "ce" }
grid = [{ "fit.learning_rate" = "1x" }]

[margin]
label = "margin"
set = { "objective.name" = "margin" }
grid = [{ "objective.barrier_weight" = 0.05 }]
"""
COMMAND_SEEDS = 2


scripts = scripts_fixture(FOLDER, NAMES)


@pytest.fixture(scope="module", name="command")
def command_fixture(tmp_path_factory):
    """Folder, and arguments of a command in it."""
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "scale.toml").write_text(SCALE, encoding="utf-8")
    (folder / "methods.toml").write_text(METHODS, encoding="utf-8")
    (folder / "text.txt").write_text(tiny_text(), encoding="utf-8")
    # A symbol that the other text lacks: the vocabulary is of both.
    (folder / "test.txt").write_text(tiny_text(1504, seed=1) + "ß", encoding="utf-8")
    named = {"text": "text.txt", "test": "test.txt", "scale": "scale.toml"}
    named |= {"methods": "methods.toml", "runs": "runs"}
    flags = [part for name, file in named.items() for part in (f"--{name}", str(folder / file))]
    return folder, [*flags, "--seeds", str(COMMAND_SEEDS)]


@pytest.fixture(scope="module", name="history")
def history_fixture(scripts, command):
    """The whole command, interrupted in its second fit and given again; statuses of both."""
    folder, arguments = command
    fits, advance = [], Trainer.advance

    def interrupting(trainer, state, start, stop):
        if start == 0:
            fits.append(trainer)
        if len(fits) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(trainer, state, start, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "advance", interrupting)
        first = scripts["run"].main(arguments)
        files = _checkpoints(folder)
        patch.setattr(Trainer, "advance", advance)
        second = scripts["run"].main(arguments)
    return first, files, second


def _checkpoints(folder):
    """When the checkpoints of each run that is there were written."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns
        for path in (folder / "runs").glob("*/*/seed-*/checkpoints/best/*/**/*")
        if path.is_file()
    }


def rows_of(folder, table):
    with (folder / "runs" / "results" / f"{table}.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
def test_an_interrupted_command_goes_on_and_repeats_nothing(history, command):
    folder, _ = command
    first, files, second = history
    assert first == 128 + signal.SIGTERM
    assert second == 0
    begun = {name.rpartition("/seed-")[0] for name in files}
    assert begun == {"runs/ce/learning_rate=1x"}
    after = _checkpoints(folder)
    assert {name: after[name] for name in files} == files
    runs = rows_of(folder, "runs")
    assert [(row["method"], row["seed"]) for row in runs] == [
        *(("ce", "0"), ("ce", "1"), ("margin", "0"), ("margin", "1"))
    ]
    assert {row["steps"] for row in runs} == {"20"}


@pytest.mark.slow
def test_tables_hold_every_report_and_point(history, command):
    folder, _ = command
    curves, noise = rows_of(folder, "curves"), rows_of(folder, "noise")
    assert len(curves) == 4 * 2
    assert float(curves[1]["epoch"]) == pytest.approx(20 * 4 * 8 / 4000, rel=1e-6)
    gaussian = [row for row in noise if row["kind"] == "gaussian"]
    # Of each run: levels in both units with 0, and on the other half those that tune.
    assert len(gaussian) == 4 * (2 + 3 + 2)
    others = {(row["kind"], row["unit"], row["level"]) for row in noise if row not in gaussian}
    assert others == {
        *(("uniform", "relative", "0"), ("uniform", "relative", "0.5")),
        *(("substitution", "probability", "0"), ("substitution", "probability", "0.1")),
    }
    assert {row["half"] for row in noise if row["kind"] != "gaussian"} == {"test"}


@pytest.mark.slow
def test_points_are_of_the_second_half_under_noise_in_its_unit(history, command):
    folder, _ = command
    text = (folder / "test.txt").read_text(encoding="utf-8")
    run = load_run(folder / "runs" / "margin" / "barrier_weight=0.05" / "seed-1")
    assert run.config.model == tiny_run.MODEL
    tokens = run.vocabulary.encode(text)[len(text) // 2 :]
    block = tiny_run.BLOCK
    assert len(tokens) % block == 1  # whole windows
    found = {
        (row["unit"], float(row["level"])): (float(row["bpc"]), float(row["degradation"]))
        for row in rows_of(folder, "noise")
        if (row["method"], row["seed"], row["half"]) == ("margin", "1", "test")
        and row["kind"] == "gaussian"
    }
    windows = tokens[:-1].reshape(-1, block), tokens[1:].reshape(-1, block)
    losses = [
        -tiny_run.log_softmax(tiny_run.all_logits(run, inputs))[np.arange(block), targets]
        for inputs, targets in zip(*windows, strict=True)
    ]
    clean = np.mean(losses) / math.log(2)
    rms = np.sqrt(np.mean(tiny_run.embedded(run, windows[0]) ** 2))
    scorer = Scorer(run.network, run.vocabulary, tokens)
    for (unit, level), (bpc, degradation) in found.items():
        sigma = level * {"absolute": 1.0, "relative": rms}[unit]
        noisy = scorer.score(run.parameters, Gaussian(sigma), rng_key=jax.random.key(0)).bpc
        assert bpc == pytest.approx(noisy, rel=1e-5)
        assert degradation == pytest.approx(noisy / clean, rel=1e-5)
    assert len({bpc for bpc, _ in found.values()}) == 4  # and 0 in both units


@pytest.mark.slow
def test_figures_and_table_are_drawn_from_the_tables_alone(history, command, scripts, tmp_path):
    folder, _ = command
    written = folder / "runs" / "results"
    for path in (*written.glob("*.csv"), written / "setting.txt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    drawn = {path.name for path in scripts["figures"].draw(tmp_path)}
    assert drawn == {"curves.png", "noise.png", "sensitivity.png", "table.md"}
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table == (written / "table.md").read_text(encoding="utf-8")
    assert "text.txt, evaluated on test.txt" in table
    assert str(folder) not in table
    clean = {
        method: [
            float(row["validation_bpc"])
            for row in rows_of(folder, "runs")
            if row["method"] == method
        ]
        for method in ("ce", "margin")
    }
    ratios = 100 * (np.divide(clean["margin"], clean["ce"]) - 1)
    low, high = stats.ttest_1samp(ratios, 0).confidence_interval()
    cost = f"{ratios.mean():+.1f} % ± {(high - low) / 2:.1f}".replace("-", "\N{MINUS SIGN}")
    assert f"| margin, clean cost | +1.7 % | {cost} |" in table


@pytest.mark.slow
def test_margins_and_harm_are_those_of_the_command_sensitivity(history, command, scripts):
    folder, _ = command
    [margins, comparisons, support] = (
        rows_of(folder, name)
        for name in ("sensitivity_margins", "sensitivity_comparisons", "support_tokens")
    )
    text = str(folder / "test.txt")
    lifts = {}
    for name, setting in (("ce", "learning_rate=1x"), ("margin", "barrier_weight=0.05")):
        for seed in range(COMMAND_SEEDS):
            run = load_run(folder / "runs" / name / setting / f"seed-{seed}")
            found = sensitivity(run, text, draws=2, most_tokens=800)

            def own(rows, method=name, number=str(seed)):
                return [r for r in rows if (r["method"], r["seed"]) == (method, number)]

            assert [row["stage"] for row in own(margins)] == [each.label for each in found.stages]
            for row, stage in zip(own(margins), found.stages, strict=True):
                later = stage.margin[found.position >= 2]
                assert float(row["smallest"]) == pytest.approx(later.min(), rel=1e-6)
                assert float(row["median"]) == pytest.approx(np.median(later), rel=1e-6)
                assert float(row["negative"]) == pytest.approx(np.mean(later < 0), rel=1e-6)
            for row, each in zip(own(comparisons), found.comparisons, strict=True):
                keys = (row["stage"], row["statistic"], row["within"])
                assert keys == (each.stage, each.statistic, each.within)
                assert float(row["estimate"] or "nan") == pytest.approx(
                    each.estimate.value, rel=1e-6, nan_ok=True
                )
                if keys == ("post hoc", "support", "text"):
                    lifts.setdefault(name, []).append(each.estimate.value)
            for stage in found.stages:
                counts = [int(r["support"]) for r in own(support) if r["stage"] == stage.label]
                assert sum(counts) == stage.support.sum()
    table = (folder / "runs" / "results" / "table.md").read_text(encoding="utf-8")
    [row] = [
        line
        for line in table.splitlines()
        if line.startswith("| increase at support") and "symbol" not in line
    ]
    for value, shown in zip((lifts["ce"], lifts["margin"]), row.split(" | ")[1:3], strict=True):
        low, high = stats.ttest_1samp(value, 0).confidence_interval(0.95)
        mean = f"{np.mean(value):.3f}".replace("-", "\N{MINUS SIGN}")
        assert shown == f"{mean} ± {(high - low) / 2:.3f}"


@pytest.mark.slow
def test_seeds_asked_for_before_stay_in_the_tables(history, command, scripts):
    folder, arguments = command
    before = {table: rows_of(folder, table) for table in ("runs", "noise", "curves")}
    assert scripts["run"].main([*arguments, "--seeds", "1"]) == 0
    assert {table: rows_of(folder, table) for table in before} == before
    assert {row["seed"] for row in before["runs"]} == {"0", "1"}


@pytest.mark.slow
def test_points_of_another_plan_are_in_no_table(history, command, scripts):
    folder, _ = command
    plan, measure = scripts["plan"], scripts["measure"]
    methods = plan.read_methods(folder / "methods.toml")
    scale = plan.read_scale(str(folder / "scale.toml"))
    data, _ = plan.choose_data(*(str(folder / name) for name in ("text.txt", "test.txt")))
    task = plan.every_task(methods, [0], scale, data, folder / "runs")[0]
    run = load_run(task.out)
    assert {point["kind"] for point in measure.measured(task, run)} >= {"gaussian"}
    noise = plan.dataclasses.replace(task.noise, tokens=task.noise.tokens + 1)
    assert measure.measured(plan.dataclasses.replace(task, noise=noise), run) == []


@pytest.mark.slow
def test_two_processes_do_tasks_and_tell_why_one_failed(history, command, scripts):
    folder, _ = command
    plan = scripts["plan"]
    methods = plan.read_methods(folder / "methods.toml")
    scale = plan.read_scale(str(folder / "scale.toml"))
    texts = [str(folder / name) for name in ("text.txt", "test.txt")]
    data, _ = plan.choose_data(*texts)
    done, changed = plan.every_task(methods, [0], scale, data, folder / "runs")
    elsewhere = plan.dataclasses.replace(changed, out=done.out)
    tasks = run_apart([done, elsewhere], scripts["measure"].work, jobs=2, command="run.py")
    outcomes = {task.setting.method: why for task, _, why in tasks}
    assert outcomes.keys() == {"ce", "margin"}
    assert outcomes["ce"] == ""
    assert "objective.name: ce -> margin" in outcomes["margin"]


@pytest.mark.slow
def test_bad_input_is_one_line(command, scripts, capsys):
    folder, arguments = command
    main = scripts["run"].main
    written = (folder / "methods.toml").read_text("utf-8")
    for name, row in (("word", '"fit.guide" = "map"'), ("field", '"fit.learning_rat" = "2x"')):
        other = f"{written}\n[other]\nset = {{}}\ngrid = [{{ {row} }}]\n"
        (folder / f"{name}.toml").write_text(other, "utf-8")
    for extra, message in (
        (["--methods", str(folder / "word.toml")], "fit.guide is 'map' in a grid: expected a num"),
        (["--methods", str(folder / "field.toml")], "no attribute 'learning_rat': expected fields"),
        (["--seeds", "0"], "--seeds: got 0, expected an integer >= 1"),
        (["--scale", "huge"], "huge: cannot read the configuration"),
        (["--text", str(folder / "none.txt")], "no such file"),
    ):
        assert main([*arguments, *extra]) == 2
        assert message in capsys.readouterr().err


def test_every_method_has_three_values_that_make_a_configuration(scripts, tmp_path):
    plan = scripts["plan"]
    methods = plan.read_methods(plan.METHODS)
    assert len(methods) >= 10
    for scale in ("small", "paper"):
        tasks = plan.every_task(methods, [0], plan.read_scale(scale), plan.DataConfig(), tmp_path)
        configs = {(task.setting.method, repr(task.config)) for task in tasks}
        assert len(configs) == len({task.out for task in tasks}) == len(tasks)
        for method in methods:
            assert sum(name == method for name, _ in configs) >= 3


def test_the_tuned_setting_and_whole_curves_have_every_seed(scripts, tmp_path):
    plan = scripts["plan"]
    methods = plan.read_methods(plan.METHODS)
    tuned = {"sam": "sam_rho=0.05", "gaussian": "embedding_noise=0.35"}
    scale, data = plan.read_scale("small"), plan.DataConfig()
    tasks = plan.tuned_tasks(tuned, ["methods", "kinds"], methods, 2, scale, data, tmp_path)
    runs = {(task.setting.method, task.setting.name, task.seed) for task in tasks}
    assert len(runs) == len(tasks)
    names = {("sam", "sam_rho=0.05"), ("ce", "learning_rate=1x")}
    assert {(task.setting.method, task.setting.name) for task in tasks if task.kinds} == names | {
        ("gaussian", "embedding_noise=0.35")
    }
    for method in ("gaussian", "occasional", "occasional_first_layer"):
        names |= {(method, setting.name) for setting in methods[method]}
    assert runs == {(*name, seed) for name in names for seed in (0, 1)}


@pytest.mark.slow
def test_what_is_committed_is_drawn_from_what_is_committed(scripts, tmp_path):
    results, copy = FOLDER / "results", tmp_path / "results"
    shutil.copytree(results, copy, ignore=shutil.ignore_patterns("*.md", "*.png"))
    drawn = {path.name for path in scripts["figures"].draw(copy)}
    assert drawn == {path.name for path in results.iterdir() if path.suffix in (".md", ".png")}
    tables = [(folder / "table.md").read_text(encoding="utf-8") for folder in (copy, results)]
    assert tables[0] == tables[1]


def test_further_seeds_and_differences_are_those_of_scipy():
    """From the committed rows: ce, and noise on some sequences with and without the barrier."""
    results = FOLDER / "results"
    bpc = {}
    for path in (results / "noise.csv", results / "confirmation" / "noise.csv"):
        with path.open(newline="") as stream:
            for row in csv.DictReader(stream):
                if (row["half"], row["kind"], row["unit"]) == ("test", "gaussian", "relative"):
                    point = row["method"], row["setting"], float(row["level"])
                    bpc.setdefault(point, {})[int(row["seed"])] = float(row["bpc"])
    setting = "noise_probability=0.15 embedding_noise=0.5"

    def of(method, level, seeds, name=setting):
        return np.array([bpc[method, name, level][seed] for seed in seeds])

    def shown(values, digits, sign=""):
        low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        mean = f"{np.mean(values):{sign}.{digits}f}".replace("-", "\N{MINUS SIGN}")
        return mean, f"{(high - low) / 2:.{digits}f}"

    lines = (results / "table.md").read_text(encoding="utf-8").splitlines()
    every = itertools.product(
        (setting, f"{setting} weight_decay=0.1"), (range(5), range(5, 10), range(10))
    )
    for name, seeds in every:
        ce = [of("ce", level, seeds, "learning_rate=1x") for level in (0.0, 0.5)]
        ours = [of("occasional_first_layer", level, seeds, name) for level in (0.0, 0.5)]
        cost = " % ± ".join(shown(100 * (ours[0] / ce[0] - 1), 1, "+"))
        excess = " ± ".join(shown((ours[1] / ours[0] - 1) / (ce[1] / ce[0] - 1), 3))
        begin = f"| occasional, first layer | {name.replace('_', ' ')} | {len(seeds)} |"
        assert any(
            line.startswith(begin) and cost in line and line.endswith(f"| {excess} |")
            for line in lines
        )
    ours, other, ce = (
        of(*name)
        for name in (
            ("occasional_first_layer", 0.0, range(5)),
            ("occasional", 0.0, range(5)),
            ("ce", 0.0, range(5), "learning_rate=1x"),
        )
    )
    name = setting.replace("_", " ")
    begin = f"| occasional, first layer, {name} less occasional noise, {name} |"
    [row] = [line for line in lines if line.startswith(begin)]
    assert row.split(" | ")[1] == " ± ".join(shown(100 * (ours - other) / ce, 1, "+"))


def test_the_weight_decay_that_was_chosen_is_the_best_by_the_tuning_rule():
    """Mean of clean BPC and BPC at noise of half an RMS, on the half of the text for tuning."""
    found = {}
    with (FOLDER / "results" / "choice.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            if row["half"] == "tune":
                setting = tuple(float(row[name]) for name in list(row)[:4])
                found.setdefault(setting, {}).setdefault(int(row["seed"]), []).append(row)
    chosen = found.pop((0.01, 0.15, 0.5, 0.1))
    assert len(found) == 6
    for other in found.values():
        ours, theirs = (
            np.mean([float(row["bpc"]) for seed in other for row in of[seed]])
            for of in (chosen, other)
        )
        assert all(len(rows) == 2 for rows in other.values())
        assert ours < theirs


def test_intervals_over_seeds_are_those_of_scipy(scripts):
    summary, rng = scripts["summary"], np.random.default_rng(0)
    a, b = rng.normal(2, 0.1, (2, 5))
    found = intervals.interval(a)
    low, high = stats.ttest_1samp(a, 0).confidence_interval(0.95)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(
        (low, high), rel=1e-12
    )
    # Pairs by seed, whatever the order and whoever is missing.
    values, reference = dict(enumerate(a)), dict(reversed(list(enumerate([*b, 7.0]))))
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    found = summary.paired_difference(values, reference)
    assert found.seeds == 5
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(
        (low, high), rel=1e-12
    )
    cost = intervals.paired_cost(values, reference)
    low, high = stats.ttest_1samp(100 * (a / b - 1), 0).confidence_interval(0.95)
    assert (cost.mean - cost.half_width, cost.mean + cost.half_width) == pytest.approx(
        (low, high), rel=1e-12
    )
    assert math.isnan(intervals.interval([1.0]).half_width)


def test_tuning_looks_at_clean_and_noisy_text_of_its_own_half(scripts):
    def rows(setting, clean, noisy, *, half="tune", seed=0):
        common = {"method": "m", "setting": setting, "half": half, "seed": seed}
        common |= {"kind": "gaussian", "unit": "relative"}
        return [common | {"level": 0.0, "bpc": clean}, common | {"level": 0.5, "bpc": noisy}]

    noise = [
        *rows("s=1", 2.0, 3.0),
        *rows("s=2", 2.2, 2.4),
        *rows("s=10", 2.1, 2.9),
        *rows("s=1", 0.1, 0.1, half="test"),
        *rows("s=3", 0.1, 0.1, seed=1),  # never fitted with the seed that tunes
    ]
    summary = scripts["summary"]
    assert summary.tuned_settings(noise, [0]) == {"m": "s=2"}
    every = [row | {"half": "test", "seed": seed} for row in noise for seed in (0, 1)]
    ce = {"method": "ce", "setting": "learning_rate=1x", "half": "test", "kind": "gaussian"}
    reference = [ce | {"unit": "relative", "level": 0.0, "bpc": 2.0, "seed": n} for n in (0, 1)]
    assert summary.curves_of([*every, *reference]) == {"m": ["s=1", "s=2", "s=3", "s=10"]}
    partly = [row for row in every if (row["setting"], row["seed"]) != ("s=2", 1)]
    assert summary.curves_of([*partly, *reference]) == {"m": ["s=1", "s=3", "s=10"]}
    assert summary.settings_of(noise) == {"m": ["s=1", "s=2", "s=3", "s=10"]}
