"""Guides of a fit: the variational families that approximate the posterior, and draws from them.

Each is one of NumPyro's autoguides over the parameters of the language model alone; the training
text enters only through the loss of a step.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jaxtyping import Array
from numpyro.infer import init_to_value
from numpyro.infer.autoguide import (
    AutoDelta,
    AutoGuide,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoNormal,
)

from probattn.batches import batched_rows
from probattn.corpora import load_corpus
from probattn.inference.checkpoints import CheckpointError
from probattn.inference.config import GuideName, RunConfig
from probattn.inference.laplace import LaplaceError, Text, hessian
from probattn.inference.memory import check_memory
from probattn.inference.progress import progress_bar
from probattn.inference.run_checks import check_same_corpus
from probattn.inference.runs import Run, fitted
from probattn.models.language_model import parameter_shapes, sample_parameters

# Guides whose own parameters say more than their median, and are saved beside it.
OWN_PARAMS = ("mean_field", "low_rank")
LARGEST_LAPLACE = 10_000  # parameters: their Hessian takes 0.8 GB, and its factors as much again
_INIT_SCALE = 0.003  # standard deviation that a fit starts from
# NumPyro's rank, the root of the number of parameters, takes 9 GB for 800,000 of them.
_RANK = 10
_DRAWS, _VALUES = 128, 2**24  # of all parameters, that are made at once at most

Model = Callable[[], Any]


def make_guide(
    name: GuideName,
    parameters: Model,
    start: Mapping[str, Array],
    *,
    hessian_fn: Callable[..., Array] | None = None,
) -> AutoGuide:
    """Make one of NumPyro's autoguides over the parameters of a model.

    Args:
        name: of the guide.
        parameters: a NumPyro model of sample sites alone. The guide's prototype is traced of it,
            which need not compile a network; the guide takes and ignores a minibatch.
        start: values of the sites that the guide is centred at before the first step.
        hessian_fn: of laplace, see AutoLaplaceApproximation.
    """

    def model(*minibatch: Array) -> None:
        parameters()

    init = init_to_value(values=dict(start))
    if name == "map":
        return AutoDelta(model, init_loc_fn=init)
    if name == "laplace":
        return AutoLaplaceApproximation(model, init_loc_fn=init, hessian_fn=hessian_fn)
    if name == "mean_field":
        return AutoNormal(model, init_loc_fn=init, init_scale=_INIT_SCALE)
    return AutoLowRankMultivariateNormal(
        model, init_loc_fn=init, init_scale=_INIT_SCALE, rank=_RANK
    )


def check_guide(config: RunConfig, vocabulary_size: int) -> None:
    """Refuse a model that would not fit into memory, or whose Hessian would not.

    Raises:
        ValueError: if parameters and Adam's moments are larger than the memory, or the guide is
            laplace and there are more than `LARGEST_LAPLACE` parameters.
    """
    shapes = parameter_shapes(vocabulary_size, config.model, config.objective)
    size = sum(math.prod(leaf.shape) for leaf in shapes.values())  # leaf.size is of 64 bits
    check_memory("parameters and optimizer state of [model]", 3 * 4 * size)
    if config.fit.guide == "laplace" and size > LARGEST_LAPLACE:
        raise ValueError(
            f"fit.guide is laplace and the model has {size:,} parameters: expected at most "
            f"{LARGEST_LAPLACE:,}, since their Hessian is dense; give a smaller model, or "
            "mean_field or low_rank"
        )


def guide_draws(
    run: Run, *, draws: int = 1000, seed: int = 0, progress: bool = False
) -> dict[str, np.ndarray]:
    """Draw parameters from the guide that a run was fitted with, as one chain.

    The guide laplace takes the Hessian of the objective over the whole training text here, in
    float64, which is as much work as a step on all of that text for every parameter.

    Args:
        run: from `load_run` or `fit`, of a guide other than map.
        draws: how many. More of them begin with the same ones.
        seed: of the draws.
        progress: show a progress bar.

    Returns:
        By site name, an array (1, draws, *shape of the site): the axes chain and draw of ArviZ.

    Raises:
        ValueError: if the run is a MAP run, which has no draws, or none of a fit, it has no
            parameters yet or they are damaged, draws < 1, or, for laplace, its corpus is gone.
        LaplaceError: if the guide is laplace and the run's parameters are no mode.
    """
    name = fitted(run).config.fit.guide
    if name == "map":
        raise ValueError(
            f"{run.path}: is a MAP run, a point estimate without draws; probattn fit --guide "
            "mean_field (or low_rank, laplace) and probattn sample make runs that have draws"
        )
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws: got {draws!r}, expected an integer >= 1")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: got {seed}, expected an integer from 0 to 2^32 - 1")
    point = run.parameters
    if name == "laplace":
        # The smallest eigenvalues, of the directions that are known least, would drown in the
        # rounding of single precision.
        with jax.enable_x64(True):
            drawn = _drawn(*_laplace(run, progress), point, draws, seed, progress)
    else:
        drawn = _drawn(*_variational(run), point, draws, seed, progress)
    return {site: drawn[site][None] for site in point}


Sampler = Callable[[Array, Any], dict[str, Array]]


def _variational(run: Run) -> tuple[Sampler, dict[str, Array]]:
    """How the run's guide samples, and the arguments that it does so with."""
    guide = make_guide(run.config.fit.guide, _parameters(run), run.parameters)
    shapes = jax.eval_shape(partial(_init_params, guide))
    step, params = run.best.load_with_step(shapes, part="guide")
    if step != run.step:
        raise CheckpointError(
            f"{run.path}: the fit has gone on to step {step} since the parameters of step "
            f"{run.step} were read; open the run again"
        )
    median = guide.median(params)
    # The vector of low_rank has no names in it: of another order it would be of the same shape.
    if not all(np.array_equal(median[name], value) for name, value in run.parameters.items()):
        raise CheckpointError(
            f"{run.path}: the guide of step {run.step} is not centred at the run's parameters: it "
            "is of another run, or of another version of NumPyro; start again with --overwrite"
        )
    return guide.sample_posterior, params


