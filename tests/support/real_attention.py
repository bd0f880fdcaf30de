"""Small layers of real attention, and what a network would compute with them, from definitions.

The definitions are loops over heads and positions, and know nothing of `probattn`. Complex steps
differentiate them, so nothing is compiled.
"""

import dataclasses
import math

import numpy as np

import probattn as pa
from tests.support.dense import STEP

T, D, R, V = 6, 6, 4, 3
BASE = 7.0
EPS = 1e-3  # of norms: large enough to be seen


@dataclasses.dataclass(frozen=True)
class Options:
    """What a layer has; see `layer`."""

    heads: int = 2
    groups: int = 1
    rotary: str | None = None
    fraction: float = 1.0
    biases: bool = False
    query_norm: bool = False
    norm: str | None = "rms"
    out_norm: bool = False
    scale: float | None = None
    cap: float | None = None
    window: int | None = None
    inner: int = V


OPTIONS = {
    "bare": Options(heads=1, groups=1, norm=None),
    "biases": Options(biases=True, norm="layer", groups=2, inner=2),
    "rotary": Options(rotary="half", biases=True),
    "partly_rotary": Options(rotary="half", fraction=0.5, norm="layer", heads=1),
    "interleaved": Options(rotary="pairs", window=2, scale=0.7, inner=1),
    "query_norm": Options(rotary="half", query_norm=True, heads=4, groups=2),
    "capped": Options(cap=0.8, biases=True, out_norm=True, inner=1),
    "all": Options(
        heads=4,
        groups=2,
        rotary="half",
        biases=True,
        query_norm=True,
        cap=1.1,
        window=3,
        out_norm=True,
        scale=0.9,
    ),
}


def numbers(options, seed=0):
    """Parameters of a layer, and a stream x, as NumPy arrays."""
    rng = np.random.default_rng(seed)

    def drawn(*shape, scale=1.0, mean=0.0):
        return mean + scale * rng.standard_normal(shape)

    heads, groups, inner = options.heads, options.groups, options.inner
    return {
        "x": drawn(T, D),
        "w_query": drawn(heads, D, R, scale=0.8),
        "w_key": drawn(groups, D, R, scale=0.8),
        "w_value": drawn(groups, D, inner, scale=0.6),
        "w_out": drawn(heads, inner, D, scale=0.6),
        "query_bias": drawn(heads, R),
        "key_bias": drawn(groups, R),
        "value_bias": drawn(groups, inner),
        "out_bias": drawn(D),
        "gain": drawn(D, scale=0.2, mean=1.0),
        "norm_bias": drawn(D),
        "query_gain": drawn(R, scale=0.2, mean=1.3),
        "key_gain": drawn(R, scale=0.2, mean=1.3),
        "out_gain": drawn(D, scale=0.2, mean=1.0),
    }


def layer(options, n):
    """The layer of probattn with these options and numbers."""
    biases = ("query_bias", "key_bias", "value_bias", "out_bias") if options.biases else ()
    rotary = None
    if options.rotary:
        rotary = pa.Rotary.of(
            R, base=BASE, fraction=options.fraction, interleaved=options.rotary == "pairs"
        )
    norm = None
    if options.norm:
        bias = n["norm_bias"] if options.norm == "layer" else None
        norm = pa.Norm(n["gain"], bias, kind=options.norm, eps=EPS)
    named = {name: n[name] for name in ("w_query", "w_key", "w_value", "w_out", *biases)}
    return pa.AttentionLayer(
        **named,
        norm=norm,
        query_norm=pa.Norm(n["query_gain"], eps=EPS) if options.query_norm else None,
        key_norm=pa.Norm(n["key_gain"], eps=EPS) if options.query_norm else None,
        out_norm=pa.Norm(n["out_gain"], eps=EPS) if options.out_norm else None,
        rotary=rotary,
        scale=options.scale,
        cap=options.cap,
        window=options.window,
    )


