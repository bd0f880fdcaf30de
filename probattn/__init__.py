"""Causal self-attention as a probabilistic program: exact log-determinants, margins, inference."""

from probattn.attention import attention_weights, conditional_mean, coupling, residual
from probattn.distributions import AttentionResidual, CausalAttention
from probattn.log_determinants import jacobian_blocks, log_det, reduced_blocks, relaxed_barrier
from probattn.margins import embedding_margin, infeasible, stability_margin, support_tokens
from probattn.stability.certificates import certificate, margin_lower_bound
from probattn.stability.folds import nearest_fold
from probattn.stability.proper import is_proper
from probattn.stability.radius import certified_radius
from probattn.stability.sequence_gain import sequence_gain
from probattn.stability.tables import table_certificate
from probattn.stages.block_spectrum import BlockSpectrum, block_spectrum
from probattn.stages.layer import AttentionLayer
from probattn.stages.projections import Norm, Rotary
from probattn.stages.stage import AttentionStage
from probattn.total_mass import conditional_mass

__version__ = "0.1.0"

__all__ = [
    "AttentionLayer",
    "AttentionResidual",
    "AttentionStage",
    "BlockSpectrum",
    "CausalAttention",
    "Norm",
    "Rotary",
    "attention_weights",
    "block_spectrum",
    "certificate",
    "certified_radius",
    "conditional_mass",
    "conditional_mean",
    "coupling",
    "embedding_margin",
    "infeasible",
    "is_proper",
    "jacobian_blocks",
    "log_det",
    "margin_lower_bound",
    "nearest_fold",
    "reduced_blocks",
    "relaxed_barrier",
    "residual",
    "sequence_gain",
    "stability_margin",
    "support_tokens",
    "table_certificate",
]
