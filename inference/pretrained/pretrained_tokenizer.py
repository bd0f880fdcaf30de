"""Tokenizers of other people's models, as vocabularies of this library.

A tokenizer is what its `tokenizer.json` says, and the library `tokenizers` encodes with it. The
bytes of each token are worked out here, from the steps of its decoder, so that texts are decoded,
shown and counted as for any other vocabulary.
"""

import functools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probattn.inference.pretrained.errors import PretrainedError, read_object, short
from probattn.inference.pretrained.tokenizer_checks import Decoder, check_definition
from probattn.messages import one_line
from probattn.text.byte_pairs import (
    UnknownCharacter,
    characters_begun,
    check_ids,
    check_surrogates,
    displayed,
)

KIND = "tokenizer_json"


@dataclass(frozen=True)
class PretrainedTokenizer:
    """A tokenizer that came with a model. It is a `Vocabulary`.

    A text is encoded as the model's own tokenizer does it, its normalisation included. So
    `decode(encode(text))` is the text only if that changes nothing: some tokenizers compose accents
    (NFC), and some write a space before the text, which `decode` takes away again. Names of special
    tokens in a text become these tokens. None is added: `begins_with` has those before a text.

    A text of more than 2^20 characters is encoded in pieces, see `probattn.text.tokens`. What a
    tokenizer writes before a text stands before the first of them only.

    Attributes:
        definition: the content of `tokenizer.json`.
        source: what messages call it.

    Raises:
        PretrainedError: if the definition is damaged, or of a kind that is not supported.
    """

    definition: dict[str, Any] = field(repr=False)
    source: str = field(default="the tokenizer", compare=False)

    def __post_init__(self) -> None:
        _ = self._checked, self._library  # building them checks the definition

    @property
    def tokens(self) -> tuple[bytes, ...]:
        """The bytes of each token; none for an id that has no token."""
        return self._checked[0]

    @property
    def size(self) -> int:
        """Number of ids, 0 to size - 1."""
        return len(self.tokens)

    @functools.cached_property
    def token_characters(self) -> NDArray[np.int32]:
        """Characters that begin in each token, shape (size,)."""
        return characters_begun(self.tokens)

    @functools.cached_property
    def begins_with(self) -> tuple[int, ...]:
        """Ids that the model expects before a text, such as that of <s>."""
        # Of a text, and not of an empty one: some tokenizers write a token after it, too.
        encoding = self._library.encode("a", add_special_tokens=True)
        count = [*encoding.special_tokens_mask, 0].index(0)
        return tuple(encoding.ids[:count])

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the token ids of a text, the empty one included, shape (tokens,).

        Raises:
            UnknownCharacter: at the first character that the tokenizer cannot represent.
        """
        check_surrogates(text)
        new = sorted(set(text) - self._represented)
        unknown = set(self._unknown(new))
        if unknown:
            position = next(at for at, each in enumerate(text) if each in unknown)
            raise UnknownCharacter(text[position], position, len(unknown))
        self._represented.update(new)
        [encoding] = self._library.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, np.int32)

    def decode(self, ids: ArrayLike) -> str:
        """Return the text of token ids of shape (tokens,).

        Bytes that belong to no character decode as the replacement character U+FFFD.

        Raises:
            ValueError: if `ids` is not a vector of integers from 0 to size - 1.
        """
        checked = check_ids(ids, self.size, ndim=1).tolist()
        text = b"".join(self.tokens[index] for index in checked).decode("utf-8", errors="replace")
        leading = len(text) - len(text.lstrip(" "))
        return text[min(leading, self._decoder.stripped) :]

    def display(self, ids: ArrayLike) -> list[str]:
        """Return what to show for each of token ids of shape (tokens,).

        It is as in `BytePairVocabulary.display`. A space that the tokenizer has put before the text
        is shown.

        Raises:
            ValueError: if `ids` is not a vector of integers from 0 to size - 1.
        """
        return displayed([self.tokens[each] for each in check_ids(ids, self.size, ndim=1).tolist()])

    def characters(self, ids: ArrayLike) -> int:
        """Count the characters that begin in token ids of any shape.

        A space that the tokenizer has put before the text counts.

        Raises:
            ValueError: if `ids` holds anything but integers from 0 to size - 1.
        """
        return int(self.token_characters[check_ids(ids, self.size)].sum(dtype=np.int64))

    def without(self, size: int) -> "PretrainedTokenizer":
        """Return the tokenizer without its added tokens from id `size` on.

        Some models share a tokenizer with larger ones, and have no row for the tokens of those.
        """
        added = self.definition.get("added_tokens") or []
        kept = [each for each in added if each["id"] < size]
        if len(kept) == len(added):
            return self
        return replace(self, definition=self.definition | {"added_tokens": kept})

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe values, for `tokenizer_from_dict`."""
        return {"kind": KIND, "definition": self.definition}

    @property
    def _decoder(self) -> Decoder:
        return self._checked[1]

    @functools.cached_property
    def _checked(self) -> tuple[tuple[bytes, ...], Decoder]:
        return check_definition(self.definition, self.source)

    @functools.cached_property
    def _library(self) -> Any:
        # What is cut or filled up would not be the text.
        definition = self.definition | {"truncation": None, "padding": None}
        library = _import()
        try:
            tokenizer = library.Tokenizer.from_str(json.dumps(definition))
        except Exception as error:  # the library raises no class of its own
            raise PretrainedError(
                self.source,
                f"is refused by the library tokenizers: {one_line(error)}; download it again",
            ) from None
        # The library numbers added tokens itself, where the vocabulary has none of their ids.
        for each in definition.get("added_tokens") or []:
            if (index := tokenizer.token_to_id(each["content"])) != each["id"]:
                raise PretrainedError(
                    self.source,
                    f"adds {short(each['content'])} as id {each['id']}: expected {index}, the next "
                    "after the vocabulary",
                )
        return tokenizer

    @functools.cached_property
    def _represented(self) -> set[str]:
        """Characters that the tokenizer is known to represent."""
        return set()

    def _unknown(self, characters: list[str]) -> list[str]:
        """Return those that do not come back whole: the library drops what it does not know."""
        normalizer = self._library.normalizer
        unknown = []
        encodings = self._library.encode_batch_fast(characters, add_special_tokens=False)
        for each, encoding in zip(characters, encodings, strict=True):
            wanted = each if normalizer is None else normalizer.normalize_str(each)
            found = b"".join(self.tokens[index] for index in encoding.ids)
            if not found.endswith(self._decoder.replaced(wanted).encode()):
                unknown.append(each)
        return unknown


