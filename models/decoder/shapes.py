"""The parameter tree of a decoder: which arrays it has, and their shapes."""

from collections.abc import Iterator, Mapping
from typing import Any

from probattn.models.decoder.config import DecoderConfig

Shapes = dict[str, Any]
"""A tree of dictionaries whose leaves are shapes."""


def parameter_shapes(config: DecoderConfig) -> Shapes:
    """Return the tree of a decoder's parameters, with shapes in place of arrays.

    With V token ids, C tokens of context, width d, H heads, G heads of keys, head width r and MLP
    width m, the leaves are

    - `embedding.tokens` (V, d) and, without rotary positions, `embedding.positions` (C, d);
    - `layers.0` and so on, see `layer_shapes`;
    - `final_norm.gain` (d,), and `final_norm.bias` where norms have one;
    - `output.weights` (d, V) where the output is not tied to the embedding.
    """
    tree: Shapes = {"embedding": {"tokens": (config.vocabulary, config.width)}}
    if config.rotary is None:
        tree["embedding"]["positions"] = (config.context, config.width)
    tree["layers"] = {str(layer): layer_shapes(config) for layer in range(config.layers)}
    tree["final_norm"] = _norm(config, config.width)
    if not config.tied:
        tree["output"] = {"weights": (config.width, config.vocabulary)}
    return tree


def layer_shapes(config: DecoderConfig) -> Shapes:
    """Return the tree of one layer's parameters.

    Its leaves are `query.weights` (d, H, r), `key.weights` and `value.weights` (d, G, r),
    `out.weights` (H, r, d), `up.weights` (d, m), `down.weights` (m, d), those of `attention_norm`
    and `mlp_norm`, and as the configuration says `gate`, `query_norm`, `key_norm`,
    `attention_post_norm`, `mlp_post_norm` and biases beside weights.
    """
    d, r, m = config.width, config.head_width, config.hidden
    heads, groups = config.heads, config.key_heads
    tree = {
        "attention_norm": _norm(config, d),
        "query": _linear((d, heads, r), (heads, r), config.attention_bias),
        "key": _linear((d, groups, r), (groups, r), config.attention_bias),
        "value": _linear((d, groups, r), (groups, r), config.attention_bias),
        "out": _linear((heads, r, d), (d,), config.out_bias),
        "mlp_norm": _norm(config, d),
        "up": _linear((d, m), (m,), config.mlp_bias),
        "down": _linear((m, d), (d,), config.mlp_bias),
    }
    if config.gated:
        tree["gate"] = _linear((d, m), (m,), config.mlp_bias)
    if config.query_norm:
        tree |= {"query_norm": _norm(config, r), "key_norm": _norm(config, r)}
    if config.post_norms:
        tree |= {"attention_post_norm": _norm(config, d), "mlp_post_norm": _norm(config, d)}
    return tree


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a tree of dictionaries by name, such as `layers.0.query.weights`."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def with_leaf(tree: Mapping[str, Any], name: str, leaf: Any) -> dict[str, Any]:
    """Return the tree with another leaf of this name; branches that it is not in are shared."""
    first, _, rest = name.partition(".")
    return {**tree, first: with_leaf(tree[first], rest, leaf) if rest else leaf}


def _norm(config: DecoderConfig, width: int) -> Shapes:
    return {"gain": (width,)} | ({"bias": (width,)} if config.norm_bias else {})


def _linear(weights: tuple[int, ...], bias: tuple[int, ...], biased: bool) -> Shapes:
    return {"weights": weights} | ({"bias": bias} if biased else {})
