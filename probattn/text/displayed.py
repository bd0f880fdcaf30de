"""The tokens of a text as they are shown, made when they are asked for."""

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from jaxtyping import Integer

from probattn.text.vocabulary import Vocabulary

_AROUND = 3  # tokens beside a part: no character has more than four bytes, nor so many tokens
_TOGETHER = 2**13  # tokens in one part


class DisplayedTokens(Sequence[str]):
    """What `display` of a vocabulary gives for each of N tokens, without N strings in memory.

    Args:
        vocabulary: the vocabulary.
        ids: the tokens, (N,).
    """

    def __init__(self, vocabulary: Vocabulary, ids: Integer[np.ndarray, " N"]) -> None:
        self._vocabulary, self._ids = vocabulary, ids

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return what is shown for a token, or for each token of a slice."""
        chosen = range(len(self))[index]
        if isinstance(chosen, int):
            return self._shown(chosen, chosen + 1)[0]
        if not chosen:
            return []
        first, last = min(chosen[0], chosen[-1]), max(chosen[0], chosen[-1])
        shown = self._shown(first, last + 1)
        return [shown[each - first] for each in chosen]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _TOGETHER):
            yield from self[start : start + _TOGETHER]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return f"<{len(self)} tokens>"

    def _shown(self, start: int, stop: int) -> list[str]:
        begin = max(start - _AROUND, 0)
        return self._vocabulary.display(self._ids[begin : stop + _AROUND])[
            start - begin : stop - begin
        ]
