"""Microcanonical Hamiltonian Monte Carlo with a Metropolis step, by BlackJAX: MCLMC without a bias.

The trajectory and its acceptance are BlackJAX's (Robnik et al. 2025, arXiv:2503.01707). Step size
and diagonal metric are tuned by NumPyro's warm-up of NUTS, which goes by acceptance alone.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from numpyro.infer.hmc_util import HMCAdaptState, IntegratorState, warmup_adapter

from probattn.inference.config_sampling import SampleConfig
from probattn.inference.sampling.kernel import Density, Kernel, Vector, blackjax_module

_STEPS = 2  # of a trajectory, on average; what BlackJAX advises


class AdjustedMclmcState(NamedTuple):
    """State of a chain, with what its last iteration was like."""

    iteration: Int[Array, ""]
    rng_key: Array
    at: Any  # BlackJAX's position, log density and gradient
    adapted: HMCAdaptState
    acceptance: Float[Array, ""]
    diverging: Bool[Array, ""]
    steps: Int[Array, ""]


def adjusted_mclmc_kernel(target: Density, config: SampleConfig) -> Kernel:
    """Return adjusted MCLMC, of which an iteration is one trajectory of random length.

    The trajectory has `config.steps` steps on average, of two gradients each. Where it leaves the
    region of positive density it is refused, so the posterior is invariant.

    Raises:
        ImportError: if BlackJAX is not installed.
    """
    mclmc = blackjax_module("mcmc.adjusted_mclmc_dynamic", config.method)
    lengths = mclmc.make_random_trajectory_length_fn(random_trajectory_length=True)
    one_trajectory = mclmc.build_kernel(lengths)
    begin, tune = warmup_adapter(config.warmup, target_accept_prob=config.target_accept)
    steps = config.steps or _STEPS

    def log_density(position: Vector) -> Float[Array, ""]:
        return target.log_density(position) / config.temperature

    def init(key: Array, number: Array) -> AdjustedMclmcState:
        start_key, length_key, tune_key, key = jax.random.split(key, 4)
        position, _ = target.start(start_key, number)
        step_size = jnp.full((), 0.1 * math.sqrt(target.size), position.dtype)
        zero = jnp.zeros((), position.dtype)
        return AdjustedMclmcState(
            jnp.zeros((), jnp.int32),
            key,
            mclmc.init(position, log_density, length_key),
            begin(_known(position), tune_key, step_size),
            zero,
            jnp.zeros((), bool),
            jnp.zeros((), jnp.int32),
        )

    def step(state: AdjustedMclmcState) -> AdjustedMclmcState:
        key, next_key = jax.random.split(state.rng_key)
        at, info = one_trajectory(
            key,
            state.at,
            log_density,
            state.adapted.step_size,
            inverse_mass_matrix=state.adapted.inverse_mass_matrix,
            integration_steps_params=(float(steps),),
        )
        adapted = jax.lax.cond(
            state.iteration < config.warmup,
            lambda: tune(state.iteration, info.acceptance_rate, _known(at.position), state.adapted),
            lambda: state.adapted,
        )
        return AdjustedMclmcState(
            state.iteration + 1,
            next_key,
            at,
            adapted,
            info.acceptance_rate,
            info.is_divergent,
            info.num_integration_steps,
        )

    def statistics(state: AdjustedMclmcState) -> dict[str, Array]:
        return {
            "diverging": state.diverging,
            "acceptance_rate": state.acceptance,
            "n_steps": 2 * state.steps,
            "lp": state.at.logdensity * config.temperature,
            "step_size": state.adapted.step_size,
        }

    return Kernel(
        init,
        step,
        lambda state: state.at.position,
        lambda state: state.at.logdensity_grad,
        lambda state: target.constrain(state.at.position),
        statistics,
    )


def _known(position: Vector) -> IntegratorState:
    """Return what NumPyro's adaptation reads of a state: the position alone."""
    return IntegratorState(position, None, None, None)
