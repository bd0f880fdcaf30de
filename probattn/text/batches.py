"""Blocks of a token sequence: random minibatches to fit, windows to evaluate."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer, PRNGKeyArray


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows over a text, such that every position is reported exactly once.

    Their arrays are made when they are asked for, since those of a long text are long.

    Attributes:
        numbers: which of all windows of the text these are.
        length: positions in each window.
        stride: positions from the start of a window to that of the next.
        last: where the last window of the text begins.
    """

    numbers: range | Int[np.ndarray, " windows"]
    length: int
    stride: int
    last: int

    @cached_property
    def starts(self) -> Int[np.ndarray, " windows"]:
        """Where each window begins, (windows,)."""
        return np.minimum(np.asarray(self.numbers) * self.stride, self.last)

    @cached_property
    def reported(self) -> Bool[np.ndarray, "windows length"]:
        """True where a position is this window's to report, (windows, length)."""
        numbers = np.asarray(self.numbers)
        before = (numbers - 1) * self.stride + self.length  # where the window before it ends
        seen = np.where(numbers > 0, before - self.starts, 0)
        return np.arange(self.length) >= seen[:, None]

    def take(self, tokens: Integer[np.ndarray, " N"]) -> Int[np.ndarray, "windows length"]:
        """Return the tokens of each window, as integers of 32 bits."""
        return tokens[self.starts[:, None] + np.arange(self.length)].astype(np.int32)

    def part(self, rows: Int[np.ndarray, " rows"]) -> "Windows":
        """Return some of the windows, given their indices among these."""
        if isinstance(self.numbers, range):  # whose numbers are their own indices
            return replace(self, numbers=rows)
        return replace(self, numbers=self.numbers[rows])

    def parts(self, most_tokens: int) -> Iterator["Windows"]:
        """Yield all windows in order, in parts of at most that many positions, and one window."""
        size = max(most_tokens // self.length, 1)
        for start in range(0, len(self.numbers), size):
            yield self.part(np.arange(start, min(start + size, len(self.numbers))))

    def spread(self, most_tokens: int) -> "Windows":
        """Return windows that hold at most that many positions, and one at least, spread evenly."""
        most = max(most_tokens // self.length, 1)
        if most >= len(self.numbers):
            return self
        return self.part(np.linspace(0, len(self.numbers) - 1, most).round().astype(int))


def random_blocks(
    rng_key: PRNGKeyArray, tokens: Integer[Array, " N"], *, batch: int, block: int
) -> tuple[Int[Array, "batch block"], Int[Array, "batch block"]]:
    """Draw blocks that start at random positions, and the token that follows each input.

    Args:
        rng_key: the minibatch is a function of it, so a step's data can be drawn again.
        tokens: (N,), N > block, integers of any type.
        batch: number of blocks B.
        block: tokens per block T.

    Returns:
        Inputs and targets, each (B, T), of the type of the tokens.

    Raises:
        ValueError: if batch or block is below 1, or the text is not longer than a block.
    """
    if batch < 1 or block < 1:
        raise ValueError(f"batch is {batch} and block {block}: expected both >= 1")
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 1 or tokens.shape[0] <= block:
        raise ValueError(
            f"tokens have shape {tokens.shape}: expected (N,) with N > block = {block}; "
            "give a longer text or a smaller block"
        )
    starts = jax.random.randint(rng_key, (batch, 1), 0, tokens.shape[0] - block)
    blocks = tokens[starts + jnp.arange(block + 1)]
    return blocks[:, :-1], blocks[:, 1:]


def windows(length: int, *, block: int, stride: int | None = None) -> Windows:
    """Cover a text of any length by windows.

    The first window reports all of its positions; each later one begins `stride` further and
    reports those that no earlier window held, so that they have at least block - stride tokens of
    context. The last window is moved back to end with the text.

    Args:
        length: number of positions, >= 1.
        block: positions in a window; shorter texts have one window of their length.
        stride: distance between windows, 1 <= stride <= block; by default block, no overlap.

    Raises:
        ValueError: if an argument is out of range.
    """
    if length < 1:
        raise ValueError(f"the text has {length} positions: expected at least 1")
    if block < 1:
        raise ValueError(f"block = {block}: expected an integer >= 1")
    stride = block if stride is None else stride
    if not hasattr(stride, "__index__") or not 1 <= stride <= block:
        raise ValueError(f"stride is {stride!r}: expected 1 <= stride <= block = {block}, integer")
    size = min(block, length)
    return Windows(range(-(-(length - size) // stride) + 1), size, stride, length - size)


def batched_rows(count: int, size: int) -> Iterator[Int[np.ndarray, " size"]]:
    """Yield indices of rows in batches of one size, the last filled up with the last row.

    One size is one compilation; what is computed of the filling is to be cut off after `count`.
    """
    for start in range(0, count, size):
        yield np.minimum(np.arange(start, start + size), count - 1)


def each_batch(
    function: Callable[[int, Int[np.ndarray, " size"]], Any], count: int, size: int
) -> Iterator[Any]:
    """Call a function for batches of rows, and yield what it returns, batch after batch.

    A batch is yielded when the next has begun, so that a device does not wait for its caller.

    Args:
        function: takes the number of a batch and the indices of its rows, as `batched_rows` gives
            them, and returns a tree of arrays whose leading axis is that of the rows.
        count: number of rows, >= 1.
        size: rows of a batch, >= 1.

    Yields:
        The tree, with NumPy arrays whose leading axis is that of the batch's own rows.
    """

    def finished(number: int, tree: Any) -> Any:
        return jax.tree.map(lambda array: np.asarray(array)[: count - number * size], tree)

    before: tuple[int, Any] | None = None
    for number, rows in enumerate(batched_rows(count, size)):
        begun = number, function(number, rows)
        if before is not None:
            yield finished(*before)
        before = begun
    if before is not None:
        yield finished(*before)


def map_batches(
    function: Callable[[int, Int[np.ndarray, " size"]], Any], count: int, size: int
) -> Any:
    """Call a function for batches of rows, and join what it returns.

    Args:
        function: see `each_batch`.
        count: number of rows, >= 1.
        size: rows of a batch, >= 1.

    Returns:
        The tree, with NumPy arrays whose leading axis is that of all rows.
    """
    parts = list(each_batch(function, count, size))
    return jax.tree.map(lambda *pieces: np.concatenate(pieces), *parts)
