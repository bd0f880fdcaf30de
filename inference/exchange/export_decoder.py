"""Export a run as a folder that transformers and other libraries load."""

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probattn.blocks.promotion import default_promotion
from probattn.inference.exchange.exported_tokenizers import (
    published_files,
    tokenizer_definition,
    tokenizer_settings,
)
from probattn.inference.exchange.hugging_face_folders import write_folder
from probattn.inference.pretrained.parameter_names import ParameterNames
from probattn.inference.runs.files import RunError, fsync, write_errors
from probattn.inference.runs.run import (
    ImportedRun,
    Run,
    RunDirectory,
    TunedRun,
    require_fitted,
)
from probattn.models.transformer_decoder import as_decoder

# The classes of transformers, by the model_type of their config.json.
_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


@default_promotion()
def export_decoder(run: RunDirectory, out: str | os.PathLike[str]) -> Path:
    """Write a run as a folder of Hugging Face: config.json, .safetensors and tokenizer.json.

    The network of a fit becomes a GPT-2 whose biases are zero, with the same logits. What is beside
    the network, such as a separate attention stage, has no place there and is left out. A model
    that was imported is written as it is. One that was fine-tuned is written in float32, with its
    adapters worked into the matrices. Both have beside them the settings, special tokens and chat
    template that they were published with.

    Args:
        run: a run of a fit or of a published model.
        out: the folder, which must be new or empty.

    Returns:
        The folder.

    Raises:
        ValueError: if the run is a sampled posterior, or the folder holds anything (RunError), or a
            file of the published model is damaged (PretrainedError).
        WriteError: if it cannot be written; nothing is then left behind.
        ImportError: without the libraries of the extra `pretrained`.
    """
    run, folder = require_fitted(run), Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder}: exists: expected a new or an empty folder; choose another name")
    if isinstance(run, ImportedRun):
        config, tensors = _imported(run)
    else:
        config, tensors = _tuned(run) if isinstance(run, TunedRun) else _fitted(run)
    config = {"architectures": [_CLASSES[config["model_type"]]], **config}
    tokenizer = tokenizer_definition(run.vocabulary)
    if isinstance(run, Run):
        beside = tokenizer_settings(tokenizer, config)
    else:
        beside = published_files(run.checkpoint)
    with write_errors(folder):
        made = folder.absolute().with_name(f".{folder.name}.{secrets.token_hex(4)}")
        made.mkdir(parents=True)
    try:
        write_folder(made, config, tensors, tokenizer, beside)
        with write_errors(folder):
            made.rename(folder)
            fsync(made.parent)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return folder


def _imported(run: ImportedRun) -> tuple[dict[str, Any], Iterator[tuple[str, NDArray]]]:
    found = run.checkpoint
    return dict(found.config), ((name, found.tensors[name]) for name in found.names.shapes)


def _tuned(run: TunedRun) -> tuple[dict[str, Any], Iterator[tuple[str, NDArray]]]:
    found = run.checkpoint
    # A loader takes either name for the precision, and the newer one first.
    config = {**found.config, "torch_dtype": "float32", "dtype": "float32"}
    written = found.names.write(run.parameters)
    return config, ((name, np.asarray(part, np.float32)) for name, part in written)


def _fitted(run: Run) -> tuple[dict[str, Any], Iterator[tuple[str, NDArray]]]:
    decoder, tree = as_decoder(run.parameters, run.config.model)
    config = {
        "model_type": "gpt2",
        "vocab_size": decoder.vocabulary,
        "n_positions": decoder.context,
        "n_embd": decoder.width,
        "n_layer": decoder.layers,
        "n_head": decoder.heads,
        "n_inner": decoder.hidden,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": decoder.norm_eps,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float32",
    }
    names = ParameterNames("gpt2", decoder)
    return config, ((name, np.asarray(part, np.float32)) for name, part in names.write(tree))
