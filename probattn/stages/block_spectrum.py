"""The attention block that really runs: determinants and singular values of its diagonal blocks.

The block is x -> y = x + out_norm(W_O concat_h(sum_{s <= t} alpha_ts v_s)). Token t attends to
itself too, so its own key and value depend on it, beside its query. With n = norm(x),

    dy_t/dx_t = I + P_t W_O M_t N'(x_t),

where N' and P_t are the Jacobians of the norms, and M_t stacks the heads' derivatives of the mean
value by n_t: Cov_{alpha_t}(v_s, c f'_ts k_s) B_t W_Q^T + c f'_tt alpha_tt (v_t - vbar_t) q_t^T K_t
W_K^T + alpha_tt W_V^T. Here K_t is the transform of the key, as B_t is that of the query.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from probattn.blocks.covariance import centred_covariance, identity_less
from probattn.blocks.geometry import logit_slopes
from probattn.blocks.nonfinite import after_nonfinite
from probattn.blocks.singular_values import extreme_singular_values
from probattn.stages.layer import AttentionLayer, checked_input
from probattn.stages.projections import Projected

_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
_AT_ONCE = 16  # positions, each with a matrix of d x d


class BlockSpectrum(NamedTuple):
    """What an attention block does to a small change of one token, at every position.

    Attributes:
        sign: (..., T), the sign of the determinant of dy_t/dx_t; 0 where it is singular.
        log_abs: (..., T), log|det|, in nats.
        smallest: (..., T), the smallest singular value.
        largest: (..., T), the largest.
    """

    sign: Float[Array, "*batch T"]
    log_abs: Float[Array, "*batch T"]
    smallest: Float[Array, "*batch T"]
    largest: Float[Array, "*batch T"]


def block_spectrum(x: Float[Array, "*batch T d"], layer: AttentionLayer) -> BlockSpectrum:
    """Compute determinant and extreme singular values of an attention block, token by token.

    Unlike a stage this is the block that a network runs: a token attends to itself, values have
    matrices of their own, and the norms count. What enters is the Jacobian of y_t by x_t, with the
    past held fixed; the Jacobian of the whole sequence has these blocks on its diagonal. With H
    heads of width r_v, matrices of H r_v rows give the determinant where that is less than d, and
    matrices of 2 H r_v rows the singular values where that is.

    Args:
        x: the stream in front of the layer (..., T, d).
        layer: its numbers, with w_value and w_out.

    Returns:
        Sign, log|det| in nats, smallest and largest singular value, each (..., T). NaN where x_t
        or a token before it is not finite.

    Raises:
        ValueError: if the shapes do not fit, the arrays are not floating point, scale, cap or
            window is out of its range, or w_value or w_out is missing.
    """
    w_value, w_out = layer.w_value, layer.w_out
    if w_value is None or w_out is None:
        raise ValueError("the layer has no w_value or no w_out: expected both for block_spectrum")
    x = checked_input(layer, x)
    *batch, length, width = x.shape
    flat = x.reshape(-1, length, width)
    found = lax.map(lambda row: _of_sequence(row, layer, w_value, w_out), flat)
    return BlockSpectrum(*(part.reshape(*batch, length) for part in found))


def _of_sequence(
    x: Float[Array, "T d"], layer: AttentionLayer, w_value: Array, w_out: Array
) -> BlockSpectrum:
    length = len(x)
    lost = after_nonfinite(x) | ~jnp.all(jnp.isfinite(x), axis=-1)
    # What is lost anyway must not spoil what comes before it.
    whole = jnp.where(lost[:, None], 0.0, x)
    tokens = layer.normalised(whole)
    queries, keys = layer.queries(tokens), layer.keys(tokens)
    values = _matmul(tokens, w_value)
    if layer.value_bias is not None:
        values = values + layer.value_bias[:, None, :]
    values = layer.for_heads(values, -3)

    def at(position: Array) -> BlockSpectrum:
        left, right = _factors(layer, w_value, w_out, whole, position, queries, keys, values)
        return _spectrum(left, right)

    found = lax.map(at, jnp.arange(length), batch_size=min(_AT_ONCE, length))
    return BlockSpectrum(*(jnp.where(lost, jnp.nan, part) for part in found))


def _factors(
    layer: AttentionLayer,
    w_value: Float[Array, "G d r_v"],
    w_out: Float[Array, "H r_v d"],
    x: Float[Array, "T d"],
    position: Array,
    queries: Projected,
    keys: Projected,
    values: Float[Array, "H T r_v"],
) -> tuple[Float[Array, "d m"], Float[Array, "m d"]]:
    """Return P_t W_O and M_t N'(x_t) of one position: the Jacobian is I plus their product."""
    _, width, rank = layer.w_query.shape
    scale = rank**-0.5 if layer.scale is None else layer.scale
    own = queries.vectors[:, position]
    logits = scale * jnp.einsum("hr,hsr->hs", own, keys.vectors, precision=lax.Precision.HIGHEST)
    logits, slopes = logit_slopes(logits, layer.cap)
    behind = position - jnp.arange(len(x))
    seen = (behind >= 0) & (behind <= (len(x) if layer.window is None else layer.window))
    weights = jax.nn.softmax(jnp.where(seen[None], logits, -jnp.inf), axis=-1)

    covariance = centred_covariance(
        weights[:, None], values, keys.vectors, None if slopes is None else slopes[:, None]
    )[:, 0]
    by_query = scale * _after(covariance, queries.transforms, position)
    own_weight = weights[:, position][:, None]
    by_logit = own_weight if slopes is None else own_weight * slopes[:, position][:, None]
    mean = _matmul(weights[:, None], values)[:, 0]
    column = scale * by_logit * (values[:, position] - mean)
    row = _after(own[:, None], keys.transforms, position)[:, 0]
    by_key = column[:, :, None] * row[:, None, :]
    w_key, w_value = (
        jnp.swapaxes(layer.for_heads(part, -3), -1, -2) for part in (layer.w_key, w_value)
    )
    change = _matmul(by_query, jnp.swapaxes(layer.w_query, -1, -2)) + _matmul(by_key, w_key)
    rows = (change + own_weight[..., None] * w_value).reshape(-1, width)
    columns = w_out.reshape(-1, width).T
    if layer.norm is not None:
        rows = layer.norm.pulled(x[position], rows)
    if layer.out_norm is not None:
        added = _matmul(columns, mean.reshape(-1))
        added = added if layer.out_bias is None else added + layer.out_bias
        columns = layer.out_norm.pushed(added, columns)
    return columns, rows


