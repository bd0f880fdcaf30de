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
from probattn.inference.evaluation.post_hoc import PostHocPrior, usual_prior
from probattn.inference.evaluation.texts import check_seed
from probattn.inference.runs.csv_tables import write_table
from probattn.inference.runs.imported import DecoderRun
from probattn.inference.runs.run import FittedRun, Run, require_fitted
from probattn.inference.runtime.progress import progress_bar
from probattn.models.decoder.config import DecoderConfig
from probattn.models.decoder.network import Cache, extend, init_cache
from probattn.models.networks import Network, Parameters

_CHUNK = 32  # tokens of a prompt that are read at once
_LENGTHS = 256  # of which the window of an imported model's margins is a multiple


@dataclass(frozen=True)
class Generated:
    """A continuation of a prompt.

    Attributes:
        prompt: what was given.
        text: what was generated.
        tokens: what each generated token stands for; the empty text where it only goes on with
            the character of the one before, and <0xC3> for a byte that belongs to no character.
        margin: margin of each generated token, kind "sigma_min", in the window in which it was
            generated: under the post-hoc attention prior, or of an imported model the smallest of
            the heads of the first layer.
        post_hoc_converged: whether the fit of the post-hoc attention prior came to rest.
        margin_stage: "post hoc" or "first layer".
    """

    prompt: str
    text: str
    tokens: tuple[str, ...]
    margin: Float[np.ndarray, " N"]
    post_hoc_converged: bool
    margin_stage: str = "post hoc"


