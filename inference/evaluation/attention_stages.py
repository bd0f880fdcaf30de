"""Attention stages of a run at which margins are taken, and their quantities over a text."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from probattn import certificate, certified_radius, log_det, stability_margin
from probattn.blocks.geometry import geometry
from probattn.inference.evaluation.post_hoc import PostHocPrior
from probattn.inference.pages.page import Past
from probattn.inference.runs.run import FittedRun, Run
from probattn.inference.runtime.blas_threads import one_blas_thread
from probattn.margins import both_margins
from probattn.models.decoder.attention import attention_layer
from probattn.models.language import attention_stage
from probattn.models.networks import Network, Parameters, TransformerNetwork
from probattn.models.transformer import attention_inputs, rms_normalised
from probattn.stages.layer import AttentionLayer
from probattn.stages.stage import prepared
from probattn.text.batches import map_batches

StageInput = Literal["embeddings", "normalised", "layer"]
POST_HOC = "post hoc"
"""Label of the stage of the post-hoc attention prior."""

_BATCH = 4  # windows in one call: the bases of 2 r directions take (windows, T, d, 2 r) numbers
_PAST = 8  # past tokens that are named of each token


@dataclass(frozen=True)
class RunStage:
    """One set of attention matrices that margins are taken with.

    Attributes:
        label: what figures and tables call it.
        w_query: W_Q (d, r).
        w_key: W_K (d, r).
        input: the embeddings, the same divided by their root mean square, token by token, or the
            normalised input of a layer.
        bound: c of its bounded context, or None.
        layer: number of that layer, from 0.
        head: of a published decoder, the head in that layer's own numbers: with rotary positions,
            biases or norms its logits are more than those of W_Q and W_K.
    """

    label: str
    w_query: Float[Array, "d r"]
    w_key: Float[Array, "d r"]
    input: StageInput = "embeddings"
    bound: float | None = None
    layer: int = 0
    head: AttentionLayer | None = None


@dataclass(frozen=True)
class StageMargins:
    """Quantities of one stage at every position of the windows of a text.

    Attributes:
        label: label of the stage.
        margin: "sigma_min", (windows, T); NaN where it is not known, see `stability_margin`.
        log_det: log det D_t in nats, -inf where the determinant is not positive.
        embedding_margin: first-order distance to the boundary in the space of the stage's input,
            and in its unit: embeddings, or their normalised form, of root mean square 1. NaN for
            heads of a published decoder, of which it is not computed.
        certificate: rho_t; below 1 the position is proved invertible. NaN for heads that normalise
            their queries, of which nothing is proved.
        infeasible: whether D_t has a real eigenvalue <= 0: the margin is then not positive. True
            too where the margin is not known.
    """

    label: str
    margin: Float[np.ndarray, "windows T"]
    log_det: Float[np.ndarray, "windows T"]
    embedding_margin: Float[np.ndarray, "windows T"]
    certificate: Float[np.ndarray, "windows T"]
    infeasible: Float[np.ndarray, "windows T"]


def stages(
    run: FittedRun, prior: PostHocPrior | None, *, all_layers: bool = False
) -> Iterator[RunStage]:
    """Yield a run's stages: post hoc if a prior is given, trained if there is one, and heads.

    Args:
        run: the run.
        prior: its post-hoc attention prior.
        all_layers: yield the heads of all layers, and not of the first alone, whose input alone is
            what the theory's model generates (paper, Corollary 6.1).
    """
    if prior is not None:
        matrices = jnp.asarray(prior.w_query), jnp.asarray(prior.w_key)
        yield RunStage(POST_HOC, *matrices, bound=run.bound)
    if isinstance(run, Run) and run.config.objective.trains_attention_prior:
        yield _trained_stage(run)
    for layer in range(run.network.config.layers if all_layers else 1):
        yield from _heads(run, layer)


def stage_margins(
    run: FittedRun, stage: RunStage, inputs: Int[np.ndarray, "windows T"]
) -> StageMargins:
    """Compute margins, log determinants and certificates of a stage over windows of tokens."""
    fields = _of_windows(
        lambda x: _measure(x, stage.w_query, stage.w_key, stage.head, bound=stage.bound),
        run,
        stage,
        inputs,
    )
    return StageMargins(stage.label, *fields)


def stage_radii(
    run: FittedRun, stage: RunStage, inputs: Int[np.ndarray, "windows T"]
) -> tuple[Float[np.ndarray, "windows T"], Float[np.ndarray, "windows T"]]:
    """Compute how far a stage's inputs may move at every position, and how large they are.

    Returns:
        The certified radius in the norm of each token, as the root mean square of the coordinates
        of a token's change, and the mean square of the coordinates of each input.
    """
    radius, squares = _of_windows(
        lambda x: _radii(x, stage.w_query, stage.w_key, bound=stage.bound), run, stage, inputs
    )
    return radius, squares


def stage_pasts(
    run: FittedRun, stage: RunStage, inputs: Int[np.ndarray, "windows T"]
) -> list[Past]:
    """Find which past tokens make the covariance of every position, and which it attends to.

    The covariance of position t is that of the values v_s of its past under its attention weights
    alpha_s, and its trace is the sum over s < t of alpha_s |v_s - mean|^2. The share of token s is
    its part of this sum. Values are the stage's inputs, moved into its bounded context if it has
    one. Tokens that the network reads before each window have shares, too, and are not named.

    Returns:
        Shares in the covariance, and in attention, each with the axes (windows, T, 8).
    """
    first = _prefix(run, stage)
    pasts = _of_windows(
        lambda x: _pasts(x, stage.w_query, stage.w_key, stage.head, bound=stage.bound, first=first),
        run,
        stage,
        inputs,
    )
    return [Past(*past) for past in pasts]


def stage_table(run: FittedRun, stage: RunStage) -> Float[np.ndarray, "V T d"]:
    """Return all that a stage ever sees: each symbol of the vocabulary at each position.

    There is one position where none is added to the embedding. Heads of later layers than the first
    see more, since what enters them depends on the whole context.
    """
    symbols = np.arange(run.vocabulary.size, dtype=np.int32)
    positions = run.network.block if run.network.adds_positions else 1
    tokens = np.repeat(symbols[:, None], positions, axis=1)
    return np.asarray(_entering(run, stage, tokens))


def _of_windows(
    measure: Callable[[Array], Any],
    run: FittedRun,
    stage: RunStage,
    inputs: Int[np.ndarray, "windows T"],
) -> Any:
    """Call a function with what enters a stage, a few windows at a time.

    A head of a published decoder sees the network's prefix, too, whose positions are left out of
    what is returned.
    """
    first = _prefix(run, stage)
    with one_blas_thread():
        found = map_batches(
            lambda _, rows: measure(_entering(run, stage, inputs[rows])),
            len(inputs),
            _BATCH if stage.head is None else 1,
        )
    return jax.tree.map(lambda each: each[:, first:], found)


def _prefix(run: FittedRun, stage: RunStage) -> int:
    """Return how many tokens a stage sees before those of a window."""
    network = run.network
    if stage.head is None or isinstance(network, TransformerNetwork):
        return 0
    return len(network.prefix)


def _trained_stage(run: Run) -> RunStage:
    model, objective = run.config.model, run.config.objective
    embedded = jnp.zeros((1, 1, model.width))
    trained = attention_stage(run.parameters, embedded, config=model, objective=objective)
    input: StageInput = "normalised" if objective.attention == "normalised" else "embeddings"
    matrices = trained["w_query"], trained["w_key"]
    return RunStage("trained", *matrices, input=input, bound=model.bound)


def _heads(run: FittedRun, layer: int) -> Iterator[RunStage]:
    network = run.network
    parameters: Parameters = run.parameters_up_to(layer)

    def label(head: int) -> str:
        return f"layer {layer + 1} head {head + 1}"

    if isinstance(network, TransformerNetwork):
        model = network.config
        _, queries, keys = attention_inputs(
            parameters,
            jnp.zeros((1, 1, model.width)),
            layer,
            heads=model.heads,
            cap=model.spectral_cap,
        )
        for head, (w_query, w_key) in enumerate(zip(queries, keys, strict=True)):
            yield RunStage(label(head), w_query, w_key, input="layer", layer=layer)
        return
    whole = attention_layer(parameters["layers"][str(layer)], network.config, layer)
    for number in range(network.config.heads):
        one = whole.of_head(number)
        yield RunStage(
            label(number), one.w_query[0], one.w_key[0], input="layer", layer=layer, head=one
        )


def _entering(run: FittedRun, stage: RunStage, tokens: Int[np.ndarray, "B T"]) -> Array:
    """Return what a stage sees: of a head in its layer's own numbers what enters the layer."""
    network, parameters = run.network, run.parameters_up_to(stage.layer)
    x = _embed(parameters, tokens, network=network)
    if stage.input == "layer":
        x = network.stream(parameters, x, stage.layer)
    if stage.head is not None or stage.input == "embeddings":
        return x
    if stage.input == "normalised":
        return rms_normalised(x)
    assert isinstance(network, TransformerNetwork)  # whose heads are W_Q and W_K alone
    return attention_inputs(parameters, x, stage.layer, heads=network.config.heads)[0]


