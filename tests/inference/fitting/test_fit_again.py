"""A fit that was cut, killed or ended goes on as if it had not been; one seed, one fit."""

import dataclasses
import itertools
import os
import shutil
import signal
import time

import numpy as np
import pytest

from probattn.inference import fit, load_run
from probattn.inference.evaluation.scoring import Scorer
from probattn.inference.fitting import loop
from probattn.inference.fitting.svi import Trainer
from probattn.inference.runtime.signals import Interrupted
from tests.support.whole_fit import (
    REPORTS,
    assert_same_outcome,
    rows_of,
)


@pytest.mark.slow
def test_the_seed_makes_the_fit_wherever_its_calls_are_cut(whole, config, tmp_path, monkeypatch):
    """Here every step is a call of its own, over a run that is to be replaced."""
    copy = shutil.copytree(whole.copies[160], tmp_path / "run")
    (copy / "post_hoc_prior.npz").write_bytes(b"of the other run")
    monkeypatch.setattr(loop, "CALL_SECONDS", 0.0)
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
