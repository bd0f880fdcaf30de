"""The metadata of GGUF files as a config.json, and what of them is refused."""

import numpy as np
import pytest

from probattn.inference.pretrained.errors import PretrainedError
from probattn.inference.pretrained.gguf_files import open_gguf
from probattn.inference.pretrained.gguf_models import gguf_model
from tests.support.converted_gguf import (
    GROUPS,
    HEAD,
    HEADS,
    INNER,
    LAYERS,
    MODELS,
    WIDTH,
    WORDS,
    converted,
)
from tests.support.gguf_bytes import ARRAY, STRING, gguf, key, tensor
from tests.support.refusals import refusal

COMMON = {
    **{"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": INNER},
    **{"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": 16},
    **{"tie_word_embeddings": True, "bos_token_id": 3},
}
GROUPED = COMMON | {
    **{"num_key_value_heads": GROUPS, "head_dim": HEAD, "rms_norm_eps": 1e-6},
    **{"rope_theta": 50_000.0, "rope_scaling": None},
}
GEMMA = GROUPED | {
    **{"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "sliding_window": 8},
    **{"query_pre_attn_scalar": HEAD},
}
CONFIGS = {
    "llama": GROUPED
    | {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "qwen2": GROUPED | {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False},
    "qwen3": GROUPED
    | {"model_type": "qwen3", "hidden_act": "silu", "use_sliding_window": False}
    | {"attention_bias": False},
    "gemma2": GEMMA
    | {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": GEMMA
    | {"model_type": "gemma3_text", "attn_logit_softcapping": None, "rope_local_base_freq": 1e4}
    | {"final_logit_softcapping": None, "sliding_window_pattern": 6},
    "gpt2": {
        **{"model_type": "gpt2", "activation_function": "gelu_new", "vocab_size": WORDS},
        **{"n_positions": 16, "n_embd": WIDTH, "n_inner": INNER, "n_layer": LAYERS},
        **{"n_head": HEADS, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        "bos_token_id": 3,
    },
    "gptneox": COMMON
    | {"model_type": "gpt_neox", "hidden_act": "gelu", "rotary_pct": 0.25, "layer_norm_eps": 1e-5}
    | {"rotary_emb_base": 1e4, "use_parallel_residual": False, "attention_bias": True}
    | {"tie_word_embeddings": False, "rope_scaling": None},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_has_the_keys_of_hugging_face(tmp_path, name):
    converted(tmp_path / "x.gguf", name)
    assert gguf_model(open_gguf(tmp_path / "x.gguf"))[0] == CONFIGS[name]


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_the_largest_gemma_scales_its_logits_in_another_way(tmp_path, name):
    """It has 46 or 62 layers; its width per head is not that of its heads."""
    layers = {"gemma2": 46, "gemma3": 62}[name]
    keys = [
        key("general.architecture", STRING, name),
        key(f"{name}.block_count", 4, layers),
        *(
            key(f"{name}.{each}", 4, value)
            for each, value in {
                **{"embedding_length": 24, "feed_forward_length": 20, "context_length": 16},
                **{"attention.head_count": 4, "attention.key_length": 10},
                "attention.sliding_window": 8,
            }.items()
        ),
        key(f"{name}.attention.layer_norm_rms_epsilon", 6, 1.0),
    ]
    if name == "gemma2":
        keys += [key(f"gemma2.{each}_logit_softcapping", 6, 1.0) for each in ("attn", "final")]
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf(keys, [tensor("token_embd.weight", [2, 24], 0, 0)], bytes(192)))
    assert gguf_model(open_gguf(path))[0]["query_pre_attn_scalar"] == 6


def llama3_divisors(count, base, factor, change=0.0):
    """The divisors of each frequency, one by one as the converter makes them."""
    found = []
    for index in range(count):
        wavelength = 2 * np.pi * base ** (index / count)
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192 / 1:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            found.append(1 / ((1 - smooth) / factor + smooth) + change)
    return np.array(found, np.float32)


def llama3(path, divisors, head=64, **factors):
    """A model of wide heads with divisors of its frequencies, as bytes."""
    numbers = {
        **{"embedding_length": head, "feed_forward_length": 20, "context_length": 16},
        **{"block_count": 1, "attention.head_count": 1},
    }
    keys = [
        key("general.architecture", STRING, "llama"),
        *(key(f"llama.{name}", 4, value) for name, value in numbers.items()),
        key("llama.attention.layer_norm_rms_epsilon", 6, 1e-5),
        key("llama.rope.freq_base", 6, 50_000.0),
        *(key(f"llama.{name}", 6, value) for name, value in factors.items()),
    ]
    tensors = [
        tensor("token_embd.weight", [1, head], 0, 0),
        tensor("rope_freqs.weight", [len(divisors)], 0, 4 * head),
    ]
    path.write_bytes(gguf(keys, tensors, bytes(4 * head) + divisors.tobytes()))
    return gguf_model(open_gguf(path))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_scaling_of_llama_3_is_found_from_its_divisors(tmp_path, factor):
    divisors = llama3_divisors(32, 50_000.0, factor)
    assert np.any((divisors > 1) & (divisors < factor))
    config, found = llama3(tmp_path / "x.gguf", divisors)
    assert config["rope_scaling"] == {
        **{"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    }
    assert "rope_freqs.weight" not in found


@pytest.mark.parametrize(
    "divisors",
    [
        llama3_divisors(32, 50_000.0, 8.0, change=0.01),
        llama3_divisors(32, 10_000.0, 8.0),
        llama3_divisors(16, 50_000.0, 8.0),
        np.full(32, np.nan, np.float32),
        np.zeros(32, np.float32),
    ],
)
def test_other_divisors_are_refused(tmp_path, divisors):
    message = refusal(PretrainedError, llama3, tmp_path / "x.gguf", divisors)
    assert "scales its positions by rope_freqs.weight in another way than Llama 3" in message


def test_divisors_beside_a_factor_are_refused(tmp_path):
    factors = {"rope.scaling.factor": 8.0}
    divisors = llama3_divisors(32, 50_000.0, 8.0)
    message = refusal(PretrainedError, llama3, tmp_path / "x.gguf", divisors, **factors)
    assert "scales its positions by 8.0 and by rope_freqs.weight: expected one of them" in message


def read(path, name, **keys):
    """Convert a model whose metadata have these keys of the architecture, too, and open it."""

    def extra(writer):
        for each, value in keys.items():
            kind = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
            add = kind.get(type(value), writer.add_array if isinstance(value, list) else None)
            (add or writer.add_string)(f"{name}.{each}", value)

    converted(path, name, extra=extra)
    return open_gguf(path)


KIND, FACTOR, OLDER = "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gptneox"])
@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({KIND: "linear", FACTOR: 4.0}, 4.0),
        ({FACTOR: 4.0}, 4.0),
        ({OLDER: 4.0}, 4.0),
        ({FACTOR: 4.0, OLDER: 2.0}, 4.0),
        ({KIND: "none", FACTOR: 4.0}, None),
        ({KIND: "linear"}, None),
        ({KIND: "linear", FACTOR: 1.0}, None),
        ({KIND: "linear", FACTOR: 0.0, OLDER: 2.0}, None),
    ],
)
def test_positions_are_scaled_as_llama_cpp_scales_them(tmp_path, name, keys, factor):
    """By a factor where the kind is missing, and where the factor has its older name."""
    config, _ = gguf_model(read(tmp_path / "x.gguf", name, **keys))
    expected = None if factor is None else {"rope_type": "linear", "factor": factor}
    assert config["rope_scaling"] == expected


@pytest.mark.parametrize("key", [FACTOR, OLDER])
@pytest.mark.parametrize("factor", ["4", -2.0, float("nan"), [4.0, 4.0]])
def test_factors_of_wrong_kinds_are_refused(tmp_path, key, factor):
    file = read(tmp_path / "x.gguf", "llama", **{key: factor})
    reason = f"as llama.{key}: expected a positive number"
    assert reason in refusal(PretrainedError, gguf_model, file)


@pytest.mark.parametrize("kind", ["yarn", "longrope", 1, ["linear", "linear"]])
def test_other_kinds_of_scaling_are_refused(tmp_path, kind):
    file = read(tmp_path / "x.gguf", "llama", **{KIND: kind, FACTOR: 4.0})
    message = refusal(PretrainedError, gguf_model, file)
    assert message.endswith("expected none, linear, or that of Llama 3")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("qwen2", "attention.sliding_window", 4096),
        ("qwen3", "attention.sliding_window", 4096),
        ("llama", "attention.sliding_window", 4096),
        ("llama", "expert_count", 8),
        ("llama", "logit_scale", 0.5),
        ("llama", "attention.clamp_kqv", 8.0),
        ("qwen2", "attention.causal", False),
        ("qwen2", "attn_logit_softcapping", 50.0),
        ("gemma3", "final_logit_softcapping", 30.0),
        ("gptneox", "rope.scaling.attn_factor", 1.5),
        ("gptneox", "attention.max_alibi_bias", [8.0, 8.0]),
    ],
)
def test_options_that_the_decoder_lacks_are_refused(tmp_path, name, key, value):
    file = read(tmp_path / "x.gguf", name, **{key: value})
    message = refusal(PretrainedError, gguf_model, file)
    assert f" as {name}.{key}: expected " in message
    assert message.endswith("since this option is not supported")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "attention.value_length", 8),
        ("llama", "rope.dimension_count", 2),
        ("qwen3", "rope.dimension_count", 2),
        ("gemma2", "attention.sliding_window_pattern", 6),
        ("gptneox", "attention.head_count_kv", 2),
        ("gpt2", "attention.head_count_kv", 2),
    ],
)
def test_numbers_that_contradict_the_network_are_refused(tmp_path, name, key, value):
    file = read(tmp_path / "x.gguf", name, **{key: value})
    reason = f"has {value} as {name}.{key}: expected"
    assert reason in refusal(PretrainedError, gguf_model, file)


