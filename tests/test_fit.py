"""A whole fit: what it leaves, how it goes on after an end of any kind, and what it refuses."""

import dataclasses
import errno
import importlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import (
    BLOCK,
    FIT,
    HEADS,
    WIDTH,
    all_logits,
    embedded,
    files_of,
    held_by_another_process,
    log_softmax,
    tiny_config,
    tiny_text,
)

from probattn import stability_margin
from probattn.inference import FitError, fit, load_run
from probattn.inference.checkpoints import CheckpointError, named_leaves
from probattn.inference.config import format_config
from probattn.inference.interrupts import Interrupted
from probattn.inference.optimizers import default_optimizer
from probattn.inference.run_files import RunError, WriteError
from probattn.inference.runs import Run
from probattn.inference.scoring import Scorer
from probattn.inference.svi import Trainer
from probattn.models import LanguageModelConfig, ObjectiveConfig

LOOP = importlib.import_module("probattn.inference.fit")  # the package's attribute is the function
REPORTS = [80, 160, 200]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("text"))
    schedule = dataclasses.replace(FIT, eval_every=80, checkpoint_every=60)
    return dataclasses.replace(config, fit=schedule)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A fit from its first step to its last, with copies of the run made on the way."""
    folder = tmp_path_factory.mktemp("whole")
    copies, starts, trainers = {}, [], []
    advance, append = Trainer.advance, Run.append_metrics

    def recording_advance(self, state, step, stop):
        if step == 0:
            trainers.append(self)
            starts.append(jax.tree.map(np.array, self.parameters(state)))
        return advance(self, state, step, stop)

    def recording_append(self, row):
        append(self, row)
        copies[row["step"]] = shutil.copytree(self.path, folder / f"line-{row['step']}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "advance", recording_advance)
        patch.setattr(Run, "append_metrics", recording_append)
        result = fit(config, folder / "run")
    return SimpleNamespace(
        result=result, run=result.run, copies=copies, start=starts[0], trainer=trainers[0]
    )


def state_of(run, trainer):
    """Everything that the latest checkpoint holds."""

    def plain():
        state = trainer.init()
        return state._replace(
            svi=state.svi._replace(rng_key=jax.random.key_data(state.svi.rng_key))
        )

    return run.latest.load(named_leaves(jax.eval_shape(plain)))


def rows_of(run):
    return [dict(row, tokens_per_s=None) for row in run.metrics()]


def assert_same_outcome(run, whole):
    """To the last bit, but for how long it took."""
    for got, expected in (
        (state_of(run, whole.trainer), state_of(whole.run, whole.trainer)),
        (run.parameters, whole.run.parameters),
    ):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert (run.step, run.latest.step) == (whole.run.step, whole.run.latest.step)
    assert rows_of(run) == rows_of(whole.run)
    assert run.summary() == whole.run.summary()
    assert files_of(run.path).keys() - checkpoint_files(run) == {
        "config.toml",
        "data.json",
        "metrics.jsonl",
        "summary.json",
    }


def checkpoint_files(run):
    return {name for name in files_of(run.path) if name.startswith("checkpoints/")}


def refusal(kind, *arguments, **options):
    with pytest.raises(kind) as raises:
        fit(*arguments, **options)
    assert "\n" not in str(raises.value)
    return str(raises.value)


# What a fit leaves


def test_the_loss_falls(whole):
    losses = [row["loss"] for row in whole.run.metrics()]
    assert losses[0] > losses[1] + 0.1
    assert losses[1] > losses[2]


def test_it_starts_a_third_as_wide_as_the_prior(whole):
    scales = {
        "token_embedding": 0.05,
        "position_embedding": 0.05,
        "attention_in": WIDTH**-0.5,
        "attention_out": (2 * WIDTH) ** -0.5,
        "mlp_in": WIDTH**-0.5,
        "mlp_out": (2 * 4 * WIDTH) ** -0.5,
    }
    values = np.concatenate([(whole.start[n] / s).ravel() for n, s in scales.items()])
    assert values.std() == pytest.approx(1, abs=4 / math.sqrt(2 * values.size))
    assert values.mean() == pytest.approx(0, abs=4 / math.sqrt(values.size))
    assert {value.dtype for value in whole.start.values()} == {np.dtype("float64")}


def test_the_lines_of_metrics(whole):
    rows = whole.run.metrics()
    assert [row["step"] for row in rows] == REPORTS
    for row in rows:
        assert list(row) == [
            "step",
            "cross_entropy",
            "bpc",
            "validation_cross_entropy",
            "validation_bpc",
            "loss",
            "tokens_per_s",
            "min_margin",
            "min_margin_kind",
            "mean_margin",
            "mean_log_det",
            "infeasible_fraction",
            "coupling_eigenvalue_min",
            "coupling_eigenvalue_max",
            "rejected_steps",
            "embedding_rms",
        ]
        assert row["tokens_per_s"] > 0
        assert (row["infeasible_fraction"], row["rejected_steps"]) == (0, 0)
        assert row["min_margin_kind"] == "reduced, separate"
    assert whole.result.metrics == rows


def cross_entropy(run, text):
    """Of every token but the first, by a network of its own, in windows without overlap."""
    tokens = run.vocabulary.encode(text)
    losses = []
    for start in range(0, len(tokens) - 1, BLOCK):
        end = min(start + BLOCK, len(tokens) - 1)
        first = end - BLOCK  # the last window is moved back to end with the text
        predicted = log_softmax(all_logits(run, tokens[first:end]))
        losses += [-predicted[i - first, tokens[i + 1]] for i in range(start, end)]
    return np.mean(losses)


def test_the_last_line_describes_the_last_parameters(whole):
    state = state_of(whole.run, whole.trainer)
    prefix, suffix = "svi.optim_state.1.0.", "_auto_loc"
    parameters = {
        name.removeprefix(prefix).removesuffix(suffix): value
        for name, value in state.items()
        if name.startswith(prefix)
    }
    run = SimpleNamespace(parameters=parameters, vocabulary=whole.run.vocabulary)
    row = whole.run.metrics()[-1]
    for prefix, text in (("", tiny_text()[:3600]), ("validation_", tiny_text()[3600:])):
        expected = cross_entropy(run, text)
        assert row[f"{prefix}cross_entropy"] == pytest.approx(expected, rel=1e-12)
        assert row[f"{prefix}bpc"] == pytest.approx(expected / math.log(2), rel=1e-12)
    tokens = run.vocabulary.encode(tiny_text()[: 16 * BLOCK]).reshape(16, BLOCK)
    margins = jax.jit(partial(stability_margin, kind="reduced"))(
        embedded(run, tokens), parameters["w_query"], parameters["w_key"]
    )
    assert row["min_margin"] == pytest.approx(float(margins[:, 2:].min()), rel=1e-12)
    inputs = run.vocabulary.encode(tiny_text()[:3599])
    rest = np.arange(3599 // BLOCK * BLOCK, 3599)
    x = [embedded(run, inputs[: rest[0]].reshape(-1, BLOCK)).reshape(-1, WIDTH)]
    x.append(embedded(run, inputs[-BLOCK:])[-len(rest) :])
    rms = np.sqrt(np.mean(np.concatenate(x) ** 2))
    assert row["embedding_rms"] == pytest.approx(rms, rel=1e-12)


def test_the_best_parameters_are_those_of_the_best_validation(whole):
    rows = whole.run.metrics()
    best = min(rows, key=lambda row: row["validation_cross_entropy"])
    expected = cross_entropy(whole.run, tiny_text()[3600:])
    assert whole.run.step == best["step"]
    assert best["validation_cross_entropy"] == pytest.approx(expected, rel=1e-12)
    assert whole.result.validation_cross_entropy == pytest.approx(expected, rel=1e-12)
    assert whole.result.validation_bpc == pytest.approx(expected / math.log(2), rel=1e-12)
    parameters = sum(value.size for value in whole.run.parameters.values())
    assert whole.run.summary()["fit"] == {
        "inference": "map",
        "steps": 200,
        "best_step": best["step"],
        "validation_cross_entropy": whole.result.validation_cross_entropy,
        "validation_bpc": whole.result.validation_bpc,
        "validation_tokens": 399,
        "rejected_steps": 0,
        "parameters": parameters,
    }


def test_so_many_tokens_are_scored_at_the_end(config, tmp_path):
    result = fit(with_fit(config, steps=2, warmup=0, evaluation_tokens=BLOCK + 1), tmp_path / "run")
    expected = cross_entropy(result.run, tiny_text()[3600 : 3600 + BLOCK + 1])
    assert result.validation_cross_entropy == pytest.approx(expected, rel=1e-12)
    assert result.run.summary()["fit"]["validation_tokens"] == BLOCK


def test_the_run_says_what_it_was_fitted_on(whole, config):
    run = load_run(whole.run.path)
    assert run.config == config
    assert run.data["train_characters"] == 3600
    assert run.data["validation_characters"] == 400
    assert run.vocabulary.symbols == tuple(sorted(set(tiny_text())))
    assert whole.run.latest.step == 200


# The same again


def test_the_seed_makes_the_fit_wherever_its_calls_are_cut(whole, config, tmp_path, monkeypatch):
    """Here every step is a call of its own, over a run that is to be replaced."""
    copy = shutil.copytree(whole.copies[160], tmp_path / "run")
    (copy / "post_hoc_prior.npz").write_bytes(b"of the other run")
    monkeypatch.setattr(LOOP, "_CALL_SECONDS", 0.0)
    losses, advance = [], Trainer.advance

    def recording_advance(self, state, step, stop):
        assert stop == step + 1
        state, progress = advance(self, state, step, stop)
        losses.append(float(progress.loss))
        return state, progress

    monkeypatch.setattr(Trainer, "advance", recording_advance)
    result = fit(config, copy, overwrite=True)
    assert_same_outcome(result.run, whole)
    assert result.validation_cross_entropy == whole.result.validation_cross_entropy
    for row, start in zip(rows_of(result.run), [0, *REPORTS[:-1]], strict=True):
        assert row["loss"] == pytest.approx(np.mean(losses[start : row["step"]]), rel=1e-12)


@pytest.mark.parametrize(("step", "cut"), [(80, None), (200, None), (200, -7)])
def test_a_fit_that_was_killed_goes_on_as_if_it_had_not_been(whole, config, tmp_path, step, cut):
    """Between a line of metrics, or within it, and the checkpoint of its parameters."""
    copy = load_run(shutil.copytree(whole.copies[step], tmp_path / "run"))
    assert copy.metrics()[-1]["step"] == step
    assert copy.latest.step < step
    assert copy.step is None or copy.step < step
    metrics = copy.path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:cut])
    assert_same_outcome(fit(config, copy.path, resume=True).run, whole)


@pytest.mark.parametrize("leap", [-1e7, 1e5], ids=["back", "forward"])
def test_a_clock_that_leaps_changes_nothing(whole, config, tmp_path, monkeypatch, leap):
    """The time of day leaps by a day or more at every look at it, and files are of another year."""
    copy = shutil.copytree(whole.copies[80], tmp_path / "run")
    for file in copy.rglob("*"):
        os.utime(file, (4e9, 4e9) if leap < 0 else (1e8, 1e8))
    looks = itertools.count(2e9, leap)
    monkeypatch.setattr(time, "time", lambda: next(looks))
    assert_same_outcome(fit(config, copy, resume=True).run, whole)
    assert next(looks) != 2e9  # somebody did look


def test_a_fit_that_goes_on_remembers_its_best(whole, config, tmp_path, monkeypatch):
    copy = shutil.copytree(whole.copies[200], tmp_path / "run")
    score = Scorer.score

    def worse_score(self, parameters):
        result = score(self, parameters)
        return dataclasses.replace(result, cross_entropy=result.cross_entropy + 1)

    monkeypatch.setattr(Scorer, "score", worse_score)
    run = fit(config, copy, resume=True).run
    assert (run.step, run.latest.step) == (160, 200)


def test_a_fit_ends_between_two_steps_and_goes_on(whole, config, tmp_path, monkeypatch, capsys):
    advance, sent = Trainer.advance, []

    def interrupting_advance(self, state, step, stop):
        if step >= 5 and not sent:
            sent.append(stop)
            os.kill(os.getpid(), signal.SIGINT)
        return advance(self, state, step, stop)

    monkeypatch.setattr(Trainer, "advance", interrupting_advance)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match="SIGINT; what was done is saved"):
        fit(config, tmp_path / "run")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert load_run(tmp_path / "run").latest.step == sent[0] < 80

    run = fit(config, tmp_path / "run", resume=True, progress=True).run
    assert_same_outcome(run, whole)
    shown = capsys.readouterr().err
    for row in run.metrics():
        assert f"step {row['step']:6d}  bpc {row['bpc']:.3f}" in shown


def test_a_finished_fit_has_nothing_left_to_do(whole, config, tmp_path):
    copy = shutil.copytree(whole.run.path, tmp_path / "run")
    result = fit(config, copy, resume=True)
    assert_same_outcome(result.run, whole)
    assert result.metrics == whole.result.metrics


SINGLE_PRECISION = """
import sys
import numpy as np
from probattn.inference import fit, read_config
from probattn.inference.svi import Trainer

