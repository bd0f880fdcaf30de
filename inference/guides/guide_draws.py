"""Draws from the guide of a fitted run."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from probattn.blocks.promotion import default_promotion
from probattn.inference.guides.guides import Model, init_params, make_guide
from probattn.inference.guides.laplace import LaplaceError, Text, hessian
from probattn.inference.guides.last_layer import LastLayer, draw_table, last_layer
from probattn.inference.runs.checkpoints import CheckpointError
from probattn.inference.runs.checks import check_same_corpus
from probattn.inference.runs.run import Run, require_fit
from probattn.inference.runtime.one_thread import one_thread_at_a_time
from probattn.inference.runtime.progress import progress_bar
from probattn.models.language import sample_parameters
from probattn.text.batches import batched_rows
from probattn.text.corpora import load_corpus
from probattn.text.tokens import corpus_tokens

DRAWS, VALUES = 128, 2**24  # most draws, and most numbers, that are made at once


@default_promotion()
@one_thread_at_a_time
def guide_draws(
    run: Run, *, draws: int = 1000, seed: int = 0, progress: bool = False
) -> dict[str, np.ndarray]:
    """Draw parameters from a run's guide, as one chain.

    The guide laplace takes the Hessian of the objective over the whole training text here, in
    float64, which is as much work as a step on all of that text for every parameter. So does
    last_layer for the output's table alone, see `last_layer`.

    Args:
        run: a run from `load_run` or `fit`, with a guide other than map.
        draws: how many. More of them begin with the same ones.
        seed: seed of the draws.
        progress: show a progress bar.

    Returns:
        By site name, an array (1, draws, *shape of the site): the axes chain and draw of ArviZ. Of
        last_layer they are the point that was fitted, the same in all draws and not to be written
        to, and the drawn "output_embedding", of `language_model` with own_output.

    Raises:
        ValueError: if the run is a MAP run, which has no draws, or none of a fit, it has no
            parameters yet or they are damaged, draws < 1, or, for laplace and last_layer, its
            corpus is gone.
        LaplaceError: if the guide is laplace and the run's parameters are no mode.
    """
    name = require_fit(run).config.fit.guide
    if name == "map":
        raise ValueError(
            f"{run.path}: is a MAP run, a point estimate without draws; probattn fit --guide "
            "mean_field (or another guide) and probattn sample make runs that have draws"
        )
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws: got {draws!r}, expected an integer >= 1")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: got {seed}, expected an integer from 0 to 2^32 - 1")
    point = run.parameters
    if name == "last_layer":
        table = {"output_embedding": point["token_embedding"]}
        with jax.enable_x64(True):
            drawn = _drawn(draw_table, _last_layer(run, progress), table, draws, seed, progress)
        for site, value in point.items():
            drawn[site] = np.broadcast_to(np.asarray(value), (draws, *value.shape))
    elif name == "laplace":
        # The smallest eigenvalues, of the directions that are known least, would drown in the
        # rounding of single precision.
        with jax.enable_x64(True):
            drawn = _drawn(*_laplace(run, progress), point, draws, seed, progress)
    else:
        drawn = _drawn(*_variational(run), point, draws, seed, progress)
    return {site: values[None] for site, values in drawn.items()}


Sampler = Callable[[Array, Any], dict[str, Array]]


def _variational(run: Run) -> tuple[Sampler, dict[str, Array]]:
    """Return the sampler of the run's guide, and its arguments."""
    guide = make_guide(run.config.fit.guide, _parameters(run), run.parameters)
    shapes = jax.eval_shape(partial(init_params, guide))
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
    text = Text(run.config, _training_tokens(run), run.vocabulary.size)

    def unpack(z: Array) -> dict[str, Array]:
        return guide.median({"auto_loc": z})

    start = {name: jnp.asarray(value, jnp.float64) for name, value in run.parameters.items()}
    guide = make_guide(
        "laplace",
        _parameters(run),
        start,
        hessian_fn=partial(hessian, text=text, unpack=unpack, progress=progress),
    )
    params = jax.jit(partial(init_params, guide))()
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


def _last_layer(run: Run, progress: bool) -> LastLayer:
    start = {name: jnp.asarray(value, jnp.float64) for name, value in run.parameters.items()}
    return last_layer(run.config.model, start, _training_tokens(run), progress=progress)


def _training_tokens(run: Run) -> np.ndarray:
    corpus = load_corpus(run.config.data)
    check_same_corpus(run, corpus)
    tokens, _ = corpus_tokens(corpus, run.vocabulary)
    return tokens


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
    size = max(1, min(DRAWS, VALUES // sum(leaf.size for leaf in point.values())))

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
