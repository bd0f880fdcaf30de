"""What is known of a token before anything is disturbed, each predictor a number per token."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sample import Subject

from probattn import sequence_gain
from probattn.inference.evaluation.attention_stages import stage_margins, stage_radii, stages
from probattn.inference.evaluation.post_hoc import usual_prior
from probattn.models.decoder import layers
from probattn.models.decoder import network as decoder
from probattn.models.decoder.attention import attention_layer
from probattn.stages.block_spectrum import block_spectrum

Found = dict[str, np.ndarray]
Measure = Callable[[np.ndarray], Found]


def clean(subject: Subject) -> Measure:
    """Measure loss, entropy and the like from one clean pass; the likeliest other tokens too."""

    def measure(rows: np.ndarray) -> Found:
        return subject.each(
            lambda few: _clean(
                subject.parameters,
                subject.inputs[few],
                subject.targets[few],
                network=subject.network,
            ),
            rows,
        )

    return measure


def gradient(subject: Subject) -> Measure:
    """Measure the norm of the gradient of the window's loss at the embedding of each token."""

    def measure(rows: np.ndarray) -> Found:
        return {"gradient": subject.each(_from(subject, _gradient), rows)}

    return measure


def loss_slope(subject: Subject) -> Measure:
    """Measure how steep each token's own loss is in all embeddings of its window.

    The mean square of its derivatives along random directions estimates the squared norm of its
    gradient: to first order that is what noise on embeddings goes by.
    """

    def measure(rows: np.ndarray) -> Found:
        squares: Any = 0.0
        for number in range(subject.scale.directions):

            def along(few, number=number):
                key = jax.random.fold_in(subject.key(1000 + number), int(few[0]))
                return _from(subject, _slope)(few, key)

            squares = squares + subject.each(along, rows) ** 2
        return {"loss_slope": np.sqrt(squares / subject.scale.directions)}

    return measure


def margins(subject: Subject) -> Measure:
    """Measure margins, log determinants and certificates of the stages of the first layer.

    Of a model of this project there are the post-hoc stage, the trained one where there is one, and
    distances and radii beside the margins.
    """
    run = subject.run
    chosen = list(stages(run, usual_prior(run)))

    def measure(rows: np.ndarray) -> Found:
        inputs, found, heads = subject.inputs[rows], {}, []
        for stage in chosen:
            of_stage = stage_margins(run, stage, inputs)
            name = stage.label.removeprefix("layer 1 ").replace(" ", "_")
            found[f"sigma_min_{name}"] = of_stage.margin
            if stage.label.startswith("layer"):
                heads.append(of_stage)
            if stage.head is None:
                found[f"embedding_margin_{name}"] = of_stage.embedding_margin
                found[f"certified_radius_{name}"], _ = stage_radii(run, stage, inputs)
            if name == "post_hoc":
                found[f"certificate_{name}"] = of_stage.certificate
                found[f"log_det_{name}"] = of_stage.log_det
                x = run.network.embed(run.parameters, inputs)
                gain = sequence_gain(x, stage.w_query, stage.w_key, bound=stage.bound)
                found[f"gain_share_{name}"] = np.asarray(gain.embedding_share)
        found["sigma_min_worst"] = np.min([each.margin for each in heads], axis=0)
        found["certificate_worst"] = np.max([each.certificate for each in heads], axis=0)
        log_det = np.array([each.log_det for each in heads])
        found["log_det_worst"], found["log_det_total"] = log_det.min(axis=0), log_det.sum(axis=0)
        return {name: values for name, values in found.items() if not np.isnan(values).all()}

    return measure


