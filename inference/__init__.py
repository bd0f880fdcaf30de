"""Everything that runs: fit, sample, evaluate, generate, and the run directories they share."""

from probattn.inference.comparison.compare import ComparedRun, compare
from probattn.inference.comparison.particle_filter import FilterError
from probattn.inference.config import FitConfig, RunConfig
from probattn.inference.config_files import read_config
from probattn.inference.config_sampling import SampleConfig, SampleRunConfig
from probattn.inference.config_tuning import PriorConfig, TuneConfig, TuneFitConfig
from probattn.inference.evaluation.evaluate import EvaluateResult, evaluate
from probattn.inference.evaluation.folding_texts import FoldingText, folding_texts
from probattn.inference.evaluation.generation import Generated, generate
from probattn.inference.evaluation.post_hoc import PostHocPrior, post_hoc_prior
from probattn.inference.evaluation.sensitivity import Sensitivity, sensitivity
from probattn.inference.evaluation.stage_certificates import StageCertificate
from probattn.inference.evaluation.token_margins import TextMargins, text_margins
from probattn.inference.exchange.export_decoder import export_decoder
from probattn.inference.exchange.import_decoder import Imported, import_decoder
from probattn.inference.export.diagnostics import ChainWeight, stack_chains
from probattn.inference.export.to_arviz import to_datatree
from probattn.inference.figures.pages import comparison_page, posterior_page
from probattn.inference.fitting.fit import fit
from probattn.inference.fitting.result import FitError, FitResult
from probattn.inference.guides.guide_draws import guide_draws
from probattn.inference.guides.laplace import LaplaceError
from probattn.inference.pretrained.errors import PretrainedError
from probattn.inference.runs.run import ImportedRun, PosteriorRun, Run, TunedRun, load_run
from probattn.inference.sampling.chains import SampleError
from probattn.inference.sampling.posterior_runs import load_posterior, sample_run
from probattn.inference.sampling.result import PosteriorResult
from probattn.inference.sampling.sample import sample

__all__ = [
    "ChainWeight",
    "ComparedRun",
    "EvaluateResult",
    "FilterError",
    "FitConfig",
    "FitError",
    "FitResult",
    "FoldingText",
    "Generated",
    "Imported",
    "ImportedRun",
    "LaplaceError",
    "PostHocPrior",
    "PosteriorResult",
    "PosteriorRun",
    "PretrainedError",
    "PriorConfig",
    "Run",
    "RunConfig",
    "SampleConfig",
    "SampleError",
    "SampleRunConfig",
    "Sensitivity",
    "StageCertificate",
    "TextMargins",
    "TuneConfig",
    "TuneFitConfig",
    "TunedRun",
    "compare",
    "comparison_page",
    "evaluate",
    "export_decoder",
    "fit",
    "folding_texts",
    "generate",
    "guide_draws",
    "import_decoder",
    "load_posterior",
    "load_run",
    "post_hoc_prior",
    "posterior_page",
    "read_config",
    "sample",
    "sample_run",
    "sensitivity",
    "stack_chains",
    "text_margins",
    "to_datatree",
]