def _dot(one, other):
    return np.sum(one * other, axis=-1, keepdims=True)


def _rms(x, gain):
    return gain * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS)


def _normed(options, n, x):
    if options.norm is None:
        return x
    if options.norm == "rms":
        return _rms(x, n["gain"])
    return _rms(x - np.mean(x, axis=-1, keepdims=True), n["gain"]) + n["norm_bias"]


def _turned(options, vector, position):
    if options.rotary is None:
        return vector
    pairs = round(R * options.fraction) // 2
    matrix = np.eye(R)
    for i in range(pairs):
        angle = position * BASE ** (-i / pairs)
        one, two = (2 * i, 2 * i + 1) if options.rotary == "pairs" else (i, i + pairs)
        matrix[one, one] = matrix[two, two] = math.cos(angle)
        matrix[one, two], matrix[two, one] = -math.sin(angle), math.sin(angle)
    return vector @ matrix.T


def _vector(options, n, token, position, side, head):
    vector = token @ n[f"w_{side}"][head]
    if options.biases:
        vector = vector + n[f"{side}_bias"][head]
    if options.query_norm:
        vector = _rms(vector, n[f"{side}_gain"])
    return _turned(options, vector, position)


def _weights(options, n, tokens, t, past, head):
    """The attention weights of position t over a list of positions."""
    group = head * options.groups // options.heads
    query = _vector(options, n, tokens[..., t, :], t, "query", head)
    logits = []
    for s in past:
        logit = _dot(query, _vector(options, n, tokens[..., s, :], s, "key", group))
        logit = logit * (options.scale or 1 / math.sqrt(R))
        logits.append(options.cap * np.tanh(logit / options.cap) if options.cap else logit)
    raised = [np.exp(logit) for logit in logits]
    return [each / sum(raised) for each in raised]


def _past(options, t, last):
    first = 0 if options.window is None else max(t - options.window, 0)
    return list(range(first, last))


def residuals(options, n, tokens, head):
    """The theory's residuals e_t of one head, (..., T, d), from its tokens n_t."""
    found = []
    for t in range(tokens.shape[-2]):
        past, mean = _past(options, t, t), 0
        if past:
            weights = _weights(options, n, tokens, t, past, head)
            mean = sum(weight * tokens[..., s, :] for weight, s in zip(weights, past, strict=True))
        found.append(tokens[..., t, :] - mean)
    return np.stack(found, axis=-2)


def tokens(options, n):
    """What enters queries and keys, (T, d)."""
    return _normed(options, n, n["x"])


def block(options, n, x):
    """The block that a network runs, (..., T, d) to (..., T, d)."""
    normed, found = _normed(options, n, x), []
    for t in range(x.shape[-2]):
        past, added = _past(options, t, t + 1), 0
        for head in range(options.heads):
            group = head * options.groups // options.heads
            weights = _weights(options, n, normed, t, past, head)
            values = [normed[..., s, :] @ n["w_value"][group] for s in past]
            mean = sum(weight * value for weight, value in zip(weights, values, strict=True))
            mean = mean + n["value_bias"][group] if options.biases else mean
            added = added + mean @ n["w_out"][head]
        added = added + n["out_bias"] if options.biases else added
        found.append(x[..., t, :] + (_rms(added, n["out_gain"]) if options.out_norm else added))
    return np.stack(found, axis=-2)


def jacobian(function, at):
    """The Jacobian (T, d, T, d) of a map of sequences, by complex steps."""
    steps = np.eye(at.size).reshape(at.size, *at.shape)
    changed = np.imag(function(at + 1j * STEP * steps)) / STEP
    return np.moveaxis(changed, 0, -1).reshape(*at.shape, *at.shape)


def diagonal_blocks(function, at):
    """The diagonal blocks (T, d, d) of the Jacobian of a causal map of sequences."""
    whole = jacobian(function, at)
    return np.stack([whole[t, :, t] for t in range(len(at))])
