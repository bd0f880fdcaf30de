"""Leave-one-out of latent models, with the embeddings of every sequence integrated out.

Given its own embeddings, which were fitted to it, a sequence is predicted far too well: its
importance weights have no mean that draws could show. Its likelihood given the parameters alone is
what the particle filter estimates, without bias (see `particle_filter`).

The importance weights are reciprocals of the likelihood. Those of an unbiased estimate are too
large on average, by its relative variance, so the elpd comes out too low. With R filters together
it is, to first order, by the sum over sequences of the variance of the log likelihood of one
filter, over R. The jackknife (Quenouille 1956, Biometrika 43, 353-360) takes this order off.
"""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from scipy.special import logsumexp

from probattn.inference.comparison.particle_filter import filter_of_draw
from probattn.inference.export.diagnostics import LeaveOneOut, leave_one_out
from probattn.models import LatentEmbeddingsConfig

DRAWS = 128  # of all chains together, spread evenly over them
REPEATS = 4  # filters with particles of their own, whose differences show bias and error


def marginal_leave_one_out(
    draws: Mapping[str, Float[np.ndarray, "chain draw *site"]],
    tokens: Int[np.ndarray, "N T"],
    config: LatentEmbeddingsConfig,
    *,
    seed: int = 0,
) -> LeaveOneOut | None:
    """Leave out each sequence of a latent model by the likelihood of its tokens alone.

    The elpd is corrected by the jackknife over `REPEATS` filters. Its Monte Carlo error joins two
    parts, and is rough, of so few filters. One is the jackknife's standard error. The other is how
    far this correction, by all filters but one, lies from that by single filters, which leaves more
    of the bias of second order. The standard error over sequences and Pareto k are those of all
    filters together.

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
    together = _of_filters(repeated)
    alone = _elpds(repeated[[number]] for number in range(REPEATS))
    others = _elpds(np.delete(repeated, number, axis=0) for number in range(REPEATS))
    if together is None or len(alone) < REPEATS or len(others) < REPEATS:
        return None
    pseudo_values = REPEATS * together.elpd_loo - (REPEATS - 1) * others
    corrected = pseudo_values.mean()
    by_single_filters = (REPEATS * together.elpd_loo - alone.mean()) / (REPEATS - 1)
    spread = pseudo_values.std(ddof=1) / np.sqrt(REPEATS)
    return together._replace(
        elpd_loo=float(corrected),
        elpd_loo_filter_error=float(np.hypot(spread, corrected - by_single_filters)),
    )


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


def _elpds(
    parts: Iterable[Float[np.ndarray, "filter chain draw N"]],
) -> Float[np.ndarray, " parts"]:
    """Return the elpd by each part of the filters, of those that have one."""
    found = map(_of_filters, parts)
    return np.array([each.elpd_loo for each in found if each is not None])


def _of_filters(repeated: Float[np.ndarray, "filter chain draw N"]) -> LeaveOneOut | None:
    """Leave out each sequence by the mean likelihood of filters."""
    import xarray as xr

    mean = logsumexp(repeated, axis=0) - np.log(len(repeated))
    dataset = xr.Dataset({"tokens": (("chain", "draw", "sequence"), mean)})
    return leave_one_out(xr.DataTree.from_dict({"log_likelihood": dataset}))
