"""Long arrays that lie on the disk, so that the system may drop them from memory."""

import os
import tempfile

import numpy as np

from probattn.inference.runtime.memory import check_memory
from probattn.user_cache import private_folder

_SHORT = 2**22  # bytes up to which an array lies in memory


def scratch_array(what: str, length: int, dtype: np.typing.DTypeLike) -> np.ndarray:
    """Make an array of zeros, a long one in a file of the user's cache.

    The file has no name and goes with the array or the process. Where the cache cannot be written
    to, the array lies in memory.

    Args:
        what: name of what the array is of, for errors.
        length: number of elements.
        dtype: type of the elements.

    Raises:
        ValueError: if it must lie in memory and is larger than that.
        OSError: if the disk has no room for it.
    """
    size = length * np.dtype(dtype).itemsize
    folder = private_folder("scratch") if size > _SHORT else None
    if folder is None:
        check_memory(f"a number for each token of {what}", size)
        return np.zeros(length, dtype)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk is then an error here, not later
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{folder}: no room for {size:,} bytes ({what}): {error.strerror}; make room "
                "there, or name another cache with XDG_CACHE_HOME",
            ) from None
        return np.asarray(np.memmap(file, dtype, mode="r+", shape=(length,)))
