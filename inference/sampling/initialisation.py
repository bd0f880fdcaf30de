"""Where the chains of a sampler start: at given values, or at draws of the prior."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.distributions import biject_to
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import init_to_sample
from numpyro.infer.util import log_density

from probattn import CausalAttention, log_det
from probattn.messages import describe


def given_values(
    init_values: Mapping[str, Any] | None, start: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """Return the initial values of chains, which the keyword's old name may hold.

    Args:
        init_values: the values, by the keyword's name.
        start: the values, by the name that it had before.

    Raises:
        ValueError: if both are given.
    """
    if start is None:
        return init_values
    if init_values is not None:
        raise ValueError("init_values and start are both given: expected one; leave out start")
    warnings.warn(
        "start is the old name of init_values, which the next version does not know: "
        "give init_values",
        FutureWarning,
        stacklevel=5,  # the caller of sample, past its two decorators
    )
    return start


def floating_values(values: Mapping[str, Any], precision: str) -> dict[str, Array]:
    """Return initial values as floating-point arrays: latent sites are continuous.

    Args:
        values: the values by site: arrays, numbers or lists of them.
        precision: "float32" or "float64".

    Raises:
        ValueError: if a value is something else than real numbers.
    """
    found = {}
    for name, value in values.items():
        try:
            array = value if isinstance(value, jax.Array) else np.asarray(value)
        except ValueError:  # lists of several lengths
            array = np.empty(0, object)
        if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer)):
            raise ValueError(
                f"init_values has {name} of {' '.join(describe(value).split())}: expected real "
                "numbers, in an array of the site's shape"
            )
        found[name] = jnp.asarray(array, precision)
    return found


def init_to_given(values: Mapping[str, Any], site: dict | None = None) -> Any:
    """Initialise, for NumPyro, to the values given, and to draws from the prior at other sites."""
    if site is None:
        return partial(init_to_given, values)
    if site["type"] == "sample" and site["name"] in values:
        return jnp.asarray(values[site["name"]])
    return init_to_sample(site)


def with_prototypes(strategy: Callable[[dict], Any]) -> partial[Any]:
    """Return a strategy that gives NumPyro each site's prototype first, and then the values.

    NumPyro initialises the model twice. Of the first values it uses the shapes alone, but they are
    part of the compiled program. A prior whose sampler is long takes twice the time to compile
    unless they are cheap.

    Args:
        strategy: of NumPyro; its values of the first pass are replaced, those of later passes not.
    """
    return partial(_with_prototypes, strategy, set())


def _with_prototypes(strategy: Callable[[dict], Any], seen: set[str], site: dict) -> Any:
    latent = site["type"] == "sample" and not site["is_observed"]
    if not latent or site["name"] in seen or site["fn"].support.is_discrete:
        return strategy(site)
    seen.add(site["name"])
    to_support = biject_to(site["fn"].support)

    def unconstrained() -> Array:
        return to_support.inv(strategy(site))

    shape = jax.eval_shape(unconstrained)
    return to_support(jnp.zeros(shape.shape, shape.dtype))


def check_initial_values(
    model: Callable,
    arguments: Sequence,
    shapes: Mapping[str, tuple[int, ...]],
    values: Mapping,
    *,
    chains: int | None = None,
    density: bool = True,
) -> None:
    """Refuse initial values of sites that the model lacks, or of density zero.

    Args:
        model: a NumPyro model.
        arguments: its arguments and keyword arguments.
        shapes: shapes of its latent sites.
        values: the initial values.
        chains: number of chains if every one has values of its own, along their first axis.
        density: whether to compute it.
    """
    if not values:
        return
    if unknown := sorted(set(values) - set(shapes)):
        raise ValueError(
            f"init_values names {', '.join(unknown)}: expected sample sites of the model, "
            f"{', '.join(sorted(shapes))}"
        )
    for name, value in values.items():
        expected = shapes[name] if chains is None else (chains, *shapes[name])
        if jnp.shape(value) != expected:
            each = "" if chains is None else f", values for each of {chains} chains"
            raise ValueError(
                f"init_values has {name} of shape {jnp.shape(value)}: expected {expected}{each}"
            )
    if not density or set(values) != set(shapes):
        return  # the rest is drawn, until the density is positive
    args, kwargs = arguments
    of_one = jax.jit(lambda values: log_density(model, args, kwargs, values)[0])
    for chain in range(1 if chains is None else chains):
        own = values if chains is None else {name: each[chain] for name, each in values.items()}
        density = of_one(own)
        if not np.isfinite(density):
            whose = "" if chains is None else f" of chain {chain}"
            raise ValueError(
                f"the initial values{whose} have a log density of {float(density)}"
                f"{_outside(model, args, kwargs, own)}; "
                "start from smaller couplings or embeddings, or from the prior"
            )


def _outside(model: Callable, args: tuple, kwargs: dict, values: Mapping) -> str:
    """Tell how many tokens of attention processes have no positive determinant."""
    sites = trace(seed(substitute(model, values), jax.random.key(0))).get_trace(*args, **kwargs)
    outside, smallest = 0, math.inf
    for site in sites.values():
        process = site.get("fn")
        if isinstance(process, dist.ExpandedDistribution):
            process = process.base_dist
        if site["type"] == "sample" and isinstance(process, CausalAttention):
            sign, log_abs = log_det(
                site["value"], process.w_query, process.w_key, bound=process.bound
            )
            outside += int(jnp.sum(sign <= 0))
            smallest = min(smallest, float(jnp.min(sign * jnp.exp(log_abs))))
    if not outside:
        return ""
    return f": {outside} tokens have a determinant <= 0, the smallest of {smallest:.3g}"
