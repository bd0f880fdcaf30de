"""What a config.json of Hugging Face says of a network, as the configuration of a decoder.

Every key must be one that is used here, or one that is known to change no logit. So a network with
an option that the decoder does not have is refused, and never read as another one.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from probattn.inference.pretrained.config_keys import IRRELEVANT, OFF, ConfigKeys
from probattn.models.decoder.config import Activation, DecoderConfig, RotaryConfig

_ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_MOST_LAYERS = 10_000  # a tree has a branch for each


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Translate a config.json into the configuration of a decoder.

    A key that is missing has the default of the library `transformers`; only sizes have none.

    Args:
        config: the object that config.json holds.

    Raises:
        ValueError: if `model_type` is unknown, a key is missing or has a wrong value, or there is
            a key that probattn does not know. The line names the key.
    """
    keys = ConfigKeys(config)
    found = _FAMILIES[keys.choice("model_type", _FAMILIES)](keys)
    keys.finish(IRRELEVANT, OFF)
    return found


def _gpt2(keys: ConfigKeys) -> DecoderConfig:
    width, heads = keys.integer("n_embd"), keys.integer("n_head")
    return DecoderConfig(
        vocabulary=keys.integer("vocab_size"),
        width=width,
        layers=keys.integer("n_layer", most=_MOST_LAYERS),
        heads=heads,
        key_heads=heads,
        head_width=_divided(keys, "n_embd", "n_head"),
        context=keys.integer("n_positions"),
        hidden=keys.optional_integer("n_inner") or 4 * width,
        norm="layer",
        norm_bias=True,
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        rotary=None,
        attention_bias=True,
        out_bias=True,
        mlp_bias=True,
        activation=_activation(keys, "activation_function", "gelu_new"),
        gated=False,
        tied=keys.flag("tie_word_embeddings", True),
        attention_scale=None if keys.flag("scale_attn_weights", True) else 1.0,
    )


def _gpt_neox(keys: ConfigKeys) -> DecoderConfig:
    heads = keys.integer("num_attention_heads")
    biased = keys.flag("attention_bias", True)
    return DecoderConfig(
        vocabulary=keys.integer("vocab_size"),
        width=keys.integer("hidden_size"),
        layers=_layers(keys),
        heads=heads,
        key_heads=heads,
        head_width=_divided(keys, "hidden_size", "num_attention_heads"),
        context=keys.integer("max_position_embeddings"),
        hidden=keys.integer("intermediate_size"),
        norm="layer",
        norm_bias=True,
        norm_eps=keys.number("layer_norm_eps", 1e-5),
        rotary=_neox_rotary(keys),
        attention_bias=biased,
        out_bias=biased,
        mlp_bias=True,
        activation=_activation(keys, "hidden_act", "gelu"),
        gated=False,
        parallel=keys.flag("use_parallel_residual", True),
        tied=keys.flag("tie_word_embeddings", False),
    )


def _llama(keys: ConfigKeys) -> DecoderConfig:
    biased = keys.flag("attention_bias", False)
    heads = keys.integer("num_attention_heads")
    return _gated(
        keys,
        key_heads=keys.optional_integer("num_key_value_heads") or heads,
        attention_bias=biased,
        out_bias=biased,
        mlp_bias=keys.flag("mlp_bias", False),
    )


def _mistral(keys: ConfigKeys) -> DecoderConfig:
    window = keys.optional_integer("sliding_window", 4096)
    return _gated(keys, windows=() if window is None else (window,) * _layers(keys))


def _qwen2(keys: ConfigKeys) -> DecoderConfig:
    return _gated(keys, attention_bias=True, windows=_qwen_windows(keys))


def _qwen3(keys: ConfigKeys) -> DecoderConfig:
    biased = keys.flag("attention_bias", False)
    return _gated(
        keys,
        head_width=keys.integer("head_dim", 128),
        query_norm=True,
        attention_bias=biased,
        out_bias=biased,
        windows=_qwen_windows(keys),
    )


