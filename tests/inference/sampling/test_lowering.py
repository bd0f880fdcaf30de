"""Chains that advance together, as a program for accelerators, lowered on any machine."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probattn.inference import SampleConfig
from probattn.inference.sampling.chains import Chains
from probattn.models import (
    LanguageModelConfig,
    LatentEmbeddingsConfig,
    ObjectiveConfig,
    language_model,
    latent_embeddings,
)
from tests.support.lowering import assert_runs_on_accelerators

TOKENS = np.asarray([[0, 1, 2, 0, 1], [2, 1, 0, 0, 2]], np.int32)
NETWORK = LanguageModelConfig(layers=1, heads=1, width=4, block=5, prior_rank=2)
MODELS = {
    "latent": partial(
        latent_embeddings,
        vocabulary_size=3,
        config=LatentEmbeddingsConfig(width=2, sequences=2, length=5),
    ),
    "language": partial(
        language_model, vocabulary_size=3, config=NETWORK, objective=ObjectiveConfig("full")
    ),
}


class TracedError(Exception):
    """The program of the chains, in place of what it would be compiled to."""


class Start:
    """The program that finds where chains start: it gives zeros, since it takes long to compile."""

    def __init__(self, traced):
        self.out_info = traced.out_info

    def lower(self):
        return self

    def compile(self):
        return lambda *_: jax.tree.map(zeros, self.out_info)


def zeros(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)


class TracingJit:
    """`jax.jit` whose programs are traced where they would be lowered to be compiled."""

    def __init__(self, function, **options):
        self._jitted = jit(function, **options)

    def __getattr__(self, name):
        return getattr(self._jitted, name)

    def __call__(self, *arguments, **options):
        return self._jitted(*arguments, **options)

    def trace(self, *arguments):
        return Start(self._jitted.trace(*arguments))

    def lower(self, *arguments):
        raise TracedError(self._jitted.trace(*arguments))


jit = jax.jit


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_chains_that_advance_together(monkeypatch, name):
    config = SampleConfig(
        chains=2, warmup=3, draws=2, chain_method="vectorized", precision="float32"
    )
    arguments = (TOKENS, TOKENS) if name == "language" else (TOKENS,)
    with jax.enable_x64(False):
        monkeypatch.setattr(jax, "jit", TracingJit)
        with pytest.raises(TracedError) as raised:
            Chains(MODELS[name], (arguments, {}), config, {})
        monkeypatch.undo()
        assert_runs_on_accelerators(raised.value.args[0])
