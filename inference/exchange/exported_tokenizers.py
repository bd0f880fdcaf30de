"""The tokenizer.json of a vocabulary and its settings, as transformers reads them."""

import json
from collections.abc import Mapping
from typing import Any

from probattn.inference.pretrained.checkpoint import SETTINGS, SPECIAL, Checkpoint
from probattn.inference.pretrained.pretrained_tokenizer import PretrainedTokenizer
from probattn.text.byte_pairs import SYMBOLS, BytePairVocabulary
from probattn.text.vocabulary import (
    OTHER,
    CharacterVocabulary,
    FrequentVocabulary,
    Vocabulary,
)

_VERSION = "1.0"  # of the format
_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}  # transformers' name of any tokenizer.json
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def tokenizer_definition(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the content of the tokenizer.json that encodes a text as the vocabulary does.

    Characters are the tokens of byte-pair encoding without a merge. Where characters were left out
    of a frequent vocabulary, its last symbol is the unknown token.

    Args:
        vocabulary: any of this library, or the tokenizer of a published model.
    """
    if isinstance(vocabulary, PretrainedTokenizer):
        return vocabulary.definition
    if isinstance(vocabulary, BytePairVocabulary):
        return _byte_pairs(vocabulary)
    assert isinstance(vocabulary, CharacterVocabulary | FrequentVocabulary)
    symbols, unknown = vocabulary.symbols, None
    if isinstance(vocabulary, FrequentVocabulary):
        symbols, unknown = (*symbols, OTHER), OTHER
    model = {"vocab": {symbol: index for index, symbol in enumerate(symbols)}, "merges": []}
    # Without a decoder, the library puts spaces between tokens.
    return _definition(model | {"unk_token": unknown}, None, {"type": "Fuse"})


def published_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the small files beside a published model, with settings of the tokenizer in any case.

    They are as they were published. Settings that are those of `_CLASS` alone come from an earlier
    version of this library, which kept none, and count as none.

    Raises:
        PretrainedError: see `Checkpoint.read_beside`.
    """
    found = checkpoint.read_beside()
    if SETTINGS in found and json.loads(found[SETTINGS]) != _CLASS:
        return found
    special = json.loads(found.get(SPECIAL, b"{}"))
    definition = checkpoint.tokenizer.definition
    return found | tokenizer_settings(definition, checkpoint.config, special)


def tokenizer_settings(
    definition: Mapping[str, Any],
    config: Mapping[str, Any],
    special: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """Return the tokenizer_config.json of a tokenizer that came without one, by its name.

    It names the tokens that begin, end and fill texts and the unknown one, as far as they are known
    and have an id, since transformers would add any other to the vocabulary.

    Args:
        definition: the content of tokenizer.json.
        config: that of config.json, whose ids count where `special` says nothing.
        special: that of special_tokens_map.json.
    """
    tokens = {index: token for token, index in definition["model"]["vocab"].items()}
    tokens |= {each["id"]: each["content"] for each in definition.get("added_tokens") or []}
    known = set(tokens.values())
    unknown = definition["model"].get("unk_token")
    named = {"unk_token": unknown} if unknown in known else {}
    for name in _SPECIAL:
        index = config.get(f"{name}_id")
        first = index[0] if isinstance(index, list) and index else index  # a model may end on many
        if type(first) is int and first in tokens:
            named[name] = tokens[first]
        said = (special or {}).get(name)
        content = said.get("content") if isinstance(said, dict) else said
        if isinstance(content, str) and content in known:
            named[name] = content
    settings = {**_CLASS, **named, "clean_up_tokenization_spaces": False}
    return {SETTINGS: (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()}


def _byte_pairs(vocabulary: BytePairVocabulary) -> dict[str, Any]:
    symbols = ["".join(SYMBOLS[byte] for byte in token) for token in vocabulary.tokens]
    model = {
        "vocab": {symbol: index for index, symbol in enumerate(symbols)},
        "merges": [[symbols[left], symbols[right]] for left, right in vocabulary.merges],
    }
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    lines = {
        "type": "Split",
        "pattern": {"String": "\n"},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    cut = {"type": "Sequence", "pretokenizers": [lines, levels | {"use_regex": True}]}
    return _definition(model, cut, levels | {"use_regex": True})


def _definition(model: dict[str, Any], cut: dict[str, Any] | None, decoder: Any) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": cut,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            **model,
        },
    }
