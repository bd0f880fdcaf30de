"""What is read from a config.json, and what is refused by name."""

import itertools
import math
import re

import pytest

from probattn.inference.pretrained.architectures import decoder_config
from probattn.models.decoder.config import DecoderConfig, RotaryConfig
from tests.support.tiny_checkpoints import CONFIGS, reference

UNKNOWN = "probattn does not know this option, and without it the network may be another one"


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_saves_is_the_same_decoder(name):
    """Its version 5 writes other keys than files that were published before."""
    assert decoder_config(reference(name)["saved_config"]) == decoder_config(CONFIGS[name])


def test_missing_keys_have_the_defaults_of_transformers():
    sizes = {"vocab_size": 9, "hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64}
    assert decoder_config(sizes | {"model_type": "llama"}).key_heads == 2
    sizes |= {"num_key_value_heads": 1}
    gemma = decoder_config(sizes | {"model_type": "gemma3_text"})
    assert gemma.windows == (4096,) * 5 + (None,)
    assert gemma.rotary == RotaryConfig(base=1e6)
    assert gemma.local_rotary == RotaryConfig(base=1e4)
    assert (gemma.head_width, gemma.attention_scale, gemma.tied) == (256, 1 / 16, True)
    gemma = decoder_config(sizes | {"model_type": "gemma2"})
    assert (gemma.attention_cap, gemma.logit_cap) == (50.0, 30.0)
    assert gemma.windows == (4096, None) * 3
    assert decoder_config(sizes | {"model_type": "mistral"}).windows == (4096,) * 6
    qwen = decoder_config(sizes | {"model_type": "qwen2"})
    assert (qwen.windows, qwen.head_width, qwen.tied) == ((), 6, False)


# What gpt2-medium is published with beside the sizes.
PUBLISHED = {
    **{"architectures": ["GPT2LMHeadModel"], "bos_token_id": 50256, "eos_token_id": 50256},
    **{"initializer_range": 0.02, "n_special": 0, "predict_special_tokens": True},
    **{"resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1},
    **{"summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True},
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}
# What a PretrainedConfig of transformers 4.46 holds for every model, at other values than its
# defaults where these have no effect; and keys that only older or newer versions have.
SAVED = {
    **{"return_dict": False, "output_hidden_states": True, "output_attentions": True},
    **{"torchscript": True, "torch_dtype": "float16", "use_bfloat16": True},
    **{"tf_legacy_loss": True, "pruned_heads": {}, "chunk_size_feed_forward": 0},
    **{"is_encoder_decoder": False, "is_decoder": True, "cross_attention_hidden_size": None},
    **{"add_cross_attention": False, "tie_encoder_decoder": False, "max_length": 50},
    **{"min_length": 3, "do_sample": True, "early_stopping": True, "num_beams": 4},
    **{"num_beam_groups": 2, "diversity_penalty": 0.5, "temperature": 0.7, "top_k": 10},
    **{"top_p": 0.9, "typical_p": 0.9, "repetition_penalty": 1.2, "length_penalty": 2.0},
    **{"no_repeat_ngram_size": 3, "encoder_no_repeat_ngram_size": 3, "bad_words_ids": [[7]]},
    **{"num_return_sequences": 2, "output_scores": True, "return_dict_in_generate": True},
    **{"forced_bos_token_id": 0, "forced_eos_token_id": 0, "remove_invalid_values": True},
    **{"exponential_decay_length_penalty": [5, 1.1], "suppress_tokens": [7]},
    **{"begin_suppress_tokens": [7], "architectures": None, "finetuning_task": "x"},
    **{"id2label": {"0": "x"}, "label2id": {"x": 0}, "tokenizer_class": "GPT2Tokenizer"},
    **{"prefix": "x", "bos_token_id": 0, "pad_token_id": 0, "eos_token_id": [0, 1]},
    **{"sep_token_id": 0, "decoder_start_token_id": 0, "task_specific_params": {"x": 1}},
    **{"problem_type": "regression", "_name_or_path": "x", "transformers_version": "4.46.3"},
    **{"_commit_hash": None, "loss_type": "ForCausalLM", "output_past": True, "num_labels": 1},
    **{"_num_labels": 1, "eos_token_ids": [0], "xla_device": None, "use_return_dict": True},
    **{"epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "encoder_repetition_penalty": 1.1},
    **{"num_assistant_tokens": 5, "num_assistant_tokens_schedule": "heuristic"},
    **{"assistant_confidence_threshold": 0.5, "name_or_path": "x", "gradient_checkpointing": True},
}


def test_keys_without_effect_on_a_logit_are_taken():
    gpt2 = decoder_config(CONFIGS["gpt2"])
    assert decoder_config(CONFIGS["gpt2"] | PUBLISHED) == gpt2
    for name in CONFIGS:
        assert decoder_config(CONFIGS[name] | SAVED) == decoder_config(CONFIGS[name])


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        (
            "llama",
            {"model_type": "opt"},
            'model_type is "opt": expected one of gpt2, gpt_neox, llama, mistral, qwen2, qwen3, '
            "gemma2, gemma3_text",
        ),
        ("llama", {"num_experts": 8}, f"num_experts is 8: {UNKNOWN}"),
        ("llama", {"a\nb": None}, f"'a\\nb' is null: {UNKNOWN}"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved is true: expected false"),
        ("gpt2", {"n_special": 3}, "n_special is 3: expected 0"),
        ("gpt2", {"pruned_heads": {"0": [1]}}, 'pruned_heads is {"0": [1]}: expected {} or null'),
        (
            "gpt2",
            {"is_encoder_decoder": True},
            "is_encoder_decoder is true: expected false or null",
        ),
        ("gpt2", {"add_cross_attention": 1}, "add_cross_attention is 1: expected false or null"),
        (
            "gpt2",
            {"cross_attention_hidden_size": 8},
            "cross_attention_hidden_size is 8: expected null",
        ),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is true: expected false",
        ),
        (
            "gemma2",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention is true: expected false or null",
        ),
        (
            "llama",
            {"hidden_size": "20"},
            'hidden_size is "20": expected an integer from 1 to 2147483647',
        ),
        (
            "llama",
            {"num_hidden_layers": 10**12},
            "num_hidden_layers is 1000000000000: expected an integer from 1 to 10000",
        ),
        (
            "llama",
            {"rms_norm_eps": 0},
            "rms_norm_eps is 0: expected a finite number > 0",
        ),
        ("llama", {"mlp_bias": 1}, "mlp_bias is 1: expected true or false"),
        (
            "llama",
            {"hidden_act": "relu2"},
            'hidden_act is "relu2": expected one of gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, '
            "silu, swish",
        ),
        (
            "llama",
            {"head_dim": None, "hidden_size": 22},
            "hidden_size is 22: expected a multiple of num_attention_heads, 4",
        ),
        (
            "llama",
            {"num_key_value_heads": 3},
            "decoder.key_heads is 3: expected a divisor of the 4 heads",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            'rope_scaling.rope_type is "yarn": expected one of default, linear, llama3',
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}},
            f"rope_scaling.mrope_section is [1]: {UNKNOWN}",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear"}},
            "rope_scaling.factor is missing: config.json must have it",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.5}}
            | {"rope_scaling": None},
            f"rope_parameters.partial_rotary_factor is 0.5: {UNKNOWN}",
        ),
        ("llama", {"rope_scaling": 2}, "rope_scaling is 2: expected an object or null"),
        (
            "gpt_neox_variant",
            {"rope_parameters": {"rope_theta": 5.0}},
            'rope_scaling is {"type": "linear", "factor": 3.0}: expected null beside '
            "rope_parameters",
        ),
        (
            "gpt_neox",
            {"rope_theta": 5.0},
            "rope_theta is 5.0: expected the same as rotary_emb_base",
        ),
        (
            "gemma2",
            {"hidden_act": "silu"},
            'hidden_act is "silu": expected the same as hidden_activation',
        ),
        (
            "gemma2",
            {"sliding_window": None},
            "sliding_window is null: expected a window that is in use, for layers that slide",
        ),
        (
            "qwen3_variant",
            {"layer_types": ["full_attention"]},
            'layer_types is ["full_attention"]: expected 2 of full_attention and sliding_attention',
        ),
        (
            "mistral",
            {"layer_types": ["full_attention"] * 2},
            f'layer_types is ["full_attention", "full_attention"]: {UNKNOWN}',
        ),
        (
            "gemma3_text",
            {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping is 50.0: expected null for gemma3_text",
        ),
    ],
)
def test_a_network_that_is_not_known_is_refused_by_name(name, changes, line):
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        decoder_config(CONFIGS[name] | changes)


def test_a_size_that_is_missing_is_named():
    config = {key: value for key, value in CONFIGS["llama"].items() if key != "hidden_size"}
    with pytest.raises(ValueError, match=r"^hidden_size is missing: config.json must have it$"):
        decoder_config(config)


ODD = [None, True, False, -1, 0, 1, 3, 10**7, 10**400, 0.3, 1e308, 1e-320, math.nan, math.inf]
ODD += ["", "x\n", "gelu", [], [7], ["full_attention", "sliding_attention"], [[]], {}, {"x\n": 1}]
ODD += [{"type": "linear"}, {"full_attention": 3}, {"rope_type": "llama3", "factor": 2}]


@pytest.mark.parametrize("name", CONFIGS)
def test_whatever_a_value_is_there_is_a_decoder_or_one_line(name):
    config = CONFIGS[name] | {"rope_scaling": None, "rope_parameters": None}
    refusals = []
    for key, value in itertools.product(config, ODD):
        try:
            found = decoder_config(config | {key: value})
        except ValueError as error:
            refusals.append(str(error))
        else:
            assert isinstance(found, DecoderConfig)
    assert len(refusals) > len(ODD)
    assert [line for line in refusals if not line.isprintable()] == []
