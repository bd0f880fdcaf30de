"""Microcanonical Langevin Monte Carlo by BlackJAX, tuned in the iterations of its warm-up.

The step of the chain, unadjusted, is BlackJAX's. The rules that tune it are those of its
`mclmc_find_L_and_step_size` (Robnik et al. 2023), but for one: there a step that leaves the region
of positive density lowers the largest step for good. They are written here for one iteration after
another, so that a warm-up can be cut into segments and resumed as the rest of a run.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from probattn.inference.config_sampling import SampleConfig
from probattn.inference.sampling.adjusted_mclmc import adjusted_mclmc_kernel
from probattn.inference.sampling.kernel import Kernel, Vector, blackjax_module, density

_MEMORY = 150  # steps that the estimate of the best step size remembers
_TRUST = 1.5  # how far, as a logarithm, a step may be from the best and count in full
_REFUSED = 4.0  # what a refused step counts as in units of the wanted error: 1 in 4 may be one
_LENGTH = 0.4  # length of decoherence in units of the autocorrelation length
_COORDINATES = 256  # that the autocorrelation length is averaged over
_LEAST_WARMUP = 50


class _Tuning(NamedTuple):
    """What the warm-up has found so far."""

    weight: Float[Array, ""]
    errors: Float[Array, ""]
    seen: Float[Array, ""]  # sum of the weights of mean and variance
    mean: Vector
    variance: Vector
    path: Float[Array, "n C"]  # coordinates after the last iterations


class MclmcState(NamedTuple):
    """State of a chain, with what its last iteration was like."""

    iteration: Int[Array, ""]
    rng_key: Array
    position: Vector
    momentum: Vector
    log_density: Float[Array, ""]
    gradient: Vector
    length: Float[Array, ""]
    step_size: Float[Array, ""]
    variances: Vector
    tuning: _Tuning
    refused: Bool[Array, ""]
    energy_variance: Float[Array, ""]


def mclmc_kernel(
    model: Callable, arguments: Sequence, config: SampleConfig, init_values: Mapping
) -> Kernel:
    """Return MCLMC, of which an iteration is `config.steps` steps of two gradients each.

    A step that leaves the region of positive density is not taken, and the momentum is reversed.
    Of exact dynamics this leaves the density in the region invariant, see docs/mathematics.md. With
    `config.adjusted` see `adjusted_mclmc_kernel`.

    Raises:
        ValueError: if the model has one unconstrained number alone, or the warm-up is too short.
        ImportError: if BlackJAX is not installed.
    """
    target = density(model, arguments, init_values, each_chain=config.method == "ensemble")
    if target.size == 1:
        raise ValueError(
            f"the model has one unconstrained number, and sample.method {config.method} moves on "
            "a sphere: expected two or more; take sample.method nuts"
        )
    if config.warmup < _LEAST_WARMUP:
        raise ValueError(
            f"sample.warmup is {config.warmup} with sample.method {config.method}, which tunes "
            f"step, metric and length in it: expected at least {_LEAST_WARMUP}"
        )
    if config.adjusted:
        return adjusted_mclmc_kernel(target, config)
    mclmc = blackjax_module("mcmc.mclmc", config.method)
    integrators = blackjax_module("mcmc.integrators", config.method)
    ess = blackjax_module("diagnostics", config.method).effective_sample_size
    one_step = mclmc.build_kernel()
    dimensions, steps = target.size, config.steps or 16
    averaged = config.warmup // 3  # iterations before positions are averaged
    scaled = 2 * config.warmup // 3  # before the metric is what they say
    measured = 5 * config.warmup // 6  # before step and metric are fixed, and L measured
    chosen = jnp.linspace(0, dimensions - 1, min(dimensions, _COORDINATES)).astype(int)

    def log_density(position: Vector) -> Float[Array, ""]:
        return target.log_density(position) / config.temperature

    def init(key: Array, number: Array) -> MclmcState:
        start_key, momentum_key, key = jax.random.split(key, 3)
        position, _ = target.start(start_key, number)
        begun = mclmc.init(position, log_density, momentum_key)
        zero, zeros = jnp.zeros((), position.dtype), jnp.zeros_like(position)
        path = jnp.zeros((config.warmup - measured, len(chosen)), position.dtype)
        return MclmcState(
            iteration=jnp.zeros((), jnp.int32),
            rng_key=key,
            position=begun.position,
            momentum=begun.momentum,
            log_density=begun.logdensity,
            gradient=begun.logdensity_grad,
            length=jnp.full_like(zero, math.sqrt(dimensions)),
            step_size=jnp.full_like(zero, 0.01 * math.sqrt(dimensions)),
            variances=jnp.ones_like(position),
            tuning=_Tuning(zero, zero, zero, zeros, zeros, path),
            refused=jnp.zeros((), bool),
            energy_variance=zero,
        )

    def one(state: MclmcState, key: Array) -> tuple[MclmcState, None]:
        before = integrators.IntegratorState(
            state.position, state.momentum, state.log_density, state.gradient
        )
        after, info = one_step(
            key, before, log_density, state.variances, state.length, state.step_size
        )
        momentum = jnp.where(info.nonans, after.momentum, -before.momentum)
        error = info.energy_change**2 / dimensions
        state = state._replace(
            position=after.position,
            momentum=momentum,
            log_density=after.logdensity,
            gradient=after.logdensity_grad,
            refused=state.refused | ~info.nonans,
            energy_variance=state.energy_variance + error / steps,
        )
        tuned = _tuned(state, jnp.where(info.nonans, error / config.energy_variance, _REFUSED))
        adapts = state.iteration < measured
        return jax.tree.map(lambda new, old: jnp.where(adapts, new, old), tuned, state), None

    def _tuned(state: MclmcState, error: Float[Array, ""]) -> MclmcState:
        """Move to the step whose energy error is 1, which grows with its sixth power."""
        tuning, decay = state.tuning, (_MEMORY - 1) / (_MEMORY + 1)
        error = error + 1e-8
        weight = jnp.exp(-0.5 * (jnp.log(error) / (6 * _TRUST)) ** 2)
        errors = decay * tuning.errors + weight * error / state.step_size**6
        weights = decay * tuning.weight + weight
        share = jnp.where(state.iteration < averaged, 0.0, state.step_size)
        seen = tuning.seen + share
        share = share / jnp.where(seen > 0, seen, 1.0)
        apart = state.position - tuning.mean
        tuning = tuning._replace(
            weight=weights,
            errors=errors,
            seen=seen,
            mean=tuning.mean + share * apart,
            variance=(1 - share) * (tuning.variance + share * apart**2),
        )
        return state._replace(step_size=(weights / errors) ** (1 / 6), tuning=tuning)

    def with_metric(state: MclmcState) -> MclmcState:
        """Take the variances found as the metric, in whose unit step and length are the same."""
        tuning = state.tuning
        size = jnp.mean(tuning.variance)  # zero of a chain that has not moved at all
        variances = jnp.where(size > 0, jnp.maximum(tuning.variance, 1e-8 * size), 1.0)
        unit = jnp.sqrt(jnp.mean(variances))
        zero = jnp.zeros_like(tuning.weight)
        return state._replace(
            variances=variances,
            step_size=state.step_size / unit,
            length=jnp.full_like(zero, math.sqrt(dimensions)),
            tuning=tuning._replace(weight=zero, errors=zero),
        )

    def with_length(state: MclmcState) -> MclmcState:
        """Set the length by the autocorrelation of the path."""
        path = state.tuning.path
        times = path.shape[0] / ess(path[None])
        known = jnp.isfinite(times)
        found = _LENGTH * steps * state.step_size * jnp.mean(times, where=known)
        return state._replace(length=jnp.where(jnp.any(known), found, state.length))

    def step(state: MclmcState) -> MclmcState:
        key, next_key = jax.random.split(state.rng_key)
        state = state._replace(
            refused=jnp.zeros_like(state.refused),
            energy_variance=jnp.zeros_like(state.energy_variance),
        )
        state, _ = jax.lax.scan(one, state, jax.random.split(key, steps))
        done = state.iteration + 1
        row = jnp.clip(state.iteration - measured, 0, len(state.tuning.path) - 1)
        recorded = state.tuning.path.at[row].set(state.position[chosen])
        path = jnp.where(state.iteration < config.warmup, recorded, state.tuning.path)
        state = state._replace(
            iteration=done, rng_key=next_key, tuning=state.tuning._replace(path=path)
        )
        state = jax.lax.cond(done == scaled, with_metric, lambda state: state, state)
        return jax.lax.cond(done == config.warmup, with_length, lambda state: state, state)

    def statistics(state: MclmcState) -> dict[str, Array]:
        return {
            "diverging": state.refused,
            "n_steps": jnp.full((), 2 * steps, jnp.int32),
            "energy_variance": state.energy_variance,
            "lp": state.log_density * config.temperature,
            "step_size": state.step_size,
            "length": state.length,
        }

    return Kernel(
        init,
        step,
        lambda state: state.position,
        lambda state: state.gradient,
        lambda state: target.constrain(state.position),
        statistics,
    )
