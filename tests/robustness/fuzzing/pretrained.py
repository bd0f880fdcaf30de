"""Target: other people's models, in GGUF, in .safetensors with an index, and their tokenizers."""

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save

from probattn.inference.pretrained.checkpoint import open_checkpoint
from probattn.inference.pretrained.errors import PretrainedError
from probattn.text.vocabulary import UnknownCharacter
from tests.robustness.fuzzing.material import any_text, edited, edits, json_values
from tests.robustness.fuzzing.target import Target, refused, require
from tests.support import gguf_bytes
from tests.support.gguf_bytes import ARRAY, STRING
from tests.support.tokenizer_files import PIECES, SCORES, TYPES, byte_level, definition

_SHARDS = {
    "model-00001-of-00002.safetensors": {"model.norm.weight": np.arange(6, dtype=np.float32)},
    "model-00002-of-00002.safetensors": {
        "lm_head.weight": np.ones((3, 2), np.float16),
        "mask": np.array([True]),
    },
}
_AS_IT_IS = "as it is"  # where a value stays
_INDEX = "model.safetensors.index.json"
_NUMBERS = ("context_length", "embedding_length", "feed_forward_length", "block_count")


def pretrained(folder: Path) -> Target:
    """A GGUF file and a folder, each right but for edits of bytes or of what its JSON says.

    Each must open, with tensors and a tokenizer that work, or be refused in one line that names the
    file or the folder.
    """
    model = folder / "model"
    model.mkdir()
    files = _files()
    gguf_files = [_gguf(kind) for kind in ("gpt2", "llama")]
    # Places in JSON, as keys one below the other, whose values are replaced.
    places = {
        name: list(_places(json.loads(data))) for name, data in files.items() if "json" in name
    }
    replaced = st.sampled_from([(name, place) for name, each in places.items() for place in each])

    def check(given: tuple[str, Any, str]) -> str:
        kind, change, text = given
        if kind == "gguf":
            number, changes = change
            path = folder / "model.gguf"
            path.write_bytes(edited(gguf_files[number], changes))
        else:
            path = model
            for name, data in files.items():
                (model / name).write_bytes(data)
            if kind == "json":
                (name, place), value = change
                (model / name).write_bytes(_with(files[name], place, value))
            else:
                name, changes = change
                (model / name).write_bytes(edited(files[name], changes))
        try:
            found = open_checkpoint(path)
            _check_tensors(found.tensors, path)
        except PretrainedError as error:
            return refused(error, named=str(path))
        _check_tokenizer(found.tokenizer, text)
        return f"accepted {kind}"

    changes = st.one_of(edits, edits, st.just([]))
    values = st.one_of(json_values, json_values, st.just(_AS_IT_IS))
    inputs = st.one_of(
        st.tuples(st.just("gguf"), st.tuples(st.integers(0, 1), changes), any_text),
        st.tuples(st.just("bytes"), st.tuples(st.sampled_from(sorted(files)), changes), any_text),
        st.tuples(st.just("json"), st.tuples(replaced, values), any_text),
    )
    return Target("pretrained", inputs, check)


def _files() -> dict[str, bytes]:
    index = {name: file for file, held in _SHARDS.items() for name in held}
    return {
        "config.json": json.dumps({"model_type": "llama", "vocab_size": 330}).encode(),
        "tokenizer.json": json.dumps(definition(byte_level("smollm"))).encode(),
        _INDEX: json.dumps({"metadata": {}, "weight_map": index}).encode(),
        **{file: save(held) for file, held in _SHARDS.items()},
    }


def _gguf(kind: str) -> bytes:
    if kind == "gpt2":
        vocabulary = definition(byte_level("smollm"))["model"]
        tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].__getitem__)
        merges = [" ".join(pair) for pair in vocabulary["merges"]]
        own = {"pre": (STRING, "smollm"), "merges": (ARRAY, (STRING, merges))}
    else:
        tokens = list(PIECES)
        own = {"scores": (ARRAY, (6, SCORES)), "token_type": (ARRAY, (5, TYPES))}
    keys = [
        gguf_bytes.key("general.architecture", STRING, "llama"),
        *(gguf_bytes.key(f"llama.{each}", 4, 2) for each in _NUMBERS),
        gguf_bytes.key("llama.attention.head_count", 4, 1),
        gguf_bytes.key("llama.attention.layer_norm_rms_epsilon", 6, 1e-5),
        *(
            gguf_bytes.key(f"tokenizer.ggml.{name}", *content)
            for name, content in {
                "model": (STRING, kind),
                "tokens": (ARRAY, (STRING, tokens)),
                "bos_token_id": (4, 1),
                **own,
            }.items()
        ),
    ]
    tensors = [
        gguf_bytes.tensor("token_embd.weight", [len(tokens), 2], 1, 0),
        gguf_bytes.tensor("blk.0.attn_q.weight", [2, 2], 0, 1344),
        gguf_bytes.tensor("blk.1.ffn_up.weight", [2, 32], 3, 1376),
    ]
    return gguf_bytes.gguf(keys, tensors, bytes(1416))


def _places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Keys of a JSON value and of those in it; of long lists and tables, the first few."""
    yield above
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    for key, each in inner[:12]:
        yield from _places(each, (*above, key))


def _with(data: bytes, place: tuple[Any, ...], value: Any) -> bytes:
    """A JSON file with another value in one place."""
    if value == _AS_IT_IS:
        return data
    if not place:
        return json.dumps(value).encode()
    content = copy.deepcopy(json.loads(data))
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return json.dumps(content).encode()


def _check_tensors(tensors: Any, path: Path) -> None:
    """A tensor has the shape and dtype that it claims, and takes no more than its file can hold."""
    size = sum(each.stat().st_size for each in ([path] if path.is_file() else path.iterdir()))
    for name, entry in tensors.entries.items():
        found = tensors[name]
        require((found.shape, found.dtype) == (entry.shape, entry.dtype), f"{name} is another")
        require(found.nbytes <= 8 * size, f"{name} has {found.nbytes} bytes")


def _check_tokenizer(tokenizer: Any, text: str) -> None:
    require(tokenizer.token_characters.shape == (tokenizer.size,), "token_characters: shape")
    with contextlib.suppress(UnknownCharacter):
        ids = tokenizer.encode(text)
        require(np.all((ids >= 0) & (ids < tokenizer.size)), "ids beyond size")
        require(isinstance(tokenizer.decode(ids), str), "no text")
        require(len(tokenizer.display(ids)) == len(ids), "as many shown as tokens")
