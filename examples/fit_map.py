"""Fit `language_model` by MAP with NumPyro's own SVI and AutoDelta, and nothing of probattn's.

    python examples/fit_map.py [--steps 300] [--width 64]

Prints the loss in nats per token and a stability margin at the end.
"""

import argparse
from functools import partial
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpyro
import optax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta

import probattn as pa
from probattn.models import LanguageModelConfig, ObjectiveConfig, language_model

parser = argparse.ArgumentParser(description="fit language_model by MAP with NumPyro alone")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--width", type=int, default=64)
options = parser.parse_args()

# Text: Python's own language reference, one symbol per character.
text = "\n".join(topics[name] for name in sorted(topics))
symbols = sorted(set(text))
index = {symbol: number for number, symbol in enumerate(symbols)}
tokens = jnp.array([index[character] for character in text])

config = LanguageModelConfig(layers=2, heads=2, width=options.width, block=64, prior_rank=8)
batch, block = 12, config.block
model = partial(
    language_model,
    vocabulary_size=len(symbols),
    config=config,
    objective=ObjectiveConfig("margin", barrier_weight=0.05),
    num_sequences=len(tokens) // block,  # the minibatch stands for the whole text
)


def minibatch(step):
    key = jax.random.fold_in(jax.random.key(1), step)
    starts = jax.random.randint(key, (batch, 1), 0, len(tokens) - block)
    blocks = tokens[starts + jnp.arange(block + 1)]
    return blocks[:, :-1], blocks[:, 1:]


guide = AutoDelta(model)
# The loss in nats per token instead of nats per text.
per_token = partial(numpyro.handlers.scale, scale=1 / len(tokens))
svi = SVI(per_token(model), per_token(guide), optax.adam(3e-3), Trace_ELBO())
state = svi.init(jax.random.key(0), *minibatch(0))


@jax.jit
def ten_steps(state, start):
    return jax.lax.scan(
        lambda state, step: svi.update(state, *minibatch(step)), state, start + jnp.arange(10)
    )


for start in range(0, options.steps, 10):
    state, losses = ten_steps(state, start)
    if start % 100 == 0:
        print(f"step {start:5d}  loss {losses.mean():.3f} nats per token")

parameters = guide.median(svi.get_params(state))
inputs, _ = minibatch(0)
x = parameters["token_embedding"][inputs] + parameters["position_embedding"]
margin = pa.stability_margin(x, parameters["w_query"], parameters["w_key"])
print(f"final loss {losses.mean():.3f}; smallest margin (sigma_min, trained) {margin.min():.3f}")
