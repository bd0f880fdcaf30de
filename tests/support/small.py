"""What makes the commands, the examples and the README cheap enough to run in the tests."""

import importlib
from contextlib import contextmanager
from pydoc_data import topics as reference

import jax
import pytest

from probattn.inference.evaluation import post_hoc
from probattn.inference.paper import data as paper_data

# The package's attribute of that name is the function.
evaluate = importlib.import_module("probattn.inference.evaluation.evaluate")

FLAGS = [
    *("--model.layers", "1", "--model.heads", "2", "--model.width", "8", "--model.block", "16"),
    *("--model.prior-rank", "2", "--fit.steps", "8", "--fit.warmup", "2", "--fit.batch", "4"),
    *("--fit.eval-every", "4"),
]
TUNE_FLAGS = ["--fit.steps", "2", "--fit.batch", "2", "--fit.evaluation-tokens", "256"]
SAMPLE_FLAGS = [
    *("--sample.chains", "1", "--sample.warmup", "8", "--sample.draws", "6"),
    *("--sample.max-tree-depth", "3"),
]
EVALUATE_FLAGS = ["--ascent-tokens", "128"]
SENSITIVITY_FLAGS = ["--most-tokens", "256", "--draws", "1"]
CHARACTERS = 20_000  # of Python's language reference
MAP_SIZE = 4  # of the paper's map of proper conditionals
LATENT_FLAGS = ["--latent.width", "2", "--latent.sequences", "2", "--latent.length", "6"]


@contextmanager
def quick_compilation():
    """Compile without XLA's expensive optimisations, which tiny programs do not repay.

    Not for checks of digits: sums may be taken in another order.
    """
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def short_reference(patch: pytest.MonkeyPatch) -> None:
    """Python's language reference, cut short."""
    text = "\n".join(reference.topics[name] for name in sorted(reference.topics))
    patch.setattr(reference, "topics", {"all": text[:CHARACTERS]})


def cheap_figures(patch: pytest.MonkeyPatch) -> None:
    """The paper's figures from few sequences and on a coarse grid."""
    mass_map = paper_data.mass_map
    patch.setattr(paper_data, "SEQUENCES", 50)
    patch.setattr(paper_data, "mass_map", lambda bound: mass_map(bound, size=MAP_SIZE))


def cheap_post_hoc(patch: pytest.MonkeyPatch) -> None:
    """A post-hoc prior from little text in few steps, and margins at few positions."""
    patch.setattr(post_hoc, "TOKENS", 256)
    patch.setattr(post_hoc, "STEPS", 5)
    patch.setattr(post_hoc, "STARTS", 2)
    patch.setattr(evaluate, "MARGIN_TOKENS", 256)
