"""Sampled posteriors as run directories: the model, its text and its draws."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from probattn.blocks.promotion import default_promotion
from probattn.inference.config_files import differences
from probattn.inference.config_sampling import SampleConfig, SampleRunConfig
from probattn.inference.guides.guide_draws import guide_draws
from probattn.inference.runs.checks import check_same_corpus
from probattn.inference.runs.files import RunError
from probattn.inference.runs.folder import clear
from probattn.inference.runs.npz import read_arrays
from probattn.inference.runs.opening import find_run, open_run
from probattn.inference.runs.run import FittedRun, PosteriorRun, Run, load_fit
from probattn.inference.sampling.chains import SampleError
from probattn.inference.sampling.initialisation import given_values
from probattn.inference.sampling.result import PosteriorResult
from probattn.inference.sampling.sample import load_draws, sample
from probattn.models import language_model, latent_embeddings
from probattn.text.batches import windows
from probattn.text.corpora import Corpus, DataError, load_corpus
from probattn.text.tokens import corpus_tokens
from probattn.text.vocabulary import Vocabulary


@default_promotion()
def sample_run(
    config: SampleRunConfig,
    out: str | os.PathLike[str],
    *,
    init_values: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    start: Mapping[str, Any] | None = None,
) -> tuple[PosteriorRun, PosteriorResult]:
    """Sample the posterior of a model given a text, into a run directory.

    Args:
        config: data, model and sampler.
        out: run directory, see `runs`; new or empty unless `resume` or `overwrite` is set.
        init_values: see `sample`; they are kept in the run, and not given again to resume.
        resume: go on with the run in `out`.
        overwrite: replace the run in `out`.
        progress: show a progress bar.
        start: the old name of `init_values`, which works for one more version.

    Returns:
        The run, and its draws.

    Raises:
        ValueError: if the text is unusable, the run larger than the memory, `out` holds something
            else, the configuration is not the run's, or its segments are damaged (RunError,
            DataError and SegmentError say which).
        SampleError: if a chain finds no start of positive density.
        Interrupted: on SIGINT, SIGTERM or SIGHUP, after the draws so far were saved.
    """
    init_values = given_values(init_values, start)
    out = Path(out)
    run, corpus = find_run(PosteriorRun, out, config, resume=resume, overwrite=overwrite)
    arguments = _tokens(config, corpus, run.vocabulary)
    if resume:
        init_values = _read_start(run)
    made = not out.exists()
    with open_run(run, resume=resume, overwrite=overwrite, start=init_values) as run:
        try:
            result = sample(
                _sampled_model(config, run.vocabulary),
                model_args=arguments,
                config=config.sample,
                init_values=init_values,
                out=run.segments.path,
                resume=True,
                progress=progress,
            )
        except (ValueError, SampleError):
            if not resume and not run.segments.ranges():
                clear(out)  # new, and nothing was sampled: it is no run
                if made:
                    shutil.rmtree(out)
            raise
    if config.sample.is_stochastic:  # the draws are of the model of all sequences
        result = replace(result, model=posterior_model(config, run.vocabulary))
    return run, result


def fitted_starts(
    paths: Sequence[str | os.PathLike[str]], config: SampleConfig
) -> tuple[SampleRunConfig, dict[str, np.ndarray]]:
    """Describe the posterior of fitted runs of one model, which chains start from.

    Args:
        paths: the run; of method ensemble a run for each chain.
        config: how the posterior is sampled.

    Returns:
        The configuration, and initial values for `sample_run`.

    Raises:
        ValueError: if there are more or fewer runs than the method takes, or they are not of the
            same model and text.
    """
    each_chain = config.method == "ensemble"
    if len(paths) != (config.chains if each_chain else 1):
        raise ValueError(
            f"--from names {len(paths)} runs with sample.method {config.method} and sample.chains "
            f"{config.chains}: expected {'a run for each chain' if each_chain else 'one run'}"
            f"{'' if each_chain else '; several are for the method ensemble'}"
        )
    runs = [load_fit(path) for path in paths]
    described = [config_of_fit(run, config) for run in runs]
    for path, other in zip(paths, described, strict=True):
        if changed := differences(described[0], other):
            raise ValueError(
                f"{path}: differs from {paths[0]} in {', '.join(changed)}: expected runs of one "
                "model, objective and text, such as fits of different seeds"
            )
    values = [{n: np.asarray(value) for n, value in run.parameters.items()} for run in runs]
    if not each_chain:
        return described[0], values[0]
    return described[0], {n: np.stack([each[n] for each in values]) for n in values[0]}


def config_of_fit(run: Run, config: SampleConfig) -> SampleRunConfig:
    """Describe the posterior of a fitted run's own model, given sequences of its own text."""
    return SampleRunConfig(
        data=run.config.data,
        sample=config,
        model=run.config.model,
        objective=run.config.objective,
    )


