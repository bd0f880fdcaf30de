"""Posteriors of the tiny text, as small as they can be, that the tests of the upper rooms share.

One is sampled, once for all workers of a session: the first makes it, the others wait. The others
and the runs of fits are made by hand, since nothing here depends on how well they fit.
"""

import shutil
from dataclasses import replace

import filelock
import jax.numpy as jnp
import numpy as np
import pytest

from probattn.inference import SampleConfig, load_run, sample_run
from probattn.inference.runs.segments import Segment, SegmentFolder
from probattn.inference.sampling import posterior_runs
from probattn.inference.sampling.posterior_runs import config_of_fit
from probattn.inference.sampling.sample import fingerprint
from probattn.models.language import parameter_shapes
from probattn.text.corpora import load_corpus
from probattn.text.vocabulary import build_vocabulary
from tests.support.made_runs import create_run
from tests.support.tiny_run import shared_folder

# Of the latent run.
SEQUENCES, LENGTH, WIDTH = 3, 6, 2
CHAINS, WARMUP, DRAWS = 2, 30, 20
LATENT_FLAGS = [
    *("--latent.width", str(WIDTH)),
    *("--latent.sequences", str(SEQUENCES), "--latent.length", str(LENGTH)),
    *("--sample.chains", str(CHAINS), "--sample.warmup", str(WARMUP)),
    *("--sample.draws", str(DRAWS)),
]
# Of the language model: 30 draws are enough for leave-one-out.
LANGUAGE = SampleConfig(chains=2, warmup=20, draws=15, sequences=4, max_tree_depth=3)


def made_once(tmp_path_factory, name, make):
    """The run that `make(path)` leaves, made by the first worker that asks for it."""
    path = shared_folder(tmp_path_factory) / name
    with filelock.FileLock(f"{path}.lock"):
        if not path.exists():
            make(path)
    return load_run(path)


def sample_latent(tiny_run, path):
    """A posterior of latent embeddings on the text of the tiny run, by the command line."""
    from probattn.inference.cli import main

    data = tiny_run.config.data
    command = ["sample", "--data", data.source, "--data.tokenizer", data.tokenizer]
    assert main([*command, "--out", str(path), *LATENT_FLAGS]) == 0


def language_by_hand(tiny_run, path):
    """The run of a posterior of the network of the tiny run: draws near its parameters.

    As sampling leaves it, without the minute that NUTS takes to compile.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(posterior_runs, "sample", _draw_near)
        sample_run(config_of_fit(tiny_run, LANGUAGE), path, init_values=tiny_run.parameters)


def _draw_near(model, *, model_args, config, init_values, out, **_):
    rng, chains = np.random.default_rng(0), config.chains
    segments = SegmentFolder(out)
    for first, stop in ((0, config.warmup), (config.warmup, config.warmup + config.draws)):
        kept = stop - first if first else 0
        draws = {
            name: np.asarray(value) + 0.05 * rng.standard_normal((chains, kept, *value.shape))
            for name, value in init_values.items()
        }
        shape = chains, stop - first
        statistics = {
            "diverging": np.zeros(shape, bool),
            "acceptance_rate": np.full(shape, 0.8),
            "n_steps": np.full(shape, 7),
            "energy": rng.standard_normal(shape),
            "step_size": np.full(shape, 0.1),
            "lp": rng.standard_normal(shape),
            "seconds": np.full(shape, float(stop)),
        }
        digest = fingerprint(config, model, model_args)
        segments.save(Segment(first, stop, draws, statistics, {}, digest))


def fitted_by_hand(tiny_run, path, *, guide="map", text=None, **objective):
    """A run as a fit leaves it, with the parameters of the tiny run and further ones drawn.

    Args:
        tiny_run: whose configuration, text and parameters it has.
        path: of the run.
        guide: "map", or "mean_field" with scales of a tenth.
        text: file of another text with the same symbols.
        objective: fields that differ.
    """
    config = tiny_run.config
    config = replace(
        config,
        objective=replace(config.objective, **objective),
        fit=replace(config.fit, guide=guide),
        data=replace(config.data, source=str(text)) if text else config.data,
    )
    corpus = load_corpus(config.data)
    vocabulary = build_vocabulary(config.data.tokenizer, corpus.train + corpus.validation)
    shapes = parameter_shapes(vocabulary.size, config.model, config.objective)
    assert {name: leaf.shape for name, leaf in shapes.items() if name in tiny_run.parameters} == {
        name: tiny_run.parameters[name].shape for name in shapes if name in tiny_run.parameters
    }
    rng = np.random.default_rng(0)
    parameters = {
        name: tiny_run.parameters.get(name, jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype))
        for name, leaf in shapes.items()
    }
    parts = {}
    if guide == "mean_field":
        parts["guide"] = {
            **{f"{name}_auto_loc": value for name, value in parameters.items()},
            **{
                f"{name}_auto_scale": jnp.full_like(value, 0.1)
                for name, value in parameters.items()
            },
        }
    run = create_run(path, config, corpus, vocabulary)
    run.best.save(tiny_run.step, parameters, **parts)
    for row in tiny_run.metrics():
        run.append_metrics(row)
    if objective.get("name") == "ce" and text is None:
        shutil.copy(tiny_run.path / "post_hoc_prior.npz", run.path)  # of the same embeddings
    return load_run(run.path)
