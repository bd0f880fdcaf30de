"""Tensors of checkpoints and the parameter tree: names, shapes, both directions."""

import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from probattn.inference.pretrained.architectures import decoder_config
from probattn.inference.pretrained.parameter_names import ParameterNames
from probattn.models.decoder.shapes import parameter_shapes
from tests.support.tiny_checkpoints import CONFIGS, random_tensor, reference


def checkpoint(name):
    """Family, configuration and tensors, these with the names and shapes of transformers."""
    shapes = {key: tuple(shape) for key, shape in reference(name)["shapes"].items()}
    tensors = {key: random_tensor(key, shape) for key, shape in shapes.items()}
    return CONFIGS[name]["model_type"], decoder_config(CONFIGS[name]), tensors


def names_of(family, config, tensors):
    return ParameterNames.of(family, config, {key: t.shape for key, t in tensors.items()})


def tree_shapes(tree):
    return {
        key: tree_shapes(value) if isinstance(value, dict) else value.shape
        for key, value in tree.items()
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_reading_and_writing_is_the_identity_bit_for_bit(name):
    family, config, tensors = checkpoint(name)
    names = names_of(family, config, tensors)
    tree = names.read(tensors)
    assert tree_shapes(tree) == parameter_shapes(config)
    written = dict(names.write(tree))
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert written[key].dtype == tensor.dtype
        np.testing.assert_array_equal(written[key], tensor)


def test_a_dtype_is_kept_or_converted_to():
    family, config, tensors = checkpoint("llama")
    halves = {key: tensor.astype(ml_dtypes.bfloat16) for key, tensor in tensors.items()}
    names = names_of(family, config, halves)
    assert names.read(halves)["embedding"]["tokens"].dtype == ml_dtypes.bfloat16
    wide = names.read(halves, np.float32)["layers"]["1"]["query"]["weights"]
    assert wide.dtype == np.float32
    expected = halves["model.layers.1.self_attn.q_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(wide.reshape(config.width, -1), expected.T)


@pytest.mark.parametrize(
    ("name", "prefix", "buffers"),
    [
        ("gpt2", "transformer.", {"h.0.attn.bias": (1, 1, 320, 320), "h.1.attn.masked_bias": ()}),
        (
            "gpt_neox_variant",
            "gpt_neox.",
            {
                "layers.0.attention.bias": (1, 1, 320, 320),
                "layers.0.attention.masked_bias": (),
                "layers.1.attention.rotary_emb.inv_freq": (2,),
            },
        ),
        ("smollm", "model.", {"layers.0.self_attn.rotary_emb.inv_freq": (5,)}),
    ],
)
def test_names_without_prefix_and_old_buffers_are_taken(name, prefix, buffers):
    family, config, tensors = checkpoint(name)
    bare = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    bare |= {key: np.zeros(shape, np.float32) for key, shape in buffers.items()}
    names = names_of(family, config, bare)
    assert names.shapes.keys() == bare.keys() - buffers.keys()
    bare = dict.fromkeys(buffers) | {key: bare[key] for key in names.shapes}
    whole = names_of(family, config, tensors).read(tensors)
    np.testing.assert_array_equal(
        names.read(bare)["layers"]["1"]["value"]["weights"],
        whole["layers"]["1"]["value"]["weights"],
    )


def test_a_tied_output_may_be_there_if_it_is_the_embedding():
    family, config, tensors = checkpoint("smollm")
    embedding = tensors["model.embed_tokens.weight"]
    twice = tensors | {"lm_head.weight": embedding}
    names = names_of(family, config, twice)
    assert "output" not in names.read(twice)
    other = twice | {"lm_head.weight": embedding + 1}
    with pytest.raises(
        ValueError, match=r"^lm_head.weight differs from model.embed_tokens.weight: expected the s"
    ):
        names.read(other)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"model.layers.1.mlp.up_proj.weight": None},
            "model.layers.1.mlp.up_proj.weight is missing: a llama of this size must have it",
        ),
        (
            {"lm_head.weight": None},
            "lm_head.weight is missing: a llama of this size must have it",
        ),
        (
            {"model.layers.2.mlp.up_proj.weight": (33, 20)},
            "model.layers.2.mlp.up_proj.weight is a tensor that a llama of this size does not "
            "have: expected no others than config.json says",
        ),
        (
            {"model.layers.0.self_attn.q_proj.bias\n": (24,)},
            "'model.layers.0.self_attn.q_proj.bias\\n' is a tensor that a llama of this size does "
            "not have: expected no others than config.json says",
        ),
        (
            {"model.layers.0.self_attn.k_proj.weight": (24, 20)},
            "model.layers.0.self_attn.k_proj.weight has shape (24, 20): expected (12, 20), as "
            "config.json says",
        ),
        (
            {"model.embed_tokens.weight": (62, 20)},
            "model.embed_tokens.weight has shape (62, 20): expected (61, 20), as config.json says",
        ),
    ],
)
def test_other_tensors_than_those_of_the_network_are_refused(change, line):
    family, config, tensors = checkpoint("llama")
    shapes = {key: tensor.shape for key, tensor in tensors.items()} | change
    shapes = {key: shape for key, shape in shapes.items() if shape is not None}
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        ParameterNames.of(family, config, shapes)


def test_a_decoder_that_a_family_cannot_express_is_refused():
    config = replace(decoder_config(CONFIGS["llama"]), rotary=None)
    line = "embedding.positions is a part of this decoder: llama has no tensor for it"
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        ParameterNames("llama", config)
