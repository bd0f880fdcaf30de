"""Causal self-attention as a probabilistic program: exact log-determinants, margins, inference."""

from probattn.ancestral import sequence_gain
from probattn.attention import attention_weights, conditional_mean, coupling, residual
from probattn.distributions import AttentionResidual, CausalAttention
from probattn.log_determinants import jacobian_blocks, log_det, reduced_blocks, relaxed_barrier
from probattn.margins import embedding_margin, infeasible, stability_margin, support_tokens
from probattn.proper import certificate, is_proper
from probattn.total_mass import conditional_mass

__version__ = "0.1.0"

__all__ = [
    "AttentionResidual",
    "CausalAttention",
    "attention_weights",
    "certificate",
    "conditional_mass",
    "conditional_mean",
    "coupling",
    "embedding_margin",
    "infeasible",
    "is_proper",
    "jacobian_blocks",
    "log_det",
    "reduced_blocks",
    "relaxed_barrier",
    "residual",
    "sequence_gain",
    "stability_margin",
    "support_tokens",
]
