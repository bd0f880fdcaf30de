"""Tensors of GGUF files in the terms of Hugging Face, against models that llama.cpp converts."""

import numpy as np
import pytest

from probattn.inference.pretrained.errors import PretrainedError
from probattn.inference.pretrained.gguf_files import open_gguf
from probattn.inference.pretrained.gguf_models import gguf_model
from tests.support.converted_gguf import MODELS, WIDTH, WORDS, converted
from tests.support.gguf_bytes import STRING, gguf, key
from tests.support.refusals import refusal


@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_those_of_hugging_face(tmp_path, name):
    wanted = converted(tmp_path / "x.gguf", name)
    _, found = gguf_model(open_gguf(tmp_path / "x.gguf"))
    assert found.keys() == wanted.keys()
    for each, values in wanted.items():
        assert found.entries[each].shape == values.shape
        assert found[each].flags.c_contiguous
        # One more and one less rounds.
        np.testing.assert_allclose(
            found[each], values, rtol=0, atol=1e-6 * name.startswith("gemma")
        )


def test_a_head_of_its_own(tmp_path):
    converted(tmp_path / "x.gguf", "llama", **{"lm_head.weight": np.ones((WORDS, WIDTH), "f4")})
    config, found = gguf_model(open_gguf(tmp_path / "x.gguf"))
    assert not config["tie_word_embeddings"]
    np.testing.assert_array_equal(found["lm_head.weight"], 1)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (
            lambda w: w.add_uint32("split.count", 2),
            "is one part of several: expected a whole model",
        ),
        (
            lambda w: w.add_tensor("blk.0.ffn_gate_inp.weight", np.zeros(2, "f4")),
            "holds the tensor 'blk.0.ffn_gate_inp.weight', which llama does not have",
        ),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, extra, reason):
    converted(tmp_path / "x.gguf", "llama", extra=extra)
    assert reason in refusal(PretrainedError, gguf_model, open_gguf(tmp_path / "x.gguf"))


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ([], "has the architecture None: expected one of llama, qwen2"),
        ([key("general.architecture", STRING, "mamba")], "has the architecture 'mamba': expected"),
        ([key("general.architecture", 4, 7)], "has the architecture 7: expected"),
        ([key("general.architecture", STRING, "llama")], "lacks the tensor token_embd.weight"),
    ],
)
def test_a_file_of_no_known_model(tmp_path, keys, reason):
    (tmp_path / "x.gguf").write_bytes(gguf(keys))
    assert reason in refusal(PretrainedError, gguf_model, open_gguf(tmp_path / "x.gguf"))
