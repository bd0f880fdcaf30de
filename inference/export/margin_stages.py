"""The attention stages of any NumPyro model: those it records, and its attention processes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.handlers import scope, trace

from probattn import CausalAttention
from probattn.models.attention_sites import record_margins

RECORDED = ("margin", "log_det", "certificate")


def with_margins(model: Callable) -> Callable:
    """Make a model record the margins of its attention processes, if it records none itself.

    A process is a sample site of a `CausalAttention` of three tokens or more. The sites are those
    of `record_margins`. They are called "margin", "log_det" and "certificate", or "SITE/margin" and
    so on where there are several processes, or the model has sites of these names.
    """

    def recording(*args: Any, **kwargs: Any) -> Any:
        with trace() as sites:
            returned = model(*args, **kwargs)
        if not recorded_stages(sites):
            processes = {name: process for name, site in sites.items() if (process := _of(site))}
            plain = len(processes) == 1 and not set(RECORDED) & set(sites)
            for name, process in processes.items():
                arguments = sites[name]["value"], process.w_query, process.w_key, process.bound
                if plain:
                    record_margins(*arguments)
                else:
                    with scope(prefix=name):
                        record_margins(*arguments)
        return returned

    return recording


def recorded_stages(sites: Mapping[str, dict]) -> list[str]:
    """Return what stands before "margin" in the names of the stages that a model records.

    A site called "margin" is a stage's if sites called "log_det" and "certificate" of the same
    shape (..., T), T >= 3, are beside it. Any other is the user's own.
    """
    stages = []
    for name in sites:
        prefix, own = name[: name.rfind("/") + 1], name[name.rfind("/") + 1 :]
        if own != "margin":
            continue
        beside = [sites.get(f"{prefix}{each}") for each in RECORDED]
        if any(site is None or site["type"] != "deterministic" for site in beside):
            continue
        shapes = {jnp.shape(site["value"]) for site in beside if site is not None}
        if len(shapes) == 1 and (shape := shapes.pop()) and shape[-1] >= 3:
            stages.append(prefix)
    return stages


def observed_sites(sites: Mapping[str, dict]) -> dict[str, dict]:
    """Return sites of a trace that were observed, without factors: NumPyro observes those too."""
    return {
        name: site
        for name, site in sites.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not isinstance(innermost(site["fn"]), dist.Unit)
    }


def innermost(distribution: dist.Distribution) -> dist.Distribution:
    """Return a distribution without what plates, masks and `to_event` put around it."""
    while isinstance(
        distribution, dist.ExpandedDistribution | dist.Independent | dist.MaskedDistribution
    ):
        distribution = distribution.base_dist
    return distribution


def _of(site: dict) -> CausalAttention | None:
    """Return the attention process that a site samples or observes, if it has margins."""
    if site["type"] != "sample":
        return None
    process = innermost(site["fn"])
    if isinstance(process, CausalAttention) and process.event_shape[0] >= 3:
        return process
    return None
