"""Everything that runs: fit, evaluate, compare, and the run directories they share."""

from probattn.inference.config import FitConfig, RunConfig, read_config
from probattn.inference.fit import FitResult, fit
from probattn.inference.runs import Run, load_run

__all__ = ["FitConfig", "FitResult", "Run", "RunConfig", "fit", "load_run", "read_config"]
