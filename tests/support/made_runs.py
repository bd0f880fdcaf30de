"""Runs made by hand, without a fit, and copies of one to do anything with."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from probattn.inference import FitConfig, RunConfig
from probattn.inference.runs.folder import check_target
from probattn.inference.runs.opening import new_run, open_run
from probattn.inference.runs.run import Run
from probattn.models import ObjectiveConfig
from probattn.text.corpora import Corpus
from probattn.text.vocabulary import CharacterVocabulary
from tests.support.tiny_run import MODEL

TEXT = 'text with a quote ", a backslash \\, é, 🦞, \u2028 and\na newline'
CORPUS = Corpus("book.txt", TEXT, TEXT[::-1], 'file "book".txt')
VOCABULARY = CharacterVocabulary.from_text(TEXT)
CONFIG = RunConfig(model=MODEL, objective=ObjectiveConfig("margin"), fit=FitConfig(steps=300))
ROWS = [{"step": 4, "loss": 3.25, "tokens_per_s": None}, {"step": 8, "loss": 1e-300}]


def draw(shapes, seed=0):
    """Arrays of given shapes and dtypes, each entry different."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for name, leaf in shapes.items()
    }


def create_run(path, config, corpus, vocabulary, *, overwrite=False):
    """A run of a fit that has taken no step."""
    check_target(Path(path), overwrite=overwrite)
    with open_run(new_run(Run, Path(path), config, corpus, vocabulary), overwrite=overwrite) as run:
        return run


def make_run(path, **options):
    """A run as a fit of eight steps leaves it."""
    run = create_run(path, CONFIG, CORPUS, VOCABULARY, **options)
    for row in ROWS:
        run.append_metrics(row)
    run.best.save(8, draw(run.parameter_shapes()))
    run.latest.save(8, {"svi.count": jnp.int32(8), "svi.rng_key": jnp.array([1, 2], jnp.uint32)})
    run.update_summary(fit={"steps": 8})
    return run


ARRAYS = {
    "a.b": jnp.asarray(np.random.default_rng(0).normal(size=(90, 70))),
    "single": jnp.array([[1.5, -0.0, jnp.inf]], jnp.float32),
    "zeros": jnp.zeros((3, 2)),
    "count": jnp.int32(2**31 - 1),
    "key": jnp.array([1, 2**32 - 1], jnp.uint32),
}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape)
        assert np.asarray(got[name]).tobytes() == np.asarray(value).tobytes(), name
