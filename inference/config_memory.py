"""How much memory a run needs at the least: the one estimate for all commands.

It counts the arrays that there must be at once, and nothing that depends on the compiler. So what
it refuses cannot be held, and not all that it lets pass can.
"""

import math

import jax
import jax.numpy as jnp

from probattn.inference.config import FitConfig, RunConfig
from probattn.inference.config_sampling import SampleConfig, SampleRunConfig
from probattn.inference.config_tuning import TuneConfig
from probattn.inference.runtime.memory import check_memory, host_memory
from probattn.models import LanguageModelConfig, LatentEmbeddingsConfig, ObjectiveConfig
from probattn.models.language import parameter_shapes
from probattn.models.networks import DecoderNetwork
from probattn.models.tied_tokens import LARGEST
from probattn.models.transformer import attends_by_cudnn
from probattn.models.tuned import tuned_numbers

_GUIDE_COPIES = {
    "map": 1,
    "laplace": 1,
    "last_layer": 1,
    "mean_field": 2,
    "low_rank": 12,
    "ivon": 1,
}
"""Numbers of each guide by parameter: low_rank has a location, a scale and ten factors.

The location, scale and momentum of ivon are as many as Adam keeps of one number.
"""
_ADAM = 3  # a number and its two moments
_NUTS = 8  # vectors of a chain: both ends of a tree and its proposal, and the mass matrix
_ROWS = 64  # least positions of a sequence whose r x r blocks are made at once


def check_size(config: RunConfig | SampleRunConfig, vocabulary_size: int) -> None:
    """Refuse a run that is larger than the memory, before anything of it is made.

    Args:
        config: configuration of a fit or a posterior.
        vocabulary_size: number of symbols.

    Raises:
        ValueError: if it is: the message says which part, and how large it is.
    """
    memory = _memory()
    if isinstance(config, RunConfig):
        _check_fit(config, config.fit, vocabulary_size, memory)
    elif config.latent is not None:
        numbers = _latent_numbers(config.latent, vocabulary_size)
        _check_chains("[latent]", config.sample, numbers, memory)
    else:
        assert config.model is not None  # SampleRunConfig has one or the other
        assert config.objective is not None
        numbers = _parameters(config.model, config.objective, vocabulary_size)
        _check_chains("[model]", config.sample, numbers, memory)
        sample = config.sample
        together = sample.batch if sample.is_stochastic else sample.sequences
        each = _step(config.model, config.objective, together)
        size = config.sample.chains * each * _bytes(config.sample)
        check_memory("a gradient of every chain of [model]", size, memory)


def check_tuned_size(config: TuneConfig, network: DecoderNetwork, stored: int) -> int:
    """Refuse a fit of a published model that is larger than the memory, and tell what it takes.

    Args:
        config: configuration of the fit.
        network: the decoder.
        stored: bytes of the published parameters.

    Returns:
        Bytes that it takes at the least: the published parameters, those that move with their
        gradient and optimizer state, and the activations of a part of a minibatch.

    Raises:
        ValueError: if there is less memory: the message says which part, and how large it is.
    """
    memory, decoder, fit = _memory(), network.config, config.fit
    moving = tuned_numbers(decoder, config.tuning)
    copies = _ADAM * _GUIDE_COPIES[fit.guide] + 1
    size = stored + 4 * copies * moving
    check_memory("parameters and optimizer state of the published model", size, memory)
    kept = 1 if fit.rematerialise else decoder.layers
    of_layer = 8 * network.block * decoder.width + decoder.heads * network.block**2
    numbers = kept * of_layer + (decoder.layers - kept) * network.block * decoder.width
    logits = min(LARGEST, network.block * decoder.vocabulary)
    step = 4 * (fit.batch // fit.gradient_accumulation * numbers + logits)
    check_memory("the published model and a step of fit.batch", size + step, memory)
    return size + step


def check_stage(*, width: int, rank: int, block: int) -> None:
    """Refuse a separate attention stage that is larger than the memory.

    Args:
        width: d.
        rank: r.
        block: positions of a sequence.

    Raises:
        ValueError: if it is.
    """
    numbers = _ADAM * 2 * width * rank + _blocks(block, rank)
    check_memory("the attention stage of model.prior_rank", 4 * numbers, _memory())


def _check_fit(config: RunConfig, fit: FitConfig, vocabulary_size: int, memory: int) -> None:
    numbers = _parameters(config.model, config.objective, vocabulary_size)
    size = 4 * _ADAM * _GUIDE_COPIES[fit.guide] * numbers
    check_memory("parameters and optimizer state of [model]", size, memory)
    # Of several processes each takes its share of a minibatch, one sequence at the least.
    sequences = 1 if jax.distributed.is_initialized() else fit.batch
    size = 4 * _step(config.model, config.objective, sequences, fit)
    check_memory("a step of [model] and fit.batch", size, memory)


def _check_chains(table: str, sample: SampleConfig, numbers: int, memory: int) -> None:
    """Refuse chains whose states and draws are too large."""
    vectors = _NUTS + 2 * sample.max_tree_depth + sample.draws
    size = sample.chains * numbers * vectors * _bytes(sample)
    check_memory(f"chains of {table}", size, memory)


def _parameters(
    config: LanguageModelConfig, objective: ObjectiveConfig, vocabulary_size: int
) -> int:
    shapes = parameter_shapes(vocabulary_size, config, objective)
    return sum(math.prod(leaf.shape) for leaf in shapes.values())  # leaf.size is of 64 bits


def _latent_numbers(config: LatentEmbeddingsConfig, vocabulary_size: int) -> int:
    """Count embeddings, a coupling and the emission of symbols."""
    embeddings = config.sequences * config.length
    return config.width * (embeddings + config.width + vocabulary_size)


def _step(
    config: LanguageModelConfig,
    objective: ObjectiveConfig,
    sequences: int,
    fit: FitConfig | None = None,
) -> int:
    """Count what the derivative of so many sequences keeps, and their determinants need."""
    # Of layers that are computed anew it keeps their inputs, and one layer at a time.
    kept = 1 if fit is not None and fit.rematerialise else config.layers
    weights = kept * config.heads * config.block**2
    rank = config.width // config.heads
    if fit is not None and attends_by_cudnn(jnp.dtype(fit.precision), rank):
        weights = 0
    of_layer = 8 * config.block * config.width  # queries to the MLP
    inputs = (config.layers - kept) * config.block * config.width
    numbers = sequences * (weights + kept * of_layer + inputs)
    if objective.name == "ce":
        return numbers
    first_layer = objective.attention == "first_layer"
    return numbers + _blocks(config.block, rank if first_layer else config.prior_rank)


def _blocks(block: int, rank: int) -> int:
    """Count the numbers of the r x r blocks of one sequence that are made at once."""
    return min(block, _ROWS) * rank**2


def _bytes(sample: SampleConfig) -> int:
    return 8 if sample.precision == "float64" else 4


def _memory() -> int:
    """Return the bytes of memory where arrays lie: of the host, or of its accelerators."""
    if jax.default_backend() == "cpu":
        return host_memory()
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return sum(each.get("bytes_limit", 0) for each in stats) or host_memory()
