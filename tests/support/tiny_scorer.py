"""A scorer of a random network on a random text of six symbols, for the tests of losses."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from probattn.inference.evaluation import scoring
from probattn.inference.evaluation.scoring import Scorer
from probattn.models import ObjectiveConfig
from probattn.models.language import parameter_shapes
from probattn.models.networks import TransformerNetwork
from tests.support.tiny_run import BLOCK, MODEL

SIZE = 6  # of the vocabulary
# Characters of each token, as of byte pairs: several, or none where one goes on.
CHARACTERS = np.array([1, 2, 3, 0, 5, 1], np.int32)
VOCABULARY = SimpleNamespace(size=SIZE, token_characters=CHARACTERS)
LONG = 8 * scoring.BATCH + 3 * BLOCK + 5  # two calls, the second not full, and a rest of a block


def draw(seed=0, **factors):
    rng = np.random.default_rng(seed)
    shapes = parameter_shapes(SIZE, MODEL, ObjectiveConfig("margin"))
    return {
        name: jnp.asarray(
            ("norm" in name) + rng.normal(size=leaf.shape) / 2 * factors.get(name, 1), leaf.dtype
        )
        for name, leaf in shapes.items()
    }


PARAMETERS = draw()


def text(length, seed=1):
    return np.random.default_rng(seed).integers(0, SIZE, length).astype(np.int32)


def scorer_of(tokens, precision="float32", **options):
    return Scorer(TransformerNetwork(MODEL, precision), VOCABULARY, tokens, **options)