def read_tokenizer(folder: Path) -> PretrainedTokenizer:
    """Read the tokenizer of a checkpoint's folder.

    Raises:
        PretrainedError: if there is no tokenizer.json, or it is damaged or not supported.
        ImportError: without the library `tokenizers` (the extra `pretrained`).
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        others = [each.name for each in folder.glob("tokenizer*")] + [
            each.name for each in folder.glob("vocab*")
        ]
        instead = f" beside {', '.join(sorted(others))}" if others else ""
        raise PretrainedError(
            folder,
            f"holds no tokenizer.json{instead}: expected one; have transformers write it, by "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    return PretrainedTokenizer(read_object(path), str(path))


def tokenizer_from_dict(values: dict[str, Any]) -> PretrainedTokenizer:
    """Read a tokenizer back from what its `to_dict` gave; nothing in it is trusted.

    Raises:
        PretrainedError: if the values are not those of a tokenizer.
    """
    definition = values.get("definition")
    if set(values) != {"kind", "definition"} or values["kind"] != KIND:
        raise PretrainedError("the tokenizer", f"is not of the kind {KIND} with its definition")
    if not isinstance(definition, dict):
        raise PretrainedError("the tokenizer", "has a definition that is no object")
    return PretrainedTokenizer(definition)


def _import() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError(
            "tokenizers of other people's models need the library tokenizers: pip install "
            "'probattn[pretrained]'"
        ) from None
    return tokenizers
