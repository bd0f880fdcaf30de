"""Fit a language model by SVI: the loop around the steps, and what it leaves in a run directory."""

import math
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from probattn.corpora import Corpus, load_corpus
from probattn.inference.config import RunConfig, format_config
from probattn.inference.fit_result import FitError, FitResult
from probattn.inference.guides import OWN_PARAMS, check_guide
from probattn.inference.interrupts import Interrupted, deferred_interrupts
from probattn.inference.latent_metrics import latent_metrics
from probattn.inference.mesh import Placement
from probattn.inference.monitor import Monitor
from probattn.inference.optimizers import check_optimizer
from probattn.inference.processes import agreed, check_alike, leads, wait_for_all
from probattn.inference.progress import Bar, progress_bar
from probattn.inference.run_checks import check_options, check_same_config, check_same_corpus
from probattn.inference.run_files import RunError
from probattn.inference.run_folder import is_replacing, locked, room_for_run
from probattn.inference.runs import Run, create_run, load_fit
from probattn.inference.scoring import Scorer
from probattn.inference.svi import Trainer
from probattn.inference.training_tokens import training_tokens
from probattn.vocabulary import build_vocabulary

_REPORT_TOKENS = 16_384  # of training and of validation text behind each line of metrics.jsonl
_CALL_SECONDS = 0.5  # of steps between two updates of the progress bar


def fit(
    config: RunConfig,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    optimizer: optax.GradientTransformation | None = None,
    mesh: str = "",
    progress: bool = False,
) -> FitResult:
    """Fit a language model with NumPyro's SVI: by MAP, or with another guide, `config.fit.guide`.

    Minibatches and initial parameters are functions of the seed, so a run that was interrupted and
    resumed ends as one that was not. The parameters of the best validation are kept.

    Args:
        config: data, model, objective and fit.
        out: run directory, see `runs`; new or empty unless `resume` or `overwrite` is set.
        resume: continue the run in `out` from its latest checkpoint.
        overwrite: replace the run in `out`.
        optimizer: any optax transformation, by default Adam with warm-up and cosine decay. It is
            not recorded in the run: pass it again to resume.
        mesh: devices over which minibatches ("data" and "fsdp") and parameters ("fsdp") are
            spread, such as "data=2,fsdp=4"; by default one. It changes no more than rounding, is
            no part of the configuration, and may be another one in a run that is resumed. Of
            several processes (`processes.joined`) all call `fit`, and the first writes.
        progress: show a progress bar and a line per report.

    Returns:
        The finished run.

    Raises:
        ValueError: if the text is unusable, `out` holds something else, the configuration is not
            the run's (the subclasses DataError, RunError and CheckpointError say which), the
            model is too large for the guide laplace, or the mesh is none for these devices.
        FitError: if the loss, a parameter, the optimizer state or a reported figure is not finite
            any more. metrics.jsonl says so, see `Run.stopped`; the checkpoint before is kept.
        Interrupted: on SIGINT or SIGTERM, after the state was saved.
    """
    out = Path(out)
    placement = Placement(mesh, batch=config.fit.batch)
    if leads():
        check_options(out, resume=resume, overwrite=overwrite)
    check_optimizer(config.fit, optimizer)
    corpus = load_corpus(config.data)
    check_alike("the options", format_config(config), corpus.sha256, mesh, resume)
    if resume:
        run = _reopen(out, config, corpus)
        train, validation = training_tokens(corpus, run.vocabulary, config)
    else:
        vocabulary = build_vocabulary(config.data.tokenizer, corpus.train + corpus.validation)
        train, validation = training_tokens(corpus, vocabulary, config)
        check_guide(config, vocabulary.size)
    with ExitStack() as held:
        if leads():
            held.enter_context(locked(out))  # from before the run is made to its end
        if leads() and not resume:
            held.enter_context(room_for_run(out, overwrite=overwrite))
            create_run(out, config, corpus, vocabulary)
        wait_for_all("made")
        run = load_fit(out)
        loop = _Loop(run, train, validation, optimizer, placement)
        with progress_bar(
            f"fit {config.objective.name}",
            total=config.fit.steps,
            initial=loop.step,
            unit="step",
            visible=progress and leads(),
        ) as bar:
            loop.go(bar)
        if leads():
            _conclude(run, validation)
        wait_for_all("concluded")
    score = run.summary()["fit"]
    return FitResult(run, score["validation_cross_entropy"], score["validation_bpc"], run.metrics())


