"""Formats of numbers in GGUF files: how many bytes they take, and their values.

A quantised row is cut into blocks of 32 numbers, each with a scale of its own in half precision.
Two numbers of four bits share a byte: number i of a block its lower half, and i + 16 its upper one.
The arithmetic is in float32 and in the order in which ggml does it, so that the values are ggml's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

_HALF = np.dtype("<f2")


@dataclass(frozen=True)
class Format:
    """How numbers are stored.

    Attributes:
        name: what ggml calls it.
        numbers: how many make a block.
        size: bytes of a block.
        dtype: of the numbers as they are read.
        values: blocks as bytes, (blocks, size) -> their values, (blocks, numbers).
    """

    name: str
    numbers: int
    size: int
    dtype: np.dtype
    values: Callable[[NDArray[np.uint8]], NDArray]


def _plain(dtype: np.dtype) -> Callable[[NDArray[np.uint8]], NDArray]:
    return lambda blocks: blocks.view(dtype).copy()


def _q8_0(blocks: NDArray[np.uint8]) -> NDArray:
    values = blocks[:, 2:].view(np.int8).astype(np.float32)
    values *= _half(blocks, 0)
    return values


def _q4_0(blocks: NDArray[np.uint8]) -> NDArray:
    values = _four_bits(blocks[:, 2:])
    values -= np.float32(8)
    values *= _half(blocks, 0)
    return values


def _q4_1(blocks: NDArray[np.uint8]) -> NDArray:
    values = _four_bits(blocks[:, 4:])
    values *= _half(blocks, 0)
    values += _half(blocks, 2)
    return values


def _half(blocks: NDArray[np.uint8], start: int) -> NDArray[np.float32]:
    """Return the number in half precision that stands in each block, (blocks, 1)."""
    column = np.ascontiguousarray(blocks[:, start : start + 2])
    return column.view(_HALF).astype(np.float32)


def _four_bits(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Unpack numbers of four bits, (blocks, 16) -> (blocks, 32)."""
    values = np.empty((len(packed), 32), np.float32)
    values[:, :16] = packed & 0x0F
    values[:, 16:] = packed >> 4
    return values


_FLOAT32 = np.dtype(np.float32)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

FORMATS = {
    0: Format("F32", 1, 4, _FLOAT32, _plain(_FLOAT32)),
    1: Format("F16", 1, 2, np.dtype(np.float16), _plain(np.dtype(np.float16))),
    2: Format("Q4_0", 32, 18, _FLOAT32, _q4_0),
    3: Format("Q4_1", 32, 20, _FLOAT32, _q4_1),
    8: Format("Q8_0", 32, 34, _FLOAT32, _q8_0),
    30: Format("BF16", 1, 2, _BFLOAT16, _plain(_BFLOAT16)),
}
"""By ggml's number of the type."""

# Named for the messages that refuse them.
OTHER_FORMATS = {
    **{6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K"},
    **{14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"},
    **{20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32"},
    **{27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"},
}
