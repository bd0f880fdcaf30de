"""Tensors in .safetensors files, one or several with an index, opened without reading them.

The library checks that the header is well-formed and that the tensors lie in the file, cover it
and do not overlap. What it does not check is checked here.
"""

import itertools
import re
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from probattn.inference.pretrained.errors import (
    PretrainedError,
    parse_object,
    read_object,
    short,
    system_says,
)
from probattn.inference.pretrained.tensors import LazyTensor, Tensors
from probattn.messages import one_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LONGEST_HEADER = 2**24  # bytes, of some 100,000 tensors
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    # Not weights: masks and the like, which checkpoints of older models hold.
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_PICKLED = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle)")


def is_pickle(name: str) -> bool:
    """Tell whether a file of this name holds Python objects, which run code when they are read."""
    return _PICKLED.fullmatch(name) is not None


def open_file(path: Path) -> Tensors:
    """Open a .safetensors file.

    Raises:
        PretrainedError: if it cannot be read, is truncated or otherwise damaged, or has a tensor of
            a dtype that NumPy and ml_dtypes do not share with it.
    """
    try:
        with path.open("rb") as stream:
            reader = _reader(path)
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _LONGEST_HEADER:
                reason = f"has a header of {length} bytes: expected at most {_LONGEST_HEADER}"
                raise PretrainedError(path, reason)
            header = parse_object(path, stream.read(length))
    except OSError as error:
        raise PretrainedError(path, system_says(error)) from None
    header.pop("__metadata__", None)
    entries = {}
    for name, described in header.items():
        if described["dtype"] not in _DTYPES:
            raise PretrainedError(
                path,
                f"its tensor {short(name)} is of {described['dtype']}: expected one of "
                f"{', '.join(_DTYPES)}; choose a checkpoint that is not quantised",
            )

        def read(name: str = name) -> NDArray:
            return reader.get_tensor(name)

        shape, dtype = tuple(described["shape"]), _DTYPES[described["dtype"]]
        entries[name] = LazyTensor(shape, dtype, read)
    return Tensors(entries)


def open_folder(folder: Path) -> Tensors:
    """Open all tensors of a checkpoint's folder.

    The folder has `model.safetensors`, or `model.safetensors.index.json` with the files that it
    names, or files `model-00001-of-00002.safetensors` and so on without an index.

    Raises:
        PretrainedError: if there are none, only pickled ones, one of several files is missing or
            holds other tensors than the index says, or a file is damaged.
    """
    if (folder / SINGLE).exists():
        return open_file(folder / SINGLE)
    if (folder / INDEX).exists():
        return _indexed(folder)
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise PretrainedError(folder, system_says(error)) from None
    shards = [name for name in names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    if shards:
        expected = int(re.split(r"[-.]", shards[0])[3])
        if len(shards) != expected:
            raise PretrainedError(
                folder, f"holds {len(shards)} of {expected} files model-*.safetensors: add the rest"
            )
        return _joined({name: open_file(folder / name) for name in shards}, folder)
    pickled = [name for name in names if is_pickle(name)]
    if pickled:
        raise pickles_refused(folder / pickled[0])
    raise PretrainedError(
        folder, f"holds no tensors: expected {SINGLE}, or {INDEX} and the files that it names"
    )


def pickles_refused(path: Path) -> PretrainedError:
    """Return the refusal of a file of pickled tensors."""
    return PretrainedError(
        path,
        "is a pickle, which can run any code when it is read: expected .safetensors; choose a "
        "revision that has them, or convert it where you trust it, by save_pretrained of "
        "transformers",
    )


def _indexed(folder: Path) -> Tensors:
    """Open the files that an index names, which must hold exactly the tensors that it says."""
    path = folder / INDEX
    index = read_object(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise PretrainedError(path, "has no weight_map: expected the file of each tensor")
    for file in index.values():
        if not isinstance(file, str) or re.fullmatch(r"[\w.-]+\.safetensors", file) is None:
            raise PretrainedError(
                path,
                f"names {short(file)}: expected a file *.safetensors in the folder of the index",
            )
    shards = {}
    for file in sorted(set(index.values())):
        if not (folder / file).exists():
            raise PretrainedError(path, f"names {file}, which is missing: add it to the folder")
        shards[file] = open_file(folder / file)
    found = _joined(shards, folder)
    for name, file in index.items():
        if name not in shards[file]:
            reason = f"says that {file} holds {short(name)}, which it does not; download both again"
            raise PretrainedError(path, reason)
    if extra := next((name for name in found if name not in index), None):
        reason = f"does not name the tensor {short(extra)}, which a file holds; download both again"
        raise PretrainedError(path, reason)
    return found


def _joined(shards: dict[str, Tensors], folder: Path) -> Tensors:
    for (one, left), (two, right) in itertools.combinations(shards.items(), 2):
        if twice := left.entries.keys() & right.entries.keys():
            raise PretrainedError(
                folder, f"holds {short(min(twice))} twice, in {one} and {two}: expected it once"
            )
    return Tensors(
        {name: entry for each in shards.values() for name, entry in each.entries.items()}
    )


def _reader(path: Path) -> Any:
    try:
        import safetensors
    except ImportError:
        raise ImportError(
            ".safetensors files need the library safetensors: pip install 'probattn[pretrained]'"
        ) from None
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise PretrainedError(
            path, f"is truncated or damaged: {one_line(error)}; download it again"
        ) from None
