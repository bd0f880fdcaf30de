"""Published decoders that are fine-tuned: priors centred at their weights, and low-rank adapters.

The prior of a tensor is Normal(w0, s RMS(w0)), w0 being its published value (L2-SP: Li,
Grandvalet and Davoine 2018, arXiv:1802.01483). An adapter adds c U V to a matrix (LoRA: Hu et al.
2021, arXiv:2106.09685), and the priors of its factors are such that an entry of what it adds has
the same prior standard deviation, s RMS(w0). Its MAP prefers low rank: docs/mathematics.md, 11.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int

from probattn.arguments import is_positive
from probattn.blocks.promotion import default_promotion
from probattn.log_determinants import relaxed_barrier
from probattn.models.checks import check_integers, check_symbols
from probattn.models.decoder.attention import attention_layer
from probattn.models.decoder.config import DecoderConfig
from probattn.models.decoder.shapes import leaves, parameter_shapes, with_leaf
from probattn.models.networks import DecoderNetwork, Parameters
from probattn.models.objective import ObjectiveConfig
from probattn.stages.stage import AttentionStage

Trainable = Literal["all", "first_attention", "adapters"]

_FIRST = ("attention_norm", "query", "key", "value", "out", "query_norm", "key_norm")
_INPUTS = {"out": 2}  # axes of a matrix that its input has, where they are not one


@dataclass(frozen=True)
class TuningConfig:
    r"""What of a published decoder moves, and how far its priors let it.

    Attributes:
        trainable: `all` parameters; `first_attention`, those of the first layer's attention and
            the norms in it; or `adapters` of low rank, which are added to matrices that stay.
        adapter_rank: rank k of the adapters.
        adapter_scale: a > 0 of the adapters (a / k) U V. It changes how fast an optimizer moves
            them, and not the prior of what they add.
        adapter_matrices: which matrices have adapters: a regular expression that is all of a
            projection's name, such as `query|value`, or of a parameter's, such as
            `layers\.[0-3]\.up\.weights`.
        prior_scale: s > 0, standard deviation of the priors in units of the root mean square of
            each tensor; of a tensor of zeros, in its own unit.
    """

    trainable: Trainable = "all"
    adapter_rank: int = 8
    adapter_scale: float = 16.0
    adapter_matrices: str = "query|value"
    prior_scale: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what moves nothing, or has no prior."""
        if self.trainable not in get_args(Trainable):
            raise ValueError(
                f"fit.trainable is {self.trainable!r}: expected one of "
                f"{', '.join(get_args(Trainable))}"
            )
        check_integers(self, "fit", adapter_rank=1)
        scales = {"fit.adapter_scale": self.adapter_scale, "prior.scale": self.prior_scale}
        for name, value in scales.items():
            if not is_positive(value):
                raise ValueError(f"{name} is {value!r}: expected a finite number > 0")
        try:
            re.compile(self.adapter_matrices)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"fit.adapter_matrices is {self.adapter_matrices!r}: expected a regular expression "
                f"({error})"
            ) from None


