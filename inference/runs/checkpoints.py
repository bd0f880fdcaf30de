"""Checkpoints by orbax: one folder for the latest state, one for the best parameters."""

import glob
import hashlib
import logging
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from probattn.messages import one_line
from probattn.inference.runtime.memory import check_memory
from probattn.inference.runs.files import WriteError, fsync, write_errors

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

_ARRAYS = "arrays"
_CHECKSUMS = "SHA256SUMS"
_SLACK = 2**24  # bytes of a checkpoint beside its arrays, at most
_LATE: dict[str, Callable[[Any], None]] = {}  # the hook that is set, see `_ignore_late_errors`


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

    def save(
        self,
        step: int,
        arrays: Mapping[str, Array | np.ndarray],
        **others: Mapping[str, Array | np.ndarray],
    ) -> None:
        """Save named arrays, then drop every other checkpoint.

        A step that is there already is left as it is: a resumed fit comes by it again.

        Args:
            step: the checkpoint's number.
            arrays: what `load` gives by default.
            others: further parts, each of named arrays: all are saved, or none.
        """
        target = self._path / str(step)
        if not target.exists():
            partial = self._path / f"{step}.saving"
            shutil.rmtree(partial, ignore_errors=True)
            for part, named in {_ARRAYS: arrays, **others}.items():
                _save(partial / part, {name: np.asarray(leaf) for name, leaf in named.items()})
            with write_errors(target):
                for entry in (*partial.rglob("*"), partial):
                    fsync(entry)
                partial.rename(target)
                fsync(self._path)
        self._tidy(step)

    def tidy(self) -> None:
        """Remove all but the newest checkpoint: those before it, and what was not saved whole."""
        self._tidy(self.step)

    def _tidy(self, kept: int | None) -> None:
        for entry in self._path.iterdir() if self._path.is_dir() else ():
            if entry.name != str(kept):
                with write_errors(entry):
                    shutil.rmtree(entry)

    def load(self, like: Mapping[str, Any], *, part: str = _ARRAYS) -> dict[str, Array]:
        """Load the checkpoint's arrays, or those of another part, into the dtypes of `like`.

        Names and shapes must be those of `like`; a floating-point array may have been saved in
        another precision. The other parts are not read.

        Raises:
            CheckpointError: if there is no checkpoint, it is damaged, or it holds something else.
        """
        return self.load_with_step(like, part=part)[1]

    def load_with_step(
        self, like: Mapping[str, Any], *, part: str = _ARRAYS
    ) -> tuple[int, dict[str, Array]]:
        """The same, and its step, which may be a later one than `step` was before."""
        expected = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in like.items()
        }
        while (step := self.step) is not None:
            folder = self._path / str(step)
            try:
                stored = _stored(folder / part, expected)
            # Orbax and tensorstore raise what they meet: KeyError, OSError, JSON errors and others.
            except Exception as error:
                if self.step != step:  # a fit that goes on has replaced it
                    continue
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise CheckpointError(
                    f"{folder}: the checkpoint is damaged, or of another model or optimizer "
                    f"({reason[:200]}); give those it was made with, restore it from a copy, or "
                    "start again with --overwrite"
                ) from None
            return step, {
                name: jnp.asarray(leaf, expected[name].dtype) for name, leaf in stored.items()
            }
        raise CheckpointError(f"{self._path}: got no checkpoint, expected one to load")


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


def _stored(folder: Path, expected: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays as they were saved, which have the names and shapes that are expected."""
    # Before tensorstore opens them: a file cut short can end the process there.
    _check_sizes(folder, expected)
    _check_files(folder)
    from orbax.checkpoint.args import StandardRestore

    with _quiet(), _checkpointer() as checkpointer:
        described = _described(checkpointer, folder)
        kinds = {
            name: jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype))
            for name, leaf in described.items()
        }
        _check_same(kinds, expected)
        _check_chunks(described)
        # As NumPy arrays: JAX would round float64 where that is not enabled.
        empty = {name: np.empty(kind.shape, kind.dtype) for name, kind in kinds.items()}
        return checkpointer.restore(folder, args=StandardRestore(empty))


def _described(checkpointer: "ocp.Checkpointer", folder: Path) -> Mapping[str, Any]:
    """What a saved folder says of its arrays: the shape, dtype and storage of each."""
    description = checkpointer.metadata(folder).item_metadata
    if description is None:
        raise ValueError("what it holds is not described")
    return description.tree


def _save(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Save arrays by orbax, and their checksums beside them.

    Raises:
        WriteError: if they cannot be written, or what was written does not describe them.
    """
    from orbax.checkpoint.args import StandardSave

    try:
        with _quiet(), _checkpointer() as checkpointer:
            with _literal(folder) as literal:
                checkpointer.save(literal, args=StandardSave(dict(arrays)))
            # Orbax reports no error where it found nothing to merge, and none could be loaded.
            _check_same(_described(checkpointer, folder), arrays)
        with _checksum_file(folder).open("x", encoding="utf-8") as file:
            file.write(_checksums(folder))
    # Tensorstore raises a ValueError, which quotes the system, where a disk is full.
    except Exception as error:
        shutil.rmtree(folder.parent, ignore_errors=True)  # which makes room again
        raise WriteError(folder.parent.with_suffix(""), _system_error(error)) from None


@contextmanager
def _literal(folder: Path) -> Iterator[Path]:
    """The folder, through a link where a glob would read its own path as a pattern.

    Orbax merges what it has written by a glob on the absolute path. It finds nothing below a
    folder named `[2024]`, and could find another run's files below one named `*`.
    """
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="probattn-") as temporary:
        link = Path(temporary) / "link"
        link.symlink_to(folder.parent)
        yield link / folder.name


