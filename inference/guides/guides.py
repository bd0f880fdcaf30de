"""Guides of a fit: the variational families that approximate the posterior, and draws from them.

Each is one of NumPyro's autoguides over the parameters of the language model alone; the training
text enters only through the loss of a step.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpyro
from jaxtyping import Array
from numpyro.infer import init_to_value
from numpyro.infer.autoguide import (
    AutoDelta,
    AutoGuide,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoNormal,
)

from probattn.inference.config import GuideName, RunConfig
from probattn.inference.guides.ivon import IvonNormal
from probattn.models.language import parameter_shapes

# Guides whose own parameters say more than their median, and are saved beside it.
OWN_PARAMS = ("mean_field", "low_rank", "ivon")
# Guides that are one point while they are fitted, and of which a fit does the same as of map.
POINTS = ("map", "last_layer")
LARGEST_LAPLACE = 10_000  # parameters: their Hessian takes 0.8 GB, and its factors as much again
_INIT_SCALE = 0.003  # standard deviation that a fit starts from
# NumPyro's rank, the root of the number of parameters, takes 9 GB for 800,000 of them.
_RANK = 10

Model = Callable[[], Any]


def make_guide(
    name: GuideName,
    parameters: Model,
    start: Mapping[str, Array],
    *,
    hessian_fn: Callable[..., Array] | None = None,
) -> AutoGuide:
    """Make one of NumPyro's autoguides over the parameters of a model.

    Args:
        name: name of the guide.
        parameters: a NumPyro model of sample sites alone. The guide's prototype is traced of it,
            which need not compile a network; the guide takes and ignores a minibatch.
        start: values of the sites that the guide is centred at before the first step.
        hessian_fn: Hessian function for laplace, see AutoLaplaceApproximation.
    """

    def model(*minibatch: Array) -> None:
        parameters()

    init = init_to_value(values=dict(start))
    if name in POINTS:
        return AutoDelta(model, init_loc_fn=init)
    if name == "laplace":
        return AutoLaplaceApproximation(model, init_loc_fn=init, hessian_fn=hessian_fn)
    if name == "ivon":
        return IvonNormal(model, init_loc_fn=init)
    if name == "mean_field":
        return AutoNormal(model, init_loc_fn=init, init_scale=_INIT_SCALE)
    return AutoLowRankMultivariateNormal(
        model, init_loc_fn=init, init_scale=_INIT_SCALE, rank=_RANK
    )


def check_guide(config: RunConfig, vocabulary_size: int) -> None:
    """Refuse a model whose Hessian would not fit into memory.

    Raises:
        ValueError: if the guide is laplace and there are more than `LARGEST_LAPLACE` parameters, or
            it is last_layer and there are more in the output's table.
    """
    if config.fit.guide == "laplace":
        shapes = parameter_shapes(vocabulary_size, config.model, config.objective)
        size = sum(math.prod(leaf.shape) for leaf in shapes.values())  # leaf.size is of 64 bits
        what, others = "model has", "mean_field, ivon or low_rank"
    elif config.fit.guide == "last_layer":
        size = vocabulary_size * config.model.width
        what, others = "output's table has", "mean_field, ivon or low_rank"
    else:
        return
    if size > LARGEST_LAPLACE:
        raise ValueError(
            f"fit.guide is {config.fit.guide} and the {what} {size:,} parameters: expected at most "
            f"{LARGEST_LAPLACE:,}, since their Hessian is dense; give a smaller model, or {others}"
        )


def init_params(guide: AutoGuide) -> dict[str, Array]:
    """Return the guide's own parameters before the first step; sets its prototype up."""
    trace = numpyro.handlers.trace(numpyro.handlers.seed(guide, rng_seed=0)).get_trace()
    return {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
