"""What ends a fit: numbers that are not finite, no step that moves, no room on the disk."""

import errno
import math
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from probattn.inference import FitError, fit, load_run
from probattn.inference.evaluation.scoring import Scorer
from probattn.inference.fitting import loop
from probattn.inference.fitting.optimizers import default_optimizer
from probattn.inference.fitting.svi import Trainer
from probattn.inference.runs.files import WriteError
from tests.support.refusals import refusal
from tests.support.tiny_run import files_of
from tests.support.whole_fit import (
    assert_same_outcome,
    state_of,
)


def spoil(patch, step, name):
    """After a step, one parameter is not a number."""
    patch.setattr(loop, "CALL_SECONDS", 0.0)  # so that every step ends a call
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
        message = refusal(FitError, fit, config, tmp_path / "run")
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
    message = refusal(FitError, fit, config, tmp_path / "run")
    assert f"the fit stopped at step {step}: the parameters are not finite; " in message
    assert ("no checkpoint was made before it" if kept is None else "step 60 is kept") in message
    run = load_run(tmp_path / "run")
    assert (run.latest.step, run.step, run.metrics()) == (kept, None, [])
    assert run.stopped == (step, "the parameters are not finite")


def test_a_fit_that_fails_early_leaves_the_run_that_it_was_to_replace(
    whole, config, tmp_path, monkeypatch
):
    copy = shutil.copytree(whole.run.path, tmp_path / "run")
    before = files_of(copy)
    spoil(monkeypatch, 60, "w_query")
    message = refusal(FitError, fit, config, copy, overwrite=True)
    assert "no checkpoint was made before it, and the run that it was to replace stays" in message
    assert files_of(copy) == before


@pytest.mark.slow
def test_who_gave_the_optimizer_is_not_told_of_the_default_one(config, tmp_path, monkeypatch):
    spoil(monkeypatch, 60, "w_query")
    own = default_optimizer(config.fit)
    message = refusal(FitError, fit, config, tmp_path / "run", optimizer=own)
    assert "try smaller steps of the optimizer, with --overwrite" in message
    assert "learning_rate" not in message


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
    message = refusal(FitError, fit, config, tmp_path / "run")
    cause = "the optimizer state is not finite (svi.optim_state.1.1.0.nu.w_key_auto_loc)"
    assert f"the fit stopped at step 60: {cause}; no checkpoint was made before it" in message
    run = load_run(tmp_path / "run")
    assert (run.latest.step, run.stopped) == (None, (60, cause))


def test_a_figure_that_is_not_finite_is_not_reported(config, tmp_path, monkeypatch):
    monkeypatch.setattr(Scorer, "embedding_rms", lambda *arguments: math.inf)
    message = refusal(FitError, fit, config, tmp_path / "run")
    assert "the fit stopped at step 80: embedding_rms is inf; step 60 is kept" in message
    run = load_run(tmp_path / "run")
    assert (run.step, run.metrics(), run.stopped) == (None, [], (80, "embedding_rms is inf"))


@pytest.mark.slow
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
    message = refusal(FitError, fit, config, tmp_path / "run")
    assert "the fit stopped at step 200: every step would have crossed the attention" in message
    run = load_run(tmp_path / "run")
    assert [row["rejected_steps"] for row in run.metrics()] == [80, 160]
    assert run.stopped[0] == 200
    assert run.summary() == {}


@pytest.mark.slow
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
    message = refusal(WriteError, fit, config, tmp_path / "run")
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
