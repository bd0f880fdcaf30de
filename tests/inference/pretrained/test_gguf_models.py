"""GGUF files in the terms of Hugging Face, against models converted as llama.cpp converts them."""

import gguf as library
import numpy as np
import pytest

from probattn.inference.pretrained.errors import PretrainedError
from probattn.inference.pretrained.gguf_files import open_gguf
from probattn.inference.pretrained.gguf_models import gguf_model
from tests.support.gguf_bytes import ARRAY, STRING, gguf, key, tensor
from tests.support.refusals import refusal

WIDTH, HEADS, GROUPS, HEAD, INNER, WORDS, LAYERS = 24, 6, 2, 4, 20, 9, 2
RNG = np.random.default_rng(0)
LLAMA_LAYER = {
    "input_layernorm.weight": (WIDTH,),
    "post_attention_layernorm.weight": (WIDTH,),
    "self_attn.q_proj.weight": (HEADS * HEAD, WIDTH),
    "self_attn.k_proj.weight": (GROUPS * HEAD, WIDTH),
    "self_attn.v_proj.weight": (GROUPS * HEAD, WIDTH),
    "self_attn.o_proj.weight": (WIDTH, HEADS * HEAD),
    "mlp.gate_proj.weight": (INNER, WIDTH),
    "mlp.up_proj.weight": (INNER, WIDTH),
    "mlp.down_proj.weight": (WIDTH, INNER),
}
BIASES = {
    "self_attn.q_proj.bias": (HEADS * HEAD,),
    "self_attn.k_proj.bias": (GROUPS * HEAD,),
    "self_attn.v_proj.bias": (GROUPS * HEAD,),
}
QK_NORMS = {"self_attn.q_norm.weight": (HEAD,), "self_attn.k_norm.weight": (HEAD,)}
GEMMA_NORMS = {
    "pre_feedforward_layernorm.weight": (WIDTH,),
    "post_feedforward_layernorm.weight": (WIDTH,),
}
LLAMA_REST = {"model.embed_tokens.weight": (WORDS, WIDTH), "model.norm.weight": (WIDTH,)}
GPT2_LAYER = {
    **{f"ln_{n}.{part}": (WIDTH,) for n in (1, 2) for part in ("weight", "bias")},
    **{"attn.c_attn.weight": (WIDTH, 3 * WIDTH), "attn.c_attn.bias": (3 * WIDTH,)},
    **{"attn.c_proj.weight": (WIDTH, WIDTH), "attn.c_proj.bias": (WIDTH,)},
    **{"mlp.c_fc.weight": (WIDTH, INNER), "mlp.c_fc.bias": (INNER,)},
    **{"mlp.c_proj.weight": (INNER, WIDTH), "mlp.c_proj.bias": (WIDTH,)},
}
GPT2_REST = {
    **{"transformer.wte.weight": (WORDS, WIDTH), "transformer.wpe.weight": (16, WIDTH)},
    **{"transformer.ln_f.weight": (WIDTH,), "transformer.ln_f.bias": (WIDTH,)},
}
NEOX_LAYER = {
    **{
        f"{name}_layernorm.{part}": (WIDTH,)
        for name in ("input", "post_attention")
        for part in ("weight", "bias")
    },
    **{"attention.query_key_value.weight": (3 * WIDTH, WIDTH)},
    **{"attention.query_key_value.bias": (3 * WIDTH,)},
    **{"attention.dense.weight": (WIDTH, WIDTH), "attention.dense.bias": (WIDTH,)},
    **{"mlp.dense_h_to_4h.weight": (INNER, WIDTH), "mlp.dense_h_to_4h.bias": (INNER,)},
    **{"mlp.dense_4h_to_h.weight": (WIDTH, INNER), "mlp.dense_4h_to_h.bias": (WIDTH,)},
}
NEOX_REST = {
    **{"gpt_neox.embed_in.weight": (WORDS, WIDTH), "embed_out.weight": (WORDS, WIDTH)},
    **{"gpt_neox.final_layer_norm.weight": (WIDTH,), "gpt_neox.final_layer_norm.bias": (WIDTH,)},
}


def as_it_is(_, values):
    return values


