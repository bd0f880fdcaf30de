"""What a fit comes to: its result, or why it cannot go on."""

from dataclasses import dataclass, field
from typing import Any

from probattn.inference.pages.notebook import facts_in_notebook
from probattn.inference.runs.run import Run, TunedRun


class FitError(RuntimeError):
    """A fit cannot go on: the message says at which step, why, and what to try."""


@dataclass(frozen=True)
class FitResult:
    """A finished fit.

    Attributes:
        run: the run directory; `run.parameters` are those of the best validation.
        validation_cross_entropy: cross-entropy of `run.parameters` on the validation text, or on
            at most `fit.evaluation_tokens` of its tokens, nats per token.
        validation_bpc: the same in bits per character.
        metrics: the lines of metrics.jsonl.
        table_certificate: rho of the stage that objective margin or full trains, over all texts;
            below 1 no text can fold it. None for other objectives.
    """

    run: Run | TunedRun
    validation_cross_entropy: float
    validation_bpc: float
    metrics: list[dict[str, Any]] = field(repr=False, hash=False)
    table_certificate: float | None = None

    def _repr_html_(self) -> str:
        objective = self.run.config.objective
        facts: dict[str, object] = {
            "objective": objective.name,
            "best step": self.run.step,
            "validation cross-entropy (nats per token)": self.validation_cross_entropy,
            "validation bits per character": self.validation_bpc,
        }
        margins = [row["min_margin"] for row in self.metrics if row.get("min_margin") is not None]
        if margins:
            facts["smallest margin at the last report"] = margins[-1]
        if self.table_certificate is not None:
            facts["certificate over all texts (below 1: no text folds it)"] = self.table_certificate
        return facts_in_notebook(f"Fit in {self.run.path}", facts)
