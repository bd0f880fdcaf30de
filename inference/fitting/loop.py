"""The loop around the steps of a fit: calls, reports, checkpoints, signals, non-finite stops."""

import math
import time

import jax
import numpy as np
import optax

from probattn.inference.fitting.reports import Reports
from probattn.inference.fitting.result import FitError
from probattn.inference.fitting.sharding import Placement
from probattn.inference.fitting.svi import Trainer
from probattn.inference.runs.folder import is_replacing
from probattn.inference.runs.run import Run, TunedRun
from probattn.inference.runtime.cores import other_rounding
from probattn.inference.runtime.processes import (
    agree_on,
    check_same_everywhere,
    is_main_process,
    wait_for_all,
)
from probattn.inference.runtime.progress import Bar
from probattn.inference.runtime.signals import Interrupted, deferred_interrupts

CALL_SECONDS = 0.5  # seconds between two updates of the progress bar


class Loop:
    """The state of a fit between compiled calls.

    Args:
        run: the run of the fit; its latest checkpoint is restored if there is one.
        train: training tokens, (N,).
        validation: validation tokens, (M,).
        optimizer: the user's optimizer, or None for the default one.
        placement: where the arrays of the fit lie.

    Attributes:
        step: steps taken so far.
        rounding: a line to tell if they were rounded otherwise than the next ones will be.
    """

    def __init__(
        self,
        run: Run | TunedRun,
        train: np.ndarray,
        validation: np.ndarray,
        optimizer: optax.GradientTransformation | None,
        placement: Placement,
    ) -> None:
        config = run.config
        self.run = run
        self._advice = (
            f"try a smaller fit.learning_rate (now {config.fit.learning_rate:g}) or a longer "
            f"fit.warmup (now {config.fit.warmup_steps})"
            if optimizer is None
            else "try smaller steps of the optimizer"
        )
        # On a CPU no copy: what is mapped from a file is read only where minibatches are.
        tokens = jax.device_put(train, may_alias=True)
        base = run.base if isinstance(run, TunedRun) else None
        size = run.vocabulary.size
        self._trainer = Trainer(config, tokens, size, optimizer, placement, base)
        self._reports = Reports(run, train, validation)
        self._state = self._trainer.init()
        # An optimizer of the user's may start from infinities, such as a best loss so far.
        saved = self._trainer.saved(self._state)
        self._finite = [name for name, leaf in saved.items() if _is_finite(leaf)]
        self._seconds = 0.0
        self._reported_step = self.step = run.latest.step or 0
        check_same_everywhere("the last checkpoint", self.step)
        self.rounding: str | None = None
        if self.step:
            self._state = self._trainer.restored(self._state, run.latest.load)
            if self.step < config.fit.steps:
                self.rounding = other_rounding(run.latest.cores())
        wait_for_all("restored")
        self._shown: dict[str, str] = {}
        if is_main_process():
            for folder in (run.latest, run.best):
                folder.tidy()
            self._reports.resume(self.step)

    def go(self, bar: Bar) -> None:
        """Take all steps that are left.

        Raises:
            FitError: if the loss, a parameter, the optimizer state or a reported figure is not
                finite any more, or no step moves.
            Interrupted: on SIGINT, SIGTERM or SIGHUP, after the state was saved.
        """
        fit = self.run.config.fit
        calls = 1
        with deferred_interrupts() as interrupted:
            while self.step < fit.steps:
                stop = min(
                    self.step + calls,
                    _next_multiple(self.step, fit.eval_every),
                    _next_multiple(self.step, fit.checkpoint_every),
                    fit.steps,
                )
                done = stop - self.step
                seconds = self._advance(stop, bar)
                bar.update(done)
                calls = max(1, min(2 * calls, round(CALL_SECONDS * done / max(seconds, 1e-9))))
                calls, signum = agree_on(calls, interrupted())
                last = stop == fit.steps
                if last or stop % fit.eval_every == 0:
                    self._report(bar)
                if last or stop % fit.checkpoint_every == 0 or signum:
                    self._save()
                if signum and not last:
                    raise Interrupted(signum)

    def _advance(self, stop: int, bar: Bar) -> float:
        started, steps = time.perf_counter(), stop - self.step
        self._state, progress = self._trainer.advance(self._state, self.step, stop)
        self.step = stop
        finite = bool(progress.finite)
        seconds = time.perf_counter() - started
        self._seconds += seconds
        if not finite:
            self._fail(int(progress.step), f"the loss is {float(progress.loss)}")
        fit = self.run.config.fit
        rate = steps * fit.batch * self.run.network.block / seconds
        bar.show(loss=f"{float(progress.loss):.3f}", tokens=f"{rate:,.0f}/s", **self._shown)
        return seconds

    def _report(self, bar: Bar) -> None:
        guide_params = self._finite_params()
        rejected = int(self._state.rejected)
        if rejected == self.step == self.run.config.fit.steps and self._unmoved(guide_params):
            self._fail(self.step, "every step would have crossed the attention barrier")
        if is_main_process():  # it alone scores and writes
            self._write_report(bar, guide_params)
        self._state = self._trainer.reported(self._state)
        self._seconds, self._reported_step = 0.0, self.step

    def _write_report(self, bar: Bar, guide_params: dict[str, jax.Array]) -> None:
        parameters = self._trainer.guide.median(guide_params)
        fit, block = self.run.config.fit, self.run.network.block
        tokens = (self.step - self._reported_step) * fit.batch * block
        row = self._reports.measure(
            parameters,
            guide_params,
            step=self.step,
            loss=float(self._state.loss_sum) / max(int(self._state.loss_count), 1),
            tokens_per_s=tokens / self._seconds if self._seconds else None,
            rejected_steps=int(self._state.rejected),
        )
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                self._fail(self.step, f"{name} is {value}")
        self._shown = {
            "bpc": f"{row['validation_bpc']:.3f}",
            "margin": f"{row['min_margin']:.3f}",
        }
        bar.line(
            f"step {self.step:6d}  bpc {row['bpc']:.3f}  validation {row['validation_bpc']:.3f}  "
            f"smallest margin {row['min_margin']:.3f} ({row['min_margin_kind']})"
        )
        self._reports.write(row, parameters, guide_params)

    def _save(self) -> None:
        self._finite_params()
        saved = self._trainer.saved(self._state)
        # A squared gradient may overflow where parameters and loss do not: Adam then stands still.
        for name in self._finite:
            if not _is_finite(saved[name]):
                self._fail(self.step, f"the optimizer state is not finite ({name})")
        if is_main_process():
            self.run.latest.save(self.step, saved)
        wait_for_all("saved")

    def _unmoved(self, params: dict[str, jax.Array]) -> bool:
        """Tell whether the fit is where it started: a step that was shortened does move it."""
        start = self._trainer.guide_params(self._trainer.init())
        return all(np.array_equal(start[name], params[name]) for name in start)

    def _finite_params(self) -> dict[str, jax.Array]:
        """Return the guide's parameters, which determine those of the network."""
        params = self._trainer.guide_params(self._state)
        if not all(map(_is_finite, params.values())):
            self._fail(self.step, "the parameters are not finite")
        return params

    def _fail(self, step: int, cause: str) -> None:
        if is_main_process():
            self.run.append_metrics({"step": step, "stopped": cause})
        kept = self.run.latest.step
        good = "no checkpoint was made before it" if kept is None else f"step {kept} is kept"
        if is_replacing(self.run.path):
            good += ", and the run that it was to replace stays"
        raise FitError(
            f"{self.run.path}: the fit stopped at step {step}: {cause}; {good}; {self._advice}, "
            "with --overwrite"
        )


def _is_finite(leaf: jax.Array | np.ndarray) -> bool:
    return bool(np.isfinite(np.asarray(leaf)).all())


def _next_multiple(step: int, every: int) -> int:
    return (step // every + 1) * every
