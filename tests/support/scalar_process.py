"""Three tokens of a latent model in one dimension, by quadrature over their embeddings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from probattn import CausalAttention

EMISSION, BIAS = np.array([[2.0, 0.3, -1.5]]), np.array([0.2, -0.4, 0.0])
CUT = 0.125  # half a step of the quadrature


def softmax(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


@functools.cache
def of_three_tokens(a, bound, cut=0):
    """Probabilities of all three tokens, (V, V, V), by the trapezoidal rule over x_1, x_2, x_3.

    Args:
        a: coupling.
        bound: c or None.
        cut: so many of the embeddings are at most `CUT`, the others are free.
    """
    step = 0.25
    axes = [step * np.arange(-most, most + 1) for most in (24, 30, 36)]  # later ones are wider
    x = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3, 1)
    mass = np.exp(np.asarray(log_density(bound)(np.array([[a]]), x))) * step**3
    mass = mass.reshape([len(axis) for axis in axes])
    p = [softmax(axis[:, None] * EMISSION + BIAS) for axis in axes]
    for number in range(cut):
        p[number] = p[number] * (axes[number] < CUT)[:, None]
    return np.einsum("ijk,iu,jv,kw->uvw", mass, *p, optimize=True)


@functools.cache
def log_density(bound):
    """Log density of sequences of three tokens as a function of the coupling and of them."""
    return jax.jit(
        lambda a, x: CausalAttention(jnp.ones((1, 1)), a, 1.0, 3, bound=bound).log_prob(x)
    )
