"""An adversary of proofs: it looks for contexts that break them, by gradient descent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.support.dense import quick_jit

STARTS, LENGTH, STEPS = 128, 5, 250


@functools.partial(quick_jit, static_argnums=0)
def lowest_found(measure, start, fixed):
    """Smallest value that Adam meets on its way from each start.

    measure(point, *fixed) says, for every start, what to descend and what to record.
    """
    adam = optax.adam(optax.cosine_decay_schedule(0.1, STEPS))

    def total(point):
        descended, recorded = measure(point, *fixed)
        return jnp.sum(descended), recorded

    def step(_, carry):
        point, state, lowest = carry
        gradient, value = jax.grad(total, has_aux=True)(point)
        with jax.numpy_dtype_promotion("standard"):  # which Adam relies on
            updates, state = adam.update(gradient, state)
        return optax.apply_updates(point, updates), state, jnp.minimum(value, lowest)

    carry = start, adam.init(start), jnp.full(STARTS, jnp.inf)
    return jax.lax.fori_loop(0, STEPS, step, carry)[2]


def units(low, high):
    """Scales of the contexts, as powers of ten, one for each start."""
    return jnp.logspace(low, high, STARTS)[:, None, None]


def starts(width):
    return jnp.asarray(np.random.default_rng(1).standard_normal((STARTS, LENGTH, width)))


def of_norm(norm, shape):
    """W_Q and W_K of this ||A||, one for each start: every other symmetric and attractive."""
    w_query, w_key = np.random.default_rng(0).standard_normal((2, STARTS, *shape))
    w_key[::2] = w_query[::2]
    coupling = w_key @ np.swapaxes(w_query, -1, -2) / np.sqrt(shape[1])
    before = np.linalg.norm(coupling, ord=2, axis=(-2, -1), keepdims=True)
    return jnp.asarray(w_query * norm / before), jnp.asarray(w_key)