def _gemma2(keys: ConfigKeys) -> DecoderConfig:
    return _gemma(
        keys,
        every=2,
        attention_cap=keys.optional_number("attn_logit_softcapping", 50.0),
        logit_cap=keys.optional_number("final_logit_softcapping", 30.0),
    )


def _gemma3(keys: ConfigKeys) -> DecoderConfig:
    if keys.take("attn_logit_softcapping", None) is not None:  # transformers reads and ignores it
        raise keys.refusal("attn_logit_softcapping", "null for gemma3_text")
    every = keys.integer("_sliding_window_pattern", 6)
    every = keys.integer("sliding_window_pattern", every)
    bases = {_FULL: 1e6, _SLIDING: keys.number("rope_local_base_freq", 1e4)}
    tables = keys.table("rope_parameters")
    if tables is None:
        rotary, local = _rotary(keys, base=bases[_FULL]), RotaryConfig(base=bases[_SLIDING])
    else:
        inner = ConfigKeys(tables, "rope_parameters.")
        rotary, local = (
            _rotation(keys, inner.table(kind) or {}, f"rope_parameters.{kind}.", base)
            for kind, base in bases.items()
        )
        inner.finish()
    return _gemma(
        keys,
        every=every,
        rotary=rotary,
        local_rotary=local,
        query_norm=True,
        logit_cap=keys.optional_number("final_logit_softcapping"),
    )


def _gemma(keys: ConfigKeys, *, every: int, **parts: Any) -> DecoderConfig:
    """Read Gemma 2 and 3, in which all layers slide but each last one of `every`."""
    activation = _activation(keys, "hidden_activation", "gelu_pytorch_tanh")
    # Older files have this key too; transformers takes the other one.
    if keys.take("hidden_act", None) is not None and _activation(keys, "hidden_act") != activation:
        raise keys.refusal("hidden_act", "the same as hidden_activation")
    biased = keys.flag("attention_bias", False)
    window = keys.optional_integer("sliding_window", 4096)
    return _gated(
        keys,
        activation=activation,
        head_width=keys.integer("head_dim", 256),
        norm="rms_plus_one",
        post_norms=True,
        attention_bias=biased,
        out_bias=biased,
        default_tied=True,
        embedding_scale=math.sqrt(keys.integer("hidden_size")),
        attention_scale=keys.number("query_pre_attn_scalar", 256) ** -0.5,
        windows=_windows(keys, lambda layer: (layer + 1) % every != 0, window),
        **parts,
    )


def _gated(
    keys: ConfigKeys,
    *,
    key_heads: int | None = None,
    head_width: int | None = None,
    rotary: RotaryConfig | None = None,
    activation: Activation | None = None,
    default_tied: bool = False,
    **parts: Any,
) -> DecoderConfig:
    """Read what Llama and its descendants share; `parts` are what a family has of its own."""
    return DecoderConfig(
        vocabulary=keys.integer("vocab_size"),
        width=keys.integer("hidden_size"),
        layers=_layers(keys),
        heads=keys.integer("num_attention_heads"),
        key_heads=key_heads or keys.integer("num_key_value_heads"),
        head_width=head_width or _head_width(keys),
        context=keys.integer("max_position_embeddings"),
        hidden=keys.integer("intermediate_size"),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        rotary=rotary or _rotary(keys, base=1e4),
        activation=activation or _activation(keys, "hidden_act", "silu"),
        tied=keys.flag("tie_word_embeddings", default_tied),
        **parts,
    )


def _activation(keys: ConfigKeys, key: str, default: str | None = None) -> Activation:
    return _ACTIVATIONS[keys.choice(key, _ACTIVATIONS, default)]


def _head_width(keys: ConfigKeys) -> int:
    given = keys.optional_integer("head_dim")
    return given or _divided(keys, "hidden_size", "num_attention_heads")


