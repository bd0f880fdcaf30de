"""The tokenizer.json of a vocabulary, as the library `tokenizers` and transformers read it."""

from typing import Any

from probattn.inference.pretrained.pretrained_tokenizer import PretrainedTokenizer
from probattn.text.byte_pairs import SYMBOLS, BytePairVocabulary
from probattn.text.vocabulary import (
    OTHER,
    CharacterVocabulary,
    FrequentVocabulary,
    Vocabulary,
)

_VERSION = "1.0"  # of the format


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
