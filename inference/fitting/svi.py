"""Stochastic variational inference of the language model, several steps per compiled call.

A step is NumPyro's SVI step on a minibatch that is a function of (seed, step), followed by the
check that keeps Adam from jumping over the attention barrier: a step that makes a determinant of
its minibatch non-positive is taken back and tried again at half its size.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from jax.stages import Traced
from jaxtyping import Array, Int
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.svi import SVIState

from probattn.inference.config import FitConfig, RunConfig
from probattn.inference.config_tuning import TuneConfig
from probattn.inference.fitting.backtracking import backtrack
from probattn.inference.fitting.elbo import AccumulatedELBO, OrderedELBO
from probattn.inference.fitting.optimizers import (
    check_step,
    default_optimizer,
    ivon_optimizer,
    svi_optimizer,
)
from probattn.inference.fitting.sharding import PlacedOptimizer, Placement
from probattn.inference.fitting.train_state import (
    Keys,
    Progress,
    TrainState,
    training_keys,
    with_key_data,
    with_keys,
)
from probattn.inference.guides.guides import POINTS, make_guide
from probattn.inference.guides.ivon import Prior, ivon_priors, ivon_scales
from probattn.inference.runs.checkpoints import named_leaves, with_leaves
from probattn.inference.runs.imported import DecoderRun
from probattn.models import latent_guide
from probattn.models.embedding_noise import gaussian_noise, neftune_noise, some_of
from probattn.models.priors import site_priors
from probattn.models.subjects import DecoderSubject, LanguageSubject, Subject
from probattn.text.batches import random_blocks

Perturb = Callable[[Array], Array]


class Trainer:
    """A language model, its guide and its optimizer, ready to take steps.

    Args:
        config: model, objective and fit.
        tokens: training text, (N,).
        vocabulary_size: number of symbols.
        optimizer: any optax transformation; by default `default_optimizer(config.fit)`. The guide
            ivon has its own, whatever is given.
        placement: placement of parameters and minibatches; by default on one device.
        base: the published decoder that is fine-tuned, where there is one.
    """

    def __init__(
        self,
        config: RunConfig | TuneConfig,
        tokens: Int[Array, " N"],
        vocabulary_size: int,
        optimizer: optax.GradientTransformation | None = None,
        placement: Placement | None = None,
        base: DecoderRun | None = None,
    ) -> None:
        self.config = config
        self._subject = subject = _subject(config, vocabulary_size, base)
        self._fixed: dict[str, Any] = {} if base is None else base.parameters
        self._placement = placement = Placement() if placement is None else placement
        self._keys = training_keys(np.uint32(config.fit.seed))
        sequences = tokens.shape[0] // subject.block
        count = sequences * subject.block
        model = partial(subject.model, num_sequences=sequences)
        drawn = subject.draw(self._keys.start)

        def guide_at(drawn: Any, fixed: dict[str, Any]) -> AutoGuide:
            parameters = partial(subject.sample_sites, fixed)
            return make_guide(config.fit.guide, parameters, subject.start(drawn, fixed))

        def prototype(drawn: Any, fixed: dict[str, Any]) -> None:
            self.guide = guide_at(drawn, fixed)
            numpyro.handlers.seed(self.guide, rng_seed=0)()  # sets its prototype up

        jax.eval_shape(prototype, drawn, self._fixed)

        def guide_of(parameters_guide: Callable) -> Callable:
            if config.fit.guide in POINTS:
                # Its log density is 0. NumPyro finds that by comparing every parameter with itself.
                parameters_guide = numpyro.handlers.mask(parameters_guide, mask=False)
            if config.objective.name == "latent":
                parameters_guide = partial(
                    latent_guide,
                    parameters=parameters_guide,
                    objective=config.objective,
                    num_sequences=sequences,
                )
            return numpyro.handlers.scale(parameters_guide, 1 / count)

        # The loss is -ELBO / N, of a point -log joint / N: nats per token, whatever the size of
        # the corpus.
        is_ivon = config.fit.guide == "ivon"
        priors = partial(_priors, partial(subject.sample_sites, self._fixed), count)
        if is_ivon:
            optimizer = ivon_optimizer(config.fit, priors, count)
        elif optimizer is None:
            optimizer = default_optimizer(config.fit)
        plain = svi_optimizer(optimizer, config.fit)
        optim = plain if placement.mesh is None else PlacedOptimizer(plain, placement)
        scaled = numpyro.handlers.scale(model, 1 / count)
        parts = config.fit.gradient_accumulation
        elbo = OrderedELBO(exact=is_ivon) if parts == 1 else AccumulatedELBO(parts, exact=is_ivon)
        self._svi = SVI(scaled, guide_of(self.guide), optim, elbo)
        self._tokens = placement.put(tokens)

        def init(drawn: Any, keys: Keys, tokens: Array, fixed: dict[str, Any]) -> TrainState:
            # The priors say what there is to learn: tracing all of the model takes long. The guide
            # is one of its own, so that where it starts is an argument.
            guide = guide_of(guide_at(drawn, fixed))
            starting = SVI(lambda *_: subject.sample_sites(fixed), guide, optim, OrderedELBO())
            # Each a buffer of its own, since all are donated.
            counts = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
            widths = ivon_scales(priors(), count, config.fit.hessian_init) if is_ivon else None
            batch = self.minibatch(tokens, 0, keys)
            svi = starting.init(keys.init, *batch, init_params=widths)
            self._svi.constrain_fn = starting.constrain_fn
            return TrainState(svi, jnp.zeros(()), *counts)

        shapes = jax.eval_shape(init, drawn, self._keys, tokens, self._fixed)
        check_step(plain, plain.get_params(shapes.svi.optim_state))
        spread = placement.shardings(shapes)
        starting_from = drawn, self._keys, self._tokens, self._fixed
        self._init = partial(jax.jit(init, out_shardings=spread), *starting_from)
        # Compiled here, so that a rate of steps is one. Donated: the old parameters and moments
        # make room for the new. Of any seed it is the same program, which is compiled but once.
        arguments = *placement.shapes((shapes, tokens)), self._keys, np.int32(0), np.int32(0)
        with placement.context():
            program = jax.jit(self._run, donate_argnums=0, out_shardings=(spread, None))
            self._advance = self._compiled(program.trace(*arguments, self._fixed))

    def _compiled(self, steps: Traced) -> Callable[..., tuple[TrainState, Progress]]:
        """Compile the program of the steps; another trainer may look at it instead."""
        return steps.lower().compile()

    def init(self) -> TrainState:
        """Return the state before the first step, which is a function of the seed."""
        return self._init()

    def advance(self, state: TrainState, step: int, stop: int) -> tuple[TrainState, Progress]:
        """Take the steps from `step` to `stop`, fewer if a loss is not finite; `state` is used up.

        Every length runs the same compiled code, so cutting a fit elsewhere changes no digit.
        """
        steps = np.int32(step), np.int32(stop)
        return self._advance(state, self._tokens, self._keys, *steps, self._fixed)

    def guide_params(self, state: TrainState) -> dict[str, Array]:
        """Return the guide's own parameters, by NumPyro's names for them, on one device."""
        params = self._svi.optim.get_params(state.svi.optim_state)
        return self._svi.constrain_fn(self._placement.local(params))

    def reported(self, state: TrainState) -> TrainState:
        """Return the state with no losses summed yet."""
        zeros = jnp.zeros_like(state.loss_sum), jnp.zeros_like(state.loss_count)
        return state._replace(loss_sum=zeros[0], loss_count=zeros[1])

    def saved(self, state: TrainState) -> dict[str, np.ndarray]:
        """Return the state's arrays by name, whole, as `restored` takes them."""
        return self._placement.fetched(named_leaves(with_key_data(state)))

    def restored(self, state: TrainState, load: Callable[[Mapping], Mapping]) -> TrainState:
        """Return a state that was saved, on whatever devices it was computed.

        Args:
            state: one of the same shapes.
            load: function from arrays by name to the saved ones of the same names and shapes.
        """
        plain = with_key_data(state)
        found = self._placement.put(with_leaves(plain, load(named_leaves(plain))))
        return with_keys(found, state)

    def minibatch(
        self, tokens: Int[Array, " N"], step: int | Int[Array, ""], keys: Keys | None = None
    ) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """Return inputs and targets of a step, a function of the seed and the step alone.

        Args:
            tokens: training text, (N,).
            step: number of the step.
            keys: keys of the fit, where a program takes them; by default those of its seed.
        """
        inputs, targets = random_blocks(
            jax.random.fold_in((keys or self._keys).data, step),
            tokens,
            batch=self.config.fit.batch,
            block=self._subject.block,
        )
        # The tokens of a text are of the smallest type that holds its vocabulary.
        return self._placement.sequences((inputs.astype(jnp.int32), targets.astype(jnp.int32)))

    def noise(self, step: int | Int[Array, ""], keys: Keys | None = None) -> dict[str, Perturb]:
        """Return a step's noise as an option of the model, a function of seed and step alone.

        No noise is no option, and compiles no random numbers. Arguments: see `minibatch`.
        """
        key = jax.random.fold_in((keys or self._keys).noise, step)
        return training_noise(self.config.fit, key)

    def _gathered_sites(self, params: dict[str, Array]) -> dict[str, Array]:
        return self.guide.median(self._placement.gathered(params))

    def _run(
        self,
        state: TrainState,
        tokens: Array,
        keys: Keys,
        step: Array,
        stop: Array,
        fixed: dict[str, Any],
    ) -> tuple[TrainState, Progress]:
        def body(carry: tuple[TrainState, Progress]) -> tuple[TrainState, Progress]:
            state, progress = carry
            state, loss = self._step(state, tokens, keys, progress.step, fixed)
            return state, Progress(progress.step + 1, loss, jnp.isfinite(loss))

        def unfinished(carry: tuple[TrainState, Progress]) -> Array:
            _, progress = carry
            return (progress.step < stop) & progress.finite

        start = Progress(step, jnp.zeros(()), jnp.bool_(True))
        return jax.lax.while_loop(unfinished, body, (state, start))

    def _step(
        self, state: TrainState, tokens: Array, keys: Keys, step: Array, fixed: dict[str, Any]
    ) -> tuple[TrainState, Array]:
        inputs, targets = self.minibatch(tokens, step, keys)
        options = self._subject.options(fixed) | self.noise(step, keys)
        svi, loss = self._svi.update(state.svi, inputs, targets, **options)
        rejected = jnp.bool_(False)
        if self.config.objective.has_barrier:
            svi, rejected = self._backtrack(state.svi, svi, inputs, fixed)
        return (
            TrainState(
                svi,
                state.loss_sum + loss,
                state.loss_count + 1,
                state.rejected + rejected.astype(jnp.int32),
            ),
            loss,
        )

    def _backtrack(
        self, old: SVIState, new: SVIState, inputs: Array, fixed: dict[str, Any]
    ) -> tuple[SVIState, Array]:
        """Shorten a step until it makes no positive determinant of the minibatch non-positive."""
        start, stop = (self._svi.optim.get_params(each.optim_state) for each in (old, new))
        subject = self._subject

        def of_params(tell: Callable[..., Array]) -> Callable[[dict[str, Array]], Array]:
            return lambda params: tell(self._gathered_sites(params), fixed, inputs)

        cheaply = subject.certainly_inside
        params, fraction = backtrack(
            start,
            stop,
            certainly_inside=None if cheaply is None else of_params(cheaply),
            inside=of_params(subject.inside),
        )
        count, (_, moments) = new.optim_state
        return new._replace(optim_state=(count, (params, moments))), fraction < 1


def _priors(parameters: Callable[[], Any], numbers: int) -> dict[str, Prior]:
    return ivon_priors(site_priors(parameters), numbers)


def _subject(
    config: RunConfig | TuneConfig, vocabulary_size: int, base: DecoderRun | None
) -> Subject:
    fit = config.fit
    if isinstance(config, RunConfig):
        own = vocabulary_size, config.model, config.objective
        return LanguageSubject(*own, fit.precision, fit.rematerialise)
    assert base is not None  # `fit` finds it
    network = replace(base.network, precision=fit.precision)
    return DecoderSubject(network, config.tuning, config.objective, fit.rematerialise)


def training_noise(config: FitConfig, rng_key: Array) -> dict[str, Perturb]:
    """Return the noise on the network's input, as `language_model`'s option `perturb`, if any."""
    if config.embedding_noise > 0:
        noise = partial(gaussian_noise, scale=config.embedding_noise)
    elif config.neftune_alpha > 0:
        noise = partial(neftune_noise, alpha=config.neftune_alpha)
    else:
        return {}
    if config.noise_probability < 1:
        noise = partial(some_of, noise, probability=config.noise_probability)
    return {"perturb": partial(noise, rng_key)}
