"""Somebody else's model from where it is."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from probattn.inference.pretrained.checkpoint import open_checkpoint
from probattn.inference.pretrained.errors import PretrainedError
from tests.support.gguf_bytes import ARRAY, STRING, gguf, key, tensor
from tests.support.refusals import refusal
from tests.support.tokenizer_files import byte_level

WEIGHT = np.arange(6, dtype=ml_dtypes.bfloat16).reshape(3, 2)


@pytest.fixture(name="folder")
def folder_fixture(tmp_path):
    """A folder as a model of Hugging Face has it."""
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, {"model.norm.weight": WEIGHT, "lm_head.weight": WEIGHT})
    byte_level("smollm").save(str(folder / "tokenizer.json"))
    return folder


def write(folder, tensors, **config):
    save_file(tensors, folder / "model.safetensors")
    text = json.dumps({"model_type": "llama", "vocab_size": 330} | config)
    (folder / "config.json").write_text(text)


def test_a_folder(folder):
    found = open_checkpoint(folder)
    assert found.source == str(folder)
    assert found.config == {"model_type": "llama", "vocab_size": 330}
    assert found.tensors["model.norm.weight"].tobytes() == WEIGHT.tobytes()
    assert found.tokenizer.decode(found.tokenizer.encode("café")) == "café"


@pytest.mark.parametrize(
    ("model_type", "stored", "expected"),
    [
        ("gpt2", {"wte.weight", "h.0.attn.bias", "h.0.attn.c_attn.bias"}, {"transformer."}),
        ("gpt_neox", {"layers.0.attention.dense.bias", "embed_out.weight"}, {"gpt_neox."}),
        ("llama", {"norm.weight", "lm_head.weight", "layers.0.self_attn.k_proj.bias"}, {"model."}),
    ],
)
def test_names_have_the_prefix_of_the_model_and_are_of_weights(
    folder, model_type, stored, expected
):
    write(folder, dict.fromkeys(stored, WEIGHT), model_type=model_type)
    heads = ("lm_head.", "embed_out.")
    buffers = {"h.0.attn.bias"}
    [prefix] = expected
    names = {n if n.startswith(heads) else prefix + n for n in stored - buffers}
    assert open_checkpoint(folder).tensors.keys() == names
    buffer = f"{prefix}layers.3.attention.rotary_emb.inv_freq"
    write(folder, dict.fromkeys([*names, buffer], WEIGHT), model_type=model_type)
    assert open_checkpoint(folder).tensors.keys() == names


def test_a_gguf_file(tmp_path):
    path = tmp_path / "x.gguf"
    numbers = {
        **{"context_length": 8, "embedding_length": 2, "feed_forward_length": 2},
        **{"block_count": 1, "attention.head_count": 1},
    }
    keys = [
        key("general.architecture", STRING, "gpt2"),
        *(key(f"gpt2.{name}", 4, value) for name, value in numbers.items()),
        key("gpt2.attention.layer_norm_epsilon", 6, 1e-5),
        key("tokenizer.ggml.model", STRING, "gpt2"),
        key("tokenizer.ggml.pre", STRING, "gpt-2"),
        key("tokenizer.ggml.tokens", ARRAY, (STRING, ["a", "b", "ab"])),
        key("tokenizer.ggml.merges", ARRAY, (STRING, ["a b"])),
    ]
    data = np.arange(6, dtype="f4").tobytes()
    path.write_bytes(gguf(keys, [tensor("token_embd.weight", [3, 2], 0, 0)], data))
    found = open_checkpoint(path)
    assert found.config["model_type"] == "gpt2"
    np.testing.assert_array_equal(found.tensors["transformer.wte.weight"], WEIGHT.astype("f4"))
    assert found.tokenizer.encode("abba").tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read: No such"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: holds no JSON"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer.json: expected"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no tensors: expected"),
        (
            lambda folder: (folder / "config.json").write_text('{"vocab_size": 329}'),
            "has a tokenizer of 330 tokens and a model of 329: expected at least as many",
        ),
        (
            lambda folder: (folder / "config.json").write_text('{"vocab_size": "many"}'),
            "has 'many' as vocab_size: expected a number of tokens",
        ),
        (shutil.rmtree, "is no model: expected a folder with config.json, a .gguf file, or hf:"),
    ],
)
def test_a_folder_that_lacks_something(folder, change, reason):
    change(folder)
    message = refusal(PretrainedError, open_checkpoint, folder)
    assert message.startswith(str(folder))
    assert reason in message


def test_an_added_token_that_the_model_has_no_row_for_is_left_out(folder):
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    image = described["added_tokens"][0] | {"id": 330, "content": "<|image|>"}
    path.write_text(json.dumps(described | {"added_tokens": [*described["added_tokens"], image]}))
    found = open_checkpoint(folder).tokenizer
    assert found.size == 330
    ids = found.encode("<|image|>")
    assert ids.max() < 330
    assert found.decode(ids) == "<|image|>"


@pytest.mark.parametrize("name", ["x.bin", "x.pt", "absent.pkl"])
def test_a_pickle_is_refused_whatever_it_holds(tmp_path, name):
    message = refusal(PretrainedError, open_checkpoint, tmp_path / name)
    assert message.startswith(f"{tmp_path / name}: is a pickle, which can run any code")


@pytest.mark.parametrize(
    "name", ["hf:", "hf:gpt2", "hf:a/b/c", "hf:../b", "hf:a/..", "hf:a/b@", "hf:a/b@x y", "hf:é/b"]
)
def test_names_that_no_model_of_the_hub_has(name):
    message = refusal(PretrainedError, open_checkpoint, name)
    assert message.startswith(f"{name}: names no model of the hub: expected hf:owner/name or")


@pytest.fixture(name="hub")
def hub_fixture(folder, tmp_path, monkeypatch):
    """A cache as `huggingface_hub` keeps it, and no network."""
    cache = tmp_path / "hub"
    commit = "0" * 40
    model = cache / "models--owner--name"
    for reference in ("main", "refs/pr/7"):
        path = model / "refs" / reference
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)
    shutil.copytree(folder, model / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


@pytest.mark.parametrize("name", ["hf:owner/name", "hf:owner/name@refs/pr/7"])
def test_a_model_of_the_hub_comes_from_its_cache(hub, name):
    del hub
    found = open_checkpoint(name)
    assert found.source == name
    assert found.tensors["model.norm.weight"].tobytes() == WEIGHT.tobytes()


def test_a_hub_that_does_not_answer(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = refusal(PretrainedError, open_checkpoint, "hf:owner/other")
    assert message.startswith("hf:owner/other: cannot be had: ")


@pytest.mark.parametrize("name", ["hf:owner/other", "hf:owner/name@another", "hf:owner/a--b"])
def test_a_model_that_is_not_in_the_cache_cannot_be_had_offline(hub, name):
    message = refusal(PretrainedError, open_checkpoint, name)
    assert message.startswith(f"{name}: cannot be had: ")
    assert message.endswith("or download it elsewhere and name its folder")
    assert [path.name for path in hub.iterdir()] == ["models--owner--name"]