def _checkpointer() -> "ocp.Checkpointer":
    """Orbax's, of this process alone: what it saves and loads is whole in its memory.

    Not the asynchronous one, which gives up after ten minutes by the time of day: a clock that is
    set forward would end a save.
    """
    import orbax.checkpoint as ocp  # here, since it takes an eighth of the time of all imports

    options = ocp.options.MultiprocessingOptions()
    if jax.process_count() > 1:
        this = jax.process_index()
        options = ocp.options.MultiprocessingOptions(
            primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process{this}"
        )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _system_error(error: Exception) -> OSError:
    """What the system said, of an exception that may be another library's."""
    if isinstance(error, OSError):
        return error
    if quoted := re.search(r"os_error_code='(\d+)'", str(error)):
        return OSError(int(quoted[1]), os.strerror(int(quoted[1])))
    return OSError(one_line(error)[:200])


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of orbax beside the one line that an error is."""
    _ignore_late_errors()
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _ignore_late_errors() -> None:
    """No tracebacks, either, of arrays still being read or written when another has failed.

    Orbax closes its event loop at the first error. Tensorstore's threads call it all the same, at
    any time after, and Python reports what nobody can catch through `sys.unraisablehook`. Tasks
    that failed too are reported by asyncio's logger, when they are collected.
    """
    logging.getLogger("asyncio").addFilter(_is_not_of_orbax)
    before = sys.unraisablehook
    if before is _LATE.get("hook"):
        return

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        late = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        if not (late and unraisable.object is None):
            before(unraisable)

    sys.unraisablehook = _LATE["hook"] = hook


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """Whether what asyncio says is not of a task whose code lies in orbax."""
    return f"{os.sep}orbax{os.sep}" not in record.getMessage()


def _checksums(folder: Path) -> str:
    """SHA-256 of every file, as `sha256sum --check` reads it beside the folder."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise ValueError(f"{path.relative_to(folder)} is a link, expected a file")
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder.parent)}\n")
    return "".join(lines)


def _checksum_file(folder: Path) -> Path:
    """Where the checksums of a part stand: beside it."""
    return folder.with_name(_CHECKSUMS if folder.name == _ARRAYS else f"{_CHECKSUMS}.{folder.name}")


def _check_files(folder: Path) -> None:
    stored = set(_checksum_file(folder).read_text(encoding="utf-8").splitlines())
    changed = stored ^ set(_checksums(folder).splitlines())
    if changed:
        names = sorted({line.partition("  ")[2] for line in changed})
        raise ValueError(f"files that do not fit their checksums: {', '.join(names)}")


def _check_sizes(folder: Path, expected: Mapping[str, Any]) -> None:
    """Refuse, before they are read, arrays and files that are too large."""
    arrays = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in expected.values())
    check_memory("its arrays", arrays)
    files = sum(path.lstat().st_size for path in folder.rglob("*"))
    largest = _SLACK + 2 * arrays  # one in single precision may have been saved in double
    if files > largest:
        raise ValueError(f"it has {files} bytes, expected at most {largest}")


def _check_chunks(stored: Mapping[str, Any]) -> None:
    """Refuse arrays in chunks larger than themselves: one is allocated at a time."""
    for name, leaf in stored.items():
        chunk = leaf.storage.chunk_shape
        if math.prod(chunk) > max(1, math.prod(leaf.shape)):
            raise ValueError(f"array {name} of {leaf.shape} is in chunks of {tuple(chunk)}")


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
