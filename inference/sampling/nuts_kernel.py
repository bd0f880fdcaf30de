"""NumPyro's NUTS as a kernel of chains."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter

from jaxtyping import Array
from numpyro.infer import NUTS
from numpyro.infer.hmc import HMCState

from probattn.inference.config_sampling import SampleConfig
from probattn.inference.sampling.initialisation import init_to_given, with_prototypes
from probattn.inference.sampling.kernel import Kernel

# What ArviZ calls the fields of NumPyro's state.
_STATISTICS: Mapping[str, Callable[[HMCState], Array]] = {
    "diverging": lambda state: state.diverging,
    "acceptance_rate": lambda state: state.accept_prob,
    "n_steps": lambda state: state.num_steps,
    "energy": lambda state: state.energy,
    "lp": lambda state: -state.potential_energy,
    "step_size": lambda state: state.adapt_state.step_size,
}


def nuts_kernel(
    model: Callable, arguments: Sequence, config: SampleConfig, init_values: Mapping
) -> Kernel:
    """Return NumPyro's NUTS, whose warm-up adapts its step size and mass matrix."""
    args, kwargs = arguments
    kernel = NUTS(
        model,
        target_accept_prob=config.target_accept,
        max_tree_depth=config.max_tree_depth,
        init_strategy=with_prototypes(partial(init_to_given, init_values)),
    )
    return Kernel(
        lambda key, number: kernel.init(key, config.warmup, model_args=args, model_kwargs=kwargs),
        lambda state: kernel.sample(state, args, kwargs),
        attrgetter("z"),
        attrgetter("z_grad"),
        # It is known only after init.
        lambda state: kernel.get_constrain_fn(args, kwargs)(state.z),
        lambda state: {name: of(state) for name, of in _STATISTICS.items()},
    )
