"""Attention stages of a run at which margins are taken, and their quantities over a text."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from probattn import certificate, certified_radius, log_det
from probattn.blocks.geometry import geometry
from probattn.inference.evaluation.post_hoc import PostHocPrior
from probattn.inference.pages.page import Past
from probattn.inference.runs.run import Run
from probattn.inference.runtime.blas_threads import one_blas_thread
from probattn.margins import both_margins
from probattn.models.language import attention_stage
from probattn.models.transformer import Parameters, embed, first_layer, rms_normalised
from probattn.text.batches import map_batches

StageInput = Literal["embeddings", "normalised", "first_layer"]
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
            first layer's normalised input.
        bound: c of its bounded context, or None.
    """

    label: str
    w_query: Float[Array, "d r"]
    w_key: Float[Array, "d r"]
    input: StageInput = "embeddings"
    bound: float | None = None


@dataclass(frozen=True)
class StageMargins:
    """Quantities of one stage at every position of the windows of a text.

    Attributes:
        label: label of the stage.
        margin: "sigma_min", (windows, T); NaN where it is not known, see `stability_margin`.
        log_det: log det D_t in nats, -inf where the determinant is not positive.
        embedding_margin: first-order distance to the boundary in the space of the stage's input,
            and in its unit: embeddings, or their normalised form, of root mean square 1.
        certificate: rho_t; below 1 the position is proved invertible.
        infeasible: whether D_t has a real eigenvalue <= 0: the margin is then not positive. True
            too where the margin is not known.
    """

    label: str
    margin: Float[np.ndarray, "windows T"]
    log_det: Float[np.ndarray, "windows T"]
    embedding_margin: Float[np.ndarray, "windows T"]
    certificate: Float[np.ndarray, "windows T"]
    infeasible: Float[np.ndarray, "windows T"]


def stages(run: Run, prior: PostHocPrior | None) -> Iterator[RunStage]:
    """Yield a run's stages: post hoc if a prior is given, trained if there is one, first layer's.

    Those of the first layer are one for each head.
    """
    model, objective = run.config.model, run.config.objective
    embedded = jnp.zeros((1, 1, model.width))
    if prior is not None:
        matrices = jnp.asarray(prior.w_query), jnp.asarray(prior.w_key)
        yield RunStage("post hoc", *matrices, bound=model.bound)
    if objective.trains_attention_prior:
        trained = attention_stage(run.parameters, embedded, config=model, objective=objective)
        input: StageInput = "normalised" if objective.attention == "normalised" else "embeddings"
        matrices = trained["w_query"], trained["w_key"]
        yield RunStage("trained", *matrices, input=input, bound=model.bound)
    _, queries, keys = first_layer(
        run.parameters, embedded, heads=model.heads, cap=model.spectral_cap
    )
    for head, (w_query, w_key) in enumerate(zip(queries, keys, strict=True), start=1):
        yield RunStage(f"layer 1 head {head}", w_query, w_key, input="first_layer")


def stage_margins(run: Run, stage: RunStage, inputs: Int[np.ndarray, "windows T"]) -> StageMargins:
    """Compute margins, log determinants and certificates of a stage over windows of tokens."""
    measure = partial(
        _measure,
        input=stage.input,
        heads=run.config.model.heads,
        bound=stage.bound,
    )
    with one_blas_thread():
        fields = map_batches(
            lambda _, rows: measure(run.parameters, inputs[rows], stage.w_query, stage.w_key),
            len(inputs),
            _BATCH,
        )
    return StageMargins(stage.label, *fields)


def stage_radii(
    run: Run, stage: RunStage, inputs: Int[np.ndarray, "windows T"]
) -> tuple[Float[np.ndarray, "windows T"], Float[np.ndarray, "windows T"]]:
    """Compute how far a stage's inputs may move at every position, and how large they are.

    Returns:
        The certified radius in the norm of each token, as the root mean square of the coordinates
        of a token's change, and the mean square of the coordinates of each input.
    """
    measure = partial(_radii, input=stage.input, heads=run.config.model.heads, bound=stage.bound)
    with one_blas_thread():
        radius, squares = map_batches(
            lambda _, rows: measure(run.parameters, inputs[rows], stage.w_query, stage.w_key),
            len(inputs),
            _BATCH,
        )
    return radius, squares


