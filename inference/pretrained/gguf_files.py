"""GGUF files, versions 2 and 3: their metadata, and tensors that are read one by one.

Nothing of a file is trusted. Counts are bounded, and whatever is made is made of bytes that are
there, so that a header cannot ask for memory.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probattn.inference.pretrained.errors import PretrainedError, short, system_says
from probattn.inference.pretrained.gguf_blocks import FORMATS, OTHER_FORMATS, Format
from probattn.inference.pretrained.tensors import LazyTensor, Tensors

_MOST_KEYS = 2**14
_MOST_TENSORS = 2**17
_MOST_TEXTS = 2**21  # of an array: four times the merges of the largest tokenizers
_LONGEST_STRING = 2**24  # bytes: of a chat template, at most
_ALIGNMENT = 32  # where a file names none

_NUMBERS = {  # by GGUF's number of the type
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file that was opened.

    Attributes:
        path: of the file.
        metadata: key -> number, truth value, text, list of texts or array of numbers.
        tensors: by the names of GGUF. The last dimension varies fastest, as in NumPy. F32, F16 and
            BF16 are read as they are, and quantised tensors as float32.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: Tensors


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF file.

    Raises:
        PretrainedError: if it cannot be read, is truncated or otherwise damaged, is of another
            version or byte order, or holds a quantisation that is not supported.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise PretrainedError(path, system_says(error)) from None
    except ValueError:  # an empty file cannot be mapped
        raise PretrainedError(path, "is empty: expected a GGUF file; download it again") from None
    header = _Header(path, data)
    if header.take(4) != b"GGUF":
        raise PretrainedError(path, "does not begin with GGUF: expected a GGUF file")
    version = header.number("<u4")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        kind = f"of version {version}" if swapped not in (2, 3) else "big-endian"
        raise PretrainedError(
            path, f"is {kind}: expected version 2 or 3, little-endian; convert the model again"
        )
    tensor_count = header.count("tensors", _MOST_TENSORS)
    key_count = header.count("metadata keys", _MOST_KEYS)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = header.text()
        if key in metadata:
            raise PretrainedError(
                path, f"holds the metadata key {short(key)} twice: expected it once"
            )
        metadata[key] = header.value()
    described = [_Described.read(header) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise PretrainedError(
            path, f"has the alignment {short(alignment)}: expected a power of two"
        )
    start = -(-header.position // alignment) * alignment
    return GgufFile(path, metadata, _tensors(path, data, described, start, alignment))


@dataclass(frozen=True)
class _Described:
    """What the header says of a tensor, with its offset from where the tensors begin."""

    name: str
    shape: tuple[int, ...]
    format: Format
    offset: int

    @classmethod
    def read(cls, header: "_Header") -> "_Described":
        name = header.text()
        rank = header.number("<u4")
        if not 1 <= rank <= 4:
            raise header.damaged(f"its tensor {short(name)} has {rank} dimensions: expected 1 to 4")
        shape = tuple(reversed([header.number("<u8") for _ in range(rank)]))
        kind = header.number("<u4")
        offset = header.number("<u8")
        if kind not in FORMATS:
            supported = ", ".join(each.name for each in FORMATS.values())
            found = OTHER_FORMATS.get(kind, f"type {kind}")
            raise PretrainedError(
                header.path,
                f"its tensor {short(name)} is of {found}: expected one of {supported}; choose a "
                "file that is quantised to one of them",
            )
        if shape[-1] % FORMATS[kind].numbers or 0 in shape:
            wanted = f"rows of a multiple of {FORMATS[kind].numbers} numbers"
            raise header.damaged(
                f"its tensor {short(name)} has the shape {shape}: expected {wanted}"
            )
        return cls(name, shape, FORMATS[kind], offset)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) // self.format.numbers * self.format.size


def _tensors(
    path: Path, data: NDArray[np.uint8], described: list[_Described], start: int, alignment: int
) -> Tensors:
    entries = {}
    end = 0
    for each in sorted(described, key=lambda each: each.offset):
        if each.name in entries:
            reason = f"holds the tensor {short(each.name)} twice: expected it once"
            raise PretrainedError(path, reason)
        if each.offset % alignment or each.offset < end:
            raise PretrainedError(
                path,
                f"its tensor {short(each.name)} begins at {each.offset}: expected a multiple of "
                f"{alignment} from {end} on; download it again",
            )
        end = each.offset + each.size
        if start + end > len(data):
            raise PretrainedError(
                path,
                f"its tensor {short(each.name)} ends at byte {start + end} and the file at "
                f"{len(data)}: it is truncated or damaged; download it again",
            )
        raw = data[start + each.offset : start + end]
        entries[each.name] = LazyTensor(each.shape, each.format.dtype, _reader(each, raw))
    return Tensors(entries)


def _reader(tensor: _Described, raw: NDArray[np.uint8]) -> Callable[[], NDArray]:
    def read() -> NDArray:
        blocks = raw.reshape(-1, tensor.format.size)
        return np.asarray(tensor.format.values(blocks)).reshape(tensor.shape)

    return read


class _Header:
    """The bytes of a file, read from its beginning on.

    Args:
        path: of the file.
        data: its bytes.
    """

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self.path = path
        self.position = 0
        self._view = memoryview(data)

    def damaged(self, reason: str) -> PretrainedError:
        """Return the error of a header that is damaged."""
        return PretrainedError(self.path, f"{reason}; download it again")

    def take(self, size: int) -> memoryview:
        """Return the next bytes.

        Raises:
            PretrainedError: if the file has fewer.
        """
        left = len(self._view) - self.position
        if size > left:
            raise self.damaged(
                f"its header claims {size} bytes where {left} are left: it is truncated or damaged"
            )
        self.position += size
        return self._view[self.position - size : self.position]

    def number(self, kind: str) -> Any:
        """Return the next number, a Python one."""
        dtype = np.dtype(kind)
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def count(self, what: str, most: int) -> int:
        """Return how many things follow."""
        found = self.number("<u8")
        if found > most:
            raise self.damaged(f"its header claims {found} {what}: expected at most {most}")
        return found

    def text(self) -> str:
        """Return the next text."""
        (length,) = struct.unpack("<Q", self.take(8))
        if length > _LONGEST_STRING:
            raise self.damaged(
                f"its header claims a text of {length} bytes: expected at most {_LONGEST_STRING}"
            )
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError:
            raise self.damaged("its header holds a text that is not UTF-8") from None

    def value(self) -> Any:
        """Return the next value of the metadata."""
        kind = self.number("<u4")
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise self.damaged(f"its header holds a value of type {kind}: expected 0 to 12")
        inner = self.number("<u4")
        if inner == _STRING:
            count = self.count("texts", _MOST_TEXTS)
            return [self.text() for _ in range(count)]
        if inner not in _NUMBERS:
            raise self.damaged(
                f"its header holds an array of type {inner}: expected one of numbers or texts"
            )
        dtype = np.dtype(_NUMBERS[inner])
        return np.frombuffer(self.take(self.number("<u8") * dtype.itemsize), dtype)