config, folder = read_config(sys.argv[1]), sys.argv[2]
whole = fit(config, folder + "/whole")
advance = Trainer.advance

def stopping_advance(self, state, step, stop):
    if step >= 130:
        raise KeyboardInterrupt
    return advance(self, state, step, stop)

Trainer.advance = stopping_advance
try:
    fit(config, folder + "/again")
except KeyboardInterrupt:
    Trainer.advance = advance
again = fit(config, folder + "/again", resume=True)
for name, value in whole.run.parameters.items():
    assert value.dtype == np.float32, name
    np.testing.assert_array_equal(again.run.parameters[name], value)
timed = [dict(row, tokens_per_s=None) for row in whole.metrics]
assert [dict(row, tokens_per_s=None) for row in again.metrics] == timed
assert timed[-1]["loss"] < timed[0]["loss"] - 0.1
print("done")
"""


def test_a_fit_in_single_precision_which_is_the_default_outside_of_these_tests(config, tmp_path):
    (tmp_path / "config.toml").write_text(format_config(config), "utf-8")
    command = [sys.executable, "-W", "error", "-c", SINGLE_PRECISION, tmp_path / "config.toml"]
    environment = {
        **os.environ,
        "JAX_ENABLE_X64": "0",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    child = subprocess.run(
        [*command, tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert (child.returncode, child.stdout) == (0, "done\n"), child.stderr


def test_a_custom_optimizer_is_used_and_the_best_of_its_steps_kept(whole, config, tmp_path):
    """It is the default one until step 160, and climbs from there."""
    default = default_optimizer(config.fit)

    def update(gradient, state, parameters):
        step, changed = default.update(gradient, state[0], parameters)
        sign = jnp.where(state[0][0].count < 160, 1.0, -3.0)
        return jax.tree.map(lambda value: sign * value, step), (changed, state[1])

    # As a best loss so far, which starts from infinity.
    optimizer = optax.GradientTransformation(
        lambda p: (default.init(p), jnp.array(jnp.inf)), update
    )
    run = fit(config, tmp_path / "run", optimizer=optimizer).run
    rows = run.metrics()
    for row, expected in zip(rows[:2], whole.run.metrics(), strict=False):
        for name in ("loss", "cross_entropy", "embedding_rms"):
            assert row[name] == pytest.approx(expected[name], rel=1e-9)  # other compiled code
    assert rows[2]["validation_cross_entropy"] > rows[1]["validation_cross_entropy"] + 0.1
    assert (run.step, run.latest.step) == (160, 200)
    best = cross_entropy(run, tiny_text()[3600:])
    assert rows[1]["validation_cross_entropy"] == pytest.approx(best, rel=1e-12)
    assert run.summary()["fit"]["best_step"] == 160


# Not finite


def spoil(patch, step, name):
    """After a step, one parameter is not a number."""
    patch.setattr(LOOP, "_CALL_SECONDS", 0.0)  # so that every step ends a call
    advance = Trainer.advance

    def spoiling_advance(self, state, start, stop):
        state, progress = advance(self, state, start, stop)
        if stop == step:
            count, (parameters, moments) = state.svi.optim_state
            site = f"{name}_auto_loc"
            parameters = parameters | {site: jnp.full_like(parameters[site], jnp.nan)}
            svi = state.svi._replace(optim_state=(count, (parameters, moments)))
            state = state._replace(svi=svi)
        return state, progress

    patch.setattr(Trainer, "advance", spoiling_advance)


def test_a_loss_that_is_not_finite_ends_the_fit_at_its_last_checkpoint(
    whole, config, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        spoil(patch, 130, "mlp_in")
        message = refusal(FitError, config, tmp_path / "run")
    assert message.startswith(f"{tmp_path / 'run'}: the fit stopped at step 131: the loss is nan; ")
    for part in (
        "step 120 is kept",
        "try a smaller fit.learning_rate (now 0.03)",
        "a longer fit.warmup (now 5)",
        "--overwrite",
    ):
        assert part in message
    run = load_run(tmp_path / "run")
    assert (run.latest.step, run.step) == (120, 80)
    assert run.stopped == (131, "the loss is nan")
    assert [row["step"] for row in run.metrics()] == [80]  # which figures and tables are made of
    arrays = [*state_of(run, whole.trainer).values(), *run.parameters.values()]
    assert all(np.isfinite(value).all() for value in arrays)
    resumed = fit(config, run.path, resume=True).run
    assert resumed.stopped is None
    assert_same_outcome(resumed, whole)


@pytest.mark.parametrize(("step", "kept"), [(60, None), (80, 60)])
def test_parameters_that_are_not_finite_are_not_saved(
    whole, config, tmp_path, monkeypatch, step, kept
):
    """W_Q is not a number, and the cross-entropy, which does not depend on it, still is."""
    spoil(monkeypatch, step, "w_query")
    message = refusal(FitError, config, tmp_path / "run")
    assert f"the fit stopped at step {step}: the parameters are not finite; " in message
    assert ("no checkpoint was made before it" if kept is None else "step 60 is kept") in message
    run = load_run(tmp_path / "run")
    assert (run.latest.step, run.step, run.metrics()) == (kept, None, [])
    assert run.stopped == (step, "the parameters are not finite")


def test_an_optimizer_state_that_is_not_finite_is_not_saved(config, tmp_path, monkeypatch):
    """The square of a gradient of 1e20 is infinite in single precision; the step is then zero."""
    advance = Trainer.advance

    def overflowing_advance(self, state, start, stop):
        state, progress = advance(self, state, start, stop)
        count, (parameters, moments) = state.svi.optim_state
        adam = moments[0]._replace(nu=moments[0].nu | {"w_key_auto_loc": jnp.full((8, 2), jnp.inf)})
        svi = state.svi._replace(optim_state=(count, (parameters, (adam, *moments[1:]))))
        return state._replace(svi=svi), progress

    monkeypatch.setattr(Trainer, "advance", overflowing_advance)
    message = refusal(FitError, config, tmp_path / "run")
    cause = "the optimizer state is not finite (svi.optim_state.1.1.0.nu.w_key_auto_loc)"
    assert f"the fit stopped at step 60: {cause}; no checkpoint was made before it" in message
    run = load_run(tmp_path / "run")
    assert (run.latest.step, run.stopped) == (None, (60, cause))


def test_a_figure_that_is_not_finite_is_not_reported(config, tmp_path, monkeypatch):
    monkeypatch.setattr(Scorer, "embedding_rms", lambda *arguments: math.inf)
    message = refusal(FitError, config, tmp_path / "run")
    assert "the fit stopped at step 80: embedding_rms is inf; step 60 is kept" in message
    run = load_run(tmp_path / "run")
    assert (run.step, run.metrics(), run.stopped) == (None, [], (80, "embedding_rms is inf"))


@pytest.mark.parametrize("moves", [False, True], ids=["taken back", "shortened"])
def test_a_fit_that_no_step_moved_is_no_success(config, tmp_path, monkeypatch, moves):
    advance, init = Trainer.advance, Trainer.init

    def rejecting_advance(self, state, start, stop):
        moved, progress = advance(self, state, start, stop)
        kept = moved.svi if moves else init(self).svi
        return moved._replace(svi=kept, rejected=jnp.int32(stop)), progress

    monkeypatch.setattr(Trainer, "advance", rejecting_advance)
    if moves:
        assert fit(config, tmp_path / "run").run.summary()["fit"]["rejected_steps"] == 200
        return
    message = refusal(FitError, config, tmp_path / "run")
    assert "the fit stopped at step 200: every step would have crossed the attention" in message
    run = load_run(tmp_path / "run")
    assert [row["rejected_steps"] for row in run.metrics()] == [80, 160]
    assert run.stopped[0] == 200
    assert run.summary() == {}


def test_minibatches_of_one_repeated_token(config, tmp_path):
    """No spread in any context: every determinant is 1, and the network learns the one token."""
    (tmp_path / "text").write_text(" " * 3600 + tiny_text()[:400], encoding="utf-8")
    run = fit(with_data(config, source=str(tmp_path / "text")), tmp_path / "run").run
    assert run.vocabulary.symbols == tuple(sorted(set(tiny_text())))
    rows = run.metrics()
    assert rows[-1]["cross_entropy"] < 0.1 < rows[-1]["validation_cross_entropy"]
    for row in rows:
        assert (row["rejected_steps"], row["infeasible_fraction"]) == (0, 0)
    assert all(np.isfinite(value).all() for value in run.parameters.values())


@pytest.mark.parametrize("after", ["make", "line", "checkpoint"])
def test_a_full_disk_ends_a_fit_in_one_line_and_leaves_it_whole(
    whole, config, tmp_path, monkeypatch, after
):
    """No byte more can be brought to the disk, from the run's making, a line or a checkpoint on."""
    sync, renames = os.fsync, []

    def full(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        renames.append(name)
        wanted = {"make": "data.json", "line": "metrics.jsonl", "checkpoint": "120.saving"}[after]
        lines = sum(each.endswith("/metrics.jsonl") for each in renames)
        if wanted in name and (after != "line" or lines == 2):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    message = refusal(WriteError, config, tmp_path / "run")
    assert "cannot be written: No space left on device; what was saved before is as it" in message
    monkeypatch.setattr(os, "fsync", sync)
    if after == "make":
        assert not (tmp_path / "run" / "config.toml").exists()
        run = fit(config, tmp_path / "run").run
    else:
        run = load_run(tmp_path / "run")
        assert (run.latest.step, run.step) == {"line": (120, 80), "checkpoint": (60, 80)}[after]
        run = fit(config, run.path, resume=True).run
    assert_same_outcome(run, whole)


# Bad input. All but the last few are refused before anything is compiled.


def with_data(config, **data):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


def with_fit(config, **changes):
    return dataclasses.replace(config, fit=dataclasses.replace(config.fit, **changes))


@pytest.fixture
def unused(tmp_path):
    """Where no run is, and none may be after a refusal."""
    yield tmp_path / "deep" / "run"
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"", "got an empty file"),
        (b"caf\xe9 " * 100, "not UTF-8: byte 0xe9 at offset 3"),
    ],
)
def test_a_text_that_cannot_be_read(config, tmp_path, unused, content, reason):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    for field in ("source", "validation"):
        message = refusal(ValueError, with_data(config, **{field: str(path)}), unused)
        assert message.startswith(f"data.{field}: ")
        assert reason in message
        assert str(path) in message


