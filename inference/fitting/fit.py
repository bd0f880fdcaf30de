"""Fit a language model by SVI: what is checked before, and the run directory that it leaves."""

import os
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
from jaxtyping import UInt

from probattn.blocks.promotion import default_promotion
from probattn.inference.config import RunConfig
from probattn.inference.fitting.guides import check_guide
from probattn.inference.fitting.loop import Loop
from probattn.inference.fitting.optimizers import check_optimizer
from probattn.inference.fitting.reports import summarise_fit
from probattn.inference.fitting.result import FitResult
from probattn.inference.fitting.sharding import Placement
from probattn.inference.runs.folder import clear
from probattn.inference.runs.opening import find_run, open_run
from probattn.inference.runs.run import Run
from probattn.inference.runtime.one_thread import one_thread_at_a_time
from probattn.inference.runtime.processes import is_main_process, wait_for_all
from probattn.inference.runtime.progress import progress_bar
from probattn.text.corpora import Corpus, DataError
from probattn.text.tokens import corpus_tokens
from probattn.text.vocabulary import Vocabulary


@default_promotion()
@one_thread_at_a_time
def fit(
    config: RunConfig,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    optimizer: optax.GradientTransformation | None = None,
    mesh: str = "",
    progress: bool = False,
) -> FitResult:
    """Fit a language model with NumPyro's SVI: by MAP, or with another guide, `config.fit.guide`.

    Minibatches and initial parameters are functions of the seed, so a run that was interrupted and
    resumed ends as one that was not. The parameters of the best validation are kept.

    Args:
        config: data, model, objective and fit.
        out: run directory, see `runs`; new or empty unless `resume` or `overwrite` is set.
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
    config = config.resolved()
    placement = Placement(mesh, batch=config.fit.batch)
    check_optimizer(config.fit, optimizer)
    run, corpus = find_run(
        Run, Path(out), config, resume=resume, overwrite=overwrite, agreed=(mesh,)
    )
    train, validation = training_tokens(corpus, run.vocabulary, config)
    if not resume:
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
            loop.go(bar)
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


def training_tokens(
    corpus: Corpus, vocabulary: Vocabulary, config: RunConfig
) -> tuple[UInt[np.ndarray, " N"], UInt[np.ndarray, " M"]]:
    """Return the tokens of training and validation text.

    Raises:
        DataError: if there is one symbol alone, a text has no more tokens than a block, or the
            training text less than a minibatch.
    """
    if vocabulary.size < 2:
        raise DataError(f"corpus {corpus.name!r}: has one symbol alone: expected two or more")
    train, validation = corpus_tokens(corpus, vocabulary)
    block, batch = config.model.block, config.fit.batch
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
