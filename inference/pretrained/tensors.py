"""Tensors that are read from their file one by one, when they are asked for."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probattn.inference.runtime.memory import check_memory
from probattn.messages import legible


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose shape and dtype are known before it is read.

    Attributes:
        shape: its shape.
        dtype: its dtype as it is read.
        read: reads it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], NDArray]


class Tensors(Mapping[str, NDArray]):
    """Tensors of a checkpoint by name: `tensors[name]` reads one each time, and keeps none.

    Args:
        entries: the tensors.

    Attributes:
        entries: name -> `LazyTensor`, whose shape and dtype cost nothing.
    """

    def __init__(self, entries: Mapping[str, LazyTensor]) -> None:
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> NDArray:
        """Read a tensor.

        Raises:
            KeyError: if there is none of this name.
            ValueError: if the memory of this machine cannot hold it.
        """
        entry = self.entries[name]
        size = entry.dtype.itemsize * int(np.prod(entry.shape, dtype=object))
        check_memory(f"the tensor {legible(name)}", size)
        return entry.read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"<{len(self)} tensors>"
