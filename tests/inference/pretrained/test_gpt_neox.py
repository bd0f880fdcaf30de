"""GPT-NeoX as it is published, whose output has a name of its own, against transformers."""

import json

import gguf as library
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from probattn.inference.pretrained.checkpoint import open_checkpoint
from probattn.inference.pretrained.errors import PretrainedError
from probattn.models.decoder.network import decoder_logits
from tests.support.refusals import refusal
from tests.support.tiny_checkpoints import (
    CONFIGS,
    POSITIONS,
    random_tensor,
    random_tokens,
    reference,
)

EMBEDDING, HEAD, NEWER = "gpt_neox.embed_in.weight", "embed_out.weight", "lm_head.weight"
UNTIED, TIED = "gpt_neox", "gpt_neox_variant"


def published(name):
    """The tensors of a tiny checkpoint, under the names of files."""
    shapes = reference(name)["shapes"]
    return {key: random_tensor(key, tuple(shape)) for key, shape in shapes.items()}


def folder(path, name, tensors):
    """Write a folder as Hugging Face has it."""
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIGS[name]))
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return open_checkpoint(path)


def gguf(path, name, tensors):
    """Write a GGUF file as llama.cpp converts such a folder."""
    config = CONFIGS[name]
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    writer = library.GGUFWriter(path, "gptneox")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(int(config["rotary_pct"] * config["hidden_size"] // heads))
    writer.add_head_count(heads)
    writer.add_parallel_residual(config["use_parallel_residual"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    if config.get("rope_scaling"):
        writer.add_rope_scaling_factor(config["rope_scaling"]["factor"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("olmo")
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_merges(["a b"])
    names = library.get_tensor_name_map(library.MODEL_ARCH.GPTNEOX, layers)
    for key, tensor in tensors.items():
        if "query_key_value" in key:
            parts = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
            tensor = np.concatenate(
                [parts[:, part].reshape(-1, *tensor.shape[1:]) for part in range(3)]
            )
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_checkpoint(path)


@pytest.mark.parametrize("write", [folder, gguf])
@pytest.mark.parametrize("name", [UNTIED, TIED])
def test_logits_of_published_files_equal_those_of_transformers(tmp_path, name, write):
    found = write(tmp_path / f"model.{write.__name__}", name, published(name))
    logits = decoder_logits(found.read_parameters(), random_tokens(name), found.decoder)
    expected = reference(name)["logits"]
    np.testing.assert_allclose(logits[np.array(POSITIONS)], expected, rtol=0, atol=1e-4)


def test_the_newer_name_of_the_output_is_read_and_the_published_one_is_written(tmp_path):
    tensors = published(UNTIED)
    newer = {key: tensor for key, tensor in tensors.items() if key != HEAD}
    found = folder(tmp_path / "newer", UNTIED, newer | {NEWER: tensors[HEAD]})
    assert found.names.shapes.keys() == found.tensors.keys() == tensors.keys()
    written = dict(found.names.write(found.read_parameters()))
    assert written.keys() == tensors.keys()
    np.testing.assert_array_equal(written[HEAD], tensors[HEAD])


@pytest.mark.parametrize("head", [HEAD, NEWER])
def test_a_tied_output_may_be_there_under_either_name(tmp_path, head):
    tensors = published(TIED)
    found = folder(tmp_path / "same", TIED, tensors | {head: tensors[EMBEDDING]})
    assert "output" not in found.read_parameters()
    other = folder(tmp_path / "other", TIED, tensors | {head: tensors[EMBEDDING] + 1})
    message = refusal(PretrainedError, other.read_parameters)
    assert f"{HEAD} differs from {EMBEDDING}: expected the same numbers" in message


def test_an_output_that_is_missing_or_there_twice_is_named(tmp_path):
    tensors = published(UNTIED)
    without = {key: tensor for key, tensor in tensors.items() if key != HEAD}
    found = folder(tmp_path / "without", UNTIED, without)
    assert f"{HEAD} is missing" in refusal(PretrainedError, lambda: found.names)
    twice = folder(tmp_path / "twice", UNTIED, tensors | {NEWER: tensors[HEAD]})
    assert f"{NEWER} is a tensor that a gpt_neox" in refusal(PretrainedError, lambda: twice.names)