@default_promotion()
def generate(
    run: FittedRun,
    prompt: str,
    *,
    length: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Generated:
    """Continue a prompt by ancestral sampling.

    The model sees a window of at most a block; when it is full it moves on by half a block. A
    published model keeps keys and values of the tokens that it has read in the window.

    Args:
        run: a run of a fit or of a published model, from `load_run` or `fit`.
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
    run = require_fitted(run)
    if not prompt:
        raise ValueError("prompt: got an empty text, expected at least one character")
    try:
        tokens = [int(token) for token in run.vocabulary.encode(prompt)]
    except ValueError as error:
        raise ValueError(f"prompt: {error}") from None
    draw = partial(
        _draw,
        greedy=temperature == 0,
        top_k=None if top_k is None else min(top_k, run.vocabulary.size),
        symbols=run.vocabulary.size,
    )
    reader = _CachedReader(run) if isinstance(run, DecoderRun) else _WindowReader(run)
    block, given = run.network.block, len(tokens)
    key = jax.random.key(seed)
    start = max(given - (block - 1), 0)
    starts = []
    with progress_bar("generate", total=length, unit="token", visible=progress) as bar:
        for index in range(given, given + length):
            if index - start == block:
                start = index - block // 2
            starts.append(start)
            scores = reader.scores(tokens, start)
            chosen = draw(scores, temperature or 1.0, jax.random.fold_in(key, index))
            tokens.append(int(chosen))
            bar.update(1)
    new, decode = np.asarray(tokens[given:], np.int32), run.vocabulary.decode
    prior = usual_prior(run, progress=progress)
    return Generated(
        prompt,
        # Of all tokens: some tokenizers drop the space that a text begins with.
        decode(tokens)[len(decode(tokens[:given])) :],
        tuple(run.vocabulary.display(new)),
        _margins(run, prior, tokens, np.asarray(starts), given),
        prior is None or prior.converged,
        "first layer" if prior is None else "post hoc",
    )


def write_csv(generated: Generated, path: Path) -> Path:
    """Write a table with a row per generated token: index, token, margin."""
    rows = zip(range(len(generated.tokens)), generated.tokens, generated.margin, strict=True)
    column = f"{generated.margin_stage.replace(' ', '_')}_sigma_min"
    return write_table(path, ["index", "token", column], rows)


def _margins(
    run: FittedRun,
    prior: PostHocPrior | None,
    tokens: list[int],
    starts: Int[np.ndarray, " N"],
    given: int,
) -> Float[np.ndarray, " N"]:
    """Return every generated token's margin, at its place in the window that generated it."""
    block = run.network.block
    unique, number = np.unique(starts, return_inverse=True)
    # What a window holds after a token does not change its margin.
    # Of few lengths, so that few programs are compiled: those of heads take a while.
    length = block if prior is not None else min(block, -(-len(tokens) // _LENGTHS) * _LENGTHS)
    inputs = np.concatenate([_window(tokens[start : start + length], length) for start in unique])
    chosen = list(stages(run, prior))
    if prior is not None:
        chosen = chosen[:1]
    margin = np.min([stage_margins(run, stage, inputs).margin for stage in chosen], axis=0)
    return margin[number, given + np.arange(len(starts)) - starts]


def _window(tokens: list[int], block: int) -> Int[np.ndarray, "1 T"]:
    window = np.zeros((1, block), np.int32)
    window[0, : len(tokens)] = tokens
    return window


class _WindowReader:
    """Scores of the token that follows a window, by a network that reads all of it each time."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def scores(self, tokens: list[int], start: int) -> Float[Array, " V"]:
        """Return the logits of the token that follows all tokens from `start` on."""
        run, window = self._run, _window(tokens[start:], self._run.network.block)
        return _last_scores(run.parameters, window, len(tokens) - start - 1, network=run.network)


class _CachedReader:
    """The same by a decoder that keeps the keys and values of the tokens it has read."""

    def __init__(self, run: DecoderRun) -> None:
        self._run, self._start, self._read = run, -1, 0

    def scores(self, tokens: list[int], start: int) -> Float[Array, " V"]:
        """Return the logits of the token that follows all tokens from `start` on.

        Successive calls have one token more each, or another start, whose tokens are read anew.
        """
        network, unread = self._run.network, tokens[self._read :]
        if start != self._start:
            room = len(network.prefix) + network.block
            self._cache = init_cache(network.config, (), room)
            self._start, unread = start, [*network.prefix, *tokens[start:]]
        self._read = len(tokens)
        while unread:
            # Of two sizes, so that two programs serve every prompt.
            size = _CHUNK if len(unread) >= _CHUNK else 1
            chunk, unread = np.asarray(unread[:size], np.int32), unread[size:]
            scores, self._cache = _extend(
                self._run.parameters, self._cache, chunk, decoder=network.config
            )
        return scores[-1]


@partial(jax.jit, static_argnames="decoder", donate_argnums=1)
def _extend(
    parameters: Parameters, cache: Cache, tokens: Int[Array, " N"], *, decoder: DecoderConfig
) -> tuple[Float[Array, "N V"], Cache]:
    return extend(parameters, cache, tokens, decoder)


@partial(jax.jit, static_argnames="network")
def _last_scores(
    parameters: Parameters, window: Int[Array, "1 T"], last: Int[Array, ""], *, network: Network
) -> Float[Array, " V"]:
    """Return the logits of position `last`, whatever the window holds after it."""
    return network.logits(parameters, network.embed(parameters, window))[0, last]


@partial(jax.jit, static_argnames=("greedy", "top_k", "symbols"))
def _draw(
    scores: Float[Array, " V"],
    temperature: Float[Array, ""],
    rng_key: Array,
    *,
    greedy: bool,
    top_k: int | None,
    symbols: int,
) -> Int[Array, ""]:
    """Draw one of the tokenizer's tokens: a published model may have scores of more."""
    scores = scores[:symbols]
    if greedy:
        return jnp.argmax(scores)
    if top_k is not None:
        least = jax.lax.top_k(scores, top_k)[0][-1]
        scores = jnp.where(scores >= least, scores, -jnp.inf)
    # Relative to the largest, so that a temperature however small overflows to -inf alone.
    scores = scores - jnp.max(scores)
    least_temperature = jnp.finfo(scores.dtype).tiny
    return jax.random.categorical(rng_key, scores / jnp.maximum(temperature, least_temperature))
