"""Leave-one-out of latent models, with the embeddings of every sequence integrated out.

Given its own embeddings, which were fitted to it, a sequence is predicted far too well: its
importance weights have no mean that draws could show. Its likelihood given the parameters alone is
what the particle filter estimates, without bias (see `particle_filter`).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from scipy.special import logsumexp

from probattn.inference.comparison.particle_filter import filter_of_draw
from probattn.inference.export.diagnostics import LeaveOneOut, leave_one_out
from probattn.models import LatentEmbeddingsConfig

if TYPE_CHECKING:
    import xarray as xr

DRAWS = 128  # of all chains together, spread evenly over them
REPEATS = 4  # filters with particles of their own, whose differences are the Monte Carlo error


def marginal_leave_one_out(
    draws: Mapping[str, Float[np.ndarray, "chain draw *site"]],
    tokens: Int[np.ndarray, "N T"],
    config: LatentEmbeddingsConfig,
    *,
    seed: int = 0,
) -> LeaveOneOut | None:
    """Leave out each sequence of a latent model by the likelihood of its tokens alone.

    Args:
        draws: values by sample site, of which embeddings are not taken.
        tokens: the sequences that the draws were given.
        config: coupling and size of the process.
        seed: seed of the particles.

    Returns:
        The estimate. None for a "free" coupling, of whose density the filter's process is not; and
        where there are too few draws, see `leave_one_out`.

    Raises:
        FilterError: if a filter has no particle left.
    """
    if config.coupling == "free":
        return None
    repeated = marginal_log_likelihood(draws, tokens, config, seed=seed)
    of_repeats = [leave_one_out(_tree(each)) for each in repeated]
    together = leave_one_out(_tree(logsumexp(repeated, axis=0) - np.log(len(repeated))))
    elpds = [found.elpd_loo for found in of_repeats if found is not None]
    if together is None or len(elpds) < len(repeated):
        return None
    # Of the mean of the elpds. That of the mean likelihood has no larger one.
    error = float(np.std(elpds, ddof=1) / np.sqrt(len(elpds)))
    return together._replace(elpd_loo_filter_error=error)


def marginal_log_likelihood(
    draws: Mapping[str, Float[np.ndarray, "chain draw *site"]],
    tokens: Int[np.ndarray, "N T"],
    config: LatentEmbeddingsConfig,
    *,
    seed: int = 0,
) -> Float[np.ndarray, "repeat chain draw N"]:
    """Estimate the log likelihood of sequences given parameters alone, in nats, `REPEATS` times.

    The estimates of the likelihood are independent and unbiased. There are as many draws of each
    chain as make at most `DRAWS` together. Arguments and errors: see `marginal_leave_one_out`.
    """
    chains, length = draws["emission"].shape[:2]
    chosen = np.linspace(0, length - 1, max(min(length, DRAWS // chains), 1)).round().astype(int)
    shared = {name: value for name, value in draws.items() if not name.startswith("embeddings")}
    filtered = np.tile(tokens, (REPEATS, 1))
    positions = np.arange(tokens.shape[1])
    found = np.zeros((REPEATS, chains, len(chosen), len(tokens)))
    for chain in range(chains):
        for number, draw in enumerate(chosen):
            one = {name: jnp.asarray(value[chain, draw]) for name, value in shared.items()}
            rng_key = jax.random.fold_in(jax.random.key(seed), chain * length + int(draw))
            log_p = filter_of_draw(rng_key, filtered, one, config).log_probabilities
            own = log_p[np.arange(len(filtered))[:, None], positions, filtered].sum(1)
            found[:, chain, number] = own.reshape(REPEATS, len(tokens))
    return found


def _tree(log_likelihood: Float[np.ndarray, "chain draw N"]) -> "xr.DataTree":
    """Return what ArviZ takes, which asks the posterior how far the draws are independent."""
    import xarray as xr

    dataset = xr.Dataset({"tokens": (("chain", "draw", "sequence"), log_likelihood)})
    return xr.DataTree.from_dict({"posterior": dataset, "log_likelihood": dataset})
