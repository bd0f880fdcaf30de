"""Somebody else's model from where it is: a folder, the hub of Hugging Face, or a GGUF file."""

import dataclasses
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from probattn.inference.pretrained.architectures import decoder_config
from probattn.inference.pretrained.errors import PretrainedError, read_object, short
from probattn.inference.pretrained.gguf_files import open_gguf
from probattn.inference.pretrained.gguf_models import gguf_model
from probattn.inference.pretrained.gguf_tokenizers import gguf_tokenizer
from probattn.inference.pretrained.parameter_names import ParameterNames
from probattn.inference.pretrained.pretrained_tokenizer import PretrainedTokenizer, read_tokenizer
from probattn.inference.pretrained.safetensors_files import is_pickle, open_folder, pickles_refused
from probattn.inference.pretrained.tensors import Tensors
from probattn.messages import one_line
from probattn.models.decoder.config import DecoderConfig

_HUB = "hf:"
_NEEDED = ["config.json", "tokenizer.json", "*.safetensors", "model.safetensors.index.json"]
_IGNORED = ["*/*", "consolidated*"]  # other formats of the same weights
# Prefix of the names of a model's tensors, which a checkpoint without its last layer leaves out.
_PREFIXES = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}
_HEADS = ("lm_head.", "embed_out.")
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
    """

    source: str
    config: dict[str, Any]
    tensors: Tensors
    tokenizer: PretrainedTokenizer

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
        found = Checkpoint(name, *gguf_model(file), gguf_tokenizer(file))
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
    return Checkpoint(str(folder), config, tensors, read_tokenizer(folder))


def _one_convention(tensors: Tensors, model_type: Any) -> Tensors:
    entries = {n: each for n, each in tensors.entries.items() if not _BUFFERS.fullmatch(n)}
    prefix = _PREFIXES.get(model_type, "model.") if isinstance(model_type, str) else "model."
    if not any(name.startswith(prefix) for name in entries):
        entries = {
            name if name.startswith(_HEADS) else prefix + name: each
            for name, each in entries.items()
        }
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