def _layers(keys: ConfigKeys) -> int:
    return keys.integer("num_hidden_layers", most=_MOST_LAYERS)


def _divided(keys: ConfigKeys, width: str, heads: str) -> int:
    if keys.integer(width) % keys.integer(heads):
        raise keys.refusal(width, f"a multiple of {heads}, {keys.integer(heads)}")
    return keys.integer(width) // keys.integer(heads)


def _qwen_windows(keys: ConfigKeys) -> tuple[int | None, ...]:
    window = keys.optional_integer("sliding_window", 4096)
    first = keys.integer("max_window_layers", 28, least=0)
    used = window if keys.flag("use_sliding_window", False) else None
    return _windows(keys, lambda layer: used is not None and layer >= first, used)


def _windows(
    keys: ConfigKeys, slides: Callable[[int], bool], window: int | None
) -> tuple[int | None, ...]:
    """Return every layer's window, by `layer_types` where config.json has it."""
    layers = _layers(keys)
    types = keys.take("layer_types", None)
    if types is None:
        kinds = [slides(layer) for layer in range(layers)]
    else:
        known = isinstance(types, list) and all(kind in (_FULL, _SLIDING) for kind in types)
        if not known or len(types) != layers:
            raise keys.refusal("layer_types", f"{layers} of {_FULL} and {_SLIDING}")
        kinds = [kind == _SLIDING for kind in types]
    if not any(kinds):
        return ()
    if window is None:
        raise keys.refusal("sliding_window", "a window that is in use, for layers that slide")
    return tuple(window if kind else None for kind in kinds)


def _neox_rotary(keys: ConfigKeys) -> RotaryConfig:
    base, fraction = keys.number("rotary_emb_base", 1e4), keys.number("rotary_pct", 0.25)
    # Some versions of transformers wrote both under a second name, too.
    for key, first, value in (
        ("rope_theta", "rotary_emb_base", base),
        ("partial_rotary_factor", "rotary_pct", fraction),
    ):
        if keys.number(key, value) != value:
            raise keys.refusal(key, f"the same as {first}")
    return _rotary(keys, base=base, fraction=fraction)


def _rotary(keys: ConfigKeys, *, base: float, fraction: float | None = None) -> RotaryConfig:
    """Read rotary positions that all layers share.

    transformers wrote `rope_theta` and `rope_scaling` up to its version 4, and `rope_parameters`
    since.
    """
    old, new = keys.table("rope_scaling"), keys.table("rope_parameters")
    if old and new:
        raise keys.refusal("rope_scaling", "null beside rope_parameters")
    name = "rope_scaling." if old else "rope_parameters."
    return _rotation(keys, old or new or {}, name, keys.number("rope_theta", base), fraction)


def _rotation(
    keys: ConfigKeys,
    table: Mapping[str, Any],
    prefix: str,
    base: float,
    fraction: float | None = None,
) -> RotaryConfig:
    """Read one object of rotary positions; only families that have a fraction may set it."""
    inner = ConfigKeys(table, prefix)
    kinds = ("default", "linear", "llama3")
    kind = inner.choice("rope_type", kinds, inner.choice("type", kinds, "default"))
    parts: dict[str, Any] = {"base": inner.number("rope_theta", base)}
    if fraction is not None:
        parts["fraction"] = inner.number("partial_rotary_factor", fraction)
    if kind != "default":
        parts |= {"scaling": kind, "factor": inner.number("factor")}
    if kind == "llama3":
        name = "original_max_position_embeddings"
        context = inner.optional_integer(name) or keys.integer("max_position_embeddings")
        parts |= {
            "low_frequency_factor": inner.number("low_freq_factor"),
            "high_frequency_factor": inner.number("high_freq_factor"),
            "original_context": context,
        }
    inner.finish()
    return RotaryConfig(**parts)


_FAMILIES: Mapping[str, Callable[[ConfigKeys], DecoderConfig]] = {
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
}
