"""A posterior as datasets with named dimensions: draws, margins, support tokens, predictions."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array
from numpyro.handlers import seed as seeded
from numpyro.handlers import trace

from probattn import support_tokens
from probattn.inference.export.site_values import map_rows, observed_sites, site_values
from probattn.inference.sampling.result import PosteriorResult

if TYPE_CHECKING:  # xarray takes half a second to load
    import xarray as xr

DIMS: Mapping[str, tuple[str, ...]] = {
    "token_embedding": ("vocab", "embed"),
    "position_embedding": ("position", "embed"),
    "final_norm": ("embed",),
    "attention_norm": ("layer", "embed"),
    "attention_in": ("layer", "embed", "query_key_value"),
    "attention_out": ("layer", "value", "embed"),
    "mlp_norm": ("layer", "embed"),
    "mlp_in": ("layer", "embed", "hidden"),
    "mlp_out": ("layer", "hidden", "embed"),
    "w_query": ("embed", "rank"),
    "w_key": ("embed", "rank"),
    "log_residual_scale": (),
    "embeddings": ("sequence", "position", "embed"),
    "embeddings_base": ("sequence", "position", "embed"),
    "margin": ("sequence", "position"),
    "log_det": ("sequence", "position"),
    "coupling": ("key_embed", "query_embed"),
    "direction": ("key_embed", "query_embed"),
    "free_coupling": ("key_embed", "query_embed"),
    "repulsion": ("embed", "factor"),
    "rotation": ("embed_pair",),
    "coupling_eigenvalues": ("eigenvalue",),
    "emission": ("embed", "vocab"),
    "emission_bias": ("vocab",),
    "tokens": ("sequence", "position"),
}

# Sites of which positions are told, with an axis of heads where the stage has them.
_PER_POSITION = {"margin", "log_det", "certificate"}


def posterior_groups(
    result: PosteriorResult,
    *,
    log_likelihood: bool,
    posterior_predictive: bool,
    prior: int,
    seed: int,
    dims: Mapping[str, Sequence[str]],
    labels: Mapping[str, Sequence],
) -> dict[str, "xr.Dataset"]:
    """Make the groups of a DataTree: see `to_datatree`.

    Args:
        result: the draws.
        log_likelihood: add the log likelihoods.
        posterior_predictive: add draws of the observed sites.
        prior: number of draws of the prior to add.
        seed: seed of the predictive and prior draws.
        dims: names of dimensions by site, after chain and draw.
        labels: coordinates by dimension.
    """
    predictive_key, prior_key = jax.random.split(jax.random.key(seed))
    tables = _Tables(result.shape)
    support = _Support(result.shape)
    parts = site_values(
        result,
        log_likelihood=log_likelihood,
        predictive=posterior_predictive,
        rng_key=predictive_key,
    )
    for rows, values in parts:
        deterministic = dict(values.deterministic)
        certificate = deterministic.pop("certificate", None)
        if "margin" in deterministic and deterministic["margin"].ndim >= 3:
            deterministic |= support.add(deterministic["margin"], certificate)
        tables.add("posterior", rows, deterministic)
        tables.add("log_likelihood", rows, values.log_likelihood)
        tables.add("posterior_predictive", rows, values.predictive)
    found = tables.groups
    found["posterior"] = {**result.draws, **found.get("posterior", {})}
    if result.statistics:
        depth = np.ceil(np.log2(np.asarray(result.statistics["n_steps"]) + 1)).astype(np.int64)
        found["sample_stats"] = {**result.statistics, "tree_depth": depth}
    if prior:
        found["prior"] = _prior(result, prior, prior_key)
    groups = {
        group: _dataset(
            sites, ("chain", "draw"), dims, labels, likelihood=group == "log_likelihood"
        )
        for group, sites in found.items()
        if sites
    }
    if support.probability is not None:
        groups["support_tokens"] = _dataset(support.summary(), (), dims, labels)
    observed = _observed(result)
    if observed:
        groups["observed_data"] = _dataset(observed, (), dims, labels)
    return groups


def located(group: "xr.Dataset") -> "xr.Dataset":
    """Return the group with integer coordinates on every dimension that has none."""
    missing = {
        name: np.arange(size) for name, size in group.sizes.items() if name not in group.coords
    }
    return group.assign_coords(missing)


class _Tables:
    """Values of sites for all draws, filled in as they come into arrays made once."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        self.groups: dict[str, dict[str, np.ndarray]] = {}

    def add(self, group: str, rows: slice, values: Mapping[str, np.ndarray | Array]) -> None:
        total = self._shape[0] * self._shape[1]
        for name, value in values.items():
            table = self.groups.setdefault(group, {})
            if name not in table:
                table[name] = np.empty((*self._shape, *value.shape[1:]), value.dtype)
            table[name].reshape(total, *value.shape[1:])[rows] = value


