"""Checkpoints by orbax: one folder for the latest state, one for the best parameters."""

import gc
import hashlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array

_DIGEST = "sha256"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or does not fit the configuration."""


class CheckpointFolder:
    """A folder with one checkpoint of named arrays, under the number of its step.

    A new checkpoint takes its name only when it is complete, and the one before it is deleted
    only then. Loading executes nothing: names, shapes and dtypes are compared with what the
    caller expects before an array is read.

    Args:
        path: the folder; `save` creates it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path).absolute()

    @property
    def step(self) -> int | None:
        """Step of the checkpoint, None where there is none."""
        names = [entry.name for entry in self._path.iterdir()] if self._path.is_dir() else []
        return max((int(name) for name in names if name.isdecimal()), default=None)

    def save(self, step: int, arrays: Mapping[str, Array]) -> None:
        """Save named arrays, then drop the checkpoint before.

        A step that is there already is left as it is: a resumed fit comes by it again.
        """
        target = self._path / str(step)
        if not target.exists():
            stored = {name: np.asarray(leaf) for name, leaf in arrays.items()}
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(target, {**stored, _DIGEST: _digest(stored)})
        for entry in self._path.iterdir():  # the one before, and what an interrupted save left
            if entry != target:
                shutil.rmtree(entry)

    def load(self, like: Mapping[str, Any]) -> dict[str, Array]:
        """Load the checkpoint's arrays into the dtypes of `like`.

        Names and shapes must be those of `like`; a floating-point array may have been saved in
        another precision.

        Raises:
            CheckpointError: if there is no checkpoint, it is damaged, or it holds something else.
        """
        step = self.step
        if step is None:
            raise CheckpointError(f"{self._path}: got no checkpoint, expected one to load")
        expected = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in like.items()
        }
        try:
            with _without_echo(), ocp.StandardCheckpointer() as checkpointer:
                folder = self._path / str(step)
                description = checkpointer.metadata(folder).item_metadata
                if description is None:
                    raise ValueError("its description is missing")
                kinds = {
                    name: jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype))
                    for name, leaf in description.tree.items()
                }
                _check_same(kinds, {**expected, _DIGEST: jax.ShapeDtypeStruct((32,), np.uint8)})
                # As NumPy arrays: JAX would round float64 where that is not enabled.
                stored = checkpointer.restore(
                    folder, {name: np.empty(kind.shape, kind.dtype) for name, kind in kinds.items()}
                )
                if not np.array_equal(stored.pop(_DIGEST), _digest(stored)):
                    raise ValueError("its checksum does not fit its arrays")
                return {
                    name: jnp.asarray(leaf, expected[name].dtype) for name, leaf in stored.items()
                }
        # Orbax and tensorstore raise what they meet: KeyError, OSError, JSON errors and others.
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{self._path / str(step)}: the checkpoint is damaged or of another model "
                f"({reason[:200]}); restore it from a copy, or start again with --overwrite"
            ) from None


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves of any tree by their path, as `CheckpointFolder` saves them."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def with_leaves(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """The tree with its leaves replaced by those of the same path."""
    return jax.tree.unflatten(
        jax.tree.structure(tree), [leaves[name] for name in named_leaves(tree)]
    )


def _digest(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """SHA-256 over names, dtypes, shapes and contents: storage alone misses a flipped bit."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\0".encode())
        digest.update(array.tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def _check_same(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if stored.keys() != expected.keys():
        difference = sorted(stored.keys() ^ expected.keys())
        raise ValueError(f"it differs in the arrays {', '.join(difference[:5])}")
    for name, leaf in expected.items():
        shape, dtype = stored[name].shape, stored[name].dtype
        # A run fitted in one floating precision may be opened in a process that has another.
        both_floating = all(jnp.issubdtype(kind, jnp.floating) for kind in (dtype, leaf.dtype))
        if shape != leaf.shape or not (both_floating or dtype == leaf.dtype):
            raise ValueError(f"array {name} is {dtype} {shape}, expected {leaf.dtype} {leaf.shape}")


@contextmanager
def _without_echo() -> Iterator[None]:
    """Silence what orbax logs of an error beside raising it, and the coroutines it abandons."""
    hook, level = sys.unraisablehook, logging.root.manager.disable
    sys.unraisablehook = lambda _: None
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        gc.collect()
        logging.disable(level)
        sys.unraisablehook = hook
