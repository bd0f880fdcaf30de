"""What a fit comes to: its result, or why it cannot go on."""

from dataclasses import dataclass, field
from typing import Any

from probattn.inference.runs.run import Run


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

    run: Run
    validation_cross_entropy: float
    validation_bpc: float
    metrics: list[dict[str, Any]] = field(repr=False, hash=False)
    table_certificate: float | None = None
