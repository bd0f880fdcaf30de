"""Generate text from a run, with the margin of every generated token."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from probattn.blocks.promotion import default_promotion
from probattn.inference.evaluation.attention_stages import stage_margins, stages
from probattn.inference.evaluation.post_hoc import PostHocPrior, post_hoc_prior
from probattn.inference.evaluation.texts import check_seed
from probattn.inference.runs.csv_tables import write_table
from probattn.inference.runs.run import Run, require_fit
from probattn.inference.runtime.progress import progress_bar
from probattn.models.transformer import Parameters, embed, logits


@dataclass(frozen=True)
class Generated:
    """A continuation of a prompt.

    Attributes:
        prompt: what was given.
        text: what was generated.
        tokens: what each generated token stands for; the empty text where it only goes on with
            the character of the one before, and <0xC3> for a byte that belongs to no character.
        margin: margin of each generated token, kind "sigma_min", under the post-hoc attention
            prior and in the window in which it was generated.
        post_hoc_converged: whether the fit of the post-hoc attention prior came to rest.
    """

    prompt: str
    text: str
    tokens: tuple[str, ...]
    margin: Float[np.ndarray, " N"]
    post_hoc_converged: bool


@default_promotion()
def generate(
    run: Run,
    prompt: str,
    *,
    length: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Generated:
    """Continue a prompt by ancestral sampling.

    The model sees a window of at most a block; when it is full it moves on by half a block.

    Args:
        run: a run from `load_run` or `fit`.
        prompt: text to continue, at least one token.
        length: tokens to generate.
        temperature: the logits are divided by it; 0 always takes the most probable token.
        top_k: sample from the k most probable tokens only; by default from all.
        seed: seed of the sampling.
        progress: show a progress bar.

    Raises:
        ValueError: if an argument is out of range or the prompt has a character that the
            vocabulary lacks.
    """
    if not 1 <= length < 2**31:  # positions are numbers of 32 bits
        raise ValueError(f"length: got {length}, expected an integer from 1 to 2^31 - 1")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: got {temperature}, expected a finite number >= 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: got {top_k}, expected an integer >= 1")
    check_seed(seed)
    run = require_fit(run)
    if not prompt:
        raise ValueError("prompt: got an empty text, expected at least one character")
    try:
        tokens = list(run.vocabulary.encode(prompt))
    except ValueError as error:
        raise ValueError(f"prompt: {error}") from None
    step = partial(
        _next_token,
        heads=run.config.model.heads,
        cap=run.config.model.spectral_cap,
        greedy=temperature == 0,
        top_k=None if top_k is None else min(top_k, run.vocabulary.size),
    )
    block, given = run.config.model.block, len(tokens)
    key = jax.random.key(seed)
    start = max(given - (block - 1), 0)
    starts = []
    with progress_bar("generate", total=length, unit="token", visible=progress) as bar:
        for index in range(given, given + length):
            if index - start == block:
                start = index - block // 2
            starts.append(start)
            window = _window(tokens[start:index], block)
            draw = jax.random.fold_in(key, index)
            chosen = step(run.parameters, window, index - start - 1, temperature or 1.0, draw)
            tokens.append(int(chosen))
            bar.update(1)
    new = np.asarray(tokens[given:], np.int32)
    prior = post_hoc_prior(run, progress=progress)
    return Generated(
        prompt,
        run.vocabulary.decode(new),
        tuple(run.vocabulary.display(new)),
        _margins(run, prior, tokens, np.asarray(starts), given),
        prior.converged,
    )


def write_csv(generated: Generated, path: Path) -> Path:
    """Write a table with a row per generated token: index, token, margin."""
    rows = zip(range(len(generated.tokens)), generated.tokens, generated.margin, strict=True)
    return write_table(path, ["index", "token", "post_hoc_sigma_min"], rows)


def _margins(
    run: Run,
    prior: PostHocPrior,
    tokens: list[int],
    starts: Int[np.ndarray, " N"],
    given: int,
) -> Float[np.ndarray, " N"]:
    """Return every generated token's margin, at its place in the window that generated it."""
    block = run.config.model.block
    unique, number = np.unique(starts, return_inverse=True)
    # What a window holds after a token does not change its margin.
    inputs = np.concatenate([_window(tokens[start : start + block], block) for start in unique])
    stage = next(stages(run, prior))
    margin = stage_margins(run, stage, inputs).margin
    return margin[number, given + np.arange(len(starts)) - starts]


def _window(tokens: list[int], block: int) -> Int[np.ndarray, "1 T"]:
    window = np.zeros((1, block), np.int32)
    window[0, : len(tokens)] = tokens
    return window


@partial(jax.jit, static_argnames=("heads", "cap", "greedy", "top_k"))
def _next_token(
    parameters: Parameters,
    window: Int[Array, "1 T"],
    last: Int[Array, ""],
    temperature: Float[Array, ""],
    rng_key: Array,
    *,
    heads: int,
    cap: float | None,
    greedy: bool,
    top_k: int | None,
) -> Int[Array, ""]:
    """Draw the token that follows position `last`, whatever the window holds after it."""
    scores = logits(parameters, embed(parameters, window), heads=heads, cap=cap)[0, last]
    if greedy:
        return jnp.argmax(scores)
    if top_k is not None:
        least = jax.lax.top_k(scores, top_k)[0][-1]
        scores = jnp.where(scores >= least, scores, -jnp.inf)
    # Relative to the largest, so that a temperature however small overflows to -inf alone.
    scores = scores - jnp.max(scores)
    least_temperature = jnp.finfo(scores.dtype).tiny
    return jax.random.categorical(rng_key, scores / jnp.maximum(temperature, least_temperature))