def stage_pasts(run: Run, stage: RunStage, inputs: Int[np.ndarray, "windows T"]) -> list[Past]:
    """Find which past tokens make the covariance of every position, and which it attends to.

    The covariance of position t is that of the values v_s of its past under its attention weights
    alpha_s, and its trace is the sum over s < t of alpha_s |v_s - mean|^2. The share of token s is
    its part of this sum. Values are the stage's inputs, moved into its bounded context if it has
    one.

    Returns:
        Shares in the covariance, and in attention, each with the axes (windows, T, 8).
    """
    measure = partial(_pasts, input=stage.input, heads=run.config.model.heads, bound=stage.bound)
    with one_blas_thread():
        pasts = map_batches(
            lambda _, rows: measure(run.parameters, inputs[rows], stage.w_query, stage.w_key),
            len(inputs),
            _BATCH,
        )
    return [Past(*past) for past in pasts]


def stage_table(run: Run, stage: RunStage) -> Float[np.ndarray, "V T d"]:
    """Return all that a stage ever sees: each symbol of the vocabulary at each position."""
    symbols = np.arange(run.vocabulary.size, dtype=np.int32)
    tokens = np.repeat(symbols[:, None], run.config.model.block, axis=1)
    table = jax.jit(partial(_stage_input, input=stage.input, heads=run.config.model.heads))
    return np.asarray(table(run.parameters, tokens))


def _stage_input(parameters: Parameters, tokens: Array, *, input: StageInput, heads: int) -> Array:
    x = embed(parameters, tokens)
    if input == "first_layer":
        return first_layer(parameters, x, heads=heads)[0]
    return rms_normalised(x) if input == "normalised" else x


@partial(jax.jit, static_argnames=("input", "heads", "bound"))
def _radii(
    parameters: Parameters,
    inputs: Array,
    w_query: Array,
    w_key: Array,
    *,
    input: StageInput,
    heads: int,
    bound: float | None,
) -> tuple[Array, Array]:
    x = _stage_input(parameters, inputs, input=input, heads=heads)
    radius = certified_radius(x, w_query, w_key, bound=bound, joint=False)
    return radius / math.sqrt(x.shape[-1]), jnp.mean(x**2, axis=-1)


@partial(jax.jit, static_argnames=("input", "heads", "bound"))
def _pasts(
    parameters: Parameters,
    inputs: Array,
    w_query: Array,
    w_key: Array,
    *,
    input: StageInput,
    heads: int,
    bound: float | None,
) -> list[tuple[Array, Array]]:
    x = _stage_input(parameters, inputs, input=input, heads=heads)
    values, _, _, weights = geometry(x, w_query, w_key, bound)
    length = x.shape[-2]
    most = min(_PAST, length)

    def largest(parts: Array, position: Array) -> tuple[Array, Array]:
        share, place = jax.lax.top_k(parts, most)
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


@partial(jax.jit, static_argnames=("input", "heads", "bound"))
def _measure(
    parameters: Parameters,
    inputs: Array,
    w_query: Array,
    w_key: Array,
    *,
    input: StageInput,
    heads: int,
    bound: float | None,
) -> tuple[Array, ...]:
    x = _stage_input(parameters, inputs, input=input, heads=heads)
    sign, log_abs = log_det(x, w_query, w_key, bound=bound)
    margin, distance = both_margins(x, w_query, w_key, bound=bound)
    return (
        margin,
        jnp.where(sign > 0, log_abs, -jnp.inf),
        distance,
        certificate(x, w_query, w_key, bound=bound),
        ~(margin > 0),  # the sign of the margin is that of `infeasible`
    )
