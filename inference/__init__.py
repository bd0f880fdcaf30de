"""Everything that runs: fit, sample, evaluate, generate, and the run directories they share."""

from probattn.inference.chains import SampleError
from probattn.inference.compare import ComparedRun, compare
from probattn.inference.config import FitConfig, RunConfig, read_config
from probattn.inference.evaluate import EvaluateResult, evaluate
from probattn.inference.filtering import FilterError
from probattn.inference.fit import fit
from probattn.inference.fit_result import FitError, FitResult
from probattn.inference.generate import Generated, generate
from probattn.inference.guides import guide_draws
from probattn.inference.laplace import LaplaceError
from probattn.inference.nuts import sample
from probattn.inference.post_hoc import PostHocPrior, post_hoc_prior
from probattn.inference.posterior import load_posterior, sample_run
from probattn.inference.posterior_result import PosteriorResult
from probattn.inference.runs import PosteriorRun, Run, load_run
from probattn.inference.sample_config import SampleConfig, SampleRunConfig
from probattn.inference.sensitivity import Sensitivity, sensitivity
from probattn.inference.to_arviz import to_datatree
from probattn.inference.token_margins import TextMargins, text_margins

__all__ = [
    "ComparedRun",
    "EvaluateResult",
    "FilterError",
    "FitConfig",
    "FitError",
    "FitResult",
    "Generated",
    "LaplaceError",
    "PostHocPrior",
    "PosteriorResult",
    "PosteriorRun",
    "Run",
    "RunConfig",
    "SampleConfig",
    "SampleError",
    "SampleRunConfig",
    "Sensitivity",
    "TextMargins",
    "compare",
    "evaluate",
    "fit",
    "generate",
    "guide_draws",
    "load_posterior",
    "load_run",
    "post_hoc_prior",
    "read_config",
    "sample",
    "sample_run",
    "sensitivity",
    "text_margins",
    "to_datatree",
]
