"""Repetition in a sequence of tokens: where a loop begins, and what was seen before."""

import numpy as np
from decoding_questions import AHEAD, COPIES, GRAM

NEVER = -1


def loop_start(tokens: np.ndarray) -> int:
    """Return the first position of the first loop, `NEVER` if there is none.

    A loop is an n-gram of at least `GRAM` tokens, `COPIES` times in succession. Shorter periods
    count through their multiples: twelve equal tokens are three copies of four.

    Args:
        tokens: the sequence, (T,).
    """
    starts = []
    for size in range(GRAM, len(tokens) // COPIES + 1):
        span = (COPIES - 1) * size  # positions in a row that equal the one a period later
        equal = tokens[size:] == tokens[:-size]
        total = np.concatenate([[0], np.cumsum(equal)])
        found = np.flatnonzero(total[span:] - total[:-span] == span)
        starts += found[:1].tolist()
    return min(starts, default=NEVER)


def repeated_share(tokens: np.ndarray) -> np.ndarray:
    """Return at each position the share of the last n-grams that were seen before, (T,).

    These are the n-grams of `GRAM` tokens that end at one of the last `AHEAD` positions. Where
    none has ended yet the share is zero.
    """
    seen: set[bytes] = set()
    known = np.zeros(len(tokens))
    for end in range(GRAM, len(tokens) + 1):
        gram = tokens[end - GRAM : end].tobytes()
        known[end - 1] = gram in seen
        seen.add(gram)
    ended = np.arange(len(tokens)) >= GRAM - 1
    sums, counts = (trailing_sum(each) for each in (known, ended.astype(float)))
    return sums / np.maximum(counts, 1)


def trailing_sum(values: np.ndarray) -> np.ndarray:
    """Sum over the last `AHEAD` positions up to each, or over those that there are, (..., T)."""
    total = np.cumsum(values, axis=-1)
    before = np.zeros_like(total)
    before[..., AHEAD:] = total[..., :-AHEAD]
    return total - before