def interleaved(name, values):
    """What llama.cpp does: number i of a head's first half goes before number i of its second."""
    heads = {"q": HEADS, "k": GROUPS}.get(name.partition("self_attn.")[2][:1])
    if heads is None or "norm" in name:
        return values
    rows = [
        head * HEAD + half * (HEAD // 2) + index
        for head in range(heads)
        for index in range(HEAD // 2)
        for half in range(2)
    ]
    return values[rows]


def one_more(name, values):
    return values + 1 if name.endswith("norm.weight") else values


def transposed(name, values):
    return values.T if "c_" in name and values.ndim == 2 else values


def parts_one_after_another(name, values):
    if "query_key_value" not in name:
        return values
    head = WIDTH // HEADS
    rows = [
        (which * 1 + 3 * each) * head + index
        for which in range(3)
        for each in range(HEADS)
        for index in range(head)
    ]
    return values[rows]


MODELS = {  # Hugging Face's layers and rest, and what the converter does with a tensor
    "llama": ("model.layers", LLAMA_LAYER, LLAMA_REST, interleaved),
    "qwen2": ("model.layers", LLAMA_LAYER | BIASES, LLAMA_REST, as_it_is),
    "qwen3": ("model.layers", LLAMA_LAYER | QK_NORMS, LLAMA_REST, as_it_is),
    "gemma2": ("model.layers", LLAMA_LAYER | GEMMA_NORMS, LLAMA_REST, one_more),
    "gemma3": ("model.layers", LLAMA_LAYER | GEMMA_NORMS | QK_NORMS, LLAMA_REST, one_more),
    "gpt2": ("transformer.h", GPT2_LAYER, GPT2_REST, transposed),
    "gptneox": ("gpt_neox.layers", NEOX_LAYER, NEOX_REST, parts_one_after_another),
}


def converted(path, name, *, extra=None, **tensors):
    """Write a random model as the converter does. Returns its tensors as Hugging Face has them."""
    prefix, layer, rest, change = MODELS[name]
    shapes = {f"{prefix}.{n}.{part}": shape for n in range(LAYERS) for part, shape in layer.items()}
    values = {
        each: RNG.normal(size=shape).astype(np.float32) for each, shape in (shapes | rest).items()
    } | tensors
    kind = {text: number for number, text in library.MODEL_ARCH_NAMES.items()}[name]
    names = library.get_tensor_name_map(kind, LAYERS)
    writer = library.GGUFWriter(path, name)
    writer.add_context_length(16)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    if name in ("gpt2", "gptneox"):
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_head_count_kv(GROUPS)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(50_000.0)
        writer.add_key_length(HEAD)
    if name in ("gemma2", "gemma3"):
        writer.add_sliding_window(8)
    if name == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    if name == "gptneox":
        writer.add_rope_dimension_count(1)
        writer.add_parallel_residual(False)
    writer.add_bos_token_id(3)
    for each, value in values.items():
        found = names.get_name(each, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(found or each, np.ascontiguousarray(change(each, value)))
    if extra:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


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
    | {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_has_the_keys_of_hugging_face(tmp_path, name):
    converted(tmp_path / "x.gguf", name)
    assert gguf_model(open_gguf(tmp_path / "x.gguf"))[0] == CONFIGS[name]


def test_a_head_of_its_own(tmp_path):
    converted(tmp_path / "x.gguf", "llama", **{"lm_head.weight": np.ones((WORDS, WIDTH), "f4")})
    config, found = gguf_model(open_gguf(tmp_path / "x.gguf"))
    assert not config["tie_word_embeddings"]
    np.testing.assert_array_equal(found["lm_head.weight"], 1)


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
        *(
            key(f"{name}.{each}", 6, 1.0)
            for each in ("attention.layer_norm_rms_epsilon", "attn_logit_softcapping")
        ),
    ]
    if name == "gemma2":
        keys.append(key("gemma2.final_logit_softcapping", 6, 1.0))
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


def llama3(path, divisors, head=64):
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


def rope(kind):
    return lambda writer: writer.add_string("llama.rope.scaling.type", kind)


def test_positions_scaled_by_a_factor(tmp_path):
    def extra(writer):
        rope("linear")(writer)
        writer.add_float32("llama.rope.scaling.factor", 4.0)

    converted(tmp_path / "x.gguf", "llama", extra=extra)
    config, _ = gguf_model(open_gguf(tmp_path / "x.gguf"))
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (rope("yarn"), "scales its positions by 'yarn': expected none, linear, or that of Llama 3"),
        (lambda w: w.add_uint32("llama.expert_count", 8), "sets llama.expert_count, which is not"),
        (lambda w: w.add_uint32("llama.rope.dimension_count", 2), "turns 2 numbers of a head of 4"),
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
