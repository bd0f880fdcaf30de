"""The post-hoc attention prior: (W_Q, W_K, sigma) fitted to a run's frozen embeddings.

A run of objective ce trains no attention stage, and one of another objective trains it for its
own weights. To compare runs, each gets the same treatment: the stage that maximises the exact log
density of its embeddings under a prior of W_Q and W_K, fitted once and kept in the run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from probattn import log_det, relaxed_barrier, residual, stability_margin
from probattn.blocks.promotion import default_promotion
from probattn.inference.config_memory import check_stage
from probattn.inference.runs.checks import check_same_corpus
from probattn.inference.runs.files import RunError, replacing
from probattn.inference.runs.folder import LOCK_SECONDS
from probattn.inference.runs.imported import DecoderRun
from probattn.inference.runs.npz import read_arrays
from probattn.inference.runs.run import FittedRun
from probattn.inference.runtime.progress import progress_bar
from probattn.models.priors import WIDTH, attention_prior
from probattn.text.batches import windows
from probattn.text.corpora import load_corpus
from probattn.text.tokens import corpus_tokens

TOKENS = 8192  # of training text, in windows spread evenly over it
_MOST_POSITIONS = 256  # of a window: work grows with their square
_MOST_NUMBERS = 2**21  # of all embeddings
PRIOR_TOKENS = 16  # for which the log prior counts once
STARTS = 4  # at most
STEPS = 1000  # most iterations of a start
NOT_CONVERGED = (
    "the fit of the post-hoc attention prior has not converged; its margins may be others"
)
_MEMORY = 20  # steps that L-BFGS remembers
_FLAT = 10.0  # relative improvement of an iteration, in rounding errors, at which a fit rests
_AGREES = 0.02  # most that the margins of the two best ends may differ, relative
_COMPARED = 1024  # tokens whose margins are compared
_ADDED = {"gradient_norm", "disagreement"}  # fields that earlier versions did not store


@dataclass(frozen=True)
class PostHocPrior:
    """Attention stage fitted to frozen embeddings by the exact log density.

    Attributes:
        w_query: W_Q (width, prior_rank).
        w_key: W_K (width, prior_rank).
        scale: sigma, the standard deviation of the residual, in units of the embedding.
        log_density: mean log density in nats per token of the text it was fitted on; -inf where
            a determinant is not positive.
        converged: whether the best fit came to rest, and the quartiles of its margins are those of
            the second best, which started elsewhere, to 2 %.
        steps: iterations of the optimizer, those of all starts together.
        tokens: how many it was fitted on.
        gradient_norm: norm of the gradient at the end, in nats per token, for matrices in units
            of the inverse root mean square of the embeddings.
        disagreement: largest relative difference of those quartiles.
    """

    w_query: Float[np.ndarray, "d r"]
    w_key: Float[np.ndarray, "d r"]
    scale: float
    log_density: float
    converged: bool
    steps: int
    tokens: int
    gradient_norm: float
    disagreement: float


@default_promotion()
def post_hoc_prior(run: FittedRun, *, progress: bool = False) -> PostHocPrior:
    """Read the run's post-hoc attention prior, fitted and stored by the first call.

    In a run that is read-only every call fits it.

    Raises:
        ValueError: if the run has no parameters yet, its corpus is not there any more, the stored
            prior is damaged, or there is none and another process is writing to the run.
    """
    path = run.path / "post_hoc_prior.npz"
    if path.exists() and (stored := _read(path, run)) is not None:
        return stored
    writable = run.is_writable()  # refused before the work rather than after it
    network = run.network
    check_stage(width=network.config.width, rank=run.prior_rank, block=network.block)
    corpus = load_corpus(run.config.data)
    check_same_corpus(run, corpus)
    tokens, _ = corpus_tokens(corpus, run.vocabulary)
    block = min(network.block, _MOST_POSITIONS)
    most = min(TOKENS, max(_MOST_NUMBERS // network.config.width, block))
    plan = windows(len(tokens), block=block).spread(most)
    prior = fit_attention_prior(
        network.embed(run.parameters_up_to(0), jnp.asarray(plan.take(tokens))),
        rank=run.prior_rank,
        bound=run.bound,
        seed=run.seed,
        steps=STEPS,
        progress=progress,
    )
    if not writable:
        return prior
    with run.lock(wait=LOCK_SECONDS):
        if path.exists() and (stored := _read(path, run)) is not None:  # another was faster
            return stored
        with replacing(path) as stream:
            np.savez(stream, of_step=run.step or 0, **vars(prior))
    return prior


def usual_prior(run: FittedRun, *, progress: bool = False) -> PostHocPrior | None:
    """Return the post-hoc attention prior of a fit; None for a published model.

    Of a published model the heads themselves are what one asks about, and a fit takes minutes.
    """
    return None if isinstance(run, DecoderRun) else post_hoc_prior(run, progress=progress)


def fit_attention_prior(
    x: Float[Array, "B T d"],
    *,
    rank: int,
    bound: float | None = None,
    seed: int,
    steps: int = STEPS,
    prior_tokens: float = PRIOR_TOKENS,
    progress: bool = False,
) -> PostHocPrior:
    """Fit W_Q, W_K and sigma to embeddings by the exact log density, by L-BFGS.

    Maximises the mean over tokens of log Normal(e_t; 0, sigma^2 I) + log det D_t, plus the log
    prior of W_Q and W_K over `prior_tokens`, all of it in units of the embeddings' root mean
    square. docs/mathematics.md, section 10, proves that there is a maximum, and says why it needs
    a prior of this weight. Fits start from prior draws until the best two agree in their
    margins, or there are four; the best is returned. sigma is the root mean square of its residual.

    Args:
        x: embeddings (B, T, d).
        rank: rank of W_Q and W_K.
        bound: c of a bounded context, or None.
        seed: seed of the prior draws that fits start from.
        steps: most iterations of a fit.
        prior_tokens: tokens for which the log prior counts once.
        progress: show a progress bar.
    """
    unit = float(jnp.sqrt(jnp.mean(x**2)))
    scaled, scaled_bound = x / unit, None if bound is None else bound / unit
    objective = partial(_value_and_gradient, bound=scaled_bound, prior_tokens=prior_tokens)
    prior = attention_prior(x.shape[-1], rank)
    compared = scaled[:: max(x.shape[0] * x.shape[1] // _COMPARED, 1)]
    ends: list[tuple[_End, np.ndarray]] = []
    with progress_bar(
        "post-hoc attention prior", total=STARTS, unit="start", visible=progress
    ) as bar:
        for key in jax.random.split(jax.random.key(seed), STARTS):
            start = prior.sample(key, (2,)).astype(x.dtype) / WIDTH
            end = _minimum(objective, (*start, jnp.zeros((), x.dtype)), scaled, steps)
            margins = np.asarray(_margins(compared, *end.params[:2], bound=scaled_bound))
            ends.append((end, np.quantile(margins, (0.25, 0.5, 0.75))))
            bar.update(1)
            bar.show(loss=f"{end.value:.3f}")
            if len(ends) > 1:
                (best, its), (_, others) = sorted(ends, key=lambda pair: pair[0].value)[:2]
                disagreement = float(np.max(np.abs(others / its - 1)))
                if disagreement <= _AGREES:
                    break
    w_query, w_key = (matrix / unit for matrix in best.params[:2])
    scale = float(jnp.sqrt(jnp.mean(residual(x, w_query, w_key, bound=bound) ** 2)))
    return PostHocPrior(
        np.asarray(w_query),
        np.asarray(w_key),
        scale,
        float(_mean_log_density(x, w_query, w_key, scale, bound)),
        best.rests and disagreement <= _AGREES,
        sum(end.steps for end, _ in ends),
        x.shape[0] * x.shape[1],
        best.gradient_norm,
        disagreement,
    )


class _End(NamedTuple):
    """Where a fit ended."""

    params: tuple[Array, Array, Array]
    value: float
    gradient_norm: float
    steps: int
    rests: bool


def _minimum(
    objective: Callable[..., Any], start: tuple[Array, Array, Array], x: Array, steps: int
) -> _End:
    """Minimise by L-BFGS until a step changes nothing that the dtype can hold."""
    from scipy.optimize import minimize  # loaded only where a prior is fitted

    flat, unravel = ravel_pytree(start)

    def evaluated(at: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = objective(unravel(jnp.asarray(at, x.dtype)), x)
        return float(value), np.asarray(ravel_pytree(gradient)[0], np.float64)

    options = {"maxiter": steps, "maxfun": 2 * steps, "maxcor": _MEMORY, "gtol": 0.0}
    found = minimize(
        evaluated,
        np.asarray(flat, np.float64),
        jac=True,
        method="L-BFGS-B",
        options=options | {"ftol": _FLAT * float(jnp.finfo(x.dtype).eps)},
    )
    return _End(
        unravel(jnp.asarray(found.x, x.dtype)),
        float(found.fun),
        float(np.linalg.norm(found.jac)),
        int(found.nit),
        found.status != 1,  # the iterations are not used up
    )


_margins = jax.jit(stability_margin)


@jax.jit
@jax.value_and_grad
def _value_and_gradient(
    params: tuple[Array, Array, Array],
    x: Float[Array, "B T d"],
    *,
    bound: float | None,
    prior_tokens: float,
) -> Array:
    """Return what is minimised, in nats per token, and its gradient."""
    w_query, w_key, log_scale = params
    energy = jnp.mean(residual(x, w_query, w_key, bound=bound) ** 2) * jnp.exp(-2 * log_scale)
    gauss = x.shape[-1] * (log_scale + energy / 2)
    barrier = jnp.mean(relaxed_barrier(x, w_query, w_key, bound=bound, summed=True)) / x.shape[-2]
    # The log prior, but for a constant: see attention_prior.
    prior = x.shape[-1] / 2 * (jnp.sum(w_query**2) + jnp.sum(w_key**2))
    return gauss + barrier + prior / prior_tokens


@jax.jit
def _mean_log_density(
    x: Float[Array, "B T d"], w_query: Array, w_key: Array, scale: float, bound: float | None
) -> Array:
    sign, log_abs = log_det(x, w_query, w_key, bound=bound)
    error = residual(x, w_query, w_key, bound=bound)
    squared = jnp.sum((error / scale) ** 2, axis=-1)
    gauss = -squared / 2 - x.shape[-1] * (jnp.log(scale) + math.log(2 * math.pi) / 2)
    return jnp.where(jnp.all(sign > 0), jnp.mean(gauss + log_abs), -jnp.inf)


def _read(path: Path, run: FittedRun) -> PostHocPrior | None:
    """Read a stored prior; None if it is of other parameters, or of an earlier version's fit."""
    shape = (run.network.config.width, run.prior_rank)
    shapes: dict[str, tuple[int, ...]]
    shapes = dict.fromkeys(("of_step", *PostHocPrior.__dataclass_fields__), ())
    shapes |= {"w_query": shape, "w_key": shape}
    try:
        values = read_arrays(path)
        if values.keys() == shapes.keys() - _ADDED:  # Adam's, which did not come to rest
            return None
        found = {name: value.shape for name, value in values.items()}
        if found != shapes:
            name = next(n for n in (*shapes, *found) if found.get(n) != shapes.get(n))
            raise ValueError(f"{name} has shape {found.get(name)}, expected {shapes.get(name)}")
        if int(values["of_step"]) != run.step:
            return None
        scale = float(values["scale"])
        if not (scale > 0 and math.isfinite(scale)):
            raise ValueError(f"scale is {scale}")
        for name in ("w_query", "w_key"):
            if not np.all(np.isfinite(values[name])):
                raise ValueError(f"{name} is not finite")
        return PostHocPrior(
            values["w_query"],
            values["w_key"],
            scale,
            float(values["log_density"]),
            bool(values["converged"]),
            int(values["steps"]),
            int(values["tokens"]),
            float(values["gradient_norm"]),
            float(values["disagreement"]),
        )
    # NumPy and zipfile raise what they meet: KeyError, TypeError, EOFError, BadZipFile and others.
    except Exception as error:
        raise RunError(f"{path}: damaged ({error}); delete it to have it fitted again") from None
