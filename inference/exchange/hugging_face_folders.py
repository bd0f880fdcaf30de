"""Folders of models as Hugging Face has them, written: the other direction of `pretrained`."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probattn.inference.pretrained.safetensors_files import INDEX, SINGLE
from probattn.inference.runs.files import fsync, replacing, write_errors, write_text

_MOST_BYTES = 2**30  # of a file, which is held in memory while it is written


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, NDArray]],
    tokenizer: Mapping[str, Any],
    beside: Mapping[str, bytes],
    *,
    done: Callable[[int], object] = lambda count: None,
) -> None:
    """Write config.json, .safetensors and tokenizer.json into a folder, which is made.

    Tensors of more than 1 GiB in all go to several files with an index. All of it is on the disk
    when the function returns; the folder's own name is the caller's to bring there.

    Args:
        folder: where to.
        config: the content of config.json.
        tensors: names and tensors; one file's are in memory at a time.
        tokenizer: the content of tokenizer.json.
        beside: other small files, by name.
        done: called with the number of tensors that a file has taken.

    Raises:
        WriteError: if something cannot be written.
        ImportError: without the library safetensors (the extra `pretrained`).
    """
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    _write_json(folder / "tokenizer.json", tokenizer)
    for name, data in beside.items():
        with replacing(folder / name) as stream:
            stream.write(data)
    written: list[tuple[Path, dict[str, int]]] = []
    for number, part in enumerate(_parts(tensors)):
        path = folder / f"{number}.safetensors"
        _write_tensors(path, part)
        written.append((path, {name: tensor.nbytes for name, tensor in part.items()}))
        done(len(part))
    _name(folder, written)
    with write_errors(folder):
        fsync(folder)  # a rename is on the disk only when its folder is


def _name(folder: Path, written: Sequence[tuple[Path, dict[str, int]]]) -> None:
    """Give files of tensors the names that they have in a whole, and write the index of several."""
    if len(written) == 1:
        with write_errors(folder):
            written[0][0].rename(folder / SINGLE)
        return
    files: dict[str, str] = {}
    size = 0
    for number, (path, sizes) in enumerate(written, start=1):
        name = f"model-{number:05}-of-{len(written):05}.safetensors"
        with write_errors(folder):
            path.rename(folder / name)
        files |= dict.fromkeys(sizes, name)
        size += sum(sizes.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": files})


def _parts(tensors: Iterable[tuple[str, NDArray]]) -> Iterator[dict[str, NDArray]]:
    """Yield tensors in groups that have room in a file."""
    part: dict[str, NDArray] = {}
    size = 0
    for name, tensor in tensors:
        if part and size + tensor.nbytes > _MOST_BYTES:
            yield part
            part, size = {}, 0
        part[name] = np.ascontiguousarray(tensor)
        size += tensor.nbytes
    yield part


def _write_tensors(path: Path, tensors: dict[str, NDArray]) -> None:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise ImportError(
            ".safetensors files need the library safetensors: pip install 'probattn[pretrained]'"
        ) from None
    with write_errors(path):
        try:
            # transformers loads no file without this entry.
            safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # it has what the system says as text
            raise OSError(str(error)) from None
        shutil.copymode(path.with_name("config.json"), path)  # the library lets nobody else read it
        fsync(path)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
