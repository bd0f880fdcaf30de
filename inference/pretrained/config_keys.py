"""A config.json read key by key, so that no key of it is left unread without a word."""

import json
import sys
from collections.abc import Collection, Mapping
from typing import Any

from probattn.messages import legible

_REQUIRED: Any = object()
_MOST = 2**31 - 1
# Training, generation of text, and where the file comes from: what transformers' PretrainedConfig
# has of these in any version. Dropout is off outside training.
IRRELEVANT = frozenset(
    (
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_flash_attn_2_enabled",
        "_name_or_path",
        "_num_labels",
        "architectures",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "attention_dropout",
        "attn_implementation",
        "attn_pdrop",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "cache_implementation",
        "classifier_dropout",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "embd_pdrop",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "eos_token_id",
        "eos_token_ids",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_llama_config",
        "keys_to_ignore_at_inference",
        "label2id",
        "length_penalty",
        "loss_type",
        "max_length",
        "min_length",
        "n_ctx",
        "name_or_path",
        "no_repeat_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "num_beam_groups",
        "num_beams",
        "num_labels",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "output_scores",
        "pad_token_id",
        "predict_special_tokens",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "remove_invalid_values",
        "reorder_and_upcast_attn",
        "repetition_penalty",
        "resid_pdrop",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "suppress_tokens",
        "target_lookbehind",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_last_hidden_states",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "typical_p",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
        "use_return_dict",
        "xla_device",
    )
)
# Options that the decoder does not have, with the values that leave them off.
OFF: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "chunk_size_feed_forward": (0, None),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False, None),
    "n_special": (0,),
    "pruned_heads": ({}, None),
    "rope_interleaved": (False,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_encoder_decoder": (False, None),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False,),
}


class ConfigKeys:
    """The keys of an object of config.json; `finish` refuses those that nobody asked for.

    Every method that reads one raises a `ValueError` of one line that begins with the key.

    Args:
        config: the object.
        prefix: where it stands in config.json, as messages name it.
    """

    def __init__(self, config: Mapping[str, Any], prefix: str = "") -> None:
        self._config, self._prefix = config, prefix
        self._read: set[str] = set()

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return a value of any kind."""
        self._read.add(key)
        value = self._config.get(key, default)
        if value is _REQUIRED:
            raise ValueError(f"{self._prefix}{key} is missing: config.json must have it")
        return value

    def integer(
        self, key: str, default: Any = _REQUIRED, *, least: int = 1, most: int = _MOST
    ) -> int:
        """Return an integer from `least` to `most`."""
        value = self.take(key, default)
        if type(value) is not int or not least <= value <= most:
            raise self.refusal(key, f"an integer from {least} to {most}")
        return value

    def optional_integer(self, key: str, default: int | None = None) -> int | None:
        """Return an integer from 1, or None where the value is null."""
        return None if self.take(key, default) is None else self.integer(key, default)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """Return a finite number > 0."""
        value = self.take(key, default)
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise self.refusal(key, "a finite number > 0")
        return float(value)

    def optional_number(self, key: str, default: float | None = None) -> float | None:
        """Return a finite number > 0, or None where the value is null."""
        return None if self.take(key, default) is None else self.number(key, default)

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self.take(key, default)
        if type(value) is not bool:
            raise self.refusal(key, "true or false")
        return value

    def choice(self, key: str, choices: Collection[str], default: Any = _REQUIRED) -> str:
        """Return one of these names."""
        value = self.take(key, default)
        if not isinstance(value, str) or value not in choices:
            raise self.refusal(key, f"one of {', '.join(choices)}")
        return value

    def table(self, key: str) -> Mapping[str, Any] | None:
        """Return an object, or None where there is none."""
        value = self.take(key, None)
        if value is not None and not isinstance(value, dict):
            raise self.refusal(key, "an object or null")
        return value

    def refusal(self, key: str, expected: str) -> ValueError:
        """Make the error of a value that is not as expected."""
        shown = as_json(self._config.get(key))
        return ValueError(f"{self._prefix}{key} is {shown}: expected {expected}")

    def finish(
        self, irrelevant: Collection[str] = (), off: Mapping[str, Collection[Any]] | None = None
    ) -> None:
        """Refuse what was not read.

        Args:
            irrelevant: keys that may have any value.
            off: keys that may have one of these values.

        Raises:
            ValueError: naming the first other key.
        """
        off = off or {}
        for key, value in self._config.items():
            if key in self._read or key in irrelevant:
                continue
            if key not in off:
                raise ValueError(
                    f"{legible(self._prefix + key)} is {as_json(value)}: probattn does not know "
                    "this option, and without it the network may be another one"
                )
            if value not in off[key]:
                raise self.refusal(key, " or ".join(map(as_json, off[key])))


def as_json(value: Any) -> str:
    """Return the beginning of a value as JSON writes it."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
