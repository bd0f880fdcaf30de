"""Attention stages of a run at which margins are taken, and their quantities over a text."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from probattn import certificate, infeasible, log_det
from probattn.batches import batched_rows
from probattn.inference.post_hoc import PostHocPrior
from probattn.inference.runs import Run
from probattn.margins import both_margins
from probattn.models.transformer import Parameters, embed, first_layer

_BATCH = 4  # windows in one call: the bases of 2 r directions take (windows, T, d, 2 r) numbers


@dataclass(frozen=True)
class Stage:
    """One set of attention matrices that margins are taken with.

    Attributes:
        label: what figures and tables call it.
        w_query: W_Q (d, r).
        w_key: W_K (d, r).
        normalised: whether it sees the first layer's normalised input instead of the embeddings.
        bound: c of its bounded context, or None.
    """

    label: str
    w_query: Float[Array, "d r"]
    w_key: Float[Array, "d r"]
    normalised: bool = False
    bound: float | None = None


@dataclass(frozen=True)
class StageMargins:
    """Quantities of one stage at every position of the windows of a text.

    Attributes:
        label: of the stage.
        margin: "sigma_min", (windows, T).
        log_det: log det D_t in nats, -inf where the determinant is not positive.
        embedding_margin: distance to the boundary in embedding space, in the embedding's unit.
        certificate: rho_t; below 1 the position is proved invertible.
        infeasible: whether R_t has a real eigenvalue <= 0.
    """

    label: str
    margin: Float[np.ndarray, "windows T"]
    log_det: Float[np.ndarray, "windows T"]
    embedding_margin: Float[np.ndarray, "windows T"]
    certificate: Float[np.ndarray, "windows T"]
    infeasible: Float[np.ndarray, "windows T"]


def stages(run: Run, prior: PostHocPrior) -> Iterator[Stage]:
    """Stages of a run: post hoc, trained where there is one, and the first layer's heads."""
    bound = run.config.model.bound
    yield Stage("post hoc", jnp.asarray(prior.w_query), jnp.asarray(prior.w_key), bound=bound)
    if run.config.objective.trains_attention_prior:
        w_query, w_key = run.parameters["w_query"], run.parameters["w_key"]
        yield Stage("trained", w_query, w_key, bound=bound)
    embedded = jnp.zeros((1, 1, run.config.model.width))
    _, queries, keys = first_layer(run.parameters, embedded, heads=run.config.model.heads)
    for head, (w_query, w_key) in enumerate(zip(queries, keys, strict=True), start=1):
        yield Stage(f"layer 1 head {head}", w_query, w_key, normalised=True)


def stage_margins(run: Run, stage: Stage, inputs: Int[np.ndarray, "windows T"]) -> StageMargins:
    """Margins, log determinants and certificates of a stage over windows of tokens."""
    measure = partial(
        _measure,
        normalised=stage.normalised,
        heads=run.config.model.heads,
        bound=stage.bound,
    )
    parts = [
        measure(run.parameters, inputs[rows], stage.w_query, stage.w_key)
        for rows in batched_rows(len(inputs), _BATCH)
    ]
    fields = [
        np.concatenate([np.asarray(piece) for piece in pieces])[: len(inputs)]
        for pieces in zip(*parts, strict=True)
    ]
    return StageMargins(stage.label, *fields)


@partial(jax.jit, static_argnames=("normalised", "heads", "bound"))
def _measure(
    parameters: Parameters,
    inputs: Array,
    w_query: Array,
    w_key: Array,
    *,
    normalised: bool,
    heads: int,
    bound: float | None,
) -> tuple[Array, ...]:
    x = embed(parameters, inputs)
    if normalised:
        x, _, _ = first_layer(parameters, x, heads=heads)
    sign, log_abs = log_det(x, w_query, w_key, bound=bound)
    margin, distance = both_margins(x, w_query, w_key, bound=bound)
    return (
        margin,
        jnp.where(sign > 0, log_abs, -jnp.inf),
        distance,
        certificate(x, w_query, w_key, bound=bound),
        infeasible(x, w_query, w_key, bound=bound),
    )