@partial(jax.jit, static_argnames="network")
def _embed(parameters: Parameters, tokens: Array, *, network: Network) -> Array:
    return network.embed(parameters, tokens)


@partial(jax.jit, static_argnames="bound")
def _radii(x: Array, w_query: Array, w_key: Array, *, bound: float | None) -> tuple[Array, Array]:
    radius = certified_radius(x, w_query, w_key, bound=bound, joint=False)
    return radius / math.sqrt(x.shape[-1]), jnp.mean(x**2, axis=-1)


@partial(jax.jit, static_argnames=("bound", "first"))
def _pasts(
    x: Array,
    w_query: Array,
    w_key: Array,
    head: AttentionLayer | None,
    *,
    bound: float | None,
    first: int,
) -> list[tuple[Array, Array]]:
    if head is None:
        values, _, _, weights = geometry(x, w_query, w_key, bound)
    else:
        start, _ = prepared(head.stage(x))
        values, weights = start.values[:, 0], start.weights[:, 0]
    length = x.shape[-2]
    most = min(_PAST, length)
    named = jnp.arange(length) >= first

    def largest(parts: Array, position: Array) -> tuple[Array, Array]:
        share, place = jax.lax.top_k(jnp.where(named, parts, 0), most)
        behind = jnp.where(share > 0, position - place, 0)
        lacking = [(0, 0), (0, _PAST - most)]  # of a window of fewer tokens
        return jnp.pad(behind, lacking), jnp.pad(share, lacking)

    def at(position: Array) -> list[tuple[Array, Array]]:
        attention = weights[:, position, :]
        mean = jnp.einsum("bs,bsd->bd", attention, values, precision=jax.lax.Precision.HIGHEST)
        # Centred before it is squared: where attention is sharp, little is left.
        parts = attention * jnp.sum((values - mean[:, None, :]) ** 2, axis=-1)
        total = jnp.sum(parts, axis=-1, keepdims=True)
        shares = jnp.where(total > 0, parts / jnp.where(total > 0, total, 1), 0)
        return [largest(shares, position), largest(attention, position)]

    # Position after position: (windows, T, T, d) numbers would be many.
    found = jax.lax.map(at, jnp.arange(length, dtype=jnp.int32))
    return jax.tree.map(lambda each: jnp.swapaxes(each, 0, 1), found)


@partial(jax.jit, static_argnames="bound")
def _measure(
    x: Array,
    w_query: Array,
    w_key: Array,
    head: AttentionLayer | None,
    *,
    bound: float | None,
) -> tuple[Array, ...]:
    arguments: tuple[Any, ...] = (x, w_query, w_key)
    if head is None:
        margin, distance = both_margins(*arguments, bound=bound)
        rho = certificate(*arguments, bound=bound)
    else:
        arguments = (head.stage(x),)
        margin = stability_margin(*arguments)
        distance = jnp.full_like(margin, jnp.nan)
        rho = certificate(*arguments) if head.query_norm is None else distance
    sign, log_abs = log_det(*arguments, bound=bound)
    log_abs = jnp.where(sign > 0, log_abs, -jnp.inf)
    # The sign of the margin is that of `infeasible`.
    found = margin, log_abs, distance, rho, ~(margin > 0)
    return found if head is None else tuple(part[:, 0] for part in found)
