"""The network: a pre-norm GPT stack as pure functions of a dictionary of parameters.

Shapes: B sequences, T positions, d width, H heads, V symbols; the parameters are those that
`priors.sample_transformer` names. Layers are unrolled, not scanned: on a CPU XLA runs the unrolled
stack faster, and compiling a few layers takes seconds either way.
"""

import math
from collections.abc import Mapping
from typing import get_args

import jax
import jax.numpy as jnp
from jax.extend.backend import get_backend
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from probattn.models.coupling import capped_weights
from probattn.models.decoder.config import Precision

Parameters = Mapping[str, Array]

LAYER_PARAMETERS = (
    "attention_norm",
    "attention_in",
    "attention_out",
    "mlp_norm",
    "mlp_in",
    "mlp_out",
)


def embed(parameters: Parameters, tokens: Int[Array, "B T"]) -> Float[Array, "B T d"]:
    """Add token and position embedding: what enters the stack, before any norm.

    Noise and margins are taken here, since a norm hides the scale of its input.
    """
    positions = parameters["position_embedding"][: tokens.shape[-1]]
    return jnp.asarray(parameters["token_embedding"])[tokens] + positions


def logits(
    parameters: Parameters,
    x: Float[Array, "B T d"],
    *,
    heads: int,
    cap: float | None = None,
    precision: Precision = "float32",
    rematerialise: bool = False,
) -> Float[Array, "B T V"]:
    """Compute next-symbol logits from what enters the stack, by the table of the output.

    Args:
        parameters: see the module.
        x: the output of `embed`, perhaps with noise, (B, T, d).
        heads: number of attention heads, a divisor of d.
        cap: what the certificates of all heads stay below, see `capped`; None leaves them as they
            are.
        precision: precision of the matrix products; norms, softmax and logits are float32 (or
            wider) in any case.
        rematerialise: whether the derivative computes each layer anew from its input, of which it
            then keeps nothing else.

    Returns:
        (B, T, V), the logits of the symbol that follows each position.

    Raises:
        ValueError: if the precision is unknown.
    """
    x = hidden(
        parameters, x, heads=heads, cap=cap, precision=precision, rematerialise=rematerialise
    )
    return output_logits(x, output_table(parameters), precision)


def output_table(parameters: Parameters) -> Float[Array, "V d"]:
    """Return the output's matrix: the table of embeddings, or "output_embedding" if it is there.

    Only draws of the guide last_layer have a table of the output's own.
    """
    return parameters.get("output_embedding", parameters["token_embedding"])


def hidden(
    parameters: Parameters,
    x: Float[Array, "B T d"],
    *,
    heads: int,
    cap: float | None = None,
    precision: Precision = "float32",
    rematerialise: bool = False,
) -> Float[Array, "B T d"]:
    """Compute what the output reads: the end of the stack, normalised. Arguments: see `logits`."""
    if precision not in get_args(Precision):
        raise ValueError(
            f"precision is {precision!r}: expected one of {', '.join(get_args(Precision))}"
        )
    parameters = capped(parameters, heads=heads, cap=cap)
    x = _through(parameters, x, heads, precision, rematerialise=rematerialise)
    return _norm(x, parameters["final_norm"])


def output_logits(
    hidden: Float[Array, "B T d"], table: Float[Array, "V d"], precision: Precision = "float32"
) -> Float[Array, "B T V"]:
    """Compute the logits of what the stack gives, by the table of the output."""
    return _product(hidden, jnp.asarray(table).T, precision, result=hidden.dtype)


def rms_normalised(x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """Divide each vector by the root mean square of its entries (Zhang and Sennrich 2019).

    The mean square is increased by 1e-8, so that a vector of zeros has a derivative.
    """
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-8)


