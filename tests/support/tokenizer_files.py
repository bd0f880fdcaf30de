"""Small tokenizers as they are published, learnt from a text that is written down here."""

import itertools
import json
from functools import cache
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TEXT = (
    """The café's menu hadn't changed: it'll cost 1234 crowns, they'd said — naïve, we're told!
\tIndented  text,   with    runs of spaces.\r\n\r\n  And "quotes", (brackets) & 3.14159 ≈ π.
日本語のテキスト and emoji 🦞🦞, Ünïcödé, DON'T SHOUT, x+y=<z>^2|w~ $5 `code` ٣٤٥ ½.
"""
    * 3
)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}@| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _cut(name: str) -> tuple[Any, Any]:
    """Normalizer and pre-tokenizer in the form in which the model's own tokenizer.json has them."""
    levels = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "gpt-2":
        return None, levels
    if name == "olmo":
        return normalizers.NFC(), levels
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return None, pre_tokenizers.Sequence([digits, levels])
    count = {"llama-bpe": "{1,3}", "qwen2": ""}[name]
    pattern = tokenizers.Regex(_WORDS.replace("@", count))
    cut = pre_tokenizers.Split(pattern, "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    normalizer = normalizers.NFC() if name == "qwen2" else None
    return normalizer, pre_tokenizers.Sequence([cut, plain])


@cache
def byte_level(name: str, size: int = 330) -> Any:
    """A tokenizer of bytes, as those of GPT-2, Llama 3, Qwen 2, SmolLM and Pythia."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    normalizer, tokenizer.pre_tokenizer = _cut(name)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def definition(tokenizer: Any) -> dict[str, Any]:
    """The content of its tokenizer.json."""
    return json.loads(tokenizer.to_str())


PIECES = (
    *("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))),
    *("▁t", "he", "▁the", "in", "▁a", "▁▁", "▁▁▁▁", "er", "▁in", "ing", "ca", "▁ca", "fé", "ab"),
    *("▁thin", "hi", "th", "▁thing", "bab", "aba", "<", "s>", "0", "<0", "xA", "A", "a", "b", "c"),
    *(
        "d",
        "e",
        "f",
        "g",
        "h",
        "i",
        "k",
        "n",
        "r",
        "s",
        "t",
        "u",
        "x",
        ">",
        "▁",
        "é",
        "<0x",
        "<0x0",
        "<0x0A",
    ),
)
"""Of a SentencePiece vocabulary: special ones, the bytes, and others by falling score."""
SCORES = tuple([0.0] * 259 + [-float(number) for number in range(len(PIECES) - 259)])
TYPES = (2, 3, 3, *[6] * 256, *[1] * (len(PIECES) - 259))


def merged(text: str) -> list[str]:
    """SentencePiece's own way: of all neighbours that make a piece, the best and leftmost first."""
    scores = {
        piece: score for piece, score, kind in zip(PIECES, SCORES, TYPES, strict=True) if kind == 1
    }
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [
            (-scores[left + right], at)
            for at, (left, right) in enumerate(itertools.pairwise(parts))
            if left + right in scores
        ]
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        token
        for part in parts
        for token in ([part] if part in scores else [f"<0x{each:02X}>" for each in part.encode()])
    ]
