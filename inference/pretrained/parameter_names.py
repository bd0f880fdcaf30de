"""Tensors of Hugging Face's checkpoints and the parameter tree of a decoder, both ways.

A row of a table has a tensor's name, how its axes become those of the tree, and the leaves that it
holds. Axes are written as words: d width, h heads, k heads of keys, r head width, m width of the
MLP, v vocabulary, c context, and 3 parts that lie side by side. In `(h r) d -> d h r` the
checkpoint has one axis of h r entries and one of d. Leaves that share a tensor are its parts along
the first axis of the right side.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probattn.messages import legible
from probattn.models.decoder.config import DecoderConfig
from probattn.models.decoder.shapes import leaves, parameter_shapes

Row = tuple[str, str, tuple[str, ...]]


def _row(name: str, axes: str, *leaves: str) -> Row:
    return name, axes, leaves


def _norm(name: str, leaf: str, axis: str = "d") -> tuple[Row, Row]:
    return (
        _row(f"{name}.weight", f"{axis} -> {axis}", f"{leaf}.gain"),
        _row(f"{name}.bias", f"{axis} -> {axis}", f"{leaf}.bias"),
    )


def _linear(name: str, weights: str, bias: str, *leaves: str) -> tuple[Row, Row]:
    return (
        _row(f"{name}.weight", weights, *(f"{leaf}.weights" for leaf in leaves)),
        _row(f"{name}.bias", bias, *(f"{leaf}.bias" for leaf in leaves)),
    )


_QKV = ("query", "key", "value")
_GPT2 = (
    _row("wte.weight", "v d -> v d", "embedding.tokens"),
    _row("wpe.weight", "c d -> c d", "embedding.positions"),
    *_norm("ln_f", "final_norm"),
)
_GPT2_LAYER = (
    *_norm("ln_1", "attention_norm"),
    *_linear("attn.c_attn", "d (3 h r) -> 3 d h r", "(3 h r) -> 3 h r", *_QKV),
    *_linear("attn.c_proj", "(h r) d -> h r d", "d -> d", "out"),
    *_norm("ln_2", "mlp_norm"),
    *_linear("mlp.c_fc", "d m -> d m", "m -> m", "up"),
    *_linear("mlp.c_proj", "m d -> m d", "d -> d", "down"),
)
_NEOX = (
    _row("embed_in.weight", "v d -> v d", "embedding.tokens"),
    *_norm("final_layer_norm", "final_norm"),
)
_NEOX_LAYER = (
    *_norm("input_layernorm", "attention_norm"),
    *_linear("attention.query_key_value", "(h 3 r) d -> 3 d h r", "(h 3 r) -> 3 h r", *_QKV),
    *_linear("attention.dense", "d (h r) -> h r d", "d -> d", "out"),
    *_norm("post_attention_layernorm", "mlp_norm"),
    *_linear("mlp.dense_h_to_4h", "m d -> d m", "m -> m", "up"),
    *_linear("mlp.dense_4h_to_h", "d m -> m d", "d -> d", "down"),
)
_LLAMA = (
    _row("embed_tokens.weight", "v d -> v d", "embedding.tokens"),
    *_norm("norm", "final_norm"),
)
_SHARED_LAYER = (
    *_norm("input_layernorm", "attention_norm"),
    *_linear("self_attn.q_proj", "(h r) d -> d h r", "(h r) -> h r", "query"),
    *_linear("self_attn.k_proj", "(k r) d -> d k r", "(k r) -> k r", "key"),
    *_linear("self_attn.v_proj", "(k r) d -> d k r", "(k r) -> k r", "value"),
    *_linear("self_attn.o_proj", "d (h r) -> h r d", "d -> d", "out"),
    *_norm("self_attn.q_norm", "query_norm", "r"),
    *_norm("self_attn.k_norm", "key_norm", "r"),
    *_linear("mlp.gate_proj", "m d -> d m", "m -> m", "gate"),
    *_linear("mlp.up_proj", "m d -> d m", "m -> m", "up"),
    *_linear("mlp.down_proj", "d m -> m d", "d -> d", "down"),
)
_LLAMA_LAYER = (*_SHARED_LAYER, *_norm("post_attention_layernorm", "mlp_norm"))
_GEMMA_LAYER = (
    *_SHARED_LAYER,
    *_norm("post_attention_layernorm", "attention_post_norm"),
    *_norm("pre_feedforward_layernorm", "mlp_norm"),
    *_norm("post_feedforward_layernorm", "mlp_post_norm"),
)


@dataclass(frozen=True)
class _Family:
    """The tables of a family: what its names begin with, where its layers are, and its output."""

    prefix: str
    layers: str
    single: tuple[Row, ...]
    layer: tuple[Row, ...]
    head: str = "lm_head.weight"


_GPT2_FAMILY = _Family("transformer.", "h", _GPT2, _GPT2_LAYER)
_NEOX_FAMILY = _Family("gpt_neox.", "layers", _NEOX, _NEOX_LAYER, "embed_out.weight")
_LLAMA_FAMILY = _Family("model.", "layers", _LLAMA, _LLAMA_LAYER)
_GEMMA_FAMILY = _Family("model.", "layers", _LLAMA, _GEMMA_LAYER)
_FAMILIES = {
    "gpt2": _GPT2_FAMILY,
    "gpt_neox": _NEOX_FAMILY,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA_FAMILY),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA_FAMILY),
}
# Masks and frequencies that older versions of transformers saved beside the parameters.
_BUFFERS = re.compile(
    r"(.*\.)?(attn\.(masked_)?bias|attention\.(masked_)?bias|rotary_emb\.inv_freq)"
)


class ParameterNames:
    """The tensors of a decoder's checkpoint, and where they are in the parameter tree.

    Args:
        model_type: the family, as config.json names it.
        config: the decoder.
        prefixed: whether names begin with the family's prefix, as transformers writes them for
            whole language models.

    Attributes:
        shapes: the shape of each tensor, by its name.

    Raises:
        ValueError: if networks of this family have no tensor for a leaf of this decoder's tree.
    """

    def __init__(self, model_type: str, config: DecoderConfig, *, prefixed: bool = True) -> None:
        family = _FAMILIES[model_type]
        prefix = family.prefix if prefixed else ""
        sizes = {"d": config.width, "h": config.heads, "k": config.key_heads}
        sizes |= {"r": config.head_width, "m": config.hidden, "v": config.vocabulary}
        sizes |= {"c": config.context, "3": 3}
        shapes = dict(leaves(parameter_shapes(config)))
        self._places: dict[str, tuple[_Axes, tuple[str, ...]]] = {}
        for name, axes, places in _all_rows(family, prefix, config.layers):
            if all(place in shapes for place in places):
                self._places[name] = (_Axes(axes, sizes), places)
        held = {place for _, places in self._places.values() for place in places}
        for leaf in shapes:
            if leaf not in held:
                raise ValueError(
                    f"{leaf} is a part of this decoder: {model_type} has no tensor for it"
                )
        self.shapes = {name: axes.source_shape for name, (axes, _) in self._places.items()}
        self._embedding = next(
            name for name, (_, places) in self._places.items() if places == ("embedding.tokens",)
        )
        self._head, self._tied = family.head, config.tied

    @classmethod
    def of(
        cls, model_type: str, config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> "ParameterNames":
        """Find the tensors of a checkpoint, and check them before any is read.

        Names may lack the family's prefix. Masks and frequencies that older versions of
        transformers saved are left alone, and so is an output that is tied to the embedding.

        Args:
            model_type: the family, as config.json names it.
            config: the decoder, from `decoder_config`.
            shapes: the shape of each of the checkpoint's tensors, by its name.

        Raises:
            ValueError: if a tensor is missing, is none of this network's, or has another shape than
                config.json says. The line names the first one.
        """
        prefix = _FAMILIES[model_type].prefix
        names = cls(model_type, config, prefixed=any(name.startswith(prefix) for name in shapes))
        for name, expected in names.shapes.items():
            if name not in shapes:
                raise ValueError(f"{name} is missing: a {model_type} of this size must have it")
            names._check_shape(name, shapes[name], expected)
        for name in shapes:
            if name in names.shapes or _BUFFERS.fullmatch(name):
                continue
            if not (names._tied and name == names._head):
                raise ValueError(
                    f"{legible(name)} is a tensor that a {model_type} of this size does not have: "
                    "expected no others than config.json says"
                )
            names._check_shape(name, shapes[name], names.shapes[names._embedding])
        return names

    def read(
        self,
        tensors: Mapping[str, NDArray],
        dtype: np.dtype | type | None = None,
        *,
        parts: Collection[str] | None = None,
    ) -> dict[str, Any]:
        """Return the parameter tree of a checkpoint, whose tensors are read one by one.

        Args:
            tensors: by name; those that `of` has checked.
            dtype: what to convert to; None keeps that of each tensor.
            parts: branches of the tree, such as "layers.0.query"; the tensors of all others are not
                read. None reads all.

        Raises:
            ValueError: if the output is tied to the embedding, and the checkpoint has another one.
        """
        tree: dict[str, Any] = {}
        for name, (axes, places) in self._places.items():
            if parts is not None and not any(_within(place, parts) for place in places):
                continue
            tensor = np.asarray(tensors[name])
            head = name == self._embedding and self._tied and self._head in tensors
            if head and not np.array_equal(tensor, tensors[self._head]):
                raise ValueError(
                    f"{self._head} differs from {name}: expected the same numbers, since "
                    "config.json has tie_word_embeddings true"
                )
            if dtype is not None:
                tensor = tensor.astype(dtype, copy=False)
            for place, part in zip(places, axes.split(tensor, len(places)), strict=True):
                _insert(tree, place, part)
        return tree

    def write(self, parameters: Mapping[str, Any]) -> Iterator[tuple[str, NDArray]]:
        """Yield the tensors of a parameter tree by name, as `read` takes them, bit for bit."""
        found = dict(leaves(parameters))
        for name, (axes, places) in self._places.items():
            yield name, axes.join([np.asarray(found[place]) for place in places])

    @staticmethod
    def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if tuple(shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(shape)}: expected {expected}, as config.json says"
            )


class _Axes:
    """How the axes of a tensor become those of a leaf: see the module."""

    def __init__(self, text: str, sizes: Mapping[str, int]) -> None:
        left, right = text.split(" -> ")
        groups = [word.strip("()").split() for word in re.findall(r"\([^)]*\)|\w+", left)]
        single = [axis for group in groups for axis in group]
        self.source_shape = tuple(math.prod(sizes[axis] for axis in group) for group in groups)
        self._single_shape = tuple(sizes[axis] for axis in single)
        self._order = tuple(single.index(axis) for axis in right.split())

    def split(self, tensor: NDArray, parts: int) -> tuple[NDArray, ...]:
        """Return the leaves that a tensor holds."""
        array = tensor.reshape(self._single_shape).transpose(self._order)
        return tuple(array) if parts > 1 else (array,)

    def join(self, parts: list[NDArray]) -> NDArray:
        """Return the tensor of these leaves."""
        array = np.stack(parts) if len(parts) > 1 else parts[0]
        back = np.argsort(self._order)
        return np.ascontiguousarray(array.transpose(back).reshape(self.source_shape))


def _all_rows(family: _Family, prefix: str, layers: int) -> Iterator[Row]:
    for name, axes, places in family.single:
        yield f"{prefix}{name}", axes, places
    for layer in range(layers):
        for name, axes, places in family.layer:
            inside = tuple(f"layers.{layer}.{place}" for place in places)
            yield f"{prefix}{family.layers}.{layer}.{name}", axes, inside
    yield _row(family.head, "v d -> d v", "output.weights")


def _within(place: str, parts: Collection[str]) -> bool:
    return any(place == part or place.startswith(f"{part}.") for part in parts)


def _insert(tree: dict[str, Any], place: str, leaf: NDArray) -> None:
    *path, last = place.split(".")
    for name in path:
        tree = tree.setdefault(name, {})
    tree[last] = leaf
