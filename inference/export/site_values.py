"""What a model says of each draw: deterministic sites, log likelihood and predictions."""

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.handlers import seed, substitute, trace

from probattn.inference.export.margin_stages import observed_sites, with_margins
from probattn.inference.runtime.blas_threads import one_blas_thread
from probattn.inference.sampling.result import PosteriorResult
from probattn.text.batches import batched_rows

# Most draws in one call, and most memory that it may take beside them: margins alone take
# (draws, N, T, d, 2 r) numbers.
_DRAWS_AT_ONCE, BYTES_AT_ONCE = 16, 2**30


class SiteValues(NamedTuple):
    """What the model says of draws, by site name, each with the draws as the leading axis.

    Attributes:
        deterministic: values of deterministic sites.
        log_likelihood: log likelihoods of observed sites, in nats, in the shape of their batch.
        predictive: draws in place of what was observed, given the rest.
    """

    deterministic: dict[str, Any]
    log_likelihood: dict[str, Any]
    predictive: dict[str, Any]


def site_values(
    result: PosteriorResult,
    *,
    log_likelihood: bool = False,
    predictive: bool = False,
    rng_key: Array | None = None,
) -> Iterator[tuple[slice, SiteValues]]:
    """Run the model on all draws, some at a time, so that memory stays bounded.

    Factor sites are no likelihood and are left out. Margins of attention processes are among the
    deterministic sites, see `with_margins`.

    Args:
        result: the draws and their model.
        log_likelihood: compute log likelihoods of observed sites.
        predictive: draw from observed sites.
        rng_key: random key of these draws.

    Yields:
        Rows of the draws, chain after chain, and their values.
    """
    rng_key = jax.random.key(0) if rng_key is None else rng_key
    chains, draws = result.shape
    rows = {name: value.reshape(-1, *value.shape[2:]) for name, value in result.draws.items()}

    def of_one(draw: dict[str, Array], rng_key: Array) -> SiteValues:
        model_key, rng_key = jax.random.split(rng_key)
        model = seed(substitute(with_margins(result.model), draw), model_key)
        sites = trace(model).get_trace(*result.model_args, **result.model_kwargs)
        observed = observed_sites(sites)
        keys = dict(zip(observed, jax.random.split(rng_key, len(observed) + 1), strict=False))
        return SiteValues(
            {n: site["value"] for n, site in sites.items() if site["type"] == "deterministic"},
            {n: site["fn"].log_prob(site["value"]) for n, site in observed.items()}
            if log_likelihood
            else {},
            {n: site["fn"].sample(keys[n]) for n, site in observed.items()} if predictive else {},
        )

    keys = jax.random.split(rng_key, chains * draws)
    yield from map_rows(of_one, rows, keys, precision=result.precision)


def map_rows(of_one: Callable, *rows: Any, precision: str) -> Iterator[tuple[slice, Any]]:
    """Call a function for every row, with as many rows at once as fit into memory.

    Args:
        of_one: function of one row of each tree.
        rows: trees of arrays with a common leading axis.
        precision: "float64" to compile it with 64-bit numbers.

    Yields:
        Rows, and the values of the function, NumPy arrays with the rows as the leading axis.
    """
    total = len(jax.tree.leaves(rows)[0])
    most = max(min(_DRAWS_AT_ONCE, total), 1)
    with jax.enable_x64(precision == "float64"):
        count, of_batch = _compiled(jax.jit(jax.vmap(of_one)), rows, most)
        for picked in batched_rows(total, count):
            batch = slice(int(picked[0]), int(picked[-1]) + 1)
            with one_blas_thread():
                values = of_batch(*jax.tree.map(operator.itemgetter(picked), rows))
                values = _without_filling(values, batch)
            yield batch, values


def _compiled(of_batch: Any, rows: tuple, count: int) -> tuple[int, Callable]:
    """Compile the function for a batch, of fewer rows where they take much memory."""
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), _dtype(leaf)), rows
    )
    compiled = of_batch.lower(*shapes).compile()
    size = compiled.memory_analysis().temp_size_in_bytes
    if size <= BYTES_AT_ONCE or count == 1:
        return count, compiled
    return _compiled(of_batch, rows, max(min(count - 1, count * BYTES_AT_ONCE // size), 1))


def _dtype(leaf: Any) -> Any:
    """Return the array's dtype in a compiled program; random keys keep theirs."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return leaf.dtype
    return jax.dtypes.canonicalize_dtype(leaf.dtype)


def _without_filling(values: Any, batch: slice) -> Any:
    """Return arrays of a batch without the rows that `batched_rows` added to fill it."""
    count = batch.stop - batch.start
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], values)
