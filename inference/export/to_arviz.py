"""Export to ArviZ: a run or a posterior as an xarray DataTree with named dimensions."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpyro.infer import MCMC
from numpyro.infer.svi import SVIRunResult

from probattn.blocks.promotion import default_promotion
from probattn.inference.config_files import format_config
from probattn.inference.evaluation.attention_stages import stage_margins, stages
from probattn.inference.evaluation.post_hoc import PostHocPrior, usual_prior
from probattn.inference.evaluation.stage_certificates import stage_certificate
from probattn.inference.evaluation.texts import text_tokens
from probattn.inference.export.layout import DIMS
from probattn.inference.export.numpyro_draws import NumPyroDraws, numpyro_result
from probattn.inference.export.posterior_groups import located, posterior_groups
from probattn.inference.runs.run import (
    FittedRun,
    ImportedRun,
    PosteriorRun,
    Run,
    RunDirectory,
    TunedRun,
)
from probattn.inference.runtime.one_thread import one_thread_at_a_time
from probattn.inference.sampling.posterior_runs import guide_posterior, load_posterior
from probattn.inference.sampling.result import PosteriorResult
from probattn.messages import describe
from probattn.text.batches import windows

if TYPE_CHECKING:
    import xarray as xr


@default_promotion()
@one_thread_at_a_time
def to_datatree(
    source: FittedRun | PosteriorRun | PosteriorResult | NumPyroDraws,
    *,
    model: Callable | None = None,
    model_args: tuple | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    guide: Callable | None = None,
    sequences: int = 64,
    draws: int = 1000,
    log_likelihood: bool = False,
    posterior_predictive: bool = False,
    prior: int = 0,
    seed: int = 0,
    dims: Mapping[str, Sequence[str]] | None = None,
    flat: bool = False,
) -> "xr.DataTree":
    """Export a run, or any posterior, as a DataTree that ArviZ takes as it is.

    The posterior may be the result of `sample`, or what NumPyro made by itself: an MCMC, the
    result of SVI.run beside its guide, or a dictionary of samples beside the model. Its model may
    be one of your own. Where it records no margins (see `attention_sites.record_margins`), they
    are taken of its sites of `CausalAttention`.

    Groups of a posterior:
        posterior: draws and deterministic sites, (chain, draw, ...), and of models with margins
            smallest_margin, of all positions >= 2, and sequence_margin, of each sequence. Of a
            language model whose symbols at all positions are at most 2048 it holds, too, what is
            proved of its stage for all texts: table_certificate, rho, and no_text_folds, 1 where
            rho is below 1, whose mean is the posterior probability of that proof.
        sample_stats: diverging, n_steps, lp, step_size and what else the sampler tells, see
            `PosteriorResult`; for a guide, whose draws are one chain, there is none.
        support_tokens: support_probability (sequence, position), the posterior probability that a
            position is its sequence's support token; certified_probability, that its certificate
            is below 1.
        log_likelihood: one per sequence, on request, for `az.loo` and `az.compare`; refused for
            draws of another temperature than 1, which neither can tell from the posterior's. Those
            of a guide's draws are not for them either.
        posterior_predictive: draws of the observed sites given each draw, on request.
        prior: draws of the prior, on request.
        observed_data: what was observed: of a language model the targets, each a token after the
            one whose embedding has the margin. Factors are none, and are left out.

    Groups of a MAP run:
        point_estimate: the parameters. Not called posterior, and without chain and draw, so that
            no diagnostic of draws (r_hat, ess, loo) can be computed of a point.
        margins: margin (kind "sigma_min"), log_det, the first-order embedding_margin, certificate
            and infeasible, each (stage, sequence, position), over windows of the validation text;
            table_certificate (stage), rho of each stage over all texts.
        observed_data: the tokens of these windows, (sequence, position).
        constant_data: W_Q, W_K and sigma of the post-hoc attention prior, and whether its fit
            converged; if it did not, its margins may be others.

    An imported model has the groups of a MAP run but for the first and the last. In a name, such as
    that of a scope, "." stands for "/", which a DataTree does not take.

    A plate that takes a minibatch has all of its rows here, whatever the draws were made with.

    Dimensions have the names of `dims`, else those that this package's models have, else those of
    plates and of `infer={"event_dims": [...]}`, as in `az.from_numpyro`; others are numbered.

    The configuration, the seed, the corpus and the versions of the packages are attributes. The
    tree can be saved with `to_netcdf` and `to_zarr`.

    Args:
        source: a run from `load_run`, `fit` or `sample_run`, the result of `sample`, an MCMC that
            was run, the result of SVI.run, or samples by site, each (draws, ...) or (chains, draws,
            ...), such as those of `MCMC.get_samples`.
        model: the NumPyro model of samples, or of a guide that is no AutoGuide.
        model_args: its arguments; of an MCMC by default those that it was run with.
        model_kwargs: its keyword arguments, likewise.
        guide: the guide of SVI.run's result, which the draws are of.
        sequences: for a fitted run, the most windows to spread evenly over the text: for a MAP
            over the validation text, for another guide over the training text.
        draws: number of draws of a guide.
        log_likelihood: add the log likelihoods.
        posterior_predictive: add draws of the observed sites.
        prior: number of draws of the prior to add.
        seed: seed of the predictive and prior draws, and of a guide's.
        dims: names of dimensions by site, after chain and draw, for sites of models of your own.
        flat: give observed data and predictions one dimension, SITE_entry, instead of sequence and
            position: `az.plot_ppc_rootogram` counts along one alone.

    Raises:
        ValueError: if an argument is out of range, draws are asked of a MAP run or an AutoDelta,
            the run or its corpus is not there any more, a model or a guide is missing or given
            beside a source that has its own, the samples are not of the model, or a prior that is
            to be drawn from cannot be.
    """
    import xarray as xr

    if sequences < 1:
        raise ValueError(f"sequences: got {sequences}, expected an integer >= 1")
    if prior < 0:
        raise ValueError(f"prior: got {prior}, expected an integer >= 0")
    if isinstance(source, MCMC | SVIRunResult | Mapping):
        source = numpyro_result(
            source,
            model=model,
            model_args=model_args,
            model_kwargs=model_kwargs,
            guide=guide,
            draws=draws,
            seed=seed,
        )
    elif not isinstance(source, RunDirectory | PosteriorResult):
        raise ValueError(
            f"source is {describe(source)}: expected a run, the result of `sample`, an MCMC, the "
            "result of SVI.run with its guide, or samples by site"
        )
    elif any(given is not None for given in (model, model_args, model_kwargs, guide)):
        raise ValueError(
            f"a {type(source).__name__} has its own model: expected model, model_args, "
            "model_kwargs and guide beside an MCMC, a result of SVI.run or samples alone"
        )
    attributes: dict[str, Any] = {}
    labels: dict[str, Any] = {}
    if isinstance(source, RunDirectory):
        attributes = _run_attributes(source)
        labels["vocab"] = _symbols(source)
    point = isinstance(source, Run) and source.config.fit.guide == "map"
    if isinstance(source, ImportedRun | TunedRun) or (isinstance(source, Run) and point):
        if log_likelihood or posterior_predictive or prior:
            raise ValueError(
                f"{source.path}: is a MAP run, a point without draws: make draws with `probattn "
                f"sample --from {source.path}`, or fit with another --guide"
                if point
                else f"{source.path}: is an imported model, a point without draws: expected none "
                "of log_likelihood, posterior_predictive and prior"
            )
        groups = _point_groups(source, sequences)
    else:
        if isinstance(source, Run):
            result = guide_posterior(source, draws=draws, seed=seed, sequences=sequences)
        elif isinstance(source, PosteriorRun):
            result = load_posterior(source)
        else:
            assert isinstance(source, PosteriorResult)
            result = source
        if log_likelihood and result.temperature != 1:
            raise ValueError(
                f"log_likelihood of draws by {result.label}: leave-one-out takes draws of the "
                "posterior itself; sample with sample.temperature 1, or leave log_likelihood out"
            )
        attributes = _posterior_attributes(result) | attributes
        groups = posterior_groups(
            result,
            log_likelihood=log_likelihood,
            posterior_predictive=posterior_predictive,
            prior=prior,
            seed=seed,
            dims=dims or {},
            labels=labels,
            flat=flat,
        )
    tree = xr.DataTree.from_dict({name: located(group) for name, group in groups.items()})
    tree.attrs = _versions() | attributes
    return tree


def _point_groups(run: FittedRun, sequences: int) -> dict[str, "xr.Dataset"]:
    import xarray as xr

    tokens, _ = text_tokens(run, None)
    block = run.network.block
    plan = windows(len(tokens), block=block).spread(sequences * block)
    inputs = plan.take(tokens)
    prior = usual_prior(run)
    margins = [stage_margins(run, stage, inputs) for stage in stages(run, prior)]
    measured: dict[str, Any] = {
        field.name: (
            ("stage", "sequence", "position"),
            np.stack([getattr(stage, field.name) for stage in margins]),
        )
        for field in dataclasses.fields(margins[0])
        if field.name != "label"
    }
    proved = [stage_certificate(run, stage).rho for stage in stages(run, prior)]
    measured["table_certificate"] = ("stage", np.array(proved))
    positions = {"sequence": plan.starts, "position": np.arange(block)}
    point = {}
    if isinstance(run, Run):
        point["point_estimate"] = xr.Dataset(
            {name: (DIMS[name], np.asarray(value)) for name, value in run.parameters.items()},
            attrs={"point_estimate": "MAP: one point, no draws"},
        )
    return (
        point
        | {
            "margins": xr.Dataset(
                measured,
                coords={"stage": [stage.label for stage in margins], **positions},
                attrs={"margin_kind": "sigma_min", "sequence": "index of the window's first token"},
            ),
            "observed_data": xr.Dataset(
                {"tokens": (("sequence", "position"), inputs)}, coords=positions
            ),
        }
        | _prior_group(prior)
    )


def _prior_group(prior: PostHocPrior | None) -> dict[str, "xr.Dataset"]:
    import xarray as xr

    if prior is None:
        return {}
    values = {
        "post_hoc_w_query": (DIMS["w_query"], prior.w_query),
        "post_hoc_w_key": (DIMS["w_key"], prior.w_key),
        "post_hoc_scale": ((), prior.scale),
        "post_hoc_converged": ((), prior.converged),
    }
    return {"constant_data": xr.Dataset(values)}


def _run_attributes(run: RunDirectory) -> dict[str, Any]:
    attributes = {
        "configuration": format_config(run.config),
        "corpus": run.data["description"],
        "corpus_sha256": run.data["sha256"],
    }
    if isinstance(run, Run):
        attributes |= {"seed": run.config.fit.seed, "step": run.step}
        if run.config.fit.guide == "map":
            attributes["inference_method"] = "MAP (SVI with AutoDelta): a point estimate"
    return attributes


def _posterior_attributes(result: PosteriorResult) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "inference_method": result.method,
        "sampling_time": result.seconds,  # seconds; ArviZ's name
    }
    if result.config is not None:
        attributes |= {
            "configuration": json.dumps(dataclasses.asdict(result.config)),
            "seed": result.config.seed,
            "tuning_steps": result.config.warmup,
            "temperature": result.temperature,
        }
        if result.method != "nuts":
            attributes["inference_library"] = "blackjax"
    return attributes


def _versions() -> dict[str, str]:
    packages = ("probattn", "numpyro", "jax", "arviz")
    return {"inference_library": "numpyro"} | {f"{n}_version": version(n) for n in packages}


def _symbols(run: RunDirectory) -> list[str]:
    # A file of netCDF holds no NUL in a text; the picture of one (U+2400) stands for it.
    symbols = (run.vocabulary.display([token])[0] for token in range(run.vocabulary.size))
    return [symbol.replace("\0", "\N{SYMBOL FOR NULL}") for symbol in symbols]
