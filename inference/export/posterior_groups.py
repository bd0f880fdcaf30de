"""A posterior as datasets with named dimensions: draws, margins, support tokens, predictions."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array
from numpyro.handlers import seed as seeded
from numpyro.handlers import substitute, trace

from probattn import support_tokens
from probattn.inference.export.layout import Layout
from probattn.inference.export.margin_stages import with_margins
from probattn.inference.export.site_values import map_rows, site_values
from probattn.inference.sampling.result import PosteriorResult, in_own_precision

if TYPE_CHECKING:  # xarray takes half a second to load
    import xarray as xr


def posterior_groups(
    result: PosteriorResult,
    *,
    log_likelihood: bool,
    posterior_predictive: bool,
    prior: int,
    seed: int,
    dims: Mapping[str, Sequence[str]],
    labels: Mapping[str, Sequence],
    flat: bool,
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
        flat: give what was observed and predicted one dimension.
    """
    result = in_own_precision(result)
    layout = Layout(result, dims)
    predictive_key, prior_key = jax.random.split(jax.random.key(seed))
    support = {stage: _Support(stage, result.shape, layout.heads(stage)) for stage in layout.stages}
    # Before the long work: there are priors that cannot be drawn from.
    of_prior = _prior(result, prior, prior_key, list(support.values())) if prior else {}
    tables = _Tables(result.shape)
    parts = site_values(
        result,
        log_likelihood=log_likelihood,
        predictive=posterior_predictive,
        rng_key=predictive_key,
    )
    for rows, values in parts:
        deterministic = dict(values.deterministic)
        for stage in support.values():
            deterministic = stage.add(deterministic) | deterministic
        tables.add("posterior", rows, deterministic)
        tables.add("log_likelihood", rows, values.log_likelihood)
        tables.add("posterior_predictive", rows, values.predictive)
    found = tables.groups
    found["posterior"] = {**result.draws, **found.get("posterior", {})}
    found["sample_stats"] = dict(result.statistics)
    if result.method == "nuts" and "n_steps" in result.statistics:
        depth = np.ceil(np.log2(np.asarray(result.statistics["n_steps"]) + 1)).astype(np.int64)
        found["sample_stats"]["tree_depth"] = depth
    found["prior"] = of_prior
    named = _Datasets(layout, labels, frozenset(result.draws), flat)
    groups = {
        group: named.dataset(group, sites, ("chain", "draw"))
        for group, sites in found.items()
        if sites
    }
    for group, sites in (
        (
            "support_tokens",
            {n: v for stage in support.values() for n, v in stage.summary().items()},
        ),
        ("observed_data", layout.observed),
    ):
        if sites:
            groups[group] = named.dataset(group, sites, ())
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
    """How often each position is the support token of its sequence, and is certified.

    Args:
        stage: what stands before "margin" in the name of the stage's margins.
        shape: chains and draws.
        heads: axes of heads in the margins of a draw.
    """

    def __init__(self, stage: str, shape: tuple[int, int], heads: tuple[int, ...]) -> None:
        self._stage, self._heads = stage, heads
        self._draws = shape[0] * shape[1]
        self._support: Any = 0
        self._certified: Any = 0

    def add(self, sites: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Count draws, and return their smallest margins; take the certificate out of the sites."""
        margin = sites[f"{self._stage}margin"]
        certificate = sites.pop(f"{self._stage}certificate")
        with jax.enable_x64(margin.dtype == np.float64):
            first = np.asarray(support_tokens(margin))
        self._support += (np.arange(margin.shape[-1]) == first).sum(0)
        self._certified += (certificate < 1).sum(0)
        return self.smallest(margin)

    def smallest(self, margin: np.ndarray) -> dict[str, np.ndarray]:
        """Return smallest margins, positions >= 2, of every sequence and of all: (draws, ...)."""
        axes = (*(axis + 1 for axis in self._heads), margin.ndim - 1)
        sequence = margin[..., 2:].min(axes)
        return {
            f"{self._stage}sequence_margin": sequence,
            f"{self._stage}smallest_margin": sequence.reshape(len(sequence), -1).min(1),
        }

    def prior(self, sites: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the sites of draws of the prior, with smallest margins and no certificate."""
        del sites[f"{self._stage}certificate"]
        return self.smallest(sites[f"{self._stage}margin"]) | sites

    def summary(self) -> dict[str, np.ndarray]:
        """Return the probabilities of every position."""
        return {
            f"{self._stage}support_probability": self._support / self._draws,
            f"{self._stage}certified_probability": self._certified / self._draws,
        }


def _prior(
    result: PosteriorResult, count: int, rng_key: Array, stages: Sequence[_Support]
) -> dict[str, np.ndarray]:
    model = with_margins(result.model)

    def draw(key: Array) -> dict[str, Array]:
        drawn = substitute(seeded(model, key), substitute_fn=_drawn)
        sites = trace(drawn).get_trace(*result.model_args, **result.model_kwargs)
        return {
            name: site["value"]
            for name, site in sites.items()
            if site["type"] == "deterministic"
            or (site["type"] == "sample" and not site["is_observed"])
        }

    tables = _Tables((1, count))
    keys = jax.random.split(rng_key, count)
    for batch, values in map_rows(draw, keys, precision=result.precision):
        for stage in stages:
            values = stage.prior(values)
        tables.add("prior", batch, values)
    return tables.groups["prior"]


def _drawn(site: dict[str, Any]) -> Any:
    """Draw a latent site from its prior, for NumPyro; leave others to NumPyro."""
    if site["type"] != "sample" or site["value"] is not None:
        return None
    try:
        return site["fn"](*site["args"], **site["kwargs"])
    except NotImplementedError as error:
        raise ValueError(
            f"the prior of the site {site['name']} is {type(site['fn']).__name__}, which cannot be "
            "drawn from: expected prior 0, or a model whose priors are proper"
        ) from error


class _Datasets:
    """Sites as datasets whose dimensions have names, and the labels that belong to them.

    Args:
        layout: names of dimensions.
        labels: coordinates by dimension.
        draws: names of the sites that were drawn.
        flat: give what was observed and predicted one dimension.
    """

    def __init__(
        self,
        layout: Layout,
        labels: Mapping[str, Sequence],
        draws: frozenset[str],
        flat: bool,
    ) -> None:
        self._layout, self._labels, self._draws, self._flat = layout, labels, draws, flat

    def dataset(
        self, group: str, sites: Mapping[str, np.ndarray], leading: tuple[str, ...]
    ) -> "xr.Dataset":
        """Make a dataset; a slash in a name, which no DataTree takes, becomes a point."""
        import xarray as xr

        flat = self._flat and group in ("observed_data", "posterior_predictive")
        # A dimension that has the name of a site would be that site's coordinate.
        sizes: dict[str, int] = dict.fromkeys(("chain", "draw", *sites), -1)
        variables = {}
        # A name that two sites have of different sizes is the first's: the user's, then what is
        # of the data, then parameters, which may be of more positions than there are.
        for name in sorted(sites, key=lambda n: (not self._layout.is_given(n), n in self._draws)):
            value = sites[name]
            if flat:
                value = value.reshape(*value.shape[: len(leading)], -1)
                dims: list[str] = [f"{name}_entry"]
            else:
                dims = self._dims(group, name, value.shape[len(leading) :], sizes)
            own = [dim.replace("/", ".") for dim in (*leading, *dims)]
            variables[name] = (own, value)
        dataset = xr.Dataset({name.replace("/", "."): variables[name] for name in sites})
        coords = {
            dim: list(values)
            for dim, values in self._labels.items()
            if dataset.sizes.get(dim) == len(values)
        }
        return dataset.assign_coords(coords)

    def _dims(
        self, group: str, name: str, shape: tuple[int, ...], sizes: dict[str, int]
    ) -> list[str]:
        named = self._layout.dims(name, len(shape), likelihood=group == "log_likelihood")
        dims: list[str] = []
        missing = 0
        given = self._layout.is_given(name)
        for dim, size in zip(named, shape, strict=True):
            is_free = dim is not None and dim not in dims and sizes.setdefault(dim, size) == size
            if dim is not None and (given or is_free):
                dims.append(dim)
            else:
                dims.append(f"{name}_dim_{missing}")  # ArviZ's name, which counts these alone
                missing += 1
        return dims
