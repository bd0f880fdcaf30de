"""What follows a token that was replaced: a branch for each token, from a cache of the clean past.

In a branch everything before the token is as it was, and everything after it too. So branches do
not disturb each other, and each costs as many tokens as are read in it, not a window.
"""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from questions import FOLLOWING
from sample import Subject

from probattn.models.decoder.network import Cache, extend, init_cache
from probattn.text.batches import map_batches
from probattn.text.vocabulary import Vocabulary

MOST_PIECES = 4  # tokens that a misspelt one may become
_BRANCHES = 16  # in a call: each holds a copy of the cache


def losses_after(
    subject: Subject, rows: np.ndarray, pieces: list[list[np.ndarray | None]], most: int
) -> np.ndarray:
    """Compute the mean loss of the next predictions after each token was replaced.

    The prediction that is made at the last of the new tokens is the first that counts, and the
    text's own tokens follow.

    Args:
        subject: the model and its text.
        rows: numbers of the windows.
        pieces: of each window and position the tokens that stand there instead, or None.
        most: the largest number of tokens that may stand for one.

    Returns:
        Mean of as many losses as `FOLLOWING` says, in nats, (rows, T); NaN where nothing replaces
        the token or the window ends too soon.
    """
    length = subject.inputs.shape[1]
    read = most + FOLLOWING - 1
    found = np.full((len(rows), length), np.nan)
    for number, row in enumerate(rows):
        cache = _read(subject.parameters, subject.inputs[row], config=subject.network.config)
        starts = [at for at in range(1, length - read + 1) if pieces[number][at] is not None]
        if not starts:
            continue
        tokens = np.zeros((len(starts), read), np.int32)
        targets = np.zeros_like(tokens)
        counted = np.zeros(tokens.shape, bool)
        for branch, at in enumerate(starts):
            new = pieces[number][at]
            assert new is not None  # by the choice of starts
            first = len(new) - 1
            tokens[branch, : len(new)] = new
            here = slice(first, first + FOLLOWING)
            tokens[branch, first + 1 : first + FOLLOWING] = subject.inputs[row][
                at + 1 : at + FOLLOWING
            ]
            targets[branch, here] = subject.targets[row][at : at + FOLLOWING]
            counted[branch, here] = True
        run = partial(_branches, subject.parameters, cache, config=subject.network.config)
        losses = _in_batches(run, np.array(starts), tokens, targets)
        found[number, starts] = np.where(counted, losses, 0).sum(1) / FOLLOWING
    return found


def _in_batches(run: Any, *arrays: np.ndarray) -> np.ndarray:
    def of_batch(number: int, rows: np.ndarray) -> Any:
        return run(*(array[rows] for array in arrays))

    return map_batches(of_batch, len(arrays[0]), _BRANCHES)


def mean_ahead(losses: np.ndarray) -> np.ndarray:
    """Average each loss with the next ones, as many as `FOLLOWING` says; NaN where they lack."""
    found = np.full(losses.shape, np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(losses, FOLLOWING, axis=1)
    found[:, : windows.shape[1]] = windows.mean(-1)
    return found


def misspelling(vocabulary: Vocabulary, token: int, seed: int) -> np.ndarray | None:
    """Return the tokens of a token's text with two neighbouring letters swapped, or None.

    All tokens of a type are misspelt in the same way. None is for texts without two different
    letters beside each other, and for those that need more than `MOST_PIECES` tokens then.
    """
    text = vocabulary.decode(np.array([token]))
    pairs = [
        at
        for at, (one, next_) in enumerate(itertools.pairwise(text))
        if one.isalpha() and next_.isalpha() and one != next_
    ]
    if not pairs:
        return None
    at = int(np.random.default_rng((seed, token)).choice(pairs))
    swapped = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    try:
        pieces = vocabulary.encode(swapped)
    except ValueError:  # a letter of a damaged character
        return None
    return pieces if 1 <= len(pieces) <= MOST_PIECES else None


@partial(jax.jit, static_argnames="config")
def _read(parameters, tokens, *, config) -> Cache:
    cache = init_cache(config, (), len(tokens), jnp.float32)
    return extend(parameters, cache, tokens, config)[1]


@partial(jax.jit, static_argnames="config")
def _branches(parameters, cache, starts, tokens, targets, *, config):
    def one(start, new, next_):
        logits, _ = extend(parameters, cache._replace(length=start), new, config)
        return optax.softmax_cross_entropy_with_integer_labels(logits, next_)

    return jax.vmap(one)(starts, tokens, targets)
