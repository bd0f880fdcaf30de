"""The sequences that are measured: articles of a text, and what a model makes of their beginnings.

Continuations go on where a model would end its turn, as those of `probattn generate` do.
"""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from decoding_questions import NEW, PROMPT, WINDOW

from probattn.inference.runs.imported import ImportedRun
from probattn.models.decoder.network import extend, init_cache
from probattn.text.corpora import read_text

_HEADING = re.compile(r"(?m)^ = [^=\n].*[^=\n] = $")  # of an article of WikiText


def read_articles(run: ImportedRun, text: Path, count: int) -> np.ndarray:
    """Read the beginnings of the first articles that fill a window, (count, WINDOW).

    Raises:
        ValueError: if the text cannot be read, or holds too few such articles.
    """
    whole = read_text(text)
    starts = [found.start() for found in _HEADING.finditer(whole)]
    found: list[np.ndarray] = []
    for start, end in zip(starts, [*starts[1:], len(whole)], strict=True):
        tokens = np.asarray(run.vocabulary.encode(whole[start:end]), np.int32)
        if len(tokens) >= WINDOW and len(found) < count:
            found.append(tokens[:WINDOW])
    if len(found) < count:
        raise ValueError(
            f"{text.name}: has {len(found)} articles of at least {WINDOW} tokens under headings "
            f"' = Title = ', {count} of which are asked for: give a longer text or fewer --articles"
        )
    return np.array(found)


def continuations(
    run: ImportedRun, prompts: np.ndarray, numbers: np.ndarray, *, temperature: float, seed: int
) -> np.ndarray:
    """Continue prompts by tokens drawn at a temperature, the most probable ones at 0.

    Args:
        run: the model.
        prompts: tokens, (B, PROMPT).
        numbers: number of each prompt, which its random keys are made with.
        temperature: the logits are divided by it.
        seed: seed of the draws.

    Returns:
        Prompts and what follows, (B, PROMPT + NEW).
    """
    decoder = run.network.config
    parameters = jax.tree.map(jnp.asarray, run.parameters)
    step = jax.jit(partial(extend, config=decoder), donate_argnums=1)
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.asarray(numbers))
    scores, cache = step(parameters, init_cache(decoder, (len(prompts),), PROMPT + NEW), prompts)
    found = [prompts]
    for position in range(PROMPT, PROMPT + NEW):
        chosen = _draw(scores[:, -1], keys, position, temperature)
        found.append(np.asarray(chosen, np.int32)[:, None])
        scores, cache = step(parameters, cache, chosen[:, None])
    return np.concatenate(found, axis=1)


def _draw(scores: jax.Array, keys: jax.Array, position: int, temperature: float) -> jax.Array:
    if temperature == 0:
        return jnp.argmax(scores, axis=-1)
    own = jax.vmap(lambda key: jax.random.fold_in(key, position))(keys)
    return jax.vmap(jax.random.categorical)(own, scores / temperature)
