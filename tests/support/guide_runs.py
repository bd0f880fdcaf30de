"""What tests of guides share: a tiny text and model, their objective by hand, sure statistics."""

import dataclasses
import math
import random

import jax
import jax.numpy as jnp
import numpy as np

from probattn.inference import FitConfig, RunConfig
from probattn.models import LanguageModelConfig, ObjectiveConfig
from probattn.text.corpora import DataConfig

WIDTH, BLOCK, WEIGHT = 2, 4, 0.05  # the last is that of the barrier
MODEL = LanguageModelConfig(layers=1, heads=1, width=WIDTH, block=BLOCK, prior_rank=1)
FIT = FitConfig(
    steps=400, batch=16, warmup=5, learning_rate=0.02, eval_every=200, checkpoint_every=100
)
SURE = 5.0  # standard errors of a Monte Carlo estimate: a false alarm in a million


def tiny_text():
    """A text of three symbols, each of which likes others to follow it."""
    rng, text = random.Random(0), "a"
    while len(text) < 2000:
        text += rng.choice({"a": "abb", "b": "bca", "c": "aac"}[text[-1]])
    return text


def config_of(folder, guide, objective="margin", **schedule):
    schedule = dataclasses.replace(FIT, guide=guide, **schedule)
    return RunConfig(DataConfig(str(folder / "text")), MODEL, ObjectiveConfig(objective), schedule)


def training_text(run):
    return (run.path.parent / "text").read_text()[:1800]


def flat(sites, axes=0):
    """Values of all sites as vectors, in the order of their names, behind some leading axes."""
    values = [np.asarray(sites[name]) for name in sorted(sites)]
    return np.concatenate([v.reshape(*v.shape[:axes], -1) for v in values], axis=-1)


# The objective, by hand


def normal(x, mean, scale):
    return -(((x - mean) / scale) ** 2) / 2 - math.log(scale) - math.log(2 * math.pi) / 2


def log_prior(p):
    into_stream = 1 / math.sqrt(2)
    scales = {
        "token_embedding": 3 * 0.05,
        "position_embedding": 3 * 0.05,
        "attention_in": 3 / math.sqrt(WIDTH),
        "attention_out": 3 / math.sqrt(WIDTH) * into_stream,
        "mlp_in": 3 / math.sqrt(WIDTH),
        "mlp_out": 3 / math.sqrt(4 * WIDTH) * into_stream,
        "w_query": 1 / math.sqrt(WIDTH),
        "w_key": 1 / math.sqrt(WIDTH),
    }
    return sum(
        normal(value, 1.0, 0.1).sum() if "norm" in name else normal(value, 0.0, scales[name]).sum()
        for name, value in p.items()
    )


def standardised(x, gain):
    centred = x - x.mean(-1, keepdims=True)
    return gain * centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def softmax(scores):
    odds = jnp.exp(scores)
    return odds / odds.sum(-1, keepdims=True)


def block_chances(p, tokens):
    """Of one block of BLOCK tokens: what each symbol's chance is to follow each of them.

    With a table of the output's own, if there is one.
    """
    x = p["token_embedding"][tokens] + p["position_embedding"]
    query, key, value = jnp.split(
        standardised(x, p["attention_norm"][0]) @ p["attention_in"][0], 3, axis=1
    )
    attended = [
        softmax(key[: t + 1] @ query[t] / math.sqrt(WIDTH)) @ value[: t + 1] for t in range(BLOCK)
    ]
    y = x + jnp.stack(attended) @ p["attention_out"][0]
    hidden = standardised(y, p["mlp_norm"][0]) @ p["mlp_in"][0]
    gelu = hidden / 2 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    y = y + gelu @ p["mlp_out"][0]
    table = p.get("output_embedding", p["token_embedding"])
    return softmax(standardised(y, p["final_norm"]) @ table.T)


def block_loss(p, tokens):
    """Of one block of BLOCK + 1 tokens: cross-entropy and barrier, all determinants > 0.001.

    Objective ce has no barrier, and no parameters of it.
    """
    x = p["token_embedding"][tokens[:-1]] + p["position_embedding"]
    barrier = 0.0
    for t in range(2, BLOCK) if "w_key" in p else ():
        past, coupling = x[:t], p["w_key"] @ p["w_query"].T
        alpha = softmax(past @ coupling @ x[t])
        centred = past - alpha @ past
        covariance = (alpha[:, None] * centred).T @ centred
        barrier -= jnp.log(jnp.linalg.det(jnp.eye(WIDTH) - covariance @ coupling))
    chosen = jnp.take_along_axis(block_chances(p, tokens[:-1]), tokens[1:, None], -1)
    return -jnp.log(chosen).sum() + WEIGHT * barrier


def objective(run):
    """Minus the log joint: the mean over blocks at every offset, for N / block of them."""
    tokens = run.vocabulary.encode(training_text(run))
    blocks = np.stack([tokens[i : i + BLOCK + 1] for i in range(len(tokens) - BLOCK)])

    def loss(p):
        return 450 * jnp.mean(jax.vmap(lambda block: block_loss(p, block))(blocks)) - log_prior(p)

    return loss


def assert_standard(draws):
    """Standard normal in every direction, those that the model knows least among them."""
    count, size = draws.shape
    np.testing.assert_allclose(draws.mean(0), 0, atol=SURE / math.sqrt(count))
    covariance = draws.T @ draws / count
    np.testing.assert_allclose(np.diag(covariance), 1, atol=SURE * math.sqrt(2 / count))
    off = covariance - np.diag(np.diag(covariance))
    np.testing.assert_allclose(off, np.zeros((size, size)), atol=SURE / math.sqrt(count))
