"""Somebody else's model from where it is: a folder, the hub of Hugging Face, or a GGUF file."""

import dataclasses
import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from probattn.inference.pretrained.architectures import decoder_config
from probattn.inference.pretrained.errors import (
    PretrainedError,
    parse_object,
    read_bytes,
    read_object,
    short,
)
from probattn.inference.pretrained.gguf_files import GgufFile, open_gguf
from probattn.inference.pretrained.gguf_models import gguf_model
from probattn.inference.pretrained.gguf_tokenizers import gguf_tokenizer
from probattn.inference.pretrained.parameter_names import ParameterNames
from probattn.inference.pretrained.pretrained_tokenizer import PretrainedTokenizer, read_tokenizer
from probattn.inference.pretrained.safetensors_files import is_pickle, open_folder, pickles_refused
from probattn.inference.pretrained.tensors import Tensors
from probattn.messages import one_line
from probattn.models.decoder.config import DecoderConfig

SETTINGS = "tokenizer_config.json"
"""What transformers has to know of a tokenizer beside its tokenizer.json."""
SPECIAL = "special_tokens_map.json"
"""Which tokens have a special meaning, as older versions of transformers wrote it."""

_HUB = "hf:"
_TEMPLATE = "chat_template.jinja"
# Files that say how texts are put together and generated. A model may lack any of them.
_BESIDE = (
    *(SETTINGS, SPECIAL, "added_tokens.json"),
    *("chat_template.json", _TEMPLATE, "generation_config.json"),
)
_MOST_BESIDE = 2**24  # bytes of each; the largest in use have a tenth of it
_NEEDED = [
    *("config.json", "tokenizer.json", "*.safetensors", "model.safetensors.index.json"),
    *_BESIDE,
]
_IGNORED = ["*/*", "consolidated*"]  # other formats of the same weights
# Prefix of the names of a model's tensors, which a checkpoint without its last layer leaves out.
_PREFIXES = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}
_HEADS = ("lm_head.", "embed_out.")
# transformers 5.14 renamed the output of GPT-NeoX in memory; files have kept the name they had.
_NEOX_HEAD, _NEOX_HEAD_IN_FILES = "lm_head.weight", "embed_out.weight"
# Masks and frequencies that older versions of transformers saved with the weights.
_BUFFERS = re.compile(r".*\.(attn\.(masked_)?bias|attention\.(masked_)?bias|rotary_emb\.inv_freq)")


