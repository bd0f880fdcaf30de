"""The metadata of a GGUF file as a config.json of Hugging Face, architecture by architecture."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from probattn.inference.pretrained.errors import PretrainedError, short
from probattn.inference.pretrained.gguf_files import GgufFile

_MOST = 2**24  # of any size in a configuration


class Metadata:
    """What a GGUF file says of a model, whose types nobody vouches for.

    Args:
        file: the file.
        architecture: the prefix of the keys.
    """

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture

    def _get(self, key: str) -> tuple[str, Any]:
        name = f"{self.architecture}.{key}"
        return name, self.file.metadata.get(name)

    def whole(self, key: str, default: int | None = None) -> int:
        """Return a number of at least one."""
        name, value = self._get(key)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= _MOST:
            raise PretrainedError(
                self.file.path, f"has {short(value)} as {name}: expected 1 to {_MOST}"
            )
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """Return a positive number as the text of a config.json gave it: 1e-05 and not 9.99e-06."""
        name, value = self._get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise PretrainedError(
                self.file.path, f"has {short(value)} as {name}: expected a positive number"
            )
        return float(str(np.float32(value)))

    def flag(self, key: str, default: bool) -> bool:
        """Return a truth value."""
        name, value = self._get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise PretrainedError(
                self.file.path, f"has {short(value)} as {name}: expected a truth value"
            )
        return value

    def absent(self, key: str) -> None:
        """Refuse a key that no configuration here has a place for."""
        name, value = self._get(key)
        if value is not None:
            raise PretrainedError(self.file.path, f"sets {name}, which is not supported")

    def has(self, tensor: str) -> bool:
        """Tell whether the file has a tensor."""
        return tensor in self.file.tensors

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return the shape of a tensor that every model has."""
        if not self.has(tensor):
            raise PretrainedError(self.file.path, f"lacks the tensor {tensor}; download it again")
        return self.file.tensors.entries[tensor].shape

    def special_tokens(self) -> dict[str, int]:
        """Return the ids of the tokens that begin, end and fill texts, as far as there are any."""
        found = {}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            value = self.file.metadata.get(f"tokenizer.ggml.{key}_token_id")
            if type(value) is int:
                found[f"{name}_token_id"] = value
        return found


def _common(metadata: Metadata) -> dict[str, Any]:
    """Return what all architectures but GPT-2 have in common."""
    return {
        "vocab_size": metadata.shape("token_embd.weight")[0],
        "hidden_size": metadata.whole("embedding_length"),
        "intermediate_size": metadata.whole("feed_forward_length"),
        "num_hidden_layers": metadata.whole("block_count"),
        "num_attention_heads": metadata.whole("attention.head_count"),
        "max_position_embeddings": metadata.whole("context_length"),
        "tie_word_embeddings": not metadata.has("output.weight"),
        **metadata.special_tokens(),
    }


