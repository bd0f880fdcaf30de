"""What the dimensions of a model's sites are called, and which stages have margins."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import seed, substitute, trace

from probattn.inference.export.margin_stages import (
    RECORDED,
    observed_sites,
    recorded_stages,
    with_margins,
)
from probattn.inference.sampling.result import PosteriorResult

DIMS: Mapping[str, tuple[str, ...]] = {
    "token_embedding": ("vocab", "embed"),
    "output_embedding": ("vocab", "embed"),
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
    "coupling": ("key_embed", "query_embed"),
    "free_coupling": ("key_embed", "query_embed"),
    "repulsion": ("embed", "factor"),
    "rotation": ("embed_pair",),
    "coupling_trace": (),
    "coupling_norm": (),
    "coupling_eigenvalues": ("eigenvalue",),
    "table_certificate": (),
    "no_text_folds": (),
    "emission": ("embed", "vocab"),
    "emission_bias": ("vocab",),
    "tokens": ("sequence", "position"),
}
"""Names of the dimensions of this package's own sites."""

Names = tuple[str | None, ...]

_OF_STAGE = (
    "coupling",
    "coupling_trace",
    "coupling_norm",
    "coupling_eigenvalues",
    "table_certificate",
    "no_text_folds",
)


class _ComputedError(Exception):
    """What was observed is not known before the model is run."""


class Layout:
    """Names of dimensions, what was observed, and the stages of attention, from a trace of a model.

    A name is the user's, or else this package's own, or that of the plate, or of the site's
    `infer={"event_dims": [...]}`.

    Args:
        result: the draws and their model.
        given: the user's names of dimensions, by site.

    Attributes:
        stages: what stands before "margin" in the name of each stage's margins.
        observed: what the model was given to observe, by site, without factors.
    """

    def __init__(self, result: PosteriorResult, given: Mapping[str, Sequence[str]]) -> None:
        self._given = given
        self._named: dict[str, Names] = {}
        self.stages: list[str] = []
        self.observed: dict[str, Any] = {}

        def note(draw: Mapping[str, Any]) -> None:
            model = seed(substitute(with_margins(result.model), draw), jax.random.key(0))
            sites = trace(model).get_trace(*result.model_args, **result.model_kwargs)
            self._named = {
                name: _names(name, site)
                for name, site in sites.items()
                if site["type"] in ("sample", "deterministic")
            }
            self.stages = recorded_stages(sites)
            for stage in self.stages:
                self._name_stage(stage)
            observed = {name: site["value"] for name, site in observed_sites(sites).items()}
            if any(isinstance(value, jax.core.Tracer) for value in observed.values()):
                raise _ComputedError  # by the model, of its arguments
            self.observed = {name: _signed(np.asarray(value)) for name, value in observed.items()}

        draw = {name: value[0, 0] for name, value in result.draws.items()}
        with jax.enable_x64(result.precision == "float64"):
            try:
                jax.eval_shape(note, draw)  # names depend on no draw: nothing need be computed
            except _ComputedError:
                note(draw)

    def dims(self, name: str, ndim: int, *, likelihood: bool = False) -> Names:
        """Name a site's dimensions, after chain and draw; None where there is no name.

        Args:
            name: of the site, or of what is derived of a stage's margins.
            ndim: number of the dimensions.
            likelihood: a log likelihood has the leading dimensions of its site alone.

        Raises:
            ValueError: if the user gave another number of names.
        """
        if self.is_given(name) and len(self._given[name]) != ndim and not likelihood:
            raise ValueError(
                f"dims of {name} are {tuple(self._given[name])}: expected {ndim} names, one per "
                "dimension"
            )
        own = self._given[name] if self.is_given(name) else self._named.get(name, ())
        return (*own, *(None,) * ndim)[:ndim]

    def is_given(self, name: str) -> bool:
        """Tell whether the user named the dimensions."""
        return name in self._given

    def heads(self, stage: str) -> tuple[int, ...]:
        """Return the axes of heads in a stage's margins (...), after chain and draw."""
        return tuple(i for i, dim in enumerate(self._named[f"{stage}margin"]) if dim == "head")

    def _name_stage(self, stage: str) -> None:
        """Name what is of each position, and what is derived of it."""
        outer = self._named[f"{stage}margin"][:-1]
        if len(outer) <= 2 and {_local(dim) for dim in outer if dim} <= {"sequences"}:
            outer = ("sequence", "head")[: len(outer)]
        each = (*outer, "position")
        for name in (*RECORDED, "support_probability", "certified_probability"):
            self._named[f"{stage}{name}"] = each
        self._named[f"{stage}sequence_margin"] = tuple(dim for dim in outer if dim != "head")


def _names(name: str, site: dict) -> Names:
    ndim = jnp.ndim(site["value"])
    plates = sorted(site["cond_indep_stack"], key=lambda plate: plate.dim)
    events = site.get("infer", {}).get("event_dims", ())
    known = DIMS.get(_local(name))
    if known is not None and _local(name) in _OF_STAGE and ndim == len(known) + 1:
        known = ("head", *known)
    own = {_local(plate.name) for plate in plates} <= {"sequences", "layers"}
    if known is not None and len(known) == ndim and own and not events:
        return known
    # A deterministic site does not say which of its axes are the batch: they lead.
    batch = ndim - site["fn"].event_dim if site["type"] == "sample" else len(plates)
    named: list[str | None] = [None] * ndim
    for place, plate in enumerate(plates):
        axis = batch + plate.dim if site["type"] == "sample" else place
        if 0 <= axis < ndim and jnp.shape(site["value"])[axis] == plate.size:
            named[axis] = plate.name
    named[batch : batch + len(events)] = events
    return tuple(named[:ndim])


def _signed(value: np.ndarray) -> np.ndarray:
    """Return whole numbers with a sign: ArviZ takes others for continuous ones."""
    return value.astype(np.int64) if value.dtype.kind == "u" else value


def _local(name: str) -> str:
    """Return a name without the scopes that it is in."""
    return name.rpartition("/")[2]