def _laplace(run: Run, progress: bool) -> tuple[Sampler, Any]:
    corpus = load_corpus(run.config.data)
    check_same_corpus(run, corpus)
    text = Text(run.config, run.vocabulary.encode(corpus.train), run.vocabulary.size)

    def unpack(z: Array) -> dict[str, Array]:
        return guide.median({"auto_loc": z})

    start = {name: jnp.asarray(value, jnp.float64) for name, value in run.parameters.items()}
    guide = make_guide(
        "laplace",
        _parameters(run),
        start,
        hessian_fn=partial(hessian, text=text, unpack=unpack, progress=progress),
    )
    params = jax.jit(partial(_init_params, guide))()
    try:
        posterior = guide.get_posterior(params)
    except LaplaceError as error:
        raise LaplaceError(
            f"{run.path}: the parameters of step {run.step} are no mode: {error}; fit it "
            "longer, take a smaller model, or --guide mean_field or low_rank"
        ) from None

    # What its sample_posterior does, which would take the Hessian again for every batch.
    def sample(rng_key: Array, posterior: Any) -> dict[str, Array]:
        return unpack(posterior.sample(rng_key))

    return sample, posterior


def _drawn(
    sample: Sampler,
    arguments: Any,
    point: Mapping[str, Array],
    draws: int,
    seed: int,
    progress: bool,
) -> dict[str, np.ndarray]:
    result = {name: np.empty((draws, *leaf.shape), leaf.dtype) for name, leaf in point.items()}
    # One size for any number of draws is one compilation.
    size = max(1, min(_DRAWS, _VALUES // sum(leaf.size for leaf in point.values())))

    @jax.jit
    def batch(rng_key: Array, numbers: Array, arguments: Any) -> dict[str, Array]:
        # A key for each draw, so that a draw does not depend on how many are made at once.
        return jax.vmap(lambda n: sample(jax.random.fold_in(rng_key, n), arguments))(numbers)

    with progress_bar("draws", total=draws, unit="draw", visible=progress) as bar:
        for numbers in batched_rows(draws, size):
            for name, values in batch(jax.random.key(seed), numbers, arguments).items():
                result[name][numbers] = values
            bar.update(len(np.unique(numbers)))
    return result


def _parameters(run: Run) -> Model:
    return partial(sample_parameters, run.vocabulary.size, run.config.model, run.config.objective)


def _init_params(guide: AutoGuide) -> dict[str, Array]:
    """The guide's own parameters before the first step; sets its prototype up."""
    trace = numpyro.handlers.trace(numpyro.handlers.seed(guide, rng_seed=0)).get_trace()
    return {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
