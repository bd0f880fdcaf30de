"""Draws that NumPyro made by itself: an MCMC, a guide with its parameters, or samples."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from numpyro.infer import MCMC, Predictive
from numpyro.infer.autoguide import AutoDelta, AutoGuide
from numpyro.infer.svi import SVIRunResult

from probattn.inference.sampling.result import PosteriorResult, in_own_precision
from probattn.inference.sampling.subsampling import Contents, contents, rows_of

type NumPyroDraws = MCMC | SVIRunResult | Mapping[str, Any]

# ArviZ's names of the fields of NumPyro's states.
_STATISTICS = {
    "accept_prob": "acceptance_rate",
    "num_steps": "n_steps",
    "adapt_state.step_size": "step_size",
    "potential_energy": "lp",
}


def numpyro_result(
    source: NumPyroDraws,
    *,
    model: Callable | None,
    model_args: tuple | None,
    model_kwargs: Mapping[str, Any] | None,
    guide: Callable | None,
    draws: int,
    seed: int,
) -> PosteriorResult:
    """Return draws of NumPyro's with the model that they are of: see `to_datatree`.

    Raises:
        ValueError: if the model or the guide is missing or of no use, the guide is a point, the
            samples are not of the model's latent sites, or one of these is in a plate that takes a
            minibatch.
    """
    statistics: dict[str, np.ndarray] = {}
    if (guide is not None) != isinstance(source, SVIRunResult):
        raise ValueError(
            f"source is a {type(source).__name__} and guide a {type(guide).__name__}: expected a "
            "guide beside the result of SVI.run, and with nothing else"
        )
    if isinstance(source, MCMC):
        if source.last_state is None:
            raise ValueError("the MCMC has no samples: expected one whose method run was called")
        method = type(source.sampler).__name__.lower()
        model = getattr(source.sampler, "model", None) if model is None else model
        model_args = source._args if model_args is None else model_args
        model_kwargs = source._kwargs if model_kwargs is None else model_kwargs
        samples = source.get_samples(group_by_chain=True)
        statistics = _statistics(source.get_extra_fields(group_by_chain=True))
    elif isinstance(source, SVIRunResult):
        method = type(guide).__name__ if isinstance(guide, AutoGuide) else "guide"
        model = guide.model if model is None and isinstance(guide, AutoGuide) else model
        arguments = (model_args or (), dict(model_kwargs or {}))
        samples = _guide_samples(guide, source.params, arguments, draws=draws, seed=seed)
    else:
        method, samples = "samples", source
    if model is None:
        raise ValueError(
            f"model is None and the {type(source).__name__} has none: expected the NumPyro model "
            "that the draws are of, with model_args and model_kwargs"
        )
    result = PosteriorResult(
        method=method,
        draws={name: np.asarray(value) for name, value in samples.items()},
        model=model,
        model_args=tuple(model_args or ()),
        model_kwargs=dict(model_kwargs or {}),
        statistics=statistics,
    )
    return _of_latent_sites(result)


def _statistics(fields: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return what NumPyro kept of each iteration under ArviZ's names; arrays alone."""
    kept = {
        _STATISTICS.get(name, name): np.asarray(value)
        for name, value in fields.items()
        if isinstance(value, jax.Array | np.ndarray)
    }
    return kept | ({"lp": -kept["lp"]} if "lp" in kept else {})


def _guide_samples(
    guide: Any, params: Mapping[str, Any], arguments: tuple, *, draws: int, seed: int
) -> dict[str, Any]:
    """Draw from a guide, as one chain."""
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws: got {draws!r}, expected an integer >= 1")
    if isinstance(guide, AutoDelta):
        raise ValueError(
            "guide is an AutoDelta, a point without draws: expected a guide that has some, such as "
            "AutoNormal; for the margins of the point give guide.median(result.params), each "
            "value[None], as a dictionary of one draw"
        )
    args, kwargs = arguments
    key = jax.random.key(seed)
    if isinstance(guide, AutoGuide):
        return guide.sample_posterior(key, params, *args, sample_shape=(draws,), **kwargs)
    return Predictive(guide, params=params, num_samples=draws)(key, *args, **kwargs)


def _of_latent_sites(result: PosteriorResult) -> PosteriorResult:
    """Return the result with the model's latent sites alone, each (chains, draws, ...).

    Where a plate takes a minibatch the model is that of all rows: each draw would have other rows.
    """
    found = _contents(in_own_precision(result)) if result.draws else Contents({}, [])
    shapes = {name: site.shape for name, site in found.latent.items()}
    if not shapes:
        raise ValueError(
            "the samples or the model have no latent sample site: expected one at least, whose "
            "draws are to be exported"
        )
    for plate, size, batch in found.plates:
        if batch < size:
            _check_outside(plate, size, batch, found)
            result = replace(result, model=rows_of(result.model, plate))
    if missing := sorted(set(shapes) - set(result.draws)):
        raise ValueError(
            f"the samples have no {', '.join(missing)}: expected every latent site of the model; "
            "draw those that were summed out by Predictive(..., infer_discrete=True), and give a "
            "dictionary of all"
        )
    draws, leading = {}, set()
    for name, shape in shapes.items():
        value = result.draws[name]
        before = value.shape[: value.ndim - len(shape)]
        leading.add(before)
        if value.shape[len(before) :] != shape or len(before) not in (1, 2) or len(leading) > 1:
            raise ValueError(
                f"samples of {name} have shape {value.shape}: expected (draws, ...) or (chains, "
                f"draws, ...), at all sites the same, with the site's own {shape} at the end"
            )
        draws[name] = value if len(before) == 2 else value[None]
    return replace(result, draws=draws)


def _contents(result: PosteriorResult) -> Contents:
    with jax.enable_x64(result.precision == "float64"):
        return contents(result.model, (result.model_args, result.model_kwargs))


def _check_outside(plate: str, size: int, batch: int, found: Contents) -> None:
    for name, site in found.latent.items():
        if plate in site.plates:
            raise ValueError(
                f"the latent site {name} is in the plate {plate}, which takes {batch} of {size} "
                "rows: expected latent sites outside of it; give as model one without "
                "subsample_size, and draws for all of its rows"
            )