@dataclass(frozen=True)
class Checkpoint:
    """A model as it was published.

    Attributes:
        source: where it was found, as the user has named it.
        config: the content of config.json; of a GGUF file, its metadata under the same keys.
        tensors: name -> tensor, read when it is asked for. The names are those of Hugging Face
            with the prefix of the model, and buffers that are no weights are left out.
        tokenizer: the tokenizer, without added tokens that the model has no row for.
        origin: the folder, or the GGUF file.
    """

    source: str
    config: dict[str, Any]
    tensors: Tensors
    tokenizer: PretrainedTokenizer
    origin: Path | GgufFile

    @cached_property
    def decoder(self) -> DecoderConfig:
        """The configuration of the network.

        Raises:
            PretrainedError: if it has an option that is not known.
        """
        with self._blamed():
            return decoder_config(self.config)

    @cached_property
    def names(self) -> ParameterNames:
        """The tensors of the network, checked by name and shape.

        Raises:
            PretrainedError: if one is missing, of another shape, or none of this network's.
        """
        shapes = {name: entry.shape for name, entry in self.tensors.entries.items()}
        with self._blamed():
            return ParameterNames.of(self.config["model_type"], self.decoder, shapes)

    def read_parameters(self, parts: Collection[str] | None = None) -> dict[str, Any]:
        """Read the parameters, in the layout of `models.decoder.shapes`.

        Args:
            parts: see `ParameterNames.read`.

        Raises:
            PretrainedError: if a tensor is missing or damaged.
        """
        names = self.names
        with self._blamed():
            return names.read(self.tensors, parts=parts)

    def read_beside(self) -> dict[str, bytes]:
        """Read the small files beside the model, as they are, by their names.

        They have the settings of the tokenizer, its special tokens, the chat template and the
        settings of the generation, as far as there are any. Those of a GGUF file are made of its
        metadata.

        Raises:
            PretrainedError: if one is no file, too large, or damaged.
        """
        if isinstance(self.origin, GgufFile):
            return _gguf_beside(self.origin)
        paths = [self.origin / name for name in _BESIDE]
        return {path.name: _read_beside(path) for path in paths if os.path.lexists(path)}

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        try:
            yield
        except PretrainedError:
            raise
        except ValueError as error:
            raise PretrainedError(self.source, str(error)) from None


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a model without reading its weights.

    Args:
        source: a folder with config.json, .safetensors and tokenizer.json, as Hugging Face has
            them; `hf:owner/name` or `hf:owner/name@revision`, which is downloaded into the cache of
            `huggingface_hub`, or taken from there where `HF_HUB_OFFLINE` is set; or a .gguf file.

    Raises:
        PretrainedError: if the source does not exist or is of another kind, a file of it is
            missing, damaged or not supported, or its vocabularies differ in size.
        ImportError: without the libraries of the extra `pretrained`.
    """
    name = str(source)
    if name.startswith(_HUB):
        found = _open_folder(_download(name))
    elif is_pickle(Path(name).name):
        raise pickles_refused(Path(name))
    elif Path(name).suffix == ".gguf":
        file = open_gguf(Path(name))
        found = Checkpoint(name, *gguf_model(file), gguf_tokenizer(file), file)
    elif Path(name).is_dir():
        found = _open_folder(Path(name))
    else:
        raise PretrainedError(
            name,
            "is no model: expected a folder with config.json, a .gguf file, or hf:owner/name",
        )
    size = found.config.get("vocab_size")
    if type(size) is not int or size < 1:
        raise PretrainedError(name, f"has {short(size)} as vocab_size: expected a number of tokens")
    tokenizer = found.tokenizer.without(size)
    if tokenizer.size > size:
        raise PretrainedError(
            name,
            f"has a tokenizer of {tokenizer.size} tokens and a model of {size}: expected at least "
            "as many; take both from one checkpoint",
        )
    return dataclasses.replace(found, source=name, tokenizer=tokenizer)


def _open_folder(folder: Path) -> Checkpoint:
    config = read_object(folder / "config.json")
    tensors = _one_convention(open_folder(folder), config.get("model_type"))
    return Checkpoint(str(folder), config, tensors, read_tokenizer(folder), folder)


def _read_beside(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # a pipe could be read for ever
        raise PretrainedError(path, "is no file: expected one, or nothing of this name")
    data = read_bytes(path, _MOST_BESIDE)
    if path.suffix == ".json":
        parse_object(path, data)
        return data
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"holds no text in UTF-8: {one_line(error)}; download it again"
        raise PretrainedError(path, reason) from None
    return data


def _gguf_beside(file: GgufFile) -> dict[str, bytes]:
    found, special = {}, {}
    tokens = file.metadata["tokenizer.ggml.tokens"]
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(index) is int and 0 <= index < len(tokens):
            special[f"{name}_token"] = tokens[index]
    if special:
        found[SPECIAL] = json.dumps(special, indent=2, ensure_ascii=False).encode()
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        found[_TEMPLATE] = template.encode()
    return found


def _one_convention(tensors: Tensors, model_type: Any) -> Tensors:
    entries = {n: each for n, each in tensors.entries.items() if not _BUFFERS.fullmatch(n)}
    prefix = _PREFIXES.get(model_type, "model.") if isinstance(model_type, str) else "model."
    if not any(name.startswith(prefix) for name in entries):
        entries = {
            name if name.startswith(_HEADS) else prefix + name: each
            for name, each in entries.items()
        }
    if model_type == "gpt_neox" and _NEOX_HEAD in entries and _NEOX_HEAD_IN_FILES not in entries:
        entries[_NEOX_HEAD_IN_FILES] = entries.pop(_NEOX_HEAD)
    return Tensors(entries)


def _download(name: str) -> Path:
    """Return the folder of the cache that holds a model of the hub."""
    part = r"[A-Za-z0-9][\w.-]*"
    known = re.fullmatch(rf"{_HUB}({part}/{part})(?:@([\w./-]+))?", name, re.ASCII)
    if known is None:
        raise PretrainedError(
            name, "names no model of the hub: expected hf:owner/name or hf:owner/name@revision"
        )
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(
            "hf:owner/name needs the library huggingface_hub: pip install 'probattn[pretrained]'"
        ) from None
    try:
        found = huggingface_hub.snapshot_download(
            known[1], revision=known[2], allow_patterns=_NEEDED, ignore_patterns=_IGNORED
        )
    except Exception as error:  # of the disk, of the hub, or of its library for the network
        raise PretrainedError(
            name,
            f"cannot be had: {one_line(error)}; check its name and the network, log in if it is "
            "gated, or download it elsewhere and name its folder",
        ) from None
    return Path(found)
