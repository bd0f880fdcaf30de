"""Optimizers of a fit: the default one, and sharpness-aware minimisation around any."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
import optax.contrib
from jaxtyping import Array
from numpyro.optim import _NumPyroOptim, optax_to_numpyro

from probattn.inference.config import FitConfig
from probattn.inference.guides.ivon import Prior, ivon
from probattn.messages import one_line


def default_optimizer(config: FitConfig) -> optax.GradientTransformation:
    """Make Adam with linear warm-up and cosine decay to a tenth; AdamW if weights decay.

    By default not AdamW: the priors already regularise, and decoupled decay on top is not the MAP.
    """
    schedule = learning_rate(config)
    if config.weight_decay == 0:
        return optax.adam(schedule, b1=0.9, b2=0.99)
    return optax.adamw(schedule, b1=0.9, b2=0.99, weight_decay=config.weight_decay, mask=_matrices)


def ivon_optimizer(
    config: FitConfig, priors: Callable[[], Mapping[str, Prior]], numbers: int
) -> optax.GradientTransformation:
    """Make the optimizer of the guide ivon. Arguments: see `ivon`."""
    return ivon(learning_rate(config), priors, numbers=numbers, beta2=config.ivon_decay)


def learning_rate(config: FitConfig) -> optax.Schedule:
    """Return the learning rate of every step: a linear warm-up, and a cosine decay to a tenth."""
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / max(config.warmup_steps, 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.steps,
        end_value=config.learning_rate / 10,
    )


def check_optimizer(config: FitConfig, optimizer: optax.GradientTransformation | None) -> None:
    """Refuse settings of the default optimizer where it is not used.

    Raises:
        ValueError: if an optimizer is given and so is a weight decay, or the guide is ivon.
    """
    if optimizer is not None and config.guide == "ivon":
        raise ValueError(
            "fit.guide is ivon and an optimizer is given: expected none, since ivon is an "
            "optimizer itself; give another guide, or fit.learning_rate"
        )
    if optimizer is not None and config.weight_decay > 0:
        raise ValueError(
            f"fit.weight_decay is {config.weight_decay} and an optimizer is given, which does not "
            "know of it: expected 0, with the decay in the optimizer"
        )


def svi_optimizer(optimizer: optax.GradientTransformation, config: FitConfig) -> "OptaxOptimizer":
    """Make an optimizer for NumPyro's SVI of an optax transformation, perhaps sharpness-aware."""
    if config.sam_rho > 0:
        return SharpnessAware(optimizer, config.sam_rho)
    return OptaxOptimizer(optimizer)


def check_step(optim: _NumPyroOptim, params: Any) -> None:
    """Refuse an optimizer that cannot take a step; trace one, and compile nothing.

    Args:
        optim: optimizer of NumPyro's SVI.
        params: parameters of a fit, or their shapes.

    Raises:
        ValueError: if the step raises, with what it says.
    """

    def step(params: Any) -> Any:
        def loss(params: Any) -> tuple[Array, None]:
            return optax.tree.norm(params, squared=True), None

        return optim.eval_and_update(loss, optim.init(params))

    try:
        jax.eval_shape(step, params)
    except Exception as error:  # whatever the user's own optimizer raises
        raise ValueError(
            f"the optimizer cannot take a step ({one_line(error)}): expected an optax "
            "transformation of gradients and parameters, which may ask for value, grad and "
            "value_fn where fit.sam_rho is 0"
        ) from error


class OptaxOptimizer(_NumPyroOptim):
    """An optax transformation as an optimizer of NumPyro's SVI.

    Beside the gradient it is given what optax's line searches ask for: the loss, and the loss as a
    function of the parameters, of the same minibatch and the same random numbers.

    Args:
        optimizer: any optax transformation.
    """

    def __init__(self, optimizer: optax.GradientTransformation) -> None:
        self._optax = optax.with_extra_args_support(optimizer)
        plain = optax_to_numpyro(optimizer)
        super().__init__(lambda: (plain.init_fn, plain.update_fn, plain.get_params_fn))

    def eval_and_update(
        self,
        fn: Callable[[Any], tuple],
        state: tuple[Array, Any],
        forward_mode_differentiation: bool = False,
    ) -> tuple[tuple[Array, Any], tuple[Array, Any]]:
        """Return loss and auxiliary output of `fn` at the parameters, and the next state."""
        if forward_mode_differentiation:
            raise NotImplementedError(f"{type(self).__name__} differentiates in reverse mode alone")
        count, (params, optimizer_state) = state
        (loss, auxiliary), gradient = jax.value_and_grad(fn, has_aux=True)(params)
        updates, optimizer_state = self._optax.update(
            gradient, optimizer_state, params, **self._beside(fn, loss, gradient)
        )
        params = optax.apply_updates(params, updates)
        return (loss, auxiliary), (count + 1, (params, optimizer_state))

    def _beside(self, fn: Callable[[Any], tuple], loss: Array, gradient: Any) -> dict[str, Any]:
        return {"value": loss, "grad": gradient, "value_fn": lambda params: fn(params)[0]}


class SharpnessAware(OptaxOptimizer):
    """Sharpness-aware minimisation by `optax.contrib.sam`, as an optimizer of NumPyro's SVI.

    A step takes two gradients of the same loss, of the same minibatch and the same random numbers:
    one where the parameters are, and one at the distance rho from there along the first. The
    optimizer is given the second (Foret et al. 2021, arXiv:2010.01412). The loss of a step is that
    where the parameters are.

    Args:
        optimizer: optimizer that takes the step; it is given gradients and parameters alone.
        rho: length of the step uphill, over all parameters together, > 0.
    """

    def __init__(self, optimizer: optax.GradientTransformation, rho: float) -> None:
        uphill = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
        super().__init__(optax.contrib.sam(optimizer, uphill, opaque_mode=True))

    def _beside(self, fn: Callable[[Any], tuple], loss: Array, gradient: Any) -> dict[str, Any]:
        return {"grad_fn": lambda params, _: jax.grad(fn, has_aux=True)(params)[0]}


def _matrices(params: dict[str, Array]) -> dict[str, bool]:
    """Tell where weights decay: in matrices, but not in gains of norms, which are one per layer."""
    return {name: leaf.ndim >= 2 and "norm" not in name for name, leaf in params.items()}
