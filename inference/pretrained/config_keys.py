"""A config.json read key by key, so that no key of it is left unread without a word."""

import json
import sys
from collections.abc import Collection, Mapping
from typing import Any

from probattn.messages import legible

_REQUIRED: Any = object()
_MOST = 2**31 - 1
# Training, decoding, and where the file comes from. Dropout is off outside training.
IRRELEVANT = frozenset(
    (
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "attn_pdrop",
        "bos_token_id",
        "cache_implementation",
        "classifier_dropout",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "finetuning_task",
        "gradient_checkpointing",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_llama_config",
        "keys_to_ignore_at_inference",
        "label2id",
        "max_length",
        "n_ctx",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "reorder_and_upcast_attn",
        "resid_pdrop",
        "return_dict",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    )
)
# Options that the decoder does not have, with the values that leave them off.
OFF: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "rope_interleaved": (False,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_encoder_decoder": (False,),
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
