"""The metadata of a GGUF file as a config.json of Hugging Face, architecture by architecture.

Every key of the architecture must be one that is used here, or one that is known to change no
logit. So a network with an option that the decoder does not have is refused, and never read as
another one.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from probattn.inference.pretrained.errors import PretrainedError, short
from probattn.inference.pretrained.gguf_files import GgufFile
from probattn.messages import legible

_MOST = 2**24  # of any size in a configuration
# Training, pooled outputs, and where the file comes from. An architecture reads the epsilon of the
# norm that it has, and the other one means nothing to it.
_IRRELEVANT = frozenset(
    (
        "attention.layer_norm_epsilon",
        "attention.layer_norm_rms_epsilon",
        "decoder_start_token_id",
        "pooling_type",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",  # of yarn alone, which is refused
        "tensor_data_layout",
        "vocab_size",
    )
)
# Options that some architectures have, with the value that leaves them off.
_OFF: Mapping[str, bool | int] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.scale": 0,
    "attention.sliding_window": 0,
    "attn_logit_softcapping": 0,
    "embedding_scale": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "final_logit_softcapping": 0,
    "logit_scale": 0,
    "residual_scale": 0,
    "rope.scaling.attn_factor": 1,
}


class Metadata:
    """What a GGUF file says of a model; `finish` refuses keys that nobody asked for.

    Nobody vouches for the types of the values.

    Args:
        file: the file.
        architecture: the prefix of the keys.
    """

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture
        self._read: set[str] = set()

    def _get(self, key: str) -> tuple[str, Any]:
        name = f"{self.architecture}.{key}"
        self._read.add(name)
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

    def only(self, key: str, expected: int) -> None:
        """Refuse another number than the one that the network has; the key may be missing."""
        if (value := self.whole(key, expected)) != expected:
            raise PretrainedError(
                self.file.path,
                f"has {value} as {self.architecture}.{key}: expected {expected}, as the rest says",
            )

    def scaling(self) -> float:
        """Return by which factor positions are scaled linearly, as llama.cpp reads it.

        The kind is linear where the file has none, the factor may stand under its older name, and
        a factor of zero scales nothing.
        """
        _, kind = self._get("rope.scaling.type")
        kind = "linear" if kind is None else kind
        if not isinstance(kind, str) or kind not in ("none", "linear"):
            raise PretrainedError(
                self.file.path,
                f"scales its positions by {short(kind)}: expected none, linear, or that of Llama 3",
            )
        found = {key: self._get(key)[1] for key in ("rope.scaling.factor", "rope.scale_linear")}
        key, factor = next(((k, f) for k, f in found.items() if f is not None), ("", 0))
        zero = isinstance(factor, int | float) and factor == 0
        return 1.0 if kind == "none" or zero else self.real(key)

    def has(self, tensor: str) -> bool:
        """Tell whether the file has a tensor."""
        return tensor in self.file.tensors

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return the shape of a tensor that every model has."""
        if not self.has(tensor):
            raise PretrainedError(self.file.path, f"lacks the tensor {tensor}; download it again")
        return self.file.tensors.entries[tensor].shape

    def finish(self) -> None:
        """Refuse what was not read.

        Raises:
            PretrainedError: naming the first key of the architecture that may change the network.
        """
        prefix = f"{self.architecture}."
        for name, value in self.file.metadata.items():
            key = name.removeprefix(prefix)
            if key == name or name in self._read or key in _IRRELEVANT:
                continue
            if key not in _OFF:
                raise PretrainedError(
                    self.file.path,
                    f"has {short(value)} as {legible(name)}: probattn does not know this option, "
                    "and without it the network may be another one",
                )
            if isinstance(value, np.ndarray | list) or value != _OFF[key]:
                raise PretrainedError(
                    self.file.path,
                    f"has {short(value)} as {name}: expected {_OFF[key]}, since this option is not "
                    "supported",
                )

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
    width = metadata.whole("attention.key_length", max(1, common["hidden_size"] // heads))
    metadata.only("attention.value_length", width)
    metadata.only("rope.dimension_count", width)
    return common | {
        "num_key_value_heads": metadata.whole("attention.head_count_kv", heads),
        "head_dim": width,
        "rms_norm_eps": metadata.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.real("rope.freq_base", base),
        "rope_scaling": _rope_scaling(metadata, width),
    }


def _rope_scaling(metadata: Metadata, width: int) -> dict[str, Any] | None:
    factor = metadata.scaling()
    if metadata.has("rope_freqs.weight"):
        if factor != 1:
            raise PretrainedError(
                metadata.file.path,
                f"scales its positions by {factor} and by rope_freqs.weight: expected one of them",
            )
        return _llama3_scaling(metadata, width)
    return _linear_scaling(factor)


def _linear_scaling(factor: float) -> dict[str, Any] | None:
    return None if factor == 1 else {"rope_type": "linear", "factor": factor}


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
    return _grouped(metadata, base=10_000.0) | {
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
    metadata.only("attention.sliding_window_pattern", 2)
    return _gemma(metadata, 46, base=10_000.0) | {
        "model_type": "gemma2",
        "attn_logit_softcapping": metadata.real("attn_logit_softcapping"),
        "final_logit_softcapping": metadata.real("final_logit_softcapping"),
    }


def _gemma3(metadata: Metadata) -> dict[str, Any]:
    return _gemma(metadata, 62, base=1_000_000.0) | {
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_local_base_freq": metadata.real("rope.freq_base_swa", 10_000.0),
        "sliding_window_pattern": metadata.whole("attention.sliding_window_pattern", 6),
    }


def _gpt2(metadata: Metadata) -> dict[str, Any]:
    heads = metadata.whole("attention.head_count")
    metadata.only("attention.head_count_kv", heads)
    return {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": metadata.shape("token_embd.weight")[0],
        "n_positions": metadata.whole("context_length"),
        "n_embd": metadata.whole("embedding_length"),
        "n_inner": metadata.whole("feed_forward_length"),
        "n_layer": metadata.whole("block_count"),
        "n_head": heads,
        "layer_norm_epsilon": metadata.real("attention.layer_norm_epsilon"),
        "tie_word_embeddings": not metadata.has("output.weight"),
        **metadata.special_tokens(),
    }


def _gpt_neox(metadata: Metadata) -> dict[str, Any]:
    config = _common(metadata)
    heads = config["num_attention_heads"]
    metadata.only("attention.head_count_kv", heads)
    width = max(1, config["hidden_size"] // heads)
    turned = metadata.whole("rope.dimension_count", width)
    share = turned / width
    # Hugging Face takes the whole part of the product, which may lie just below the number.
    rotary = share if int(share * width) == turned else math.nextafter(share, math.inf)
    return config | {
        **{"model_type": "gpt_neox", "hidden_act": "gelu", "rotary_pct": rotary},
        "rotary_emb_base": metadata.real("rope.freq_base", 10_000.0),
        "rope_scaling": _linear_scaling(metadata.scaling()),
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