def moving_leaves(config: DecoderConfig, tuning: TuningConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters that move, or have an adapter, by name.

    Raises:
        ValueError: if no matrix of the decoder has the name that adapters are for.
    """
    shapes = dict(leaves(parameter_shapes(config)))
    if tuning.trainable == "all":
        return shapes
    if tuning.trainable == "first_attention":
        return {name: shape for name, shape in shapes.items() if _in_first_attention(name)}
    matrices = [name for name in shapes if name.startswith("layers.") and name.endswith(".weights")]
    found = {
        name: shapes[name]
        for name in matrices
        if any(re.fullmatch(tuning.adapter_matrices, each) for each in (name, _projection(name)))
    }
    if not found:
        known = ", ".join(dict.fromkeys(map(_projection, matrices)))
        raise ValueError(
            f"fit.adapter_matrices is {tuning.adapter_matrices!r}, the name of no matrix: expected "
            f"some of {known}, or of the parameters, such as {matrices[0]}"
        )
    return found


def tuned_numbers(config: DecoderConfig, tuning: TuningConfig) -> int:
    """Count the numbers that move."""
    shapes = moving_leaves(config, tuning)
    if tuning.trainable != "adapters":
        return sum(map(math.prod, shapes.values()))
    factors = (_factor_shapes(name, shape, tuning) for name, shape in shapes.items())
    return sum(math.prod(down) + math.prod(up) for down, up in factors)


def sample_changes(
    start: Parameters, config: DecoderConfig, tuning: TuningConfig
) -> dict[str, Array]:
    """Sample the sites of a tuned decoder: all that a guide has to match.

    A parameter that moves is a site of its own name. An adapter of NAME, of m inputs and n
    outputs, has the sites NAME.down (m, k) and NAME.up (k, n).

    Args:
        start: published parameters, a tree in the layout of `decoder.shapes`.
        config: the decoder.
        tuning: what moves.
    """
    found = dict(leaves(start))
    sites: dict[str, Array] = {}
    for name in moving_leaves(config, tuning):
        centre = _wide(found[name])
        scale = tuning.prior_scale * _size(centre)
        if tuning.trainable != "adapters":
            prior = dist.Normal(centre, scale).to_event(centre.ndim)
            sites[name] = numpyro.sample(name, prior)
            continue
        (down, up), rank = _factor_shapes(name, centre.shape, tuning), tuning.adapter_rank
        # An entry of U V is a sum of k products: its variance is that of U times that of V times k.
        widths = down[0] ** -0.5, scale * math.sqrt(down[0] * rank) / tuning.adapter_scale
        for factor, shape, width in (("down", down, widths[0]), ("up", up, widths[1])):
            prior = dist.Normal(jnp.zeros((), centre.dtype), jnp.asarray(width, centre.dtype))
            site = f"{name}.{factor}"
            sites[site] = numpyro.sample(site, prior.expand(shape).to_event(2))
    return sites


def changes_at_start(
    rng_key: Array, start: Parameters, config: DecoderConfig, tuning: TuningConfig
) -> dict[str, Array]:
    """Return values of the sites at which the tuned decoder is the published one.

    Of an adapter the first factor is drawn from its prior, and the second is zero (Hu et al.).

    Args:
        rng_key: key of the draws.
        start: published parameters.
        config: the decoder.
        tuning: what moves.
    """
    found, sites = dict(leaves(start)), {}
    for number, name in enumerate(moving_leaves(config, tuning)):
        centre = _wide(found[name])
        if tuning.trainable != "adapters":
            sites[name] = centre
            continue
        down, up = _factor_shapes(name, centre.shape, tuning)
        draw = jax.random.normal(jax.random.fold_in(rng_key, number), down, centre.dtype)
        sites[f"{name}.down"] = draw * down[0] ** -0.5
        sites[f"{name}.up"] = jnp.zeros(up, centre.dtype)
    return sites


def tuned_parameters(
    start: Parameters, sites: Mapping[str, Array], config: DecoderConfig, tuning: TuningConfig
) -> dict[str, Any]:
    """Return the parameters of the tuned decoder, adapters worked into their matrices.

    Args:
        start: published parameters; what does not move is theirs, and is not copied.
        sites: values of the sites.
        config: the decoder.
        tuning: what moves.
    """
    tree, found = dict(start), dict(leaves(start))
    for name in moving_leaves(config, tuning):
        if tuning.trainable != "adapters":
            tree = with_leaf(tree, name, sites[name])
            continue
        centre = _wide(found[name])
        product = jnp.matmul(
            sites[f"{name}.down"], sites[f"{name}.up"], precision=jax.lax.Precision.HIGHEST
        )
        factor = tuning.adapter_scale / tuning.adapter_rank
        tree = with_leaf(tree, name, centre + factor * product.reshape(centre.shape))
    return tree


def first_stage(
    parameters: Parameters, x: Float[Array, "B T d"], network: DecoderNetwork
) -> AttentionStage:
    """Return the heads of the first layer as they are in the network: the axes are (B, H, P+T).

    Args:
        parameters: those of the decoder.
        x: what enters the stack behind the P tokens of the network's prefix.
        network: the decoder.
    """
    read = network.read_with_prefix(parameters, x)
    return attention_layer(parameters["layers"]["0"], network.config, 0).stage(read)


@default_promotion()
def tuned_decoder(
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"] | None = None,
    *,
    start: Parameters,
    network: DecoderNetwork,
    tuning: TuningConfig | None = None,
    objective: ObjectiveConfig | None = None,
    num_sequences: int | None = None,
    rematerialise: bool = False,
    perturb: Callable[[Float[Array, "B T d"]], Float[Array, "B T d"]] | None = None,
) -> None:
    """Model token sequences by a published decoder that moves, in NumPyro.

    Sample sites: what moves (see `sample_changes`), then "tokens" with one log likelihood per
    sequence. Factor site of objective "margin": "attention_barrier", minus the weighted relaxed
    barrier of each sequence on the heads of the first layer, averaged over them. They are those of
    the network, with rotary positions, biases, norms, caps and windows: see `AttentionLayer.stage`.
    Plate: "sequences".

    Args:
        inputs: token ids (B, T), T <= network.block.
        targets: the token that follows each input, (B, T); None samples them.
        start: published parameters, a tree in the layout of `decoder.shapes`.
        network: the decoder.
        tuning: what moves, and its priors; by default all, with the defaults of `TuningConfig`.
        objective: "ce" or "margin" with attention "first_layer"; by default "ce".
        num_sequences: sequences in the whole training set, of which the B given are a random
            minibatch; by default B. See `language_model`.
        rematerialise: whether the derivative computes each layer anew from its input.
        perturb: function from the embeddings to the network's input, such as noise to add.

    Raises:
        ValueError: if inputs are not (B, T) with T <= network.block, targets differ in shape, an
            id is no token's, num_sequences is no integer >= B, or the objective is another one.
    """
    tuning = TuningConfig() if tuning is None else tuning
    objective = ObjectiveConfig("ce") if objective is None else objective
    check_tuned_objective(objective)
    _check(inputs, targets, num_sequences, network)
    config, sequences = network.config, inputs.shape[0]
    sites = sample_changes(start, config, tuning)
    parameters = tuned_parameters(start, sites, config, tuning)
    total = sequences if num_sequences is None else num_sequences
    with numpyro.plate("sequences", total, subsample_size=sequences):
        x = network.embed(parameters, inputs)
        if objective.has_barrier:
            barrier = _barrier(first_stage(parameters, x, network), objective)
            numpyro.factor("attention_barrier", -objective.weights[0] * barrier)
        if perturb is not None:
            x = perturb(x)
        tokens = network.tokens(parameters, x, rematerialise=rematerialise)
        numpyro.sample("tokens", tokens, obs=targets)


def check_tuned_objective(objective: ObjectiveConfig) -> None:
    """Refuse an objective that is not one of published decoders.

    Raises:
        ValueError: if it is full or latent, weighs a residual, or puts its barrier on a stage
            beside the network.
    """
    if objective.name not in ("ce", "margin") or objective.weights[1]:
        raise ValueError(
            f"objective.name is {objective.name} with a residual weight of "
            f"{objective.weights[1]:g}, of a published model: expected ce, or margin without a "
            "residual"
        )
    if objective.has_barrier and objective.attention != "first_layer":
        raise ValueError(
            f"objective.attention is {objective.attention} of a published model: expected "
            "first_layer, the heads that its network has"
        )


def _barrier(stage: AttentionStage, objective: ObjectiveConfig) -> Float[Array, " B"]:
    """Return the relaxed barrier, summed over positions and averaged over heads."""
    if objective.one_sided:
        barrier = jnp.maximum(relaxed_barrier(stage, delta=objective.delta), 0).sum(-1)
    else:
        barrier = relaxed_barrier(stage, delta=objective.delta, summed=True)
    return barrier.mean(-1)


def _check(
    inputs: Array, targets: Array | None, num_sequences: int | None, network: DecoderNetwork
) -> None:
    if inputs.ndim != 2 or inputs.shape[0] < 1 or not 1 <= inputs.shape[1] <= network.block:
        raise ValueError(
            f"inputs have shape {inputs.shape}: expected (B, T) with B >= 1 and 1 <= T <= block = "
            f"{network.block}"
        )
    if targets is not None and targets.shape != inputs.shape:
        raise ValueError(
            f"targets have shape {targets.shape}: expected that of inputs, {inputs.shape}"
        )
    if num_sequences is not None and not (
        isinstance(num_sequences, int | np.integer) and num_sequences >= len(inputs)
    ):
        raise ValueError(
            f"num_sequences is {num_sequences!r}: expected an integer, at least the {len(inputs)} "
            "of the minibatch"
        )
    if targets is not None:  # the inputs are checked where they are embedded
        check_symbols("targets", targets, network.config.vocabulary)


def _in_first_attention(name: str) -> bool:
    return name.startswith("layers.0.") and name.split(".")[2] in (*_FIRST, "attention_post_norm")


def _projection(name: str) -> str:
    return name.split(".")[-2]


def _factor_shapes(
    name: str, shape: tuple[int, ...], tuning: TuningConfig
) -> tuple[tuple[int, int], tuple[int, int]]:
    inputs = _INPUTS.get(_projection(name), 1)
    rows, columns = math.prod(shape[:inputs]), math.prod(shape[inputs:])
    return (rows, tuning.adapter_rank), (tuning.adapter_rank, columns)


def _size(centre: Float[Array, "..."]) -> Float[Array, ""]:
    """Return the root mean square, 1 of zeros; a mean of means, so that little is rounded."""
    square = centre**2
    while square.ndim:
        square = jnp.mean(square, axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 1)


def _wide(leaf: Any) -> Float[Array, "..."]:
    """Return a parameter in JAX's own precision at the least, in which it can move a little."""
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.result_type(float)))