@pytest.mark.parametrize(("part", "field"), [("training", "source"), ("validation", "validation")])
def test_a_text_that_is_no_longer_than_a_block(config, tmp_path, unused, part, field):
    for name, length in (("long", 500), ("short", BLOCK)):
        (tmp_path / name).write_text("ab" * (length // 2))
    texts = {"source": str(tmp_path / "long"), "validation": str(tmp_path / "long")}
    short = with_data(config, **(texts | {field: str(tmp_path / "short")}))
    message = refusal(ValueError, short, unused)
    assert f"the {part} text has 8 tokens: expected more than one block of 8; give a" in message
    assert "model.block" in message


def test_a_text_of_fewer_blocks_than_a_minibatch(config, tmp_path, unused):
    (tmp_path / "short").write_text("ab" * (3 * BLOCK // 2) + "a")
    short = str(tmp_path / "short")
    message = refusal(ValueError, with_data(config, source=short, validation=short), unused)
    assert "training text has 25 tokens" in message
    assert "fit.batch" in message


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_a_place_that_is_not_for_a_run(config, tmp_path, options):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file", tmp_path / "folder" / "thesis.tex"):
        path.write_text("mine")
    expected = {
        "file": "expected a directory for the run, got a file",
        "folder": "holds thesis.tex, which is no part of a run; expected a new or empty directory",
    }
    before = files_of(tmp_path)
    for name, reason in expected.items():
        message = refusal(RunError, config, tmp_path / name, **options)
        if "resume" in options:
            reason = "holds no run to resume; start one without --resume"
        assert message == f"{tmp_path / name}: {reason}"
    assert files_of(tmp_path) == before


def test_nothing_to_resume(config, unused):
    message = refusal(RunError, config, unused, resume=True)
    assert message == f"{unused}: holds no run to resume; start one without --resume"


def test_resume_and_overwrite_together(whole, config):
    before = files_of(whole.run.path)
    message = refusal(ValueError, config, whole.run.path, resume=True, overwrite=True)
    assert message == "resume and overwrite exclude each other: expected at most one of them"
    assert files_of(whole.run.path) == before


@pytest.fixture
def kept(whole, tmp_path):
    """A copy of a run that every refusal leaves as it was when the test last looked."""
    return load_run(shutil.copytree(whole.run.path, tmp_path / "kept"))


def assert_refused(kind, config, run, **options):
    before = files_of(run.path)
    message = refusal(kind, config, run.path, **options)
    assert files_of(run.path) == before
    return message


def test_a_place_that_holds_a_run(config, kept):
    message = assert_refused(RunError, config, kept)
    assert message.startswith(f"{kept.path}: holds another run; ")
    assert "--resume" in message
    assert "--overwrite" in message


def test_a_run_is_not_replaced_by_one_that_cannot_be(config, kept, tmp_path):
    (tmp_path / "short").write_text("ab")
    short = with_data(config, source=str(tmp_path / "short"))
    assert_refused(ValueError, short, kept, overwrite=True)
    assert_refused(ValueError, with_data(config, source="/no/file"), kept, overwrite=True)


def test_resuming_with_another_configuration_names_the_fields(config, kept):
    other = dataclasses.replace(
        with_fit(config, learning_rate=0.1, steps=300),
        model=LanguageModelConfig(layers=2, heads=HEADS, width=WIDTH, block=BLOCK, prior_rank=2),
        objective=ObjectiveConfig("ce"),
    )
    message = assert_refused(RunError, other, kept, resume=True)
    assert message.startswith(f"{kept.path}: cannot resume with a changed configuration: ")
    for change in (
        "model.layers: 1 -> 2",
        "objective.name: margin -> ce",
        "fit.steps: 200 -> 300",
        "fit.learning_rate: 0.03 -> 0.1",
    ):
        assert change in message
    for same in ("model.width", "data.", "fit.seed"):
        assert same not in message


def test_resuming_after_the_text_has_changed(kept, tmp_path):
    config = tiny_config(tmp_path)
    kept = dataclasses.replace(kept, config=with_fit(config, eval_every=80, checkpoint_every=60))
    text = (kept.path / "config.toml").read_text("utf-8")
    moved = text.replace(load_run(kept.path).config.data.source, config.data.source)
    (kept.path / "config.toml").write_text(moved, "utf-8")
    (tmp_path / "corpus.txt").write_text(tiny_text(seed=1), "utf-8")
    message = assert_refused(RunError, kept.config, kept, resume=True)
    assert "with checksum " + kept.data["sha256"][:12] in message
    assert "restore the text, or start a new run" in message


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}])
def test_a_run_that_another_process_fits(config, kept, options):
    with held_by_another_process(kept):
        message = assert_refused(RunError, config, kept, **options)
        assert message == f"{kept.path}: another process is writing to this run"


@pytest.mark.parametrize("name", ["config.toml", "data.json"])
def test_resuming_a_run_whose_description_is_damaged(config, kept, name):
    whole = (kept.path / name).read_bytes()
    for end in (0, len(whole) // 2, len(whole) - 5):
        (kept.path / name).write_bytes(whole[:end])
        assert f"{kept.path / name}: " in assert_refused(RunError, config, kept, resume=True)


@pytest.mark.parametrize("size", [2.5, 1.0, 0.0, None])
def test_resuming_a_run_whose_metrics_are_damaged(config, kept, size):
    """Cut off within the last line, cut off after the first, empty, or gone."""
    path = kept.path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.unlink()
    if size is not None:
        end = sum(map(len, lines[: int(size)])) + int(size % 1 * len(lines[0]))
        path.write_bytes(b"".join(lines)[:end])
    message = assert_refused(RunError, config, kept, resume=True)
    assert message.startswith(f"{path}")
    assert "--overwrite" in message


def test_resuming_from_a_damaged_checkpoint(config, kept):
    folder = kept.path / "checkpoints" / "latest" / "200"
    largest = max(folder.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    largest.write_bytes(largest.read_bytes()[:-1000])
    message = assert_refused(CheckpointError, config, kept, resume=True)
    assert message.startswith(f"{folder}: the checkpoint is damaged")


def test_no_file_of_a_run_holds_what_json_lacks(whole):
    constants = []  # NaN, Infinity and -Infinity, as Python writes and reads them
    for name in ("metrics.jsonl", "summary.json", "data.json"):
        text = (whole.run.path / name).read_text("utf-8")
        for part in text.splitlines() if name.endswith("l") else [text]:
            assert json.loads(part, parse_constant=constants.append)
    assert constants == []
