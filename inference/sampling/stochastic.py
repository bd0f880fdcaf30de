"""SGLD and SGHMC by BlackJAX, with gradients of minibatches that a plate of the model takes.

The plate's rows are drawn anew in every step and without replacement, and NumPyro scales what is
in the plate, factors included, so that the gradient is unbiased for the density of all the data.
The integrators are BlackJAX's. They are used in such a way that the bias of a step is known for a
Gaussian, see docs/mathematics.md, and the tests hold it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from probattn.inference.config_sampling import SampleConfig
from probattn.inference.sampling.kernel import Kernel, Vector, blackjax_module, density
from probattn.inference.sampling.subsampling import check_rows, contents, rows_of


class StochasticState(NamedTuple):
    """State of a chain, with what its last iteration was like."""

    iteration: Int[Array, ""]
    rng_key: Array
    position: Vector
    momentum: Vector  # of SGHMC, in units of scale
    squares: Vector  # mean squares of the gradients
    scale: Vector
    log_density: Float[Array, ""]  # of all the data
    refused: Bool[Array, ""]


def stochastic_kernel(
    model: Callable, arguments: Sequence, config: SampleConfig, init_values: Mapping
) -> Kernel:
    """Return SGLD or SGHMC, of which an iteration is many steps of one gradient each.

    At the end of an iteration the density of all the data is computed. If it is zero or not finite
    there, or that of a minibatch was on the way, the chain goes back to where the iteration began.
    So no draw has density zero.

    Raises:
        ValueError: if the data do not have the rows of the model's plate, or the preconditioner
            has no warm-up.
        ImportError: if BlackJAX is not installed.
    """
    if config.preconditioned and config.warmup < 1:
        raise ValueError(
            f"sample.warmup is {config.warmup} with sample.preconditioned, which is estimated in "
            "it: expected at least 1, or sample.preconditioned false"
        )
    [plate] = contents(model, arguments).plates
    first = rows_of(model, plate.name, jnp.arange(plate.batch))
    target = density(first, arguments, init_values, each_chain=False)
    diffusions = blackjax_module("sgmcmc.diffusions", config.method)
    langevin, hamiltonian = diffusions.overdamped_langevin(), diffusions.sghmc(config.friction)
    is_hamiltonian = config.method == "sghmc"
    steps = config.steps or max(16, math.ceil(plate.size / plate.batch))
    memory = max(1, config.warmup * steps // 10)  # of the mean of squared gradients
    sizes = np.full(steps, config.step_size)
    if config.cyclical:
        sizes *= (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2

    def log_density(position: Vector, rows: Int[Array, " B"]) -> Float[Array, ""]:
        return target.log_density(position, rows_of(model, plate.name, rows))

    check_rows(plate, lambda rows: log_density(jnp.zeros(target.size), rows))

    def of_all(position: Vector) -> Float[Array, ""]:
        """Average over minibatches that divide the data: each counts its own share of them."""
        rows = jnp.arange(plate.size)
        even = plate.size - plate.size % plate.batch
        parts = jax.lax.map(
            lambda each: log_density(position, each), rows[:even].reshape(-1, plate.batch)
        )
        total = jnp.sum(parts) * plate.batch
        if even < plate.size:
            total = total + log_density(position, rows[even:]) * (plate.size - even)
        return total / plate.size

    def init(key: Array, number: Array) -> StochasticState:
        start_key, momentum_key, key = jax.random.split(key, 3)
        position = target.start(start_key, number)
        return StochasticState(
            jnp.zeros((), jnp.int32),
            key,
            position,
            jax.random.normal(momentum_key, position.shape, position.dtype),
            jnp.zeros_like(position),
            jnp.ones_like(position),
            of_all(position),
            jnp.zeros((), bool),
        )

    def one(state: StochasticState, of_step: tuple) -> tuple[StochasticState, None]:
        key, size, number = of_step
        rows_key, noise_key = jax.random.split(key)
        rows = jax.random.choice(rows_key, plate.size, (plate.batch,), replace=False)
        at = before = state.position / state.scale
        if is_hamiltonian:  # the gradient at the end of the step makes the step symplectic
            at = before + size * state.momentum
        value, gradient = jax.value_and_grad(log_density)(at * state.scale, rows)
        scaled = gradient * state.scale
        temperature = config.temperature
        if is_hamiltonian:
            after, momentum = hamiltonian(
                noise_key, before, state.momentum, scaled, size, temperature
            )
        else:
            after, momentum = langevin(noise_key, before, scaled, size, temperature), state.momentum
        position = after * state.scale
        if config.preconditioned:
            # The first iteration only looks: a single gradient may be next to nothing.
            looks = state.iteration == 0
            position = jnp.where(looks, state.position, position)
            momentum = jnp.where(looks, state.momentum, momentum)
            state = adapted(state, gradient, number)
        fine = jnp.isfinite(value) & jnp.all(jnp.isfinite(position))
        return (
            state._replace(position=position, momentum=momentum, refused=state.refused | ~fine),
            None,
        )

    def adapted(
        state: StochasticState, gradient: Vector, number: Int[Array, ""]
    ) -> StochasticState:
        """Count a gradient among those whose squares give the scale, until the warm-up ends."""
        counted = jnp.minimum(state.iteration * steps + number + 1, memory)
        squares = state.squares + (gradient**2 - state.squares) / counted
        adapts = (state.iteration < config.warmup) & jnp.all(jnp.isfinite(squares))
        return state._replace(
            squares=jnp.where(adapts, squares, state.squares),
            # Never more than 1, whatever the gradients: at a mode of all the data they are zero.
            scale=jnp.where(adapts, 1 / jnp.sqrt(squares + 1), state.scale),
        )

    def step(state: StochasticState) -> StochasticState:
        key, next_key = jax.random.split(state.rng_key)
        begun = state._replace(rng_key=next_key, refused=jnp.zeros_like(state.refused))
        of_steps = (
            jax.random.split(key, steps),
            jnp.asarray(sizes, state.position.dtype),
            jnp.arange(steps),
        )
        ended, _ = jax.lax.scan(one, begun, of_steps)
        reached = of_all(ended.position)
        refused = ended.refused | ~jnp.isfinite(reached)
        return ended._replace(
            iteration=state.iteration + 1,
            position=jnp.where(refused, state.position, ended.position),
            momentum=jnp.where(refused, -state.momentum, ended.momentum),
            log_density=jnp.where(refused, state.log_density, reached),
            refused=refused,
        )

    def statistics(state: StochasticState) -> dict[str, Array]:
        return {
            "diverging": state.refused,
            "n_steps": jnp.full((), steps, jnp.int32),
            "lp": state.log_density,
            "step_size": jnp.full((), sizes[-1], state.position.dtype),
        }

    return Kernel(
        init,
        step,
        lambda state: state.position,
        lambda state: target.constrain(state.position),
        statistics,
    )