def capped(parameters: Parameters, *, heads: int, cap: float | None) -> Parameters:
    """Shrink the query and key matrices of all heads, so that no input folds their attention.

    What a head sees are vectors g * z, with the gain g of the layer's norm and |z|^2 < d. None is
    longer than sqrt(d) max |g|, whatever enters the stack. With this reach
    `coupling.capped_weights` keeps the certificate of every table of such vectors below the cap.

    Args:
        parameters: see the module.
        heads: number of attention heads.
        cap: what the certificates stay below; None returns the parameters as they are.
    """
    if cap is None:
        return parameters
    matrices = jnp.asarray(parameters["attention_in"])
    layers, width = matrices.shape[:2]
    # (layers, d, 2 d) -> (2, layers, H, d, d / H)
    w_query, w_key = (
        matrices[..., : 2 * width]
        .reshape(layers, width, 2, heads, width // heads)
        .transpose(2, 0, 3, 1, 4)
    )
    reach = math.sqrt(width) * jnp.max(jnp.abs(jnp.asarray(parameters["attention_norm"])), axis=-1)

    def of_head(w_query: Array, w_key: Array, reach: Array) -> tuple[Array, Array]:
        return capped_weights(w_query, w_key, reach=reach, cap=cap)

    of_layer = jax.vmap(of_head, in_axes=(0, 0, None))
    found = jax.vmap(of_layer)(w_query, w_key, reach)
    query, key = (part.transpose(0, 2, 1, 3).reshape(layers, width, width) for part in found)
    values = matrices[..., 2 * width :]
    return {**parameters, "attention_in": jnp.concatenate([query, key, values], axis=-1)}


def stream(
    parameters: Parameters,
    x: Float[Array, "B T d"],
    layer: int,
    *,
    heads: int,
    cap: float | None = None,
    precision: Precision = "float32",
) -> Float[Array, "B T d"]:
    """Return what enters a layer, counted from 0, of what enters the stack (B, T, d)."""
    if layer == 0:
        return x
    first = {name: parameters[name][:layer] for name in LAYER_PARAMETERS}
    return _through(capped(first, heads=heads, cap=cap), x, heads, precision)


def attention_inputs(
    parameters: Parameters,
    x: Float[Array, "B T d"],
    layer: int = 0,
    *,
    heads: int,
    cap: float | None = None,
) -> tuple[Float[Array, "B T d"], Float[Array, "H d r"], Float[Array, "H d r"]]:
    """Return the input of a layer's attention, and its heads' query and key matrices.

    Args:
        parameters: see the module.
        x: what enters the layer: of the first one the output of `embed`, perhaps with noise,
            (B, T, d).
        layer: number of the layer, from 0.
        heads: number of attention heads.
        cap: see `capped`.

    Returns:
        The normalised input (B, T, d), w_query and w_key (H, d, d / H).
    """
    width = x.shape[-1]
    names = ("attention_in", "attention_norm")
    own = {name: parameters[name][layer : layer + 1] for name in names}
    matrices = capped(own, heads=heads, cap=cap)["attention_in"][0, :, : 2 * width]
    # (d, 2 d) -> (d, 2, H, d / H) -> (2, H, d, d / H)
    w_query, w_key = matrices.reshape(width, 2, heads, width // heads).transpose(1, 2, 0, 3)
    return _norm(x, own["attention_norm"][0]), w_query, w_key


def apply_layer(
    parameters: Parameters, x: Float[Array, "B T d"], heads: int, precision: Precision
) -> Float[Array, "B T d"]:
    """Add one attention layer and its MLP to the stream; its parameters have no layer axis."""
    sequences, length, width = x.shape
    projected = _product(
        _norm(x, parameters["attention_norm"]), parameters["attention_in"], precision
    )
    # (B, T, 3 d) -> three of (B, T, H, d / H)
    query, key, value = jnp.split(
        projected.reshape(sequences, length, 3 * heads, width // heads), 3, axis=2
    )
    attended = _attend(query, key, value).reshape(sequences, length, width)
    x = x + _product(attended, parameters["attention_out"], precision).astype(x.dtype)
    hidden = _product(_norm(x, parameters["mlp_norm"]), parameters["mlp_in"], precision)
    return x + _product(jax.nn.gelu(hidden), parameters["mlp_out"], precision).astype(x.dtype)


def _through(
    parameters: Parameters,
    x: Float[Array, "B T d"],
    heads: int,
    precision: Precision,
    *,
    rematerialise: bool = False,
) -> Float[Array, "B T d"]:
    """Return what leaves these layers."""
    stacked = [_unstack(parameters[name]) for name in LAYER_PARAMETERS]
    apply = jax.checkpoint(apply_layer, static_argnums=(2, 3)) if rematerialise else apply_layer
    for layer in zip(*stacked, strict=True):
        x = apply(dict(zip(LAYER_PARAMETERS, layer, strict=True)), x, heads, precision)
    return x


def attends_by_cudnn(dtype: DTypeLike, rank: int) -> bool:
    """Tell whether attention of these queries runs as one kernel, which keeps no weights.

    cuDNN has it on NVIDIA GPUs of compute capability 8 or more, for bfloat16 and heads of at most
    128 dimensions, a multiple of 8.
    """
    if dtype != jnp.bfloat16 or rank % 8 or rank > 128:
        return False
    if "cuda" not in get_backend().platform_version:
        return False
    return float(jax.local_devices()[0].compute_capability) >= 8


def _norm(x: Float[Array, "*batch d"], gain: Float[Array, " d"]) -> Float[Array, "*batch d"]:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return gain * centred * jax.lax.rsqrt(variance + 1e-5)


def _attend(
    query: Float[Array, "B T H r"], key: Float[Array, "B T H r"], value: Float[Array, "B T H r"]
) -> Float[Array, "B T H r"]:
    if attends_by_cudnn(query.dtype, query.shape[-1]):
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation="cudnn"
        )
    # By hand: jax.nn.dot_product_attention takes its softmax in float32 even of float64, whose
    # rounding NUTS would feel as noise, and is no faster here.
    length, rank = query.shape[1], query.shape[-1]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("bthr,bshr->bhts", query, key, preferred_element_type=wide)
    causal = jnp.tril(jnp.ones((length, length), dtype=bool))
    weights = jax.nn.softmax(jnp.where(causal, scores / math.sqrt(rank), -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshr->bthr", weights.astype(value.dtype), value)


def _product(
    x: Array, weights: Array, precision: Precision, *, result: jnp.dtype | None = None
) -> Array:
    if precision == "bfloat16":
        x, weights = x.astype(jnp.bfloat16), weights.astype(jnp.bfloat16)
    # As matrices: of batches, XLA's CPU compiler computes what is between two products anew inside
    # the sums of their derivatives, and a training step takes twice as long.
    rows = x.reshape(-1, x.shape[-1])
    if weights.shape[0] > weights.shape[1]:
        # Transposed in memory, so that their derivative is the narrow factor, transposed, times
        # the wide one; with the wide one transposed that product takes 1.7 times as long there.
        narrow_first = jax.lax.optimization_barrier(weights.T)
        product = jax.lax.dot_general(
            rows, narrow_first, (((1,), (1,)), ((), ())), preferred_element_type=result
        )
    else:
        product = jnp.matmul(rows, weights, preferred_element_type=result)
    return product.reshape(*x.shape[:-1], weights.shape[-1])


def _unstack(parameter: Float[Array, "layers ..."]) -> list[Array]:
    # A split transposes to one concatenation; indexing would transpose to a sum of padded arrays.
    return [jnp.squeeze(part, 0) for part in jnp.split(parameter, parameter.shape[0])]
