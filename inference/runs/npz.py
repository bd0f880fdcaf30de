"""Arrays in npz files: what a file claims to hold is checked before anything of it is read."""

import io
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from probattn.inference.runtime.memory import check_memory

_LONGEST = 2**20  # bytes of an archive that zipfile reads in one go, such as its list of members
_SLACK = 2**16  # bytes of an archive beside its numbers, at most
_KINDS = "biuf"  # booleans and numbers: all that is ever stored


def read_part(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a part of a study, which is measured anew if it is not there.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        # Compressed, which `read_arrays` refuses. NumPy leaves a damaged file open.
        with path.open("rb") as stream, np.load(stream) as stored:
            return dict(stored)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: damaged: {error}; delete it and go on") from None


def read_arrays(
    path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, np.ndarray]:
    """Read all arrays of a file that `numpy.savez` wrote. Executes nothing.

    Every member has a checksum, which is verified when it is read.

    Args:
        path: the file.
        shapes: of all arrays that it must hold, where they are known.

    Raises:
        ValueError: if it is no such file, holds other things than numbers, or claims more than
            its bytes or the memory hold, or other shapes. NumPy and zipfile raise what else they
            meet.
    """
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if shapes is not None:
            largest = _SLACK + 8 * sum(math.prod(shape) for shape in shapes.values())
            if size > largest:
                raise ValueError(f"it has {size} bytes, expected at most {largest}")
        check_memory("its arrays", size)
        with _InPieces(path) as pieces, zipfile.ZipFile(pieces) as archive:
            members = archive.infolist()
            # Stored as they are: an archive that unpacks to more than its size is not ours.
            packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
            if packed or sum(member.file_size for member in members) > size:
                raise ValueError("it is compressed, expected plain arrays")
            found = {}
            for member in members:
                with archive.open(member) as data:
                    name = member.filename.removesuffix(".npy")
                    found[name] = _shape(name, data, member.file_size)
            if shapes is not None and found != shapes:
                name = next(n for n in (*shapes, *found) if found.get(n) != shapes.get(n))
                raise ValueError(f"{name} has shape {found.get(name)}, expected {shapes.get(name)}")
        stream.seek(0)
        with np.load(stream, allow_pickle=False) as stored:
            return dict(stored)


class _InPieces(io.FileIO):
    """A file of which nobody reads much at once."""

    def read(self, size: int | None = -1) -> bytes:
        """Read so many bytes.

        Raises:
            ValueError: if they are many.
        """
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > _LONGEST:
            raise ValueError("its list of arrays is too long")
        return super().read(size)


def _shape(name: str, data: IO[bytes], size: int) -> tuple[int, ...]:
    """Shape of an array, if the bytes of its member are those of this shape and dtype."""
    version = np.lib.format.read_magic(data)
    if version != (1, 0):  # of other ones the header may be long
        raise ValueError(f"{name} is of format {version}")
    shape, _, dtype = np.lib.format.read_array_header_1_0(data)
    if dtype.kind not in _KINDS:
        raise ValueError(f"{name} is of {dtype}, expected numbers")
    if data.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{name} claims to be of shape {shape} and has {size} bytes")
    return shape
