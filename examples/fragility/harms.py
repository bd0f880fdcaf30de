"""What harms a token: its loss, or that of what follows, once something is disturbed.

Every harm is an increase of loss in nats. Of noise, rounding, lost attention and a worst-case
direction it is that of the token's own prediction, with everything disturbed at once. Where the
token itself is replaced it is the mean increase over the next predictions.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from predictors import Found, Measure
from questions import ASCENT_LEVEL, ASCENT_STEPS, DROPPED, SCOPES
from replaced import MOST_PIECES, losses_after, misspelling
from sample import Subject

from probattn.inference.evaluation.perturbations import Ascent, Gaussian
from probattn.models.decoder import network as decoder
from probattn.models.decoder.rounding import round_weights


def noise(subject: Subject, name: str, level: float) -> Measure:
    """Disturb all embeddings by Gaussian noise; the loss is the mean over draws."""
    disturbed = Gaussian(level * subject.rms)

    def measure(rows: np.ndarray) -> Found:
        draws = [subject.losses(rows, disturbed, draw=draw) for draw in range(subject.scale.draws)]
        return {name: np.mean(draws, axis=0)}

    return measure


def rounding(subject: Subject, name: str, bits: int, scope: str) -> Measure:
    """Round the weights of the embedding and the first layer, or of the whole network."""
    rounded = dict(round_weights(subject.parameters, bits, only=SCOPES[scope]))
    return lambda rows: {name: subject.losses(rows, parameters=rounded)}


def dropped(subject: Subject, name: str) -> Measure:
    """Let every head of every layer lose each past token with a probability, itself never."""

    def measure(rows: np.ndarray) -> Found:
        def of_draw(draw: int) -> np.ndarray:
            def of_windows(few: np.ndarray) -> jax.Array:
                key = jax.random.fold_in(subject.key(2000 + draw), int(few[0]))
                return _dropped(
                    subject.parameters,
                    subject.inputs[few],
                    subject.targets[few],
                    key,
                    network=subject.network,
                )

            return subject.each(of_windows, rows)

        return {name: np.mean([of_draw(d) for d in range(subject.scale.draws)], axis=0)}

    return measure


def ascent(subject: Subject, name: str) -> Measure:
    """Move all embeddings towards a large loss of their window, see `perturbations.Ascent`."""
    disturbed = Ascent(ASCENT_LEVEL * subject.rms, ASCENT_STEPS)
    return lambda rows: {name: subject.losses(rows, disturbed)}


def likely_other(subject: Subject, name: str, others: np.ndarray) -> Measure:
    """Replace each token by the likeliest other one, by the prediction before it.

    Args:
        subject: the model and its text.
        name: of the harm.
        others: those tokens, (W, T).
    """

    def measure(rows: np.ndarray) -> Found:
        pieces: list[list[np.ndarray | None]] = [[np.array([o]) for o in others[r]] for r in rows]
        return {name: losses_after(subject, rows, pieces, 1)}

    return measure


def misspelt(subject: Subject, name: str) -> Measure:
    """Replace each token by a misspelling of it."""
    types = np.unique(subject.inputs)
    vocabulary = subject.run.vocabulary
    made = {token: misspelling(vocabulary, int(token), subject.seed) for token in types}

    def measure(rows: np.ndarray) -> Found:
        pieces = [[made[token] for token in subject.inputs[row]] for row in rows]
        return {name: losses_after(subject, rows, pieces, MOST_PIECES)}

    return measure


@partial(jax.jit, static_argnames="network")
def _dropped(parameters, inputs, targets, key, *, network):
    config, x = network.config, network.embed(parameters, inputs)
    (batch, length), own = inputs.shape, jnp.eye(inputs.shape[1], dtype=bool)
    for layer in range(config.layers):
        shape = (batch, config.heads, length, length)
        lost = jax.random.bernoulli(jax.random.fold_in(key, layer), DROPPED, shape)
        tree = parameters["layers"][str(layer)]
        x = decoder.apply_layer(tree, x, config, layer, kept=own | ~lost)
    logits = decoder.read_out(parameters, x, config)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
