"""The tokenizer in the metadata of a GGUF file, written as the tokenizer.json that it came from.

A GGUF file has the vocabulary and the merges. How a text is cut before it is merged, it gives by a
name alone, and what the name means is written down here.
"""

from collections.abc import Mapping
from typing import Any

from probattn.inference.pretrained.errors import PretrainedError, short
from probattn.inference.pretrained.gguf_files import GgufFile
from probattn.inference.pretrained.pretrained_tokenizer import PretrainedTokenizer
from probattn.inference.pretrained.tokenizer_checks import SPACE

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # types of tokens
_LONGEST_PIECE = 256  # characters, of which every cut is looked up

# The patterns are those by which the tokenizers of GPT-2, Llama 3 and Qwen 2 cut a text.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+"
    r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _WORDS.format(digits=r"\p{N}{1,3}")
_QWEN2 = _WORDS.format(digits=r"\p{N}")
# What llama.cpp does where the name is "default": one pattern after the other.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")

_PATTERNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (_LLAMA3,)),
    "qwen2": (_QWEN2,),
    "default": _DEFAULT,
}
_COMPOSED = ("olmo", "qwen2")  # which normalise a text by NFC before they cut it
_WHOLE_FIRST = ("llama-bpe", "llama3", "llama-v3")  # a word that is a token is not merged


def gguf_tokenizer(file: GgufFile) -> PretrainedTokenizer:
    """Return the tokenizer of a GGUF file.

    Raises:
        PretrainedError: if the metadata has none, lacks a part of it or is damaged, or names a kind
            or a pre-tokenizer that is not supported.
        ImportError: without the library `tokenizers` (the extra `pretrained`).
    """
    metadata = _Metadata(file)
    kind = metadata.text("model")
    tokens = metadata.texts("tokens")
    types = metadata.numbers("token_type", len(tokens), _NORMAL)
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        raise metadata.refused("holds a token twice: expected distinct tokens")
    if kind == "gpt2":
        definition = _byte_level(metadata, ids)
    elif kind == "llama":
        definition = _sentencepiece(metadata, ids, types)
    else:
        raise metadata.refused(f"has the tokenizer {short(kind)}: expected gpt2 or llama")
    definition["added_tokens"] = [
        {
            **{"id": index, "content": token, "special": types[index] != _USER_DEFINED},
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for token, index in ids.items()
        if types[index] in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token
    ]
    begins = kind == "llama" or metadata.text("pre", "default") in _WHOLE_FIRST
    if metadata.flag("add_bos_token", begins):
        definition["post_processor"] = _template(metadata, tokens)
    return PretrainedTokenizer(definition, str(file.path))


class _Metadata:
    """The metadata of a tokenizer, whose types nobody vouches for."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file

    def refused(self, reason: str) -> PretrainedError:
        return PretrainedError(self._file.path, reason)

    def get(self, name: str, default: Any = None) -> Any:
        return self._file.metadata.get(f"tokenizer.ggml.{name}", default)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.refused(
                f"has {short(value)} as tokenizer.ggml.{name}: expected a truth value"
            )
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self.refused(
                f"has {short(value)} as tokenizer.ggml.{name}: expected a name; choose a file with "
                "its tokenizer"
            )
        return value

    def texts(self, name: str) -> list[str]:
        value = self.get(name)
        if not isinstance(value, list):
            raise self.refused(f"has no list of texts as tokenizer.ggml.{name}: expected one")
        return value

    def numbers(self, name: str, count: int, default: float | None = None) -> list[Any]:
        """Return one number for each token; the default for each if there are none."""
        value = self.get(name)
        if value is None and default is not None:
            return [default] * count
        numbers = value.tolist() if hasattr(value, "tolist") else []
        if len(numbers) != count:
            raise self.refused(
                f"has {len(numbers)} numbers as tokenizer.ggml.{name}: expected {count}, one for "
                "each token"
            )
        return numbers


def _byte_level(metadata: _Metadata, ids: Mapping[str, int]) -> dict[str, Any]:
    name = metadata.text("pre", "default")
    if name not in _PATTERNS:
        raise metadata.refused(
            f"has the pre-tokenizer {short(name)}: expected one of {', '.join(_PATTERNS)}; take "
            "the model as a folder with its tokenizer.json"
        )
    # A space inside a token is written as another character, so the first one parts the two.
    pairs = [merge.partition(" ") for merge in metadata.texts("merges")]
    cuts = [
        {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False}
        for each in _PATTERNS[name]
    ]
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "normalizer": {"type": "NFC"} if name in _COMPOSED else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*cuts, {**levels, "use_regex": False}],
        },
        "decoder": {**levels, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": ids,
            "merges": [[left, right] for left, _, right in pairs],
            "ignore_merges": name in _WHOLE_FIRST,
        },
    }


def _sentencepiece(metadata: _Metadata, ids: Mapping[str, int], types: list[int]) -> dict[str, Any]:
    """Write a SentencePiece vocabulary as merges: the pair whose union has the best score first."""
    scores = metadata.numbers("scores", len(ids))
    plain = {token for token, index in ids.items() if types[index] == _NORMAL}
    if (longest := max(map(len, plain), default=0)) > _LONGEST_PIECE:
        raise metadata.refused(
            f"holds a token of {longest} characters: expected at most {_LONGEST_PIECE}"
        )
    merges = [
        (-scores[ids[token]], -cut, cut - len(token), token[:cut], token[cut:])
        for token in ids
        if token in plain
        for cut in range(1, len(token))
        if token[:cut] in plain and token[cut:] in plain
    ]
    # Where several pairs make one token, the longest left part comes first, as in transformers.
    merges.sort(key=lambda merge: merge[:3])
    unknown = [token for token, index in ids.items() if types[index] == _UNKNOWN]
    prefix = metadata.flag("add_space_prefix", True)
    before = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "version": "1.0",
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                *before,
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *after,
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": ids,
            "merges": [[left, right] for *_, left, right in merges],
            "unk_token": unknown[0] if unknown else None,
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _template(metadata: _Metadata, tokens: list[str]) -> dict[str, Any]:
    """Return the step that puts the token of a beginning before a text."""
    index = metadata.get("bos_token_id")
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise metadata.refused(
            f"has {short(index)} as tokenizer.ggml.bos_token_id: expected 0 to {len(tokens) - 1}"
        )
    name = tokens[index]
    first = {"SpecialToken": {"id": name, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            *(first, {"Sequence": {"id": "A", "type_id": 0}}),
            *(first, {"Sequence": {"id": "B", "type_id": 1}}),
        ],
        "special_tokens": {name: {"id": name, "ids": [index], "tokens": [name]}},
    }