@default_promotion()
def load_posterior(run: PosteriorRun) -> PosteriorResult:
    """Load the draws of a run that is finished, without compiling or sampling anything.

    Raises:
        RunError: if it is not finished.
        SegmentError: if its segments are damaged.
        ValueError: if its text is not there any more.
    """
    draws, statistics, seconds, done = load_draws(run.segments, run.config.sample)
    total = run.config.sample.warmup + run.config.sample.draws
    if done < total:
        raise RunError(
            f"{run.path}: has {done} of {total} iterations; finish it with sample --resume"
        )
    return PosteriorResult(
        method=run.config.sample.method,
        draws=draws,
        model=posterior_model(run.config, run.vocabulary),
        model_args=posterior_data(run),
        statistics=statistics,
        seconds=seconds,
        config=run.config.sample,
    )


def guide_posterior(
    run: Run, *, draws: int = 1000, seed: int = 0, sequences: int = 64, progress: bool = False
) -> PosteriorResult:
    """Draw from a fitted run's guide, as one chain, given sequences of its training text.

    Args:
        run: run with a guide other than map.
        draws: how many.
        seed: seed of the draws.
        sequences: at most so many of model.block tokens, spread evenly over the training text:
            margins and log likelihoods are taken of these.
        progress: show a progress bar.

    Raises:
        ValueError: if the run is a MAP run, which has no draws; see `guide_draws`.
    """
    found = guide_draws(run, draws=draws, seed=seed, progress=progress)
    config = config_of_fit(run, SampleConfig(sequences=sequences))
    model = posterior_model(config, run.vocabulary)
    return PosteriorResult(
        method=run.config.fit.guide,
        draws=found,
        model=partial(model, own_output=True) if "output_embedding" in found else model,
        model_args=training_sequences(run, sequences),
    )


def training_sequences(run: FittedRun, at_most: int) -> tuple[np.ndarray, ...]:
    """Return inputs and targets (count, block) from the training text of a run.

    Raises:
        ValueError: if its text is not there any more, or too short for one.
    """
    corpus = load_corpus(run.config.data)
    check_same_corpus(run, corpus)
    tokens, _ = corpus_tokens(corpus, run.vocabulary)
    length = run.network.block
    count = max(min(at_most, (len(tokens) - 1) // length), 1)
    return _spread(tokens, corpus, count=count, length=length, shifts=2)


def posterior_data(run: PosteriorRun) -> tuple[np.ndarray, ...]:
    """Return the tokens that a run's posterior is given, as its model takes them.

    Raises:
        ValueError: if its text is not there any more.
    """
    corpus = load_corpus(run.config.data)
    check_same_corpus(run, corpus)
    return _tokens(run.config, corpus, run.vocabulary)


def posterior_model(config: SampleRunConfig, vocabulary: Vocabulary) -> Callable:
    """Return the NumPyro model of a configuration, as a function of its tokens."""
    if config.latent is not None:
        return partial(latent_embeddings, vocabulary_size=vocabulary.size, config=config.latent)
    assert config.model is not None  # SampleRunConfig has one or the other
    return partial(
        language_model,
        vocabulary_size=vocabulary.size,
        config=config.model,
        objective=config.objective,
        margins=True,
    )


def _sampled_model(config: SampleRunConfig, vocabulary: Vocabulary) -> Callable:
    """Return the model whose gradients a method takes: of minibatches, or of all sequences."""
    model = posterior_model(config, vocabulary)
    if not config.sample.is_stochastic or config.latent is not None:
        return model
    return partial(model, minibatch=config.sample.batch)


def _tokens(
    config: SampleRunConfig, corpus: Corpus, vocabulary: Vocabulary
) -> tuple[np.ndarray, ...]:
    """Return the model's arguments: sequences from the training text, spread evenly over it."""
    tokens, _ = corpus_tokens(corpus, vocabulary)
    if config.latent is not None:
        count, length = config.latent.sequences, config.latent.length
        return _spread(tokens, corpus, count=count, length=length, shifts=1)
    assert config.model is not None
    count, length = config.sample.sequences, config.model.block
    return _spread(tokens, corpus, count=count, length=length, shifts=2)


def _spread(
    tokens: np.ndarray, corpus: Corpus, *, count: int, length: int, shifts: int
) -> tuple[np.ndarray, ...]:
    usable = (len(tokens) - 1) // length * length  # whatever the shifts: models may be compared
    if usable < count * length:
        raise DataError(
            f"corpus {corpus.name!r}: the training text has {len(tokens)} tokens: expected at "
            f"least {count} sequences of {length}; give a longer text, or fewer or shorter "
            "sequences"
        )
    plan = windows(usable, block=length).spread(count * length)
    return tuple(plan.take(tokens[shift:]) for shift in range(shifts))


def _read_start(run: PosteriorRun) -> dict[str, np.ndarray] | None:
    path = run.path / "start.npz"
    if not path.exists():
        return None
    try:
        return read_arrays(path)
    # NumPy and zipfile raise what they meet: EOFError, BadZipFile and others.
    except Exception as error:
        raise RunError(f"{path}: damaged ({error}); start again with --overwrite") from None