class _Support:
    """How often each position is the support token of its sequence, and is certified."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._draws = shape[0] * shape[1]
        self.probability: np.ndarray | None = None
        self._certified: np.ndarray | None = None

    def add(self, margin: np.ndarray, certificate: np.ndarray | None) -> dict[str, np.ndarray]:
        """Count draws (draws, sequences, ..., T), and return their smallest margins."""
        with jax.enable_x64(margin.dtype == np.float64):
            first = np.asarray(support_tokens(margin))
        is_support = np.arange(margin.shape[-1]) == first
        counts = is_support.sum(0)
        self.probability = counts if self.probability is None else self.probability + counts
        if certificate is not None:
            certified = (certificate < 1).sum(0)
            self._certified = certified if self._certified is None else self._certified + certified
        return _smallest(margin)

    def summary(self) -> dict[str, np.ndarray]:
        counts = {"support_probability": self.probability, "certified_probability": self._certified}
        return {name: count / self._draws for name, count in counts.items() if count is not None}


def _prior(result: PosteriorResult, count: int, rng_key: Array) -> dict[str, np.ndarray]:
    def draw(key: Array) -> dict[str, Array]:
        sites = trace(seeded(result.model, key)).get_trace(
            *result.model_args, **result.model_kwargs
        )
        return {
            name: site["value"]
            for name, site in sites.items()
            if site["type"] == "deterministic"
            or (site["type"] == "sample" and not site["is_observed"])
        }

    tables = _Tables((1, count))
    keys = jax.random.split(rng_key, count)
    for batch, values in map_rows(draw, keys, precision=result.precision):
        values.pop("certificate", None)
        if "margin" in values and values["margin"].ndim >= 3:
            values |= _smallest(values["margin"])
        tables.add("prior", batch, values)
    return tables.groups["prior"]


def _smallest(margin: np.ndarray) -> dict[str, np.ndarray]:
    """Return smallest margins, positions >= 2, of every sequence and of all: (draws, ...)."""
    sequence = margin[..., 2:].min(tuple(range(2, margin.ndim)))
    return {"sequence_margin": sequence, "smallest_margin": sequence.min(1)}


def _observed(result: PosteriorResult) -> dict[str, np.ndarray]:
    """Return what the model was given to observe, by site."""
    found: dict[str, Any] = {}

    def note() -> None:
        sites = trace(seeded(result.model, jax.random.key(0))).get_trace(
            *result.model_args, **result.model_kwargs
        )
        found.update({name: site["value"] for name, site in observed_sites(sites).items()})

    jax.eval_shape(note)  # what is observed depends on no draw: nothing need be computed
    if any(isinstance(value, jax.core.Tracer) for value in found.values()):
        note()  # but where the model computes it from its arguments
    return {name: np.asarray(value) for name, value in found.items()}


def _dataset(
    sites: Mapping[str, np.ndarray],
    leading: tuple[str, ...],
    dims: Mapping[str, Sequence[str]],
    labels: Mapping[str, Sequence],
    *,
    likelihood: bool = False,
) -> "xr.Dataset":
    import xarray as xr

    variables = {}
    for name, value in sites.items():
        own = _dims_of(name, value.ndim - len(leading), dims, likelihood=likelihood)
        variables[name] = ((*leading, *own), value)
    dataset = xr.Dataset(variables)
    coords = {
        dim: list(values) for dim, values in labels.items() if dataset.sizes.get(dim) == len(values)
    }
    return dataset.assign_coords(coords)


def _dims_of(
    name: str, ndim: int, given: Mapping[str, Sequence[str]], *, likelihood: bool
) -> tuple[str, ...]:
    """Name a site's dimensions: as given, as this package's models do, or by numbers."""
    if name in given:
        if likelihood:
            return tuple(given[name][:ndim])
        if len(given[name]) != ndim:
            raise ValueError(
                f"dims of {name} are {tuple(given[name])}: expected {ndim} names, one per dimension"
            )
        return tuple(given[name])
    derived: Mapping[str, tuple[str, ...]] = {
        "sequence_margin": ("sequence",),
        "support_probability": DIMS["margin"],
        "certified_probability": DIMS["margin"],
    }
    known: Any = DIMS.get(name, derived.get(name, ()))
    if name in _PER_POSITION | set(derived) and ndim == 3:
        known = ("sequence", "head", "position")
    if name.startswith("coupling") and ndim == len(known) + 1:
        known = ("head", *known)
    # A log likelihood has the leading dimensions of its site.
    if len(known) == ndim or (likelihood and len(known) > ndim):
        return tuple(known[:ndim])
    return tuple(f"{name}_dim_{axis}" for axis in range(ndim))