@pytest.mark.parametrize("name", MODELS)
def test_keys_that_nobody_knows_are_refused_by_name(tmp_path, name):
    file = read(tmp_path / "x.gguf", name, **{"some.new_option": 3})
    message = refusal(PretrainedError, gguf_model, file)
    assert f"has 3 as {name}.some.new_option: probattn does not know this option" in message


def test_a_key_that_is_no_line_is_shown_as_one(tmp_path):
    file = read(tmp_path / "x.gguf", "llama", **{"some\nkey": 3})
    assert "has 3 as 'llama.some\\nkey': " in refusal(PretrainedError, gguf_model, file)


@pytest.mark.parametrize("name", MODELS)
def test_keys_without_effect_change_nothing(tmp_path, name):
    """What converters have written in any version, and options that are off."""
    keys = {
        **{"vocab_size": WORDS, "tensor_data_layout": "Meta AI original pth", "pooling_type": 0},
        **{"rope.scaling.finetuned": False, "rope.scaling.original_context_length": 16},
        **{"rope.scaling.attn_factor": 1.0, "attention.causal": True, "expert_count": 0},
        **{"attention.clamp_kqv": 0.0, "attention.max_alibi_bias": 0.0, "logit_scale": 0.0},
        "expert_used_count": 0,
    }
    if name not in ("gpt2", "gptneox"):
        keys |= {"attention.value_length": HEAD, "rope.dimension_count": HEAD}
        keys["attention.layer_norm_epsilon"] = 1e-5
    if name == "gemma3":
        keys |= {"rope.freq_base_swa": 1e4, "attention.sliding_window_pattern": 6}
    others = {"general.file_type": 1, "quantize.imatrix.file": "x", "tokenizer.ggml.pre": "x"}

    def extra(writer):
        for each, value in others.items():
            (writer.add_uint32 if type(value) is int else writer.add_string)(each, value)

    plain = tmp_path / "plain.gguf"
    converted(plain, name, extra=extra)
    expected, _ = gguf_model(open_gguf(plain))
    assert gguf_model(read(tmp_path / "x.gguf", name, **keys))[0] == expected == CONFIGS[name]


