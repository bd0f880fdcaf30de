"""The guide ivon: independent Gaussians whose precisions the optimizer learns as it goes.

The Improved Variational Online Newton method (Shen et al. 2024, arXiv:2402.17641, algorithm 1)
minimises the bound that the guide mean_field does, by natural gradients. Its target is the
posterior of the model, at temperature 1: lambda of the paper is the number of tokens, and what the
paper calls weight decay is the precision of the Gaussian prior of every number, over lambda.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import optax
from jaxtyping import Array, Float, Int
from numpyro.distributions import constraints
from numpyro.infer.autoguide import AutoNormal


class Prior(NamedTuple):
    """Gaussian priors of the numbers of a site.

    Attributes:
        mean: their means, in the shape of the site.
        delta: their precisions over lambda, delta of the paper, in the shape of the site.
    """

    mean: Float[Array, "..."]
    delta: Float[Array, "..."]


class IvonState(NamedTuple):
    """What the optimizer carries beside the guide's parameters.

    Attributes:
        step: steps taken.
        momentum: mean of past gradients, g of the paper, by site.
    """

    step: Int[Array, ""]
    momentum: dict[str, Array]


class IvonNormal(AutoNormal):
    """Independent Gaussians; a fit moves the logarithms of their standard deviations.

    The precision over lambda is h + delta of the paper, so h needs no place of its own.
    """

    scale_constraint = constraints.positive


def ivon_priors(sites: Mapping[str, dist.Distribution], numbers: int) -> dict[str, Prior]:
    """Return the Gaussian priors of sites as the optimizer takes them.

    Args:
        sites: the priors by site name.
        numbers: lambda, what the mean loss is multiplied by to give the whole.

    Raises:
        ValueError: if a prior is not Gaussian.
    """
    for name, prior in sites.items():
        base = prior
        while isinstance(base, dist.Independent | dist.ExpandedDistribution):
            base = base.base_dist
        if not isinstance(base, dist.Normal):
            raise ValueError(
                f"the prior of {name} is {type(base).__name__}: expected a Normal one, whose "
                "precision is the delta of the guide ivon; take mean_field or low_rank"
            )
    return {n: Prior(prior.mean, 1 / (numbers * prior.variance)) for n, prior in sites.items()}


def ivon_scales(
    priors: Mapping[str, Prior], numbers: int, hessian_init: float
) -> dict[str, Float[Array, "..."]]:
    """Return the standard deviations of the guide before the first step, by NumPyro's names.

    Args:
        priors: see `ivon_priors`.
        numbers: lambda.
        hessian_init: h_0 of the paper, curvature of the mean loss in every number.
    """
    return {
        f"{name}_auto_scale": 1 / jnp.sqrt(numbers * (hessian_init + prior.delta))
        for name, prior in priors.items()
    }


def ivon(
    learning_rate: optax.Schedule,
    priors: Callable[[], Mapping[str, Prior]],
    *,
    numbers: int,
    beta1: float = 0.9,
    beta2: float,
) -> optax.GradientTransformation:
    """Make the optimizer, for the unconstrained parameters of an `IvonNormal`.

    It takes the gradient of the bound over lambda, with the divergence from the priors computed
    and not estimated (`OrderedELBO(exact=True)`). Such a gradient in log sigma is
    sigma^2 (h_hat - h), with the estimate h_hat of the curvature by Price's theorem, so the noise
    of the draw need not be known. With r = (1 - beta2) (h_hat - h) / (h + delta) the paper's update
    multiplies h + delta by 1 + r + r^2 / 2, which is 1/2 at the least: no precision ever becomes
    non-positive.

    Args:
        learning_rate: alpha_t of the paper, a function of the number of the step, from 0.
        priors: function that returns the priors, see `ivon_priors`.
        numbers: lambda.
        beta1: decay of the momentum.
        beta2: decay of the curvature.
    """

    def init(params: Mapping[str, Array]) -> IvonState:
        momentum = {n: jnp.zeros_like(leaf) for n, leaf in params.items() if n.endswith("_loc")}
        return IvonState(jnp.zeros((), jnp.int32), momentum)

    def update(
        gradients: Mapping[str, Array], state: IvonState, params: Mapping[str, Array] | None = None
    ) -> tuple[dict[str, Array], IvonState]:
        assert params is not None  # the class of NumPyro's optimizers gives them
        step = optax.safe_increment(state.step)
        rate = learning_rate(state.step)
        updates, momentum = {}, {}
        for name, prior in priors().items():
            loc, scale = f"{name}_auto_loc", f"{name}_auto_scale"
            pull = prior.delta * (params[loc] - prior.mean)
            r = (1 - beta2) * numbers * gradients[scale]
            # (h + delta) lambda sigma^2 = 1, before the step and after it.
            updates[scale] = -jnp.log1p(r + r**2 / 2) / 2
            precision = jnp.exp(-2 * (params[scale] + updates[scale])) / numbers
            g = beta1 * state.momentum[loc] + (1 - beta1) * (gradients[loc] - pull)
            momentum[loc] = g
            updates[loc] = -rate * (g / (1 - beta1**step) + pull) / precision
        return jax.tree.map(lambda new, old: new.astype(old.dtype), updates, dict(params)), (
            IvonState(step, momentum)
        )

    return optax.GradientTransformation(init, update)
