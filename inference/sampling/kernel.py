"""What a sampler is to the chains that run it, and models as densities of one vector."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from numpyro.infer.util import ParamInfo, constrain_fn, initialize_model, potential_energy

from probattn.inference.sampling.initialisation import init_to_given, with_prototypes

type Vector = Float[Array, " D"]


class Kernel(NamedTuple):
    """A sampler of one model: functions of the state of one chain, which is a tree of arrays.

    Attributes:
        init: the state before the first iteration, from the chain's random key and its number. If
            no start is found that has a finite log density and gradient, one of them is not.
        step: the state after one more iteration.
        position: the unconstrained numbers in a state.
        gradient: the gradient of the log density, up to a factor, in a state that `init` made.
        draw: the values of the model's sample sites in a state.
        statistics: numbers of the last iteration, under ArviZ's names where it has one. All
            samplers have diverging, n_steps (gradients), lp and step_size.
    """

    init: Callable[[Array, Array], Any]
    step: Callable[[Any], Any]
    position: Callable[[Any], Any]
    gradient: Callable[[Any], Any]
    draw: Callable[[Any], dict[str, Array]]
    statistics: Callable[[Any], dict[str, Array]]


class Density(NamedTuple):
    """A model as a log density of one vector of unconstrained numbers.

    Attributes:
        size: length D of the vector.
        start: where a chain starts, and the gradient of the log density there, from the chain's
            random key and its number.
        log_density: the log density, with the Jacobian of the constraints; of the model, or of
            one with the same latent sites.
        constrain: the values of the sample sites.
    """

    size: int
    start: Callable[[Array, Array], tuple[Vector, Vector]]
    log_density: Callable[..., Float[Array, ""]]
    constrain: Callable[[Vector], dict[str, Array]]


def density(
    model: Callable, arguments: Sequence, init_values: Mapping, *, each_chain: bool
) -> Density:
    """Return the log density of a model.

    Args:
        model: a NumPyro model.
        arguments: its arguments and keyword arguments.
        init_values: values of sample sites that chains start from.
        each_chain: whether their first axis is that of the chains.
    """
    args, kwargs = arguments

    def start(key: Array, number: Array) -> ParamInfo:
        values = dict(init_values)
        if each_chain:
            values = {name: jnp.asarray(value)[number] for name, value in values.items()}
        strategy = with_prototypes(partial(init_to_given, values))
        found = initialize_model(
            key,
            model,
            init_strategy=strategy,
            dynamic_args=True,
            model_args=args,
            model_kwargs=kwargs,
        )
        return found.param_info

    def flat_start(key: Array, number: Array) -> tuple[Vector, Vector]:
        found = start(key, number)
        return ravel_pytree(found.z)[0], -ravel_pytree(found.z_grad)[0]

    shapes = jax.eval_shape(start, jax.random.key(0), jnp.zeros((), int)).z
    zeros, unravel = ravel_pytree(
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    )

    def log_density(position: Vector, of: Callable = model) -> Float[Array, ""]:
        return -potential_energy(of, args, kwargs, unravel(position))

    return Density(
        zeros.size,
        flat_start,
        log_density,
        lambda position: constrain_fn(model, args, kwargs, unravel(position)),
    )


def blackjax_module(name: str, method: str) -> ModuleType:
    """Import a module of BlackJAX.

    Raises:
        ImportError: if BlackJAX is not installed.
    """
    try:
        return importlib.import_module(f"blackjax.{name}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"blackjax is not installed, and sample.method {method} needs it: install it with "
            "`pip install 'probattn[samplers]'`, or take sample.method nuts"
        ) from error
