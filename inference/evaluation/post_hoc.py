"""The post-hoc attention prior: (W_Q, W_K, sigma) fitted to a run's frozen embeddings.

A run of objective ce trains no attention stage, and one of another objective trains it for its
own weights. To compare runs, each gets the same treatment: the stage that maximises the exact log
density of its embeddings, with the model's prior on W_Q and W_K, fitted once and kept in the run.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from probattn import log_det, relaxed_barrier, residual
from probattn.blocks.promotion import default_promotion
from probattn.inference.config_memory import check_stage
from probattn.inference.runs.checks import check_same_corpus
from probattn.inference.runs.files import RunError, replacing
from probattn.inference.runs.folder import LOCK_SECONDS
from probattn.inference.runs.npz import read_arrays
from probattn.inference.runs.run import Run
from probattn.inference.runtime.progress import progress_bar
from probattn.models.priors import attention_prior
from probattn.models.transformer import embed
from probattn.text.batches import windows
from probattn.text.corpora import load_corpus
from probattn.text.tokens import corpus_tokens

TOKENS = 65_536  # of training text, in windows spread evenly over it
_BATCH = 16  # windows in a step
STEPS = 1000
_STEPS_PER_CALL = 50
_LEARNING_RATE = 0.03
_CONVERGED = 0.01  # most that the last tenth of the steps may add to the whole improvement


@dataclass(frozen=True)
class PostHocPrior:
    """Attention stage fitted to frozen embeddings by the exact log density.

    Attributes:
        w_query: W_Q (width, prior_rank).
        w_key: W_K (width, prior_rank).
        scale: sigma, the standard deviation of the residual, in units of the embedding.
        log_density: mean log density in nats per token of the text it was fitted on; -inf where
            a determinant is not positive.
        converged: whether the last tenth of the steps added less than a hundredth of what all did,
            or than the minibatches' noise.
        steps: number of steps of the optimizer.
        tokens: how many it was fitted on.
    """

    w_query: Float[np.ndarray, "d r"]
    w_key: Float[np.ndarray, "d r"]
    scale: float
    log_density: float
    converged: bool
    steps: int
    tokens: int


@default_promotion()
def post_hoc_prior(run: Run, *, progress: bool = False) -> PostHocPrior:
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
    check_stage(run.config.model)
    corpus = load_corpus(run.config.data)
    check_same_corpus(run, corpus)
    tokens, _ = corpus_tokens(corpus, run.vocabulary)
    plan = windows(len(tokens), block=run.config.model.block).spread(TOKENS)
    prior = fit_attention_prior(
        embed(run.parameters, jnp.asarray(plan.take(tokens))),
        rank=run.config.model.prior_rank,
        bound=run.config.model.bound,
        training_tokens=len(tokens),
        seed=run.config.fit.seed,
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


def fit_attention_prior(
    x: Float[Array, "B T d"],
    *,
    rank: int,
    training_tokens: int,
    bound: float | None = None,
    seed: int,
    steps: int = STEPS,
    progress: bool = False,
) -> PostHocPrior:
    """Fit W_Q, W_K and sigma to embeddings by the exact log density, by Adam on minibatches.

    Maximises the mean over tokens of log Normal(e_t; 0, sigma^2 I) + log det D_t, plus the log
    prior of W_Q and W_K over the number of training tokens. Without the prior there is no
    maximum: the log determinant grows like log ||A||. The learning rate decays to zero, and sigma
    ends at its maximum given W_Q and W_K, the root mean square of the residual.

    Args:
        x: embeddings (B, T, d).
        rank: rank of W_Q and W_K.
        training_tokens: tokens of the whole text, of which x is a sample: the prior's weight.
        bound: c of a bounded context, or None.
        seed: seed of the prior draw that the fit starts from, and of the minibatches.
        steps: steps of Adam.
        progress: show a progress bar.
    """
    start_key, data_key = jax.random.split(jax.random.key(seed))
    prior = attention_prior(x.shape[-1], rank)
    w_query, w_key = (prior.sample(key).astype(x.dtype) for key in jax.random.split(start_key))
    params = w_query, w_key, jnp.log(jnp.std(x))
    schedule = optax.warmup_cosine_decay_schedule(0.0, _LEARNING_RATE, steps // 20, steps)
    optimizer = optax.adam(schedule, b2=0.99)
    objective = partial(_objective, bound=bound, training_tokens=training_tokens)

    def step(x: Array, carry: tuple[Any, Any], number: Array) -> tuple[tuple[Any, Any], Array]:
        params, state = carry
        key = jax.random.fold_in(data_key, number)
        chosen = jax.random.choice(key, x.shape[0], (min(_BATCH, x.shape[0]),), replace=False)
        value, gradient = jax.value_and_grad(objective)(params, x[chosen])
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    @jax.jit
    def several(x: Array, carry: tuple[Any, Any], numbers: Array) -> tuple[Any, Array]:
        return jax.lax.scan(partial(step, x), carry, numbers)

    carry, values = (params, optimizer.init(params)), np.empty(0)
    with progress_bar(
        "post-hoc attention prior", total=steps, unit="step", visible=progress
    ) as bar:
        for first in range(0, steps, _STEPS_PER_CALL):
            numbers = jnp.arange(first, min(first + _STEPS_PER_CALL, steps))
            carry, losses = several(x, carry, numbers)
            values = np.append(values, np.asarray(losses))
            bar.update(len(numbers))
            bar.show(loss=f"{values[-1]:.3f}")
    tenths = np.array_split(values, 10)
    gained = tenths[0].mean() - tenths[-1].mean()
    last = tenths[-2].mean() - tenths[-1].mean()
    noise = math.sqrt(sum(part.var() / part.size for part in tenths[-2:]))
    w_query, w_key, _ = carry[0]
    scale = float(jnp.sqrt(jnp.mean(residual(x, w_query, w_key, bound=bound) ** 2)))
    return PostHocPrior(
        np.asarray(w_query),
        np.asarray(w_key),
        scale,
        float(_mean_log_density(x, w_query, w_key, scale, bound)),
        bool(last <= max(_CONVERGED * gained, 2 * noise)),
        steps,
        x.shape[0] * x.shape[1],
    )


def _objective(
    params: tuple[Array, Array, Array],
    x: Float[Array, "B T d"],
    *,
    bound: float | None,
    training_tokens: int,
) -> Array:
    w_query, w_key, log_scale = params
    energy = jnp.mean(residual(x, w_query, w_key, bound=bound) ** 2) * jnp.exp(-2 * log_scale)
    gauss = x.shape[-1] * (log_scale + energy / 2)
    barrier = jnp.mean(relaxed_barrier(x, w_query, w_key, bound=bound, summed=True)) / x.shape[-2]
    prior = attention_prior(*w_query.shape)
    log_prior = prior.log_prob(w_query) + prior.log_prob(w_key)
    return gauss + barrier - log_prior / training_tokens


@jax.jit
def _mean_log_density(
    x: Float[Array, "B T d"], w_query: Array, w_key: Array, scale: float, bound: float | None
) -> Array:
    sign, log_abs = log_det(x, w_query, w_key, bound=bound)
    error = residual(x, w_query, w_key, bound=bound)
    squared = jnp.sum((error / scale) ** 2, axis=-1)
    gauss = -squared / 2 - x.shape[-1] * (jnp.log(scale) + math.log(2 * math.pi) / 2)
    return jnp.where(jnp.all(sign > 0), jnp.mean(gauss + log_abs), -jnp.inf)


def _read(path: Path, run: Run) -> PostHocPrior | None:
    shape = (run.config.model.width, run.config.model.prior_rank)
    shapes = dict.fromkeys(("of_step", *PostHocPrior.__dataclass_fields__), ())
    try:
        values = read_arrays(path, shapes | {"w_query": shape, "w_key": shape})
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
        )
    # NumPy and zipfile raise what they meet: KeyError, TypeError, EOFError, BadZipFile and others.
    except Exception as error:
        raise RunError(f"{path}: damaged ({error}); delete it to have it fitted again") from None