def spectrum(subject: Subject) -> Measure:
    """Measure determinant and singular values of the first layer's real block, of some windows."""
    layer = attention_layer(subject.parameters["layers"]["0"], subject.network.config, 0)
    windows, length = subject.inputs.shape
    wanted = max(subject.scale.spectrum_tokens // length, 1)
    chosen = np.unique(np.linspace(0, windows - 1, min(wanted, windows)).round().astype(int))

    def measure(rows: np.ndarray) -> Found:
        names = ("spectrum_log_det", "spectrum_smallest", "spectrum_largest")
        found = {name: np.full((len(rows), length), np.nan) for name in names}
        for number in np.flatnonzero(np.isin(rows, chosen)):
            x = subject.network.embed(subject.parameters, subject.inputs[rows[number]])
            of_window = _spectrum(x, layer)
            log_det = np.where(of_window.sign > 0, of_window.log_abs, -np.inf)
            values = (log_det, of_window.smallest, of_window.largest)
            for name, part in zip(names, values, strict=True):
                found[name][number] = part
        return found

    return measure


_spectrum = jax.jit(block_spectrum)


def token_constraint_bound(logits: jax.Array, table: jax.Array) -> jax.Array:
    """Compute the Token Constraint Bound of arXiv:2602.10816, for a tolerance of one.

    It is 1 over the Frobenius norm of the derivative of the probabilities p by what the output
    matrix multiplies: |J|^2 = sum_i p_i^2 |w_i - sum_j p_j w_j|^2.

    Args:
        logits: (..., V).
        table: rows w_i of the output matrix, (V, d).

    Returns:
        (...).
    """
    p = jax.nn.softmax(logits, axis=-1)
    top = jnp.argmax(p, axis=-1)
    first = jnp.take_along_axis(p, top[..., None], axis=-1)
    # Where one token has nearly all, its distance to the mean would be lost to rounding.
    rest = jnp.where(jnp.arange(p.shape[-1]) == top[..., None], 0, p)
    others = rest @ table
    mean = first * table[top] + others
    own = jnp.sum(rest, axis=-1, keepdims=True) * table[top] - others
    squares = (
        rest**2 @ jnp.sum(table**2, axis=-1)
        - 2 * jnp.sum((rest**2 @ table) * mean, axis=-1)
        + jnp.sum(mean**2, axis=-1) * jnp.sum(rest**2, axis=-1)
    )
    squares = jnp.maximum(squares, 0) + first[..., 0] ** 2 * jnp.sum(own**2, axis=-1)
    return 1 / jnp.sqrt(squares)


def _from(subject: Subject, function: Any) -> Any:
    def of_windows(few: np.ndarray, *more: Any) -> jax.Array:
        inputs, targets = subject.inputs[few], subject.targets[few]
        return function(subject.parameters, inputs, targets, *more, network=subject.network)

    return of_windows


@partial(jax.jit, static_argnames="network")
def _clean(parameters, inputs, targets, *, network):
    config = network.config
    x = network.embed(parameters, inputs)
    found, largest, entropies = {"embedding_norm": jnp.linalg.norm(x, axis=-1)}, [], []
    for layer in range(config.layers):
        own = parameters["layers"][str(layer)]
        weights = _attention(own, x, config, layer)
        largest.append(weights.max(-1).mean(1))
        entropies.append(jnp.sum(jax.scipy.special.entr(weights), axis=-1).mean(1))
        x = decoder.apply_layer(own, x, config, layer)
    logits = decoder.read_out(parameters, x, config)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    loss = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    # What the prediction before it would rather have had at each token but the first.
    is_own = jnp.arange(config.vocabulary) == targets[..., None]
    other = jnp.argmax(jnp.where(is_own, -jnp.inf, logits), axis=-1)
    table = parameters["embedding"]["tokens"] if config.tied else parameters["output"]["weights"].T
    return found | {
        "loss": loss,
        "entropy": -jnp.sum(jnp.exp(log_p) * log_p, axis=-1),
        "token_constraint_bound": token_constraint_bound(logits, jnp.asarray(table, x.dtype)),
        "attention_max_first": largest[0],
        "attention_entropy_first": entropies[0],
        "attention_max": jnp.mean(jnp.array(largest), axis=0),
        "attention_entropy": jnp.mean(jnp.array(entropies), axis=0),
        "other": jnp.concatenate([inputs[:, :1], other[:, :-1].astype(inputs.dtype)], axis=1),
    }


def _attention(own, x, config, layer):
    """Compute the weights of a layer's heads (B, H, T, T), a token's own among them."""
    positions = jnp.arange(x.shape[-2])
    n = layers.normalise(own["attention_norm"], x, config)
    query, key, _ = layers.project(own, n, positions, config, layer)
    key = jnp.repeat(key, query.shape[-2] // key.shape[-2], axis=-2)
    scores = config.scale * jnp.einsum("bthr,bshr->bhts", query, key)
    scores = layers.soft_cap(scores, config.attention_cap)
    behind = positions[:, None] - positions[None, :]
    window = config.window(layer)
    visible = (behind >= 0) & (behind < (len(positions) if window is None else window))
    return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)


def _losses(parameters, targets, network):
    return lambda x: optax.softmax_cross_entropy_with_integer_labels(
        network.logits(parameters, x), targets
    )


@partial(jax.jit, static_argnames="network")
def _gradient(parameters, inputs, targets, *, network):
    losses = _losses(parameters, targets, network)
    slopes = jax.grad(lambda x: losses(x).sum())(network.embed(parameters, inputs))
    return jnp.linalg.norm(slopes, axis=-1)


@partial(jax.jit, static_argnames="network")
def _slope(parameters, inputs, targets, key, *, network):
    x = network.embed(parameters, inputs)
    direction = jax.random.normal(key, x.shape, x.dtype)
    return jax.jvp(_losses(parameters, targets, network), (x,), (direction,))[1]
