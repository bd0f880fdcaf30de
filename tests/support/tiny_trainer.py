"""A trainer of the tiny text at any parameters, and their prior by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import norm

from probattn.inference import RunConfig
from probattn.inference.runs.checkpoints import named_leaves, with_leaves
from probattn.models import ObjectiveConfig
from probattn.models.language import parameter_shapes
from probattn.text.vocabulary import CharacterVocabulary
from tests.support.tiny_run import BLOCK, FIT, MODEL, START, WIDTH, tiny_text

VOCABULARY = CharacterVocabulary.from_text(tiny_text())
TOKENS = jnp.asarray(VOCABULARY.encode(tiny_text())[:-3])  # no whole number of blocks
SEQUENCES = TOKENS.shape[0] // BLOCK
CE = RunConfig(model=MODEL, objective=ObjectiveConfig("ce"), fit=FIT)
FULL = RunConfig(model=MODEL, objective=ObjectiveConfig("full", 0.7, 0.3, 0.5), fit=FIT)
STATE = "svi.optim_state.1.0."  # of the parameters in the names of the state's leaves


def draw(config, seed=0, **scales):
    """Parameters like those that a fit starts from, those named in `scales` multiplied."""
    rng = np.random.default_rng(seed)
    return {
        name: (("norm" in name) + rng.normal(size=leaf.shape) / 4) * scales.get(name, 1)
        for name, leaf in parameter_shapes(VOCABULARY.size, MODEL, config.objective).items()
    }


def state_at(trainer, parameters, **leaves):
    """State before the first step at given parameters; all else in it is zero."""
    state = jax.eval_shape(trainer.init)
    empty = {
        name: jax.random.key(0) if name == "svi.rng_key" else jnp.zeros(leaf.shape, leaf.dtype)
        for name, leaf in named_leaves(state).items()
    }
    start = {f"{STATE}{name}_auto_loc": jnp.array(value) for name, value in parameters.items()}
    return with_leaves(state, empty | start | leaves)


def assert_close(got, expected, rtol=1e-12, atol=1e-12):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=rtol, atol=atol, err_msg=name)


def log_prior(parameters):
    """As the module `priors` describes it: three times as wide as the start of a network."""
    total = 0.0
    for name, value in parameters.items():
        if "norm" in name:
            total += norm.logpdf(value, 1.0, 0.1).sum()
        elif name in ("w_query", "w_key"):
            total += norm.logpdf(value, 0.0, WIDTH**-0.5).sum()
        else:
            total += norm.logpdf(value, 0.0, 3 * START[name]).sum()
    return total
