"""What a network does to a token on its way to a query or a key: norms, biases, rotations.

Each step has its Jacobian beside it. Together they are the transforms of an `AttentionStage`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from probattn.blocks.promotion import with_rank

NormKind = Literal["rms", "layer"]

_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@partial(
    jax.tree_util.register_dataclass, data_fields=["gain", "bias"], meta_fields=["kind", "eps"]
)
@dataclass(frozen=True)
class Norm:
    """A norm of vectors: g (x - m) / sqrt(v + eps) + b, with m = 0 where the kind is "rms".

    Here v is the mean of the squared entries of x - m, and m their mean where the kind is "layer".

    Attributes:
        gain: g (m,); a network that stores g - 1 adds the 1 first. Leading axes broadcast.
        bias: b (m,), or None.
        kind: "rms" or "layer".
        eps: what is added to the mean square.
    """

    gain: Float[Array, "*batch m"]
    bias: Float[Array, "*batch m"] | None = None
    kind: NormKind = "rms"
    eps: float = 1e-6

    def __call__(self, x: Float[Array, "*batch m"]) -> Float[Array, "*batch m"]:
        """Normalise vectors (..., m)."""
        unit, _ = self._unit(x)
        scaled = _over_rows(self.gain, x) * unit
        return scaled if self.bias is None else scaled + _over_rows(self.bias, x)

    def pushed(
        self, x: Float[Array, "*batch m"], columns: Float[Array, "*batch m n"]
    ) -> Float[Array, "*batch m n"]:
        """Return the Jacobian at x times columns."""
        unit, size = self._unit(x)
        along = jnp.sum(unit[..., None] * columns, axis=-2, keepdims=True) / x.shape[-1]
        change = columns - unit[..., None] * along
        if self.kind == "layer":
            change = change - jnp.mean(columns, axis=-2, keepdims=True)
        return _over_rows(self.gain, x)[..., None] * change / size[..., None]

    def pulled(
        self, x: Float[Array, "*batch m"], rows: Float[Array, "*batch n m"]
    ) -> Float[Array, "*batch n m"]:
        """Return rows times the Jacobian at x."""
        unit, size = self._unit(x)
        rows = rows * _over_rows(self.gain, x)[..., None, :]
        along = jnp.sum(rows * unit[..., None, :], axis=-1, keepdims=True) / x.shape[-1]
        change = rows - along * unit[..., None, :]
        if self.kind == "layer":
            change = change - jnp.mean(rows, axis=-1, keepdims=True)
        return change / size[..., None]

    def _unit(self, x: Array) -> tuple[Array, Array]:
        """Return the vectors without gain and bias, and what they were divided by (..., 1)."""
        if self.kind == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        size = jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.eps)
        return x / size, size


@partial(jax.tree_util.register_dataclass, data_fields=["frequencies"], meta_fields=["interleaved"])
@dataclass(frozen=True)
class Rotary:
    """Rotary positions: at position t, pair i of a vector turns by the angle t f_i.

    Of a vector of r entries the first 2 p turn, for p frequencies, and the others stay.

    Attributes:
        frequencies: f (p,), in radians per position.
        interleaved: whether pair i is (2 i, 2 i + 1); by default it is (i, i + p), as in the
            networks of Hugging Face's Llama.
    """

    frequencies: Float[Array, " p"]
    interleaved: bool = False

    @classmethod
    def of(
        cls, rank: int, *, base: float = 1e4, fraction: float = 1.0, interleaved: bool = False
    ) -> "Rotary":
        """Make the usual frequencies f_i = base^(-i / p).

        Args:
            rank: r, the width of a query.
            base: largest wavelength over 2 pi, or nearly, > 1.
            fraction: the part of the r entries that turns.
            interleaved: see the class.

        Raises:
            ValueError: if no whole number of pairs, at least one, is that part of the entries.
        """
        turning = round(rank * fraction)
        if turning % 2 or not 2 <= turning <= rank or abs(turning - rank * fraction) > 1e-6:
            raise ValueError(
                f"fraction is {fraction!r} of {rank} entries: expected a part that is an even "
                "number of them, at least two"
            )
        pairs = turning // 2
        return cls(base ** -(jnp.arange(pairs) / pairs), interleaved)

    def __call__(self, vectors: Float[Array, "*batch T r"]) -> Float[Array, "*batch T r"]:
        """Turn vectors, one for each position 0, 1, ..."""
        pairs = len(self.frequencies)
        turning, rest = vectors[..., : 2 * pairs], vectors[..., 2 * pairs :]
        cosine, sine = self._angles(vectors)
        if self.interleaved:
            first, second = turning[..., ::2], turning[..., 1::2]
        else:
            first, second = turning[..., :pairs], turning[..., pairs:]
        turned = cosine * first - sine * second, sine * first + cosine * second
        if self.interleaved:
            mixed = jnp.stack(turned, axis=-1).reshape(turning.shape)
        else:
            mixed = jnp.concatenate(turned, axis=-1)
        return jnp.concatenate([mixed, rest], axis=-1)

    def matrices(self, like: Float[Array, "*batch T r"]) -> Float[Array, "T r r"]:
        """Return the rotations of all positions, for vectors of this shape and dtype."""
        length, rank = like.shape[-2:]
        identity = jnp.broadcast_to(
            jnp.eye(rank, dtype=like.dtype)[:, None, :], (rank, length, rank)
        )
        return jnp.moveaxis(self(identity), 0, -1)

    def _angles(self, vectors: Array) -> tuple[Array, Array]:
        positions = jnp.arange(vectors.shape[-2], dtype=vectors.dtype)
        angles = positions[:, None] * self.frequencies.astype(vectors.dtype)[None, :]
        angles = with_rank(angles, vectors.ndim)
        return jnp.cos(angles), jnp.sin(angles)


class Projected(NamedTuple):
    """Queries or keys as a network makes them, and their derivative.

    Attributes:
        vectors: (..., T, r).
        transforms: (..., T, r, r), such that token t has the derivative transforms_t W^T; None
            where it is W^T.
    """

    vectors: Float[Array, "*batch T r"]
    transforms: Float[Array, "*transforms T r r"] | None


def project(
    values: Float[Array, "*batch T d"],
    weights: Float[Array, "*weights d r"],
    *,
    bias: Float[Array, "*bias r"] | None = None,
    norm: Norm | None = None,
    rotary: Rotary | None = None,
) -> Projected:
    """Make queries or keys of tokens: a linear map, a bias, a norm and a rotation, in this order.

    Args:
        values: tokens (..., T, d).
        weights: W (..., d, r).
        bias: (..., r), or None.
        norm: of the projected vectors, or None.
        rotary: rotary positions, or None.
    """
    vectors = _matmul(values, weights)
    if bias is not None:
        vectors = vectors + _over_rows(bias[..., None, :], vectors)
    transforms = None
    if rotary is not None:
        transforms = rotary.matrices(vectors)
    if norm is not None:
        turned = jnp.eye(vectors.shape[-1], dtype=vectors.dtype)
        turned = turned if transforms is None else transforms
        rows = jnp.broadcast_to(turned, (*vectors.shape, vectors.shape[-1]))
        transforms = norm.pulled(vectors, rows)
        vectors = norm(vectors)
    if rotary is not None:
        vectors = rotary(vectors)
    return Projected(vectors, transforms)


def _over_rows(parameter: Array, x: Array) -> Array:
    """Return a parameter, whose last axis is that of x, with as many axes as x."""
    return with_rank(parameter, x.ndim)
