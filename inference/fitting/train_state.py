"""The state of a fit between two steps, and the keys that its randomness comes from."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from numpyro.infer.svi import SVIState


class TrainState(NamedTuple):
    """All that a fit carries from step to step.

    Attributes:
        svi: NumPyro's state: parameters, optimizer state, random key.
        loss_sum: sum of the losses since the last report, in nats per token.
        loss_count: how many they are.
        rejected: steps so far of which at least one try was rejected.
    """

    svi: SVIState
    loss_sum: Float[Array, ""]
    loss_count: Int[Array, ""]
    rejected: Int[Array, ""]


class Progress(NamedTuple):
    """Where `Trainer.advance` stopped.

    Attributes:
        step: steps done in all; smaller than asked for if a loss was not finite.
        loss: loss of the last step, in nats per token.
        finite: whether that loss is finite.
    """

    step: Int[Array, ""]
    loss: Float[Array, ""]
    finite: Bool[Array, ""]


class Keys(NamedTuple):
    """Random keys of a fit, all of them functions of its seed.

    Attributes:
        start: key of the parameters that it starts from.
        init: key of NumPyro's state.
        data: key of the minibatches.
        noise: key of the noise of `FitConfig.embedding_noise` and `FitConfig.neftune_alpha`.
    """

    start: Array
    init: Array
    data: Array
    noise: Array


@jax.jit
def training_keys(seed: Array) -> Keys:
    """Return the keys of a fit, which are functions of its seed alone."""
    root = jax.random.key(seed)
    init, data = jax.random.split(root)
    start, init = jax.random.split(init)
    noise = jax.random.fold_in(root, 2)  # the split is 0 and 1
    return Keys(start, init, data, noise)


def with_key_data(state: TrainState) -> TrainState:
    """Return the state with its typed random keys as plain numbers, which can be saved.

    Beside the key of the steps these are keys in the optimizer's state.
    """
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, state)


def with_keys(plain: TrainState, like: TrainState) -> TrainState:
    """Undo `with_key_data`: numbers become keys where another state has them."""
    return jax.tree.map(
        lambda old, new: (
            jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if _is_key(old) else new
        ),
        like,
        plain,
    )


def _is_key(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
