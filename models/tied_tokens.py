"""The distribution of a text's tokens, given what the tied output of the network reads.

Of a large vocabulary the logits of a minibatch are its largest array by far: 32 sequences of 1,024
tokens and 50,257 symbols have 6.6 GB of them, and their derivative has as many again. Above a size
they are made for a few positions at a time, and made anew in the derivative.
"""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.nn import logsumexp
from jaxtyping import Array, Float, Int
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from probattn.models.decoder.config import Precision
from probattn.models.transformer import output_logits

LARGEST = 2**26  # logits that are made at once, and kept for the derivative


def tied_tokens(
    hidden: Float[Array, "B T d"],
    table: Float[Array, "V d"],
    *,
    precision: Precision = "float32",
) -> dist.Distribution:
    """Return the distribution of the token that follows each position, an event per sequence.

    Args:
        hidden: the output of `transformer.hidden`, (B, T, d).
        table: the embedding of every symbol, (V, d), which is the output's matrix too.
        precision: see `transformer.logits`.
    """
    if hidden.shape[0] * hidden.shape[1] * len(table) > LARGEST:
        return SlicedTokens(hidden, table, precision=precision)
    logits = output_logits(hidden, table, precision)
    return dist.Categorical(logits=logits).to_event(1)


class SlicedTokens(dist.Distribution):
    """Categorical tokens whose logits are never all in memory while a density is computed.

    It is `Categorical(logits=output_logits(hidden, table, precision)).to_event(1)`, whose log
    density takes `LARGEST` logits at a time. Its draws make all of them at once.

    Args:
        hidden: (B, T, d).
        table: (V, d).
        precision: see `transformer.logits`.
        validate_args: whether NumPyro checks the values.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    pytree_data_fields = ("hidden", "table")
    pytree_aux_fields = ("precision",)

    def __init__(
        self,
        hidden: Float[Array, "B T d"],
        table: Float[Array, "V d"],
        *,
        precision: Precision = "float32",
        validate_args: bool | None = None,
    ) -> None:
        self.hidden, self.table, self.precision = hidden, table, precision
        super().__init__(hidden.shape[:-2], hidden.shape[-2:-1], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Symbols 0 .. V - 1 at every position."""
        return constraints.independent(constraints.integer_interval(0, len(self.table) - 1), 1)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Int[Array, "*samples B T"]:
        """Draw tokens."""
        logits = output_logits(self.hidden, self.table, self.precision)
        return dist.Categorical(logits=logits).to_event(1).sample(key, sample_shape)

    @validate_sample
    def log_prob(self, value: Int[Array, "*samples B T"]) -> Float[Array, "*samples B"]:
        """Compute the log probability of every sequence of tokens."""
        *samples, sequences, length = jnp.broadcast_shapes(value.shape, self.hidden.shape[:-1])
        value = jnp.broadcast_to(value, (*samples, sequences, length)).reshape(-1, length)
        hidden = jnp.broadcast_to(self.hidden, (*samples, *self.hidden.shape))
        hidden = hidden.reshape(-1, length, hidden.shape[-1])

        # Along positions: of a mesh each device then works on its own sequences in every slice.
        most = max(LARGEST // (len(hidden) * len(self.table)), 1)
        parts = -(-length // most)
        each = -(-length // parts)
        padding = (0, 0), (0, parts * each - length)

        def sliced(array: Array) -> Array:
            padded = jnp.pad(array, (*padding, *[(0, 0)] * (array.ndim - 2)))
            return jnp.moveaxis(padded.reshape(len(array), parts, each, *array.shape[2:]), 1, 0)

        # What a scan computes anew is its own: no other use of it could be merged with it.
        @partial(jax.checkpoint, prevent_cse=False)
        def one(slices: tuple[Array, Array]) -> Array:
            hidden, value = slices
            logits = _logits(hidden, self.table, self.precision)
            chosen = jnp.take_along_axis(logits, value[..., None], -1)[..., 0]
            return chosen - logsumexp(logits, axis=-1)

        found = jax.lax.map(one, (sliced(hidden), sliced(value)))
        found = jnp.moveaxis(found, 0, 1).reshape(len(hidden), -1)[:, :length]
        return jnp.sum(found, axis=-1).reshape(*samples, sequences)


def _logits(
    hidden: Float[Array, "B T d"], table: Float[Array, "V d"], precision: Precision
) -> Float[Array, "B T V"]:
    if precision == "bfloat16":
        return _logits_in_bfloat16(hidden, table)
    return output_logits(hidden, table, precision)


@jax.custom_vjp
def _logits_in_bfloat16(
    hidden: Float[Array, "B T d"], table: Float[Array, "V d"]
) -> Float[Array, "B T V"]:
    """Return `output_logits` in bfloat16, whose derivative multiplies numbers of bfloat16 too.

    JAX's own multiplies float32 by bfloat16 there, since the logits are float32: on a GPU at a
    fraction of the speed.
    """
    return output_logits(hidden, table, "bfloat16")


def _forward(hidden: Array, table: Array) -> tuple[Array, tuple[Array, Array]]:
    return _logits_in_bfloat16(hidden, table), (hidden, table)


def _backward(kept: tuple[Array, Array], change: Float[Array, "B T V"]) -> tuple[Array, Array]:
    hidden, table = kept
    rounded, rows, matrix = (array.astype(jnp.bfloat16) for array in (change, hidden, table))
    rounded, rows = (array.reshape(-1, array.shape[-1]) for array in (rounded, rows))
    of_hidden = jnp.matmul(rounded, matrix, preferred_element_type=hidden.dtype)
    of_table = jnp.matmul(rounded.T, rows, preferred_element_type=table.dtype)
    return of_hidden.reshape(hidden.shape), of_table


_logits_in_bfloat16.defvjp(_forward, _backward)
