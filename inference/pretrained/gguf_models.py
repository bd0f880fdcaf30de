"""GGUF files in the terms of Hugging Face: the keys of config.json, names and layout of tensors.

llama.cpp names tensors in its own way and changes some of them when it converts a model. All of it
is undone here, so that a decoder sees one convention whatever the file was.

* `llama` turns neighbouring pairs of a head's numbers, Hugging Face the halves: the rows of queries
  and keys are interleaved in the file.
* `gpt2` holds the weights that Hugging Face keeps transposed (input, output).
* `gptneox` holds queries, keys and values one after another, Hugging Face head by head.
* `gemma2` and `gemma3` hold one plus the weights of their norms.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probattn.inference.pretrained.errors import PretrainedError, short
from probattn.inference.pretrained.gguf_configs import CONFIGS, Metadata
from probattn.inference.pretrained.gguf_files import GgufFile
from probattn.inference.pretrained.tensors import LazyTensor, Tensors

_LLAMA = {
    **{"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
    **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    **{"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"},
    **{"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    **{"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"},
    "ffn_down": "mlp.down_proj",
}
_GEMMA = _LLAMA | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT2 = {
    **{"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output": "lm_head"},
    **{"output_norm": "transformer.ln_f", "attn_norm": "ln_1", "ffn_norm": "ln_2"},
    **{"attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj"},
    **{"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
}
_GPT_NEOX = {
    **{"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm"},
    **{"output": "embed_out", "attn_norm": "input_layernorm"},
    **{"ffn_norm": "post_attention_layernorm", "attn_qkv": "attention.query_key_value"},
    **{"attn_output": "attention.dense", "ffn_up": "mlp.dense_h_to_4h"},
    "ffn_down": "mlp.dense_4h_to_h",
}
_Change = Callable[[LazyTensor, Mapping[str, Any]], LazyTensor]


@dataclass(frozen=True)
class _Architecture:
    """How the tensors of an architecture are named.

    Attributes:
        layers: prefix of a layer in Hugging Face's names.
        names: GGUF's name, without number of the layer and suffix -> Hugging Face's.
        changes: pattern of GGUF's name -> what undoes llama.cpp's change of the tensor.
    """

    layers: str
    names: Mapping[str, str]
    changes: Mapping[str, _Change] = dataclasses.field(default_factory=dict)


def _changed(
    tensor: LazyTensor, shape: tuple[int, ...], change: Callable[[NDArray], NDArray]
) -> LazyTensor:
    return LazyTensor(shape, tensor.dtype, lambda: np.ascontiguousarray(change(tensor.read())))


def _halves(heads: str) -> _Change:
    """Undo the interleaving of the two halves of each head."""

    def change(tensor: LazyTensor, config: Mapping[str, Any]) -> LazyTensor:
        inner = tensor.shape[1:]
        return _changed(
            tensor,
            tensor.shape,
            lambda rows: (
                rows.reshape(config[heads], -1, 2, *inner).swapaxes(1, 2).reshape(rows.shape)
            ),
        )

    return change


def _transposed(tensor: LazyTensor, _: Mapping[str, Any]) -> LazyTensor:
    return _changed(tensor, tensor.shape[::-1], lambda weight: weight.T)


def _by_heads(tensor: LazyTensor, config: Mapping[str, Any]) -> LazyTensor:
    """Put queries, keys and values of each head together."""
    heads, inner = config["num_attention_heads"], tensor.shape[1:]
    return _changed(
        tensor,
        tensor.shape,
        lambda rows: rows.reshape(3, heads, -1, *inner).swapaxes(0, 1).reshape(rows.shape),
    )


def _without_one(tensor: LazyTensor, _: Mapping[str, Any]) -> LazyTensor:
    return _changed(tensor, tensor.shape, lambda weight: weight - weight.dtype.type(1))


_NORMS = {r".*norm\.weight": _without_one}
_ARCHITECTURES = {
    "llama": _Architecture(
        "model.layers",
        _LLAMA,
        {
            r"blk\.\d+\.attn_q\.(weight|bias)": _halves("num_attention_heads"),
            r"blk\.\d+\.attn_k\.(weight|bias)": _halves("num_key_value_heads"),
        },
    ),
    "qwen2": _Architecture("model.layers", _LLAMA),
    "qwen3": _Architecture("model.layers", _LLAMA),
    "gemma2": _Architecture("model.layers", _GEMMA, _NORMS),
    "gemma3": _Architecture("model.layers", _GEMMA, _NORMS),
    "gpt2": _Architecture(
        "transformer.h",
        _GPT2,
        {r"blk\.\d+\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight": _transposed},
    ),
    "gptneox": _Architecture(
        "gpt_neox.layers", _GPT_NEOX, {r"blk\.\d+\.attn_qkv\.(weight|bias)": _by_heads}
    ),
}
_DERIVED = ("rope_freqs.weight",)  # whose values are in the configuration


def gguf_model(file: GgufFile) -> tuple[dict[str, Any], Tensors]:
    """Return the configuration and the tensors of a GGUF file as Hugging Face has them.

    Raises:
        PretrainedError: if the architecture is not supported, the metadata lacks a value that it
            needs or has an option that it does not have, or there is such a tensor.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise PretrainedError(
            file.path,
            f"has the architecture {short(name)}: expected one of {', '.join(_ARCHITECTURES)}",
        )
    if file.metadata.get("split.count", 1) != 1:
        raise PretrainedError(
            file.path,
            "is one part of several: expected a whole model; join them by llama-gguf-split",
        )
    metadata = Metadata(file, name)
    config = CONFIGS[name](metadata)
    metadata.finish()
    architecture = _ARCHITECTURES[name]
    entries = {}
    for gguf_name, tensor in file.tensors.entries.items():
        if gguf_name in _DERIVED:
            continue
        known = re.fullmatch(r"(blk\.(\d{1,6})\.)?(\w+)\.(weight|bias)", gguf_name)
        if known is None or known[3] not in architecture.names:
            raise PretrainedError(
                file.path, f"holds the tensor {short(gguf_name)}, which {name} does not have"
            )
        layer = f"{architecture.layers}.{int(known[2])}." if known[1] else ""
        for pattern, change in architecture.changes.items():
            if re.fullmatch(pattern, gguf_name):
                _check_parts(file, gguf_name, tensor, config)
                tensor = change(tensor, config)
        entries[f"{layer}{architecture.names[known[3]]}.{known[4]}"] = tensor
    return config, Tensors(entries)


def _check_parts(file: GgufFile, name: str, tensor: LazyTensor, config: Mapping[str, Any]) -> None:
    """Refuse queries and keys whose rows are not those of heads of even width."""
    if ".attn_k." in name or ".attn_q." in name:
        heads = config["num_key_value_heads" if ".attn_k." in name else "num_attention_heads"]
        parts = 2 * heads
    elif "attn_qkv" in name and config["model_type"] == "gpt_neox":
        parts = 3 * config["num_attention_heads"]
    else:
        return
    if tensor.shape[0] % parts:
        raise PretrainedError(
            file.path,
            f"its tensor {short(name)} has {tensor.shape[0]} rows: expected a multiple of {parts}",
        )
