"""An attention layer of a decoder, in its own numbers."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from probattn.arguments import floating
from probattn.stages.projections import Norm, Projected, Rotary, project
from probattn.stages.stage import AttentionStage, check_logits

_MATRICES = ("w_query", "w_key", "w_value", "w_out")
_BIASES = ("query_bias", "key_bias", "value_bias", "out_bias")
_PARTS = ("norm", "query_norm", "key_norm", "out_norm", "rotary")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[*_MATRICES, *_BIASES, *_PARTS],
    meta_fields=["scale", "cap", "window"],
)
@dataclass(frozen=True)
class AttentionLayer:
    """The numbers of an attention layer: x -> x + out_norm(concat_h(sum_s alpha_ts v_s) W_O + b_O).

    Queries are rotary(query_norm(n W_Q + b_Q)) with n = norm(x), and keys likewise; values are
    n W_V + b_V. H is the number of heads and G, which divides it, that of the heads of keys and
    values: each serves H / G heads, one after the other. A part that is None is left out.

    Attributes:
        w_query: W_Q (H, d, r).
        w_key: W_K (G, d, r).
        w_value: W_V (G, d, r_v); only `block_spectrum` needs it.
        w_out: W_O (H, r_v, d), likewise.
        query_bias: b_Q (H, r).
        key_bias: b_K (G, r).
        value_bias: b_V (G, r_v).
        out_bias: b_O (d,).
        norm: in front of the layer, of vectors of d entries.
        query_norm: of the queries, of r entries, before they are rotated.
        key_norm: of the keys.
        out_norm: of what the layer adds.
        rotary: rotary positions of queries and keys.
        scale: c > 0 of the logits c q_t . k_s, or None for 1/sqrt(r).
        cap: soft cap of the logits, > 0.
        window: how many tokens before its own a token attends to, or None for all. A network whose
            window of W tokens counts the own one has W - 1.
    """

    w_query: Float[Array, "H d r"]
    w_key: Float[Array, "G d r"]
    w_value: Float[Array, "G d r_v"] | None = None
    w_out: Float[Array, "H r_v d"] | None = None
    query_bias: Float[Array, "H r"] | None = None
    key_bias: Float[Array, "G r"] | None = None
    value_bias: Float[Array, "G r_v"] | None = None
    out_bias: Float[Array, " d"] | None = None
    norm: Norm | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    out_norm: Norm | None = None
    rotary: Rotary | None = None
    scale: float | None = None
    cap: float | None = None
    window: int | None = None

    def normalised(self, x: Float[Array, "*batch T d"]) -> Float[Array, "*batch 1 T d"]:
        """Return what queries, keys and values are made of, with an axis for the heads."""
        x = checked_input(self, x)
        return (x if self.norm is None else self.norm(x))[..., None, :, :]

    def queries(self, tokens: Float[Array, "*batch 1 T d"]) -> Projected:
        """Return the queries of all heads (..., H, T, r), from what `normalised` returns."""
        return project(
            tokens, self.w_query, bias=self.query_bias, norm=self.query_norm, rotary=self.rotary
        )

    def keys(self, tokens: Float[Array, "*batch 1 T d"]) -> Projected:
        """Return the keys of all heads (..., H, T, r)."""
        found = project(
            tokens, self.w_key, bias=self.key_bias, norm=self.key_norm, rotary=self.rotary
        )
        transforms = found.transforms
        if transforms is not None and transforms.ndim > 3:
            transforms = self.for_heads(transforms, -4)
        return Projected(self.for_heads(found.vectors, -3), transforms)

    def for_heads(self, groups: Float[Array, "*batch G m n"], axis: int) -> Array:
        """Repeat what groups of heads share, along this axis."""
        return jnp.repeat(groups, self.w_query.shape[0] // self.w_key.shape[0], axis=axis)

    def of_head(self, head: int) -> "AttentionLayer":
        """Return the layer with one of its heads alone, counted from 0."""
        group = head // (self.w_query.shape[0] // self.w_key.shape[0])
        rows = dict.fromkeys(("w_query", "w_out", "query_bias"), head)
        rows |= dict.fromkeys(("w_key", "w_value", "key_bias", "value_bias"), group)
        chosen: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[row : row + 1]
            for name, row in rows.items()
        }
        return replace(self, **chosen)

    def stage(self, x: Float[Array, "*batch T d"]) -> AttentionStage:
        """Make the theory's stage of what enters the layer, all heads beside each other.

        Its values are the tokens norm(x), and a token does not attend to itself. It needs neither
        W_V nor W_O.

        Args:
            x: the stream in front of the layer (..., T, d).

        Returns:
            A stage with the axes (..., H); functions of it return (..., H, T).

        Raises:
            ValueError: if the shapes do not fit, the arrays are not floating point, or scale, cap
                or window is out of its range.
        """
        tokens = self.normalised(x)
        queries, keys = self.queries(tokens), self.keys(tokens)
        return AttentionStage(
            tokens,
            queries.vectors,
            keys.vectors,
            self.w_query,
            queries.transforms,
            scale=self.scale,
            cap=self.cap,
            window=self.window,
            positional=self.query_norm is None,
        )


def checked_input(layer: AttentionLayer, x: Array) -> Float[Array, "*batch T d"]:
    """Return the stream as an array of a floating dtype, and check the layer by it.

    Raises:
        ValueError: if their shapes do not fit together, an array is not floating point, or scale,
            cap or window is out of its range.
    """
    x = floating("x", x)
    w_query, w_key = jnp.shape(layer.w_query), jnp.shape(layer.w_key)
    ranks = min(x.ndim, 2), len(w_query), len(w_key)
    if ranks != (2, 3, 3) or min(x.shape[-2], *w_query, *w_key) < 1:
        raise ValueError(
            f"x has shape {x.shape}, w_query {w_query} and w_key {w_key}: expected (..., T, d), "
            "(H, d, r) and (G, d, r), none of them empty"
        )
    (heads, width, rank), groups = w_query, w_key[0]
    if heads % groups:
        raise ValueError(
            f"w_query has {heads} heads and w_key {groups}: expected a number that divides {heads}"
        )
    inner = rank if layer.w_value is None else jnp.shape(layer.w_value)[-1]
    expected = {
        "x": (*x.shape[:-1], width),
        "w_query": w_query,
        "w_key": (groups, width, rank),
        "w_value": (groups, width, inner),
        "w_out": (heads, inner, width),
        "query_bias": (heads, rank),
        "key_bias": (groups, rank),
        "value_bias": (groups, inner),
        "out_bias": (width,),
        "norm": (width,),
        "query_norm": (rank,),
        "key_norm": (rank,),
        "out_norm": (width,),
    }
    for name, shape in expected.items():
        given = x if name == "x" else getattr(layer, name)
        arrays = {name: given}
        if isinstance(given, Norm):
            arrays = {f"the gain of {name}": given.gain, f"the bias of {name}": given.bias}
        for called, array in arrays.items():
            if array is not None and floating(called, array).shape != shape:
                raise ValueError(
                    f"{called} has shape {jnp.shape(array)}: expected {shape}, to fit w_query of "
                    f"shape {w_query}"
                )
    if layer.rotary is not None:
        frequencies = floating("the frequencies of rotary", layer.rotary.frequencies).shape
        if len(frequencies) != 1 or 2 * frequencies[0] > rank:
            raise ValueError(
                f"the frequencies of rotary have shape {frequencies}: expected (p,) with 2 p <= "
                f"{rank}, to fit w_query of shape {w_query}"
            )
    # The block that runs has the own token beside the window; a stage, which has not, needs one.
    check_logits(layer.scale, layer.cap, layer.window, shortest_window=0)
    return x