def test_the_pattern_of_windows_is_that_of_the_file(tmp_path):
    file = read(tmp_path / "x.gguf", "gemma3", **{"attention.sliding_window_pattern": 4})
    assert gguf_model(file)[0]["sliding_window_pattern"] == 4
    file = read(tmp_path / "y.gguf", "gemma3", **{"attention.sliding_window_pattern": [True] * 2})
    reason = "as gemma3.attention.sliding_window_pattern: expected 1 to"
    assert reason in refusal(PretrainedError, gguf_model, file)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ((4, 0), "has 0 as llama.attention.head_count: expected 1 to 16777216"),
        ((4, 2**31), "has 2147483648 as llama.attention.head_count: expected 1 to"),
        ((6, 2.0), "has 2.0 as llama.attention.head_count: expected 1 to"),
        ((7, True), "has True as llama.attention.head_count: expected 1 to"),
        ((STRING, "six"), "has 'six' as llama.attention.head_count: expected 1 to"),
        ((ARRAY, (4, [6, 6])), "as llama.attention.head_count: expected 1 to"),
        (None, "has None as llama.attention.head_count: expected 1 to"),
        ((4, 5), "its tensor 'blk.0.attn_q.weight' has 24 rows: expected a multiple of 10"),
    ],
)
def test_metadata_of_wrong_kinds_is_refused(tmp_path, changed, reason):
    numbers = {
        **{"embedding_length": 24, "feed_forward_length": 20, "context_length": 16},
        **{"block_count": 1, "attention.key_length": 4},
    }
    keys = [
        key("general.architecture", STRING, "llama"),
        *(key(f"llama.{name}", 4, value) for name, value in numbers.items()),
        key("llama.attention.layer_norm_rms_epsilon", 6, 1e-5),
    ]
    if changed:
        keys.append(key("llama.attention.head_count", *changed))
    tensors = [
        tensor("token_embd.weight", [2, 24], 0, 0),
        tensor("blk.0.attn_q.weight", [24, 24], 0, 192),
    ]
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf(keys, tensors, bytes(192 + 24 * 24 * 4)))
    assert reason in refusal(PretrainedError, gguf_model, open_gguf(path))
