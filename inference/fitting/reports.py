"""Reports of a fit: scores of a step, the line of metrics.jsonl, the best parameters."""

import math
from typing import Any

import jax
import numpy as np

from probattn.inference.config import RunConfig
from probattn.inference.config_tuning import TuneConfig
from probattn.inference.evaluation.scoring import Scorer
from probattn.inference.evaluation.stage_certificates import trained_certificate
from probattn.inference.fitting.latent_metrics import latent_metrics
from probattn.inference.fitting.monitor import DecoderMonitor, Monitor
from probattn.inference.guides.guides import OWN_PARAMS
from probattn.inference.runs.files import RunError
from probattn.inference.runs.run import Run, TunedRun

REPORT_TOKENS = 16_384  # tokens of training and of validation text for each line of metrics.jsonl


class Reports:
    """Scores of a fit's parameters, and what they leave in its run.

    Args:
        run: where they are written.
        train: training tokens, (N,).
        validation: validation tokens, (M,).
    """

    def __init__(self, run: Run | TunedRun, train: np.ndarray, validation: np.ndarray) -> None:
        self._run = run
        self._scorers = {
            prefix: _scorer(run, tokens, most_tokens=REPORT_TOKENS)
            for prefix, tokens in (("", train), ("validation_", validation))
        }
        inputs = self._scorers[""].inputs
        self._monitor: Monitor | DecoderMonitor
        if isinstance(run, TunedRun):
            self._monitor = DecoderMonitor(run.network, inputs)
        else:
            self._monitor = Monitor(run.config, inputs)
        self._best = math.inf

    def resume(self, step: int) -> None:
        """Drop the reports after a checkpoint, since its fit makes them again.

        Raises:
            RunError: if a report up to the checkpoint is missing.
        """
        rows = self._up_to(step)
        self._run.write_metrics(rows)
        self._best = min((row["validation_cross_entropy"] for row in rows), default=math.inf)
        if (self._run.best.step or 0) > step:  # its steps are taken again
            kept = self._run.best.load(self._run.parameter_shapes())
            kept = self._run.network_parameters(kept)
            self._best = self._scorers["validation_"].score(kept).cross_entropy

    def measure(
        self,
        sites: dict[str, jax.Array],
        guide_params: dict[str, jax.Array],
        *,
        step: int,
        loss: float,
        tokens_per_s: float | None,
        rejected_steps: int,
    ) -> dict[str, Any]:
        """Return a line of metrics.jsonl: scores and margins of parameters, and what is given."""
        row: dict[str, Any] = {"step": step}
        parameters = self._run.network_parameters(sites)
        for prefix, scorer in self._scorers.items():
            score = scorer.score(parameters)
            row |= {f"{prefix}cross_entropy": score.cross_entropy, f"{prefix}bpc": score.bpc}
        config = self._run.config
        return row | {
            "loss": loss,
            "tokens_per_s": tokens_per_s,
            **self._monitor(parameters),
            **(
                latent_metrics(config, self._scorers, parameters, guide_params)
                if isinstance(config, RunConfig)
                else {}
            ),
            "rejected_steps": rejected_steps,
            "embedding_rms": self._scorers[""].embedding_rms(parameters),
        }

    def write(
        self,
        row: dict[str, Any],
        parameters: dict[str, jax.Array],
        guide_params: dict[str, jax.Array],
    ) -> None:
        """Append a line to metrics.jsonl, and keep the parameters if they are the best so far."""
        self._run.append_metrics(row)
        if row["validation_cross_entropy"] < self._best:
            self._best = row["validation_cross_entropy"]
            others = {}
            if self._run.config.fit.guide in OWN_PARAMS:
                others["guide"] = guide_params
            self._run.best.save(row["step"], parameters, **others)

    def _up_to(self, step: int) -> list[dict[str, Any]]:
        path = self._run.path / "metrics.jsonl"
        rows = self._run.metrics("validation_cross_entropy", "rejected_steps")
        rows = [row for row in rows if row["step"] <= step]
        steps = [row["step"] for row in rows]
        expected = _report_steps(self._run.config, step)
        if steps != expected:
            raise RunError(
                f"{path}: has reports of steps {steps}: expected {expected}, up to the checkpoint "
                "to resume from; restore it from a copy, or start again with --overwrite"
            )
        return rows


def summarise_fit(run: Run | TunedRun, validation: np.ndarray) -> None:
    """Score and certify the best parameters, and store the result in summary.json."""
    fit = run.config.fit
    score = _scorer(run, validation, most_tokens=fit.evaluation_tokens).score(run.parameters)
    rows = run.metrics("rejected_steps")
    run.update_summary(
        fit={
            "inference": fit.guide,
            "steps": fit.steps,
            "best_step": run.step,
            "validation_cross_entropy": score.cross_entropy,
            "validation_bpc": score.bpc,
            "validation_tokens": score.tokens,
            "rejected_steps": rows[-1]["rejected_steps"],
            "table_certificate": trained_certificate(run),
            "parameters": sum(math.prod(leaf.shape) for leaf in run.parameter_shapes().values()),
        }
    )


def _scorer(run: Run | TunedRun, tokens: np.ndarray, *, most_tokens: int | None) -> Scorer:
    return Scorer(run.fitted_network, run.vocabulary, tokens, most_tokens=most_tokens)


def _report_steps(config: RunConfig | TuneConfig, step: int) -> list[int]:
    """Return the steps up to this one that have a report."""
    fit = config.fit
    steps = list(range(fit.eval_every, step + 1, fit.eval_every))
    if step == fit.steps and fit.steps % fit.eval_every:
        steps.append(fit.steps)
    return steps
