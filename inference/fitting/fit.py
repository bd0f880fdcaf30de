"""Fit a language model by SVI: what is checked before, and the run directory that it leaves."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
from jaxtyping import UInt

from probattn.blocks.promotion import default_promotion
from probattn.inference.config import RunConfig
from probattn.inference.config_memory import check_tuned_size
from probattn.inference.config_tuning import BaseConfig, TuneConfig
from probattn.inference.fitting.loop import Loop
from probattn.inference.fitting.optimizers import check_optimizer
from probattn.inference.fitting.reports import summarise_fit
from probattn.inference.fitting.result import FitResult
from probattn.inference.fitting.sharding import Placement
from probattn.inference.guides.guides import check_guide
from probattn.inference.runs.files import RunError
from probattn.inference.runs.folder import clear
from probattn.inference.runs.opening import find_run, open_run
from probattn.inference.runs.run import ImportedRun, Run, TunedRun, load_run
from probattn.inference.runs.tuned import move_base
from probattn.inference.runtime.one_thread import one_thread_at_a_time
from probattn.inference.runtime.processes import is_main_process, wait_for_all
from probattn.inference.runtime.progress import progress_bar
from probattn.text.corpora import Corpus, DataError
from probattn.text.tokens import corpus_tokens
from probattn.text.vocabulary import Vocabulary


@default_promotion()
@one_thread_at_a_time
def fit(
    config: RunConfig | TuneConfig,
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    optimizer: optax.GradientTransformation | None = None,
    mesh: str = "",
    progress: bool = False,
) -> FitResult:
    """Fit a language model with NumPyro's SVI: by MAP, or with another guide, `config.fit.guide`.

    Minibatches and initial parameters are functions of the seed, so a run that was interrupted and
    resumed ends as one that was not. The parameters of the best validation are kept.

    A published model that was imported is fine-tuned under priors centred at its weights: see
    `tuned_decoder`. The run then holds what has moved, and reads the rest from `base`.

    Args:
        config: data, model, objective and fit; of a published model a `TuneConfig`.
        out: run directory, see `runs`; new or empty unless `resume` or `overwrite` is set.
        base: run of the published model, with a `TuneConfig`. A run that is resumed knows its own,
            and notes its new place if it is named.
        resume: continue the run in `out` from its latest checkpoint.
        overwrite: replace the run in `out`.
        optimizer: any optax transformation, by default Adam with warm-up and cosine decay. A line
            search such as that of `optax.lbfgs` is given the loss of the minibatch. It is not
            recorded in the run: pass it again to resume.
        mesh: devices over which minibatches ("data" and "fsdp") and parameters ("fsdp") are
            spread, such as "data=2,fsdp=4"; by default one. It changes no more than rounding, is
            no part of the configuration, and may be another one in a run that is resumed. Of
            several processes (`processes.distributed`) all call `fit`, and the first writes.
        progress: show a progress bar and a line per report.

    Returns:
        The finished run.

    Raises:
        ValueError: if the text is unusable, `out` holds something else, the configuration is not
            the run's (the subclasses DataError, RunError and CheckpointError say which), the
            model is too large for the guide laplace, the optimizer asks for what a step does not
            give, the mesh is none for these devices, or JAX is to check for leaked tracers.
        FitError: if the loss, a parameter, the optimizer state or a reported figure is not finite
            any more. metrics.jsonl says so, see `Run.stopped`; the checkpoint before is kept.
        Interrupted: on SIGINT, SIGTERM or SIGHUP, after the state was saved.
    """
    _check_leaks()
    config, start = with_base(config.resolved(), base, Path(out), resume=resume)
    placement = Placement(mesh, batch=config.fit.batch)
    _check_mesh(config, mesh)
    check_optimizer(config.fit, optimizer)
    kind: type[Run | TunedRun] = TunedRun if isinstance(config, TuneConfig) else Run
    run, corpus = find_run(
        kind,
        Path(out),
        config,
        resume=resume,
        overwrite=overwrite,
        agreed=(mesh,),
        base=start,
    )
    train, validation = training_tokens(corpus, run.vocabulary, run.network.block, config.fit.batch)
    if not resume and isinstance(config, RunConfig):
        check_guide(config, run.vocabulary.size)
    made = not run.path.exists()
    with open_run(run, resume=resume, overwrite=overwrite) as run:
        try:
            loop = Loop(run, train, validation, optimizer, placement)
        except ValueError:
            if not resume and is_main_process():
                clear(run.path)  # new, and refused before the first step: it is no run
                if made:
                    shutil.rmtree(run.path)
            raise
        with progress_bar(
            f"fit {config.objective.name}",
            total=config.fit.steps,
            initial=loop.step,
            unit="step",
            visible=progress and is_main_process(),
        ) as bar:
            if loop.rounding:
                bar.line(f"{run.path}: {loop.rounding}")
            if isinstance(run, TunedRun):
                size = check_tuned_size(run.config, run.network, run.stored)
                bar.line(f"{run.path}: takes {size / 2**30:.1f} GiB of memory at the least")
            loop.go(bar)
        del loop  # its state and the parameters that are read now may be too large together
        if is_main_process():
            summarise_fit(run, validation)
        wait_for_all("concluded")
    score = run.summary()["fit"]
    return FitResult(
        run,
        score["validation_cross_entropy"],
        score["validation_bpc"],
        run.metrics(),
        score["table_certificate"],
    )


def _check_leaks() -> None:
    if jax.config.jax_check_tracer_leaks:
        raise ValueError(
            "JAX_CHECK_TRACER_LEAKS is set: NumPyro's guides keep values of a trace on purpose, "
            "which it takes for leaks: expected a fit without it"
        )


def with_base[C: RunConfig | TuneConfig](
    config: C, base: str | os.PathLike[str] | None, out: Path, *, resume: bool
) -> tuple[C, ImportedRun | None]:
    """Name the run of the published model in a configuration, and return that run.

    Args:
        config: configuration of a fit.
        base: the run as it was named, if it was.
        out: directory of the fit.
        resume: whether the fit goes on. Without a name its model is where it was. A name is noted
            in `out`, also of a fit that has ended, or whose text is gone.

    Raises:
        ValueError: if it is named for a fit that has no use for it, or is not named for one that
            has; RunError if it is no run of a published model, or not that of the fit in `out`.
    """
    if not isinstance(config, TuneConfig):
        if base is not None:
            raise ValueError(
                f"base is {base} with a RunConfig, which describes a network: expected a TuneConfig"
            )
        return config, None
    if base is None and resume:
        found = load_run(out)
        if config.base == BaseConfig() and isinstance(found, TunedRun):
            config = replace(config, base=found.config.base)
        return config, None
    if base is None:
        raise ValueError("base is missing: expected the run of a published model, of `import`")
    run = load_run(base)
    if os.path.realpath(run.path) == os.path.realpath(out):
        raise RunError(f"{out}: is the run that the fit begins with: expected another directory")
    if not isinstance(run, ImportedRun):
        raise RunError(
            f"{run.path}: is no run of `probattn import`: expected one; `probattn export` makes a "
            "model of a fitted run, which can be imported"
        )
    named = BaseConfig(os.path.abspath(run.path), run.checksum, run.network.block)
    if resume:
        if is_main_process():
            move_base(out, named)
        wait_for_all("moved")
    return replace(config, base=named), run


def _check_mesh(config: RunConfig | TuneConfig, mesh: str) -> None:
    if mesh and (isinstance(config, TuneConfig) or config.fit.gradient_accumulation > 1):
        raise ValueError(
            f"mesh is {mesh}: expected none for a published model, and none with "
            "fit.gradient_accumulation, which both are of one device"
        )


def training_tokens(
    corpus: Corpus, vocabulary: Vocabulary, block: int, batch: int
) -> tuple[UInt[np.ndarray, " N"], UInt[np.ndarray, " M"]]:
    """Return the tokens of training and validation text.

    Args:
        corpus: both texts.
        vocabulary: symbols of the tokens.
        block: tokens of a sequence.
        batch: sequences of a minibatch.

    Raises:
        DataError: if there is one symbol alone, a text has no more tokens than a block, or the
            training text less than a minibatch.
    """
    if vocabulary.size < 2:
        raise DataError(f"corpus {corpus.name!r}: has one symbol alone: expected two or more")
    train, validation = corpus_tokens(corpus, vocabulary)
    for part, tokens in (("training", train), ("validation", validation)):
        if len(tokens) <= block:
            raise DataError(
                f"corpus {corpus.name!r}: the {part} text has {len(tokens)} tokens: expected more "
                f"than one block of {block}; give a longer text or a smaller model.block"
            )
    if len(train) < batch * block:
        raise DataError(
            f"corpus {corpus.name!r}: the training text has {len(train)} tokens: expected at least "
            f"a minibatch of {batch} blocks of {block}; give a longer text or a smaller fit.batch"
        )
    return train, validation
