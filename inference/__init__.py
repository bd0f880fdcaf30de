"""Everything that runs: fit, evaluate, generate, and the run directories they share."""

from probattn.inference.config import FitConfig, RunConfig, read_config
from probattn.inference.evaluate import EvaluateResult, evaluate
from probattn.inference.fit import FitError, FitResult, fit
from probattn.inference.generate import Generated, generate
from probattn.inference.post_hoc import PostHocPrior, post_hoc_prior
from probattn.inference.runs import Run, load_run
from probattn.inference.to_arviz import to_datatree
from probattn.inference.token_margins import TextMargins, text_margins

__all__ = [
    "EvaluateResult",
    "FitConfig",
    "FitError",
    "FitResult",
    "Generated",
    "PostHocPrior",
    "Run",
    "RunConfig",
    "TextMargins",
    "evaluate",
    "fit",
    "generate",
    "load_run",
    "post_hoc_prior",
    "read_config",
    "text_margins",
    "to_datatree",
]
