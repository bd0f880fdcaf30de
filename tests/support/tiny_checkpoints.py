"""Tiny checkpoints of every family, whose weights are functions of their names and shapes.

The config.json of each is as people publish it. So tests need nothing but the logits that
`make_decoder_references.py` has computed with transformers, and no weights.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np

REFERENCES = Path(__file__).parent / "decoder_references"
POSITIONS = (0, 1, 2, 7, 31, 32, 63, 128, 255, 299)
LENGTH = 300
VOCABULARY = 61

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 20,
    "initializer_range": 0.02,
    "intermediate_size": 33,
    "max_position_embeddings": 320,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}
_GPT2 = {
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "model_type": "gpt2",
    "n_ctx": 320,
    "n_embd": 21,
    "n_head": 3,
    "n_layer": 2,
    "n_positions": 320,
    "summary_type": "cls_index",
    "vocab_size": VOCABULARY,
}
_NEOX = {
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 21,
    "intermediate_size": 34,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 320,
    "model_type": "gpt_neox",
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.6,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "vocab_size": VOCABULARY,
}
_LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
_GEMMA = _LLAMA | {
    "head_dim": 6,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 11,
    "sliding_window": 29,
}
del _GEMMA["hidden_act"]

CONFIGS = {
    "gpt2": _GPT2,
    "gpt2_variant": _GPT2
    | {
        "activation_function": "gelu",
        "n_inner": 31,
        "scale_attn_weights": False,
        "tie_word_embeddings": False,
    },
    "gpt_neox": _NEOX,
    "gpt_neox_variant": _NEOX
    | {
        "attention_bias": False,
        "rope_scaling": {"type": "linear", "factor": 3.0},
        "tie_word_embeddings": True,
        "use_parallel_residual": False,
    },
    "smollm": _LLAMA
    | {
        "hidden_size": 30,
        "is_llama_config": True,
        "model_type": "llama",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "pretraining_tp": 1,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
    },
    "llama": _LLAMA
    | {
        "attention_bias": False,
        "head_dim": 6,
        "mlp_bias": False,
        "model_type": "llama",
        "rope_scaling": _LLAMA3,
        "rope_theta": 100.0,
        "tie_word_embeddings": False,
    },
    "llama_variant": _LLAMA
    | {
        "attention_bias": True,
        "head_dim": 14,
        "hidden_act": "gelu",
        "mlp_bias": True,
        "model_type": "llama",
        "rope_scaling": {"type": "linear", "factor": 2.5},
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
    "mistral": _LLAMA
    | {"head_dim": 10, "model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 37},
    "mistral_variant": _LLAMA
    | {"head_dim": None, "model_type": "mistral", "sliding_window": None}
    | {"hidden_size": 24},
    "qwen2": _LLAMA
    | {
        "hidden_size": 24,
        "max_window_layers": 1,
        "model_type": "qwen2",
        "rope_theta": 1000000.0,
        "sliding_window": 50,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
    },
    "qwen3": _LLAMA
    | {
        "attention_bias": False,
        "head_dim": 14,
        "max_window_layers": 2,
        "model_type": "qwen3",
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "qwen3_variant": _LLAMA
    | {
        "attention_bias": True,
        "head_dim": 10,
        "layer_types": ["sliding_attention", "full_attention"],
        "model_type": "qwen3",
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "sliding_window": 20,
        "use_sliding_window": True,
    },
    "gemma2": _GEMMA
    | {
        "attn_logit_softcapping": 3.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 4.0,
        "hidden_act": "gelu_pytorch_tanh",
        "model_type": "gemma2",
        "rope_theta": 10000.0,
    },
    "gemma2_variant": _GEMMA
    | {
        "attention_bias": True,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "layer_types": ["full_attention", "sliding_attention"],
        "model_type": "gemma2",
        "tie_word_embeddings": False,
    },
    "gemma3_text": _GEMMA
    | {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "model_type": "gemma3_text",
        "rope_local_base_freq": 10000,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 1000000,
        "sliding_window_pattern": 2,
    },
    "gemma3_text_variant": _GEMMA
    | {
        "attention_bias": True,
        "final_logit_softcapping": 5.0,
        "layer_types": ["full_attention", "sliding_attention"],
        "model_type": "gemma3_text",
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    },
}


def random_tokens(name):
    """The text of a checkpoint, (LENGTH,)."""
    return np.floor(uniform(f"{name} tokens", (LENGTH,)) * VOCABULARY).astype(np.int64)


def random_tensor(name, shape):
    """A tensor whose numbers are a function of its name and shape, in float32.

    They are so large that attention is far from uniform, and no gain or bias is left out of sight.
    """
    # The logits were computed when this tensor had its newer name, in the memory of transformers.
    seed = {"embed_out.weight": "lm_head.weight"}.get(name, name)
    spread = 2 * math.sqrt(3) * (uniform(seed, shape) - 0.5)  # of standard deviation 1
    if len(shape) > 1:
        return (1.2 * spread / math.sqrt(shape[-1])).astype(np.float32)
    gain = name.endswith("weight") and ("norm" in name or ".ln_" in name)
    centre = 1.0 if gain else 0.0
    return (centre + 0.3 * spread).astype(np.float32)


def uniform(name, shape):
    """Numbers in [0, 1) from the bits of a generator, which NumPy promises never to change."""
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    return (bits >> np.uint64(11)).astype(np.float64).reshape(shape) * 2.0**-53


def reference(name):
    """What transformers computed: see `make_decoder_references.py`."""
    found = json.loads((REFERENCES / f"{name}.json").read_text("utf-8"))
    return found | {"logits": np.array(found["logits"])}
