"""Export to ArviZ: a run as an xarray DataTree with named dimensions."""

import dataclasses
from importlib.metadata import version
from typing import Any

import numpy as np
import xarray as xr

from probattn.batches import windows
from probattn.inference.config import format_config
from probattn.inference.evaluate import text_tokens
from probattn.inference.post_hoc import post_hoc_prior
from probattn.inference.runs import Run
from probattn.inference.stages import stage_margins, stages

_DIMS = {
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
}


def to_datatree(run: Run, *, sequences: int = 64) -> xr.DataTree:
    """Export a MAP run as a DataTree.

    Groups:
        point_estimate: the parameters. Not called posterior, and without chain and draw, so that
            no diagnostic of draws (r_hat, ess, loo) can be computed of a point.
        margins: margin (kind "sigma_min"), log_det, embedding_margin, certificate and infeasible,
            each (stage, sequence, position), over windows of the validation text.
        observed_data: the tokens of these windows, (sequence, position).
        constant_data: W_Q, W_K and sigma of the post-hoc attention prior.

    The configuration, the seed, the corpus and the versions of the packages are attributes. The
    tree can be saved with `to_netcdf` and `to_zarr`.

    Args:
        run: from `load_run` or `fit`.
        sequences: at most so many windows, spread evenly over the validation text.

    Raises:
        ValueError: if sequences < 1, or the run or its corpus is not there any more.
    """
    if sequences < 1:
        raise ValueError(f"sequences: got {sequences}, expected an integer >= 1")
    tokens, _ = text_tokens(run, None)
    block = run.config.model.block
    plan = windows(len(tokens), block=block).spread(sequences * block)
    inputs = plan.take(tokens)
    prior = post_hoc_prior(run)
    margins = [stage_margins(run, stage, inputs) for stage in stages(run, prior)]
    measured = {
        field.name: (
            ("stage", "sequence", "position"),
            np.stack([getattr(stage, field.name) for stage in margins]),
        )
        for field in dataclasses.fields(margins[0])
        if field.name != "label"
    }
    positions = {"sequence": plan.starts, "position": np.arange(block)}
    groups = {
        "point_estimate": xr.Dataset(
            {name: (_DIMS[name], np.asarray(value)) for name, value in run.parameters.items()},
            attrs={"point_estimate": "MAP: one point, no draws"},
        ),
        "margins": xr.Dataset(
            measured,
            coords={"stage": [stage.label for stage in margins], **positions},
            attrs={"margin_kind": "sigma_min", "sequence": "index of the window's first token"},
        ),
        "observed_data": xr.Dataset(
            {"tokens": (("sequence", "position"), inputs)}, coords=positions
        ),
        "constant_data": xr.Dataset(
            {
                "post_hoc_w_query": (_DIMS["w_query"], prior.w_query),
                "post_hoc_w_key": (_DIMS["w_key"], prior.w_key),
                "post_hoc_scale": ((), prior.scale),
            }
        ),
    }
    tree = xr.DataTree.from_dict({name: _located(group) for name, group in groups.items()})
    tree.attrs = _attributes(run)
    return tree


def _located(group: xr.Dataset) -> xr.Dataset:
    """The group with integer coordinates on every dimension that has none."""
    missing = {
        name: np.arange(size) for name, size in group.sizes.items() if name not in group.coords
    }
    return group.assign_coords(missing)


def _attributes(run: Run) -> dict[str, Any]:
    packages = ("probattn", "numpyro", "jax", "arviz")
    return {
        "inference_library": "numpyro",
        "inference_method": "MAP (SVI with AutoDelta): a point estimate",
        "configuration": format_config(run.config),
        "seed": run.config.fit.seed,
        "step": run.step,
        "corpus": run.data["description"],
        "corpus_sha256": run.data["sha256"],
        **{f"{name}_version": version(name) for name in packages},
    }
