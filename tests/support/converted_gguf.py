"""Small random models of every architecture, converted to GGUF as llama.cpp converts them."""

import gguf as library
import numpy as np

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
