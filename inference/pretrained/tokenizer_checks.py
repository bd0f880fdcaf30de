"""What a tokenizer.json says, checked before the library reads it, and the bytes of its tokens.

The library panics at some damaged vocabularies and prints a trace that no program can keep back, so
that vocabularies and merges are checked here.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from probattn.inference.pretrained.errors import PretrainedError, short
from probattn.text.byte_pairs import SYMBOLS

MOST_IDS = 2**20
"""Largest vocabulary. The largest in use have a quarter of it."""
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What SentencePiece writes for a space."""
_BYTES = {symbol: byte for byte, symbol in SYMBOLS.items()}


@dataclass(frozen=True)
class Decoder:
    """How tokens become text.

    Attributes:
        byte_level: every character of a token stands for a byte, as in GPT-2.
        byte_fallback: tokens such as <0x0A> are bytes.
        replacements: what is written in place of what, such as a space for U+2581.
        stripped: spaces at the beginning of a text that are taken away.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    stripped: int = 0

    def replaced(self, text: str) -> str:
        """Return a text after the replacements."""
        for old, new in self.replacements:
            text = text.replace(old, new)
        return text

    def token_bytes(self, token: str) -> bytes:
        """Return the bytes of a token."""
        if self.byte_level and all(each in _BYTES for each in token):
            return bytes(_BYTES[each] for each in token)
        if self.byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return self.replaced(token).encode()


def check_definition(definition: dict[str, Any], source: str) -> tuple[tuple[bytes, ...], Decoder]:
    """Return the bytes of each id and the decoder of what a tokenizer.json says.

    Raises:
        PretrainedError: if it is damaged, or not byte-pair encoding with a decoder that is known.
    """

    def refused(reason: str) -> PretrainedError:
        return PretrainedError(source, reason)

    model = definition.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind not in ("BPE", None):
        raise refused(f"has a model of kind {short(kind)}: expected BPE; no other is supported")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise refused(
                f"sets {name} to {short(model[name])}: expected none; it is not supported"
            )
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict):
        raise refused("has no vocabulary: expected a table of tokens and their ids")
    ids = _ids(vocabulary, definition.get("added_tokens") or [], refused)
    _check_merges(model.get("merges"), vocabulary, refused)
    decoder = _decoder(definition.get("decoder"), refused)
    tokens = [b""] * (1 + max(ids, default=-1))
    for index, (token, added) in ids.items():
        tokens[index] = _encoded(token, refused) if added else decoder.token_bytes(token)
    return tuple(tokens), decoder


_Refused = Callable[[str], PretrainedError]


def _encoded(token: str, refused: _Refused) -> bytes:
    try:
        return token.encode()
    except UnicodeEncodeError:
        raise refused(f"has the token {short(token)}: expected text that UTF-8 can hold") from None


def _ids(vocabulary: dict[str, Any], added: Any, refused: _Refused) -> dict[int, tuple[str, bool]]:
    """Return id -> token, and whether it stands among the added tokens."""
    found: dict[int, tuple[str, bool]] = {}
    for token, index in vocabulary.items():
        if type(index) is not int or not 0 <= index < MOST_IDS:
            raise refused(
                f"has the id {short(index)} of {short(token)}: expected 0 to {MOST_IDS - 1}"
            )
        if index in found:
            raise refused(
                f"gives the id {index} to {short(found[index][0])} and {short(token)}: damaged"
            )
        _encoded(token, refused)
        found[index] = token, False
    if not isinstance(added, list):
        raise refused("has added_tokens that are no list: damaged")
    for each in added:
        described = each if isinstance(each, dict) else {}
        content, number = described.get("content"), described.get("id")
        if not isinstance(content, str) or type(number) is not int or not 0 <= number < MOST_IDS:
            raise refused(
                f"adds the token {short(content)} of id {short(number)}: expected a text, and an "
                f"id of 0 to {MOST_IDS - 1}"
            )
        if found.get(number, (content,))[0] != content or vocabulary.get(content, number) != number:
            raise refused(f"adds {short(content)} as id {number}, which is another one's: damaged")
        found[number] = content, True
    return found


def _check_merges(merges: Any, vocabulary: dict[str, Any], refused: _Refused) -> None:
    if not isinstance(merges, list):
        raise refused("has no merges: expected a list of pairs of tokens")
    for number, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(part, str) and part in vocabulary for part in pair)
            or pair[0] + pair[1] not in vocabulary
        ):
            raise refused(
                f"has the merge {short(merge)} as number {number}: expected two tokens of the "
                "vocabulary whose concatenation is a third"
            )


def _decoder(described: Any, refused: _Refused) -> Decoder:
    steps: Any = [described]
    if isinstance(described, dict) and described.get("type") == "Sequence":
        steps = described.get("decoders")
    if not isinstance(steps, list):
        raise refused("has a decoder without steps: damaged")
    byte_level = byte_fallback = False
    replacements, stripped = [], 0
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                stripped = start
            case {"type": "Metaspace", "replacement": str(old)}:
                replacements.append((old, " "))
                stripped = int(step.get("prepend_scheme", "always") != "never")
            case _:
                kind = step.get("type") if isinstance(step, dict) else step
                raise refused(
                    f"has the decoder {short(kind)}: expected ByteLevel, or a sequence of Replace, "
                    "ByteFallback, Fuse and Strip, or Metaspace; no other is supported"
                )
    return Decoder(byte_level, byte_fallback, tuple(replacements), stripped)
