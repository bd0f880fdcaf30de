"""The one training loop of the arena: NumPyro's SVI of any of its models, as `probattn fit` has it.

Minibatches, the start, the schedule and the guard of the barrier are those of `probattn fit`, with
the learning rate and the clipping as arguments, so that a setting is compiled once for all of them.
The loop is its own because a fit of the library has one learning rate in its program, and no model
but its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import optax
from arena_model import (
    Variant,
    arena_model,
    decoder_of,
    sample_arena_parameters,
    start_of_variant,
)
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int
from numpyro.handlers import replay, seed
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.util import compute_log_probs, log_density
from numpyro.primitives import Messenger

from probattn.inference import FitConfig
from probattn.inference.fitting.backtracking import backtrack
from probattn.inference.fitting.elbo import OrderedELBO
from probattn.inference.fitting.optimizers import OptaxOptimizer, learning_rate
from probattn.inference.fitting.train_state import training_keys
from probattn.inference.guides.guides import make_guide
from probattn.models import LanguageModelConfig, ObjectiveConfig, latent_guide
from probattn.models.embedding_noise import gaussian_noise, some_of
from probattn.models.language import sample_parameters
from probattn.models.networks import DecoderNetwork
from probattn.models.priors import starting_point
from probattn.models.subjects import LanguageSubject
from probattn.text.batches import random_blocks

PLAIN = ObjectiveConfig("ce")
_TERMS = ("attention_barrier", "attention_residual", "embeddings")


class Strengths(NamedTuple):
    """The numbers of a setting that are arguments of the compiled program.

    Attributes:
        strength: of a variant, or weight of the library's barrier, residual or divergence.
        noise: standard deviation of the noise in training, in units of the embeddings' root mean
            square.
        probability: probability of a sequence to be disturbed.
    """

    strength: ArrayLike = 0.0
    noise: ArrayLike = 0.0
    probability: ArrayLike = 1.0


@dataclass(frozen=True)
class Contender:
    """A model that is trained: one of the library's, or a variant of the plain one.

    Attributes:
        model: size of the network.
        objective: of the library's model; its weights are multiplied by the strength.
        variant: of the arena's own model; None for the library's.
        noisy: whether the library's model is trained with noise.
    """

    model: LanguageModelConfig
    objective: ObjectiveConfig = PLAIN
    variant: Variant | None = None
    noisy: bool = False

    def sample_sites(self, vocabulary_size: int) -> dict[str, Array]:
        """Sample the parameters."""
        if self.variant is None:
            return sample_parameters(vocabulary_size, self.model, self.objective)
        return sample_arena_parameters(vocabulary_size, self.model, self.variant)

    def start(self, rng_key: Array, vocabulary_size: int, strength: ArrayLike) -> dict[str, Array]:
        """Draw the start: of one key every contender has the same network."""
        found = starting_point(
            rng_key, partial(sample_parameters, vocabulary_size, self.model, PLAIN)
        )
        if self.variant is not None:
            return start_of_variant(found, self.model, self.variant, strength)
        if self.objective == PLAIN:
            return found
        more = starting_point(
            jax.random.fold_in(rng_key, 1), partial(self.sample_sites, vocabulary_size)
        )
        return more | found

    def model_of(self, vocabulary_size: int, num_sequences: int, strength: ArrayLike) -> Callable:
        """Return the NumPyro model of a minibatch."""
        if self.variant is None:
            subject = LanguageSubject(vocabulary_size, self.model, self.objective)
            return _Weighted(partial(subject.model, num_sequences=num_sequences), strength)
        return partial(
            arena_model,
            vocabulary_size=vocabulary_size,
            config=self.model,
            variant=self.variant,
            strength=strength,
            num_sequences=num_sequences,
        )

    def network(self, sites: Mapping[str, Array]) -> tuple[DecoderNetwork, dict[str, Any]]:
        """Return the network that runs, as a decoder, and its parameters."""
        return decoder_of(sites, self.model, self.variant or "plain")


class Trained(NamedTuple):
    """What a training leaves.

    Attributes:
        sites: the parameters at the end.
        losses: (steps,), cross-entropy of each minibatch before its step, in nats per token.
        rejected: steps that were shortened, as they would have crossed the barrier.
    """

    sites: dict[str, Array]
    losses: Float[Array, " steps"]
    rejected: Int[Array, ""]


class _Weighted(Messenger):
    """Multiply the terms of the library's objectives by a strength that is traced."""

    def __init__(self, fn: Callable, strength: ArrayLike) -> None:
        super().__init__(fn)
        self._strength = strength

    def process_message(self, msg: dict[str, Any]) -> None:
        """Scale the sites of the terms."""
        if msg["type"] == "sample" and msg["name"] in _TERMS:
            msg["scale"] = self._strength * (1.0 if msg["scale"] is None else msg["scale"])