class _Loop:
    """The state of a fit between compiled calls."""

    def __init__(
        self,
        run: Run,
        train: np.ndarray,
        validation: np.ndarray,
        optimizer: optax.GradientTransformation | None,
        placement: Placement,
    ) -> None:
        config = run.config
        self.run = run
        self._advice = (
            f"try a smaller fit.learning_rate (now {config.fit.learning_rate:g}) or a longer "
            f"fit.warmup (now {config.fit.warmup})"
            if optimizer is None
            else "try smaller steps of the optimizer"
        )
        self._trainer = Trainer(
            config, jnp.asarray(train), run.vocabulary.size, optimizer, placement
        )
        self._scorers = {
            prefix: Scorer(
                config.model,
                run.vocabulary,
                tokens,
                most_tokens=_REPORT_TOKENS,
                precision=config.fit.precision,
            )
            for prefix, tokens in (("", train), ("validation_", validation))
        }
        self._monitor = Monitor(config, self._scorers[""].inputs)
        self._state = self._trainer.init()
        # An optimizer of the user's may start from infinities, such as a best loss so far.
        self._finite = [n for n, leaf in self._saved().items() if _is_finite(leaf)]
        self._seconds = 0.0
        self._reported_step = self.step = run.latest.step or 0
        check_alike("the last checkpoint", self.step)
        if self.step:
            self._state = self._trainer.restored(self._state, run.latest.load)
        wait_for_all("restored")
        self._shown: dict[str, str] = {}
        self._best = math.inf
        if leads():
            for folder in (run.latest, run.best):
                folder.tidy()
            rows = self._reported()
            run.write_metrics(rows)
            self._best = min((row["validation_cross_entropy"] for row in rows), default=math.inf)
            if (run.best.step or 0) > self.step:  # of steps that are taken again
                kept = run.best.load(run.parameter_shapes())
                self._best = self._scorers["validation_"].score(kept).cross_entropy

    def go(self, bar: Bar) -> None:
        """Take all steps that are left."""
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
                calls = max(1, min(2 * calls, round(_CALL_SECONDS * done / max(seconds, 1e-9))))
                calls, signum = agreed(calls, interrupted())
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
        rate = steps * fit.batch * self.run.config.model.block / seconds
        bar.show(loss=f"{float(progress.loss):.3f}", tokens=f"{rate:,.0f}/s", **self._shown)
        return seconds

    def _report(self, bar: Bar) -> None:
        """Score training and validation text, note it, keep the parameters if they are best."""
        guide_params = self._finite_params()
        rejected = int(self._state.rejected)
        if rejected == self.step == self.run.config.fit.steps and self._unmoved(guide_params):
            self._fail(self.step, "every step would have crossed the attention barrier")
        if leads():
            self._write_report(bar, guide_params)
        self._state = self._trainer.reported(self._state)
        self._seconds, self._reported_step = 0.0, self.step

    def _write_report(self, bar: Bar, guide_params: dict[str, jax.Array]) -> None:
        """What the first process does of it: it alone scores and writes."""
        parameters = self._trainer.guide.median(guide_params)
        row: dict[str, Any] = {"step": self.step}
        for prefix, scorer in self._scorers.items():
            score = scorer.score(parameters)
            row |= {f"{prefix}cross_entropy": score.cross_entropy, f"{prefix}bpc": score.bpc}
        fit, block = self.run.config.fit, self.run.config.model.block
        tokens = (self.step - self._reported_step) * fit.batch * block
        row |= {
            "loss": float(self._state.loss_sum) / max(int(self._state.loss_count), 1),
            "tokens_per_s": tokens / self._seconds if self._seconds else None,
            **self._monitor(parameters),
            **latent_metrics(self.run.config, self._scorers, parameters, guide_params),
            "rejected_steps": int(self._state.rejected),
            "embedding_rms": self._scorers[""].embedding_rms(parameters),
        }
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                self._fail(self.step, f"{name} is {value}")
        self.run.append_metrics(row)
        self._shown = {
            "bpc": f"{row['validation_bpc']:.3f}",
            "margin": f"{row['min_margin']:.3f}",
        }
        bar.line(
            f"step {self.step:6d}  bpc {row['bpc']:.3f}  validation {row['validation_bpc']:.3f}  "
            f"smallest margin {row['min_margin']:.3f} ({row['min_margin_kind']})"
        )
        if row["validation_cross_entropy"] < self._best:
            self._best = row["validation_cross_entropy"]
            others = {}
            if fit.guide in OWN_PARAMS:
                others["guide"] = guide_params
            self.run.best.save(self.step, parameters, **others)

    def _save(self) -> None:
        self._finite_params()
        saved = self._saved()
        # A squared gradient may overflow where parameters and loss do not: Adam then stands still.
        for name in self._finite:
            if not _is_finite(saved[name]):
                self._fail(self.step, f"the optimizer state is not finite ({name})")
        if leads():
            self.run.latest.save(self.step, saved)
        wait_for_all("saved")

    def _unmoved(self, params: dict[str, jax.Array]) -> bool:
        """Whether the fit is where it started: a step that was shortened does move it."""
        start = self._trainer.guide_params(self._trainer.init())
        return all(np.array_equal(start[name], params[name]) for name in start)

    def _saved(self) -> dict[str, np.ndarray]:
        return self._trainer.saved(self._state)

    def _finite_params(self) -> dict[str, jax.Array]:
        """The guide's parameters, and thereby those of the network."""
        params = self._trainer.guide_params(self._state)
        if not all(map(_is_finite, params.values())):
            self._fail(self.step, "the parameters are not finite")
        return params

    def _reported(self) -> list[dict[str, Any]]:
        """The reports up to the checkpoint; those after it are made again."""
        fit, path = self.run.config.fit, self.run.path / "metrics.jsonl"
        rows = [row for row in self.run.metrics() if row["step"] <= self.step]
        steps = [row["step"] for row in rows]
        expected = list(range(fit.eval_every, self.step + 1, fit.eval_every))
        if self.step == fit.steps and fit.steps % fit.eval_every:
            expected.append(fit.steps)
        if steps != expected:
            raise RunError(
                f"{path}: has reports of steps {steps}: expected {expected}, up to the checkpoint "
                "to resume from; restore it from a copy, or start again with --overwrite"
            )
        return rows

    def _fail(self, step: int, cause: str) -> None:
        if leads():
            self.run.append_metrics({"step": step, "stopped": cause})
        kept = self.run.latest.step
        good = "no checkpoint was made before it" if kept is None else f"step {kept} is kept"
        if is_replacing(self.run.path):
            good += ", and the run that it was to replace stays"
        raise FitError(
            f"{self.run.path}: the fit stopped at step {step}: {cause}; {good}; {self._advice}, "
            "with --overwrite"
        )


def _conclude(run: Run, validation: np.ndarray) -> None:
    fit = run.config.fit
    scorer = Scorer(
        run.config.model,
        run.vocabulary,
        validation,
        most_tokens=fit.evaluation_tokens,
        precision=fit.precision,
    )
    score = scorer.score(run.parameters)
    rows = run.metrics()
    run.update_summary(
        fit={
            "inference": fit.guide,
            "steps": fit.steps,
            "best_step": run.step,
            "validation_cross_entropy": score.cross_entropy,
            "validation_bpc": score.bpc,
            "validation_tokens": score.tokens,
            "rejected_steps": rows[-1]["rejected_steps"],
            "parameters": sum(leaf.size for leaf in run.parameters.values()),
        }
    )


def _reopen(out: Path, config: RunConfig, corpus: Corpus) -> Run:
    run = load_fit(out)
    check_same_config(run, config)
    check_same_corpus(run, corpus)
    return run


def _is_finite(leaf: jax.Array | np.ndarray) -> bool:
    return bool(np.isfinite(np.asarray(leaf)).all())


def _next_multiple(step: int, every: int) -> int:
    return (step // every + 1) * every
