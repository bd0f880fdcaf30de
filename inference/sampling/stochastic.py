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

_CHECKS = 10  # of the warm-up, that the density of all the data is positive


class StochasticState(NamedTuple):
    """State of a chain, with what its last iteration was like."""

    iteration: Int[Array, ""]
    rng_key: Array
    position: Vector
    momentum: Vector  # of SGHMC, in units of scale
    path: "Path"
    scale: Vector
    checked: Vector  # where the density of all the data was computed last, and is positive
    log_density: Float[Array, ""]  # there, of the first minibatch if not of all the data
    refused: Bool[Array, ""]


class Path(NamedTuple):
    """Means and variances of the positions and gradients of late, weighted exponentially."""

    position: Vector
    gradient: Vector
    position_variance: Vector
    gradient_variance: Vector
    last_gradient: Vector
    noise: Vector  # half of the mean square change of the gradient from step to step


def stochastic_kernel(
    model: Callable, arguments: Sequence, config: SampleConfig, init_values: Mapping
) -> Kernel:
    """Return SGLD or SGHMC, of which an iteration is many steps of one gradient each.

    At the end of an iteration the density of all the data is computed, in the warm-up every tenth
    part of it. If it is zero or not finite there, or that of a minibatch was on the way, the chain
    goes back to where the iteration began, or to where the density was computed last. So no draw
    has density zero. Without `full_density` that is only known of minibatches.

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
    seeking = config.warmup // 2  # iterations in which the chain finds where the density is
    check_every = max(1, config.warmup // _CHECKS)  # iterations of the warm-up
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

    def of_first(position: Vector) -> Float[Array, ""]:
        return log_density(position, jnp.arange(plate.batch))

    known_density = of_all if config.full_density else of_first

    def init(key: Array, number: Array) -> StochasticState:
        start_key, momentum_key, key = jax.random.split(key, 3)
        position, gradient = target.start(start_key, number)
        return StochasticState(
            jnp.zeros((), jnp.int32),
            key,
            position,
            jax.random.normal(momentum_key, position.shape, position.dtype),
            Path(*[jnp.zeros_like(position)] * 6)._replace(last_gradient=gradient),
            jnp.ones_like(position),
            position,
            known_density(position),
            jnp.zeros((), bool),
        )

    def one(state: StochasticState, of_step: tuple) -> tuple[StochasticState, None]:
        key, size, number = of_step
        rows_key, noise_key = jax.random.split(key)
        rows = jax.random.choice(rows_key, plate.size, (plate.batch,), replace=False)
        # The first iteration only looks: a single gradient may be next to nothing.
        looks = jnp.asarray(config.preconditioned) & (state.iteration == 0)
        at = before = state.position / state.scale
        if is_hamiltonian:  # the gradient at the end of the step makes the step symplectic
            at = before + jnp.where(looks, 0, size) * state.momentum
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
            position = jnp.where(looks, state.position, position)
            momentum = jnp.where(looks, state.momentum, momentum)
            state = adapted(state, at * state.scale, gradient, number)
        fine = jnp.isfinite(value) & jnp.all(jnp.isfinite(position))
        return (
            state._replace(position=position, momentum=momentum, refused=state.refused | ~fine),
            None,
        )

    def adapted(
        state: StochasticState, position: Vector, gradient: Vector, number: Int[Array, ""]
    ) -> StochasticState:
        """Count position and gradient among those that give the scale, until the warm-up ends."""
        taken = state.iteration * steps + number + 1
        # Of a tenth of the steps so far, so that the gradients of a poor start are forgotten.
        memory = jnp.maximum(jnp.minimum(taken, steps), taken // 10)
        path = _followed(state.path, position, gradient, 1 / memory)
        adapts = (state.iteration < config.warmup) & jnp.all(jnp.isfinite(path.gradient_variance))
        return state._replace(
            path=jax.tree.map(lambda new, old: jnp.where(adapts, new, old), path, state.path),
            scale=jnp.where(adapts, _scale(path, seeks=state.iteration < seeking), state.scale),
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
        iteration = state.iteration + 1
        position = jnp.where(ended.refused, state.position, ended.position)
        # A pass over all the data costs a third of the steps that take them once.
        is_due = (iteration >= config.warmup) | (iteration % check_every == 0)
        log_density = jax.lax.cond(is_due, known_density, lambda _: state.log_density, position)
        lost = ~jnp.isfinite(log_density)
        refused = ended.refused | lost
        position = jnp.where(lost, state.checked, position)
        return ended._replace(
            iteration=iteration,
            position=position,
            momentum=jnp.where(refused, -state.momentum, ended.momentum),
            checked=jnp.where(is_due, position, state.checked),
            log_density=jnp.where(lost, state.log_density, log_density),
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
        lambda state: state.path.last_gradient,  # at the start that of the first minibatch
        lambda state: target.constrain(state.position),
        statistics,
    )


def _followed(path: Path, position: Vector, gradient: Vector, weight: Array) -> Path:
    """Count a position and its gradient, with this weight of the last."""

    def one(mean: Vector, variance: Vector, value: Vector) -> tuple[Vector, Vector]:
        change = value - mean
        return mean + weight * change, (1 - weight) * (variance + weight * change**2)

    mean, variance = one(path.position, path.position_variance, position)
    slope, slope_variance = one(path.gradient, path.gradient_variance, gradient)
    change = jnp.where(weight < 1, (gradient - path.last_gradient) ** 2 / 2, 0)
    noise = path.noise + weight * (change - path.noise)
    return Path(mean, slope, variance, slope_variance, gradient, noise)


def _scale(path: Path, *, seeks: Bool[Array, ""]) -> Vector:
    """Return the unit of every number: 1 over the root mean square of its gradient.

    Far from where the density is, gradients are large and alike, and steps in that unit go nowhere.
    A chain that seeks has a larger unit, in which the curvature along its path is 1, but at most 1
    over the standard deviation of the gradients' noise. No unit is more than 1, whatever the
    gradients: at a mode of all the data they are zero.
    """
    at_rest = 1 / (path.gradient_variance + path.gradient**2 + 1)
    along = jnp.sqrt(path.position_variance / (path.gradient_variance + 1e-30))
    squared = jnp.where(seeks, jnp.clip(along, at_rest, 1 / (path.noise + 1)), at_rest)
    return jnp.sqrt(squared)