class TokenELBO(OrderedELBO):
    """The bound of a fit, which also tells the cross-entropy of the tokens, as mutable state."""

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs):
        """Return the negative bound, and the tokens' part of it."""
        model_key, guide_key = jax.random.split(rng_key)
        guide_log, drawn = log_density(seed(guide, guide_key), args, kwargs, param_map)
        replayed = replay(seed(model, model_key), drawn)
        terms, _ = compute_log_probs(replayed, args, kwargs, param_map)
        state = {"token_loss": -terms["tokens"]}
        return {"loss": guide_log - sum(terms.values()), "mutable_state": state}


@partial(jax.jit, static_argnames=("contender", "fit", "vocabulary_size"))
def train(
    run_seed: Array,
    rate: Array,
    clip: Array,
    strengths: Strengths,
    tokens: Int[Array, " N"],
    *,
    contender: Contender,
    fit: FitConfig,
    vocabulary_size: int,
) -> Trained:
    """Train a contender; the result is a function of the seed, the rate and the clipping.

    Args:
        run_seed: seed of the start and of the minibatches.
        rate: peak of the learning rate.
        clip: largest norm of the gradient; infinite for none.
        strengths: of the setting.
        tokens: text that is fitted.
        contender: what is trained.
        fit: steps, warm-up and batch; of the rest nothing is used.
        vocabulary_size: number of symbols.
    """
    block, keys = contender.model.block, training_keys(run_seed)
    sequences = len(tokens) // block
    count = sequences * block
    shape = learning_rate(replace(fit, learning_rate=1.0))
    optimizer = optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adam(lambda step: rate * shape(step), b1=0.9, b2=0.99),
    )
    start = contender.start(keys.start, vocabulary_size, strengths.strength)
    guide = make_guide("map", partial(contender.sample_sites, vocabulary_size), start)
    strength = strengths.strength
    model, whole = (
        numpyro.handlers.scale(part, 1 / count)
        for part in (
            contender.model_of(vocabulary_size, sequences, strength),
            _guide(guide, contender, sequences, strength),
        )
    )
    svi = SVI(model, whole, OptaxOptimizer(optimizer), TokenELBO())

    def batch(step: Array) -> tuple[Array, Array]:
        key = jax.random.fold_in(keys.data, step)
        found = random_blocks(key, tokens, batch=fit.batch, block=block)
        return tuple(part.astype(jnp.int32) for part in found)

    def take(carry, step):
        state, rejected = carry
        inputs, targets = batch(step)
        options = _noise(contender, strengths, jax.random.fold_in(keys.noise, step))
        new, _ = svi.update(state, inputs, targets, **options)
        if contender.objective.has_barrier:
            new, shortened = _guarded(svi, guide, contender, state, new, inputs, vocabulary_size)
            rejected = rejected + shortened
        return (new, rejected), new.mutable_state["token_loss"]

    state = svi.init(keys.init, *batch(jnp.int32(0)))
    state = state._replace(mutable_state={"token_loss": jnp.zeros(())})
    (state, rejected), losses = jax.lax.scan(
        take, (state, jnp.int32(0)), jnp.arange(fit.steps, dtype=jnp.int32)
    )
    return Trained(guide.median(svi.get_params(state)), losses, rejected)


def _guide(guide: AutoGuide, contender: Contender, sequences: int, strength: ArrayLike) -> Callable:
    point = numpyro.handlers.mask(guide, mask=False)  # the log density of a point is 0
    if contender.objective.name != "latent":
        return point
    whole = partial(
        latent_guide, parameters=point, objective=contender.objective, num_sequences=sequences
    )
    return _Weighted(whole, strength)


def _noise(contender: Contender, strengths: Strengths, rng_key: Array) -> dict[str, Any]:
    if not contender.noisy:
        return {}
    disturbed = partial(gaussian_noise, scale=strengths.noise)
    return {"perturb": partial(some_of, disturbed, rng_key, probability=strengths.probability)}


def _guarded(svi, guide, contender, old, new, inputs, vocabulary_size):
    """Shorten a step that makes a positive determinant non-positive, as a fit does."""
    subject = LanguageSubject(vocabulary_size, contender.model, contender.objective)
    start, stop = (svi.optim.get_params(each.optim_state) for each in (old, new))
    params, fraction = backtrack(
        start,
        stop,
        certainly_inside=lambda p: subject.certainly_inside(guide.median(p), {}, inputs),
        inside=lambda p: subject.inside(guide.median(p), {}, inputs),
    )
    count, (_, moments) = new.optim_state
    return new._replace(optim_state=(count, (params, moments))), fraction < 1