def _grouped(metadata: Metadata, *, base: float) -> dict[str, Any]:
    """Return what the architectures after Llama have in common."""
    common = _common(metadata)
    heads = common["num_attention_heads"]
    for key in ("expert_count", "attention.scale", "attention.clamp_kqv", "logit_scale"):
        metadata.absent(key)
    width = metadata.whole("attention.key_length", max(1, common["hidden_size"] // heads))
    return common | {
        "num_key_value_heads": metadata.whole("attention.head_count_kv", heads),
        "head_dim": width,
        "rms_norm_eps": metadata.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.real("rope.freq_base", base),
        "rope_scaling": _rope_scaling(metadata, width),
    }


def _rope_scaling(metadata: Metadata, width: int) -> dict[str, Any] | None:
    kind = metadata.file.metadata.get(f"{metadata.architecture}.rope.scaling.type", "none")
    if metadata.has("rope_freqs.weight"):
        return _llama3_scaling(metadata, width)
    if kind == "none":
        return None
    if kind != "linear":
        raise PretrainedError(
            metadata.file.path,
            f"scales its positions by {short(kind)}: expected none, linear, or that of Llama 3",
        )
    return {"rope_type": "linear", "factor": metadata.real("rope.scaling.factor")}


def _llama3_scaling(metadata: Metadata, width: int) -> dict[str, Any]:
    """Return the scaling of Llama 3 whose divisors of the frequencies are those of the file.

    The file has the divisors and not the four numbers that they come from. All models of Llama 3
    share three of them, and the fourth is the largest divisor; the divisors are worked out and
    compared.
    """
    stored = metadata.file.tensors["rope_freqs.weight"].astype(np.float64).ravel()
    factor, low, high, original = float(stored.max(initial=1.0)), 1.0, 4.0, 8192
    base = metadata.real("rope.freq_base", 10_000.0)
    wavelengths = 2 * np.pi * base ** (np.arange(0, width, 2) / width)
    kept = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / ((1 - kept) / factor + kept)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4, atol=0):
        raise PretrainedError(
            metadata.file.path,
            "scales its positions by rope_freqs.weight in another way than Llama 3 does: expected "
            "no such tensor, or that of Llama 3",
        )
    return {
        **{"rope_type": "llama3", "factor": factor},
        **{"low_freq_factor": low, "high_freq_factor": high},
        "original_max_position_embeddings": original,
    }


def _llama(metadata: Metadata) -> dict[str, Any]:
    metadata.absent("attention.sliding_window")
    config = _grouped(metadata, base=10_000.0)
    width = metadata.whole("rope.dimension_count", config["head_dim"])
    if width != config["head_dim"]:
        raise PretrainedError(
            metadata.file.path,
            f"turns {width} numbers of a head of {config['head_dim']}: expected all of them",
        )
    return config | {
        **{"model_type": "llama", "hidden_act": "silu"},
        "attention_bias": metadata.has("blk.0.attn_q.bias"),
        "mlp_bias": metadata.has("blk.0.ffn_up.bias"),
    }


def _qwen2(metadata: Metadata) -> dict[str, Any]:
    config = _grouped(metadata, base=10_000.0)
    return config | {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False}


def _qwen3(metadata: Metadata) -> dict[str, Any]:
    config = _grouped(metadata, base=1_000_000.0)
    return config | {
        **{"model_type": "qwen3", "hidden_act": "silu", "use_sliding_window": False},
        "attention_bias": metadata.has("blk.0.attn_q.bias"),
    }


def _gemma(metadata: Metadata, largest: int, *, base: float) -> dict[str, Any]:
    """Return what both Gemmas have in common.

    The scale of the logits is not in the file. It is that of the width of a head, but for the
    largest model, which is known by its number of layers.
    """
    config = _grouped(metadata, base=base)
    scalar = config["head_dim"]
    if config["num_hidden_layers"] == largest:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    return config | {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": scalar,
        "sliding_window": metadata.whole("attention.sliding_window"),
    }


def _gemma2(metadata: Metadata) -> dict[str, Any]:
    return _gemma(metadata, 46, base=10_000.0) | {
        "model_type": "gemma2",
        "attn_logit_softcapping": metadata.real("attn_logit_softcapping"),
        "final_logit_softcapping": metadata.real("final_logit_softcapping"),
    }


def _gemma3(metadata: Metadata) -> dict[str, Any]:
    metadata.absent("final_logit_softcapping")
    return _gemma(metadata, 62, base=1_000_000.0) | {
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_local_base_freq": metadata.real("rope.freq_base_swa", 10_000.0),
        "sliding_window_pattern": 6,
    }


def _gpt2(metadata: Metadata) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": metadata.shape("token_embd.weight")[0],
        "n_positions": metadata.whole("context_length"),
        "n_embd": metadata.whole("embedding_length"),
        "n_inner": metadata.whole("feed_forward_length"),
        "n_layer": metadata.whole("block_count"),
        "n_head": metadata.whole("attention.head_count"),
        "layer_norm_epsilon": metadata.real("attention.layer_norm_epsilon"),
        "tie_word_embeddings": not metadata.has("output.weight"),
        **metadata.special_tokens(),
    }


def _gpt_neox(metadata: Metadata) -> dict[str, Any]:
    config = _common(metadata)
    width = max(1, config["hidden_size"] // config["num_attention_heads"])
    turned = metadata.whole("rope.dimension_count", width)
    share = turned / width
    # Hugging Face takes the whole part of the product, which may lie just below the number.
    rotary = share if int(share * width) == turned else math.nextafter(share, math.inf)
    return config | {
        **{"model_type": "gpt_neox", "hidden_act": "gelu", "rotary_pct": rotary},
        "rotary_emb_base": metadata.real("rope.freq_base", 10_000.0),
        "layer_norm_eps": metadata.real("attention.layer_norm_epsilon"),
        "use_parallel_residual": metadata.flag("use_parallel_residual", True),
        "attention_bias": metadata.has("blk.0.attn_qkv.bias"),
    }


CONFIGS: dict[str, Callable[[Metadata], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "gptneox": _gpt_neox,
}
"""By the name of the architecture in GGUF."""