def _after(
    rows: Float[Array, "H n r"], transforms: Float[Array, "*heads T r r"] | None, position: Array
) -> Float[Array, "H n r"]:
    """Return rows times the transforms of one position."""
    return rows if transforms is None else _matmul(rows, transforms[..., position, :, :])


def _spectrum(left: Float[Array, "d m"], right: Float[Array, "m d"]) -> BlockSpectrum:
    """Return the spectrum of I + left right, from matrices as small as may be."""
    width, inner = left.shape
    small = identity_less(-_matmul(right, left)) if inner < width else None
    if 2 * inner < width:
        # In an orthonormal basis of what left reaches, and then of what is left of right's rows.
        basis, factor = jnp.linalg.qr(left)
        inside = _matmul(right, basis)
        _, outside = jnp.linalg.qr((right - _matmul(inside, basis.T)).T)
        top = jnp.concatenate(
            [identity_less(-_matmul(factor, inside)), _matmul(factor, outside.T)], axis=-1
        )
        bottom = jnp.eye(inner, 2 * inner, inner, dtype=left.dtype)
        block = jnp.concatenate([top, bottom], axis=-2)
    else:
        block = identity_less(-_matmul(left, right))
    sign, log_abs = jnp.linalg.slogdet(block if small is None else small)
    return BlockSpectrum(sign, log_abs, *extreme_singular_values(block))
