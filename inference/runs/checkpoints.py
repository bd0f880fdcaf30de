"""Checkpoints by orbax: one folder for the latest state, one for the best parameters.

Orbax's `CheckpointManager` is not used: it brings nothing to the disk before it renames, and it
deletes the checkpoint before as soon as the new one has its name. See record 12 of
`docs/decisions.md`.
"""

import glob
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from probattn.inference.runs.files import WriteError, fsync, read_json, write_errors
from probattn.inference.runtime.cores import cores
from probattn.inference.runtime.memory import check_memory
from probattn.messages import one_line

if TYPE_CHECKING:
    import tensorstore

_ARRAYS = "arrays"
_CHECKSUMS = "SHA256SUMS"
_ORIGIN = "origin.json"  # in each part: its step, and the cores it was computed on
_SLACK = 2**24  # bytes of a checkpoint beside its arrays, at most
_LARGEST = 2**20  # bytes of other files
_WHOLE = re.compile("0|[1-9][0-9]*")
_UNFINISHED = re.compile(r"[0-9]+\.(saving|orbax-checkpoint-tmp.*)")
# What orbax and tensorstore raise: of the status of an operation, a ValueError or another of these.
_OF_LIBRARIES = (OSError, ValueError, LookupError, RuntimeError)


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or does not fit the configuration."""


class CheckpointFolder:
    """A folder with one checkpoint of named arrays, under the number of its step.

    A new checkpoint takes its name only when it is complete and on the disk, and the one before it
    is deleted only then. Loading executes nothing: checksums, names, shapes and dtypes are compared
    with what the caller expects before an array is read.

    Args:
        path: the folder; `save` creates it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path).absolute()

    @property
    def step(self) -> int | None:
        """Step of the checkpoint, None where there is none."""
        return max((int(entry.name) for entry in self._checkpoints()), default=None)

    def _checkpoints(self) -> list[Path]:
        """List the checkpoints, and nothing else that may lie there."""
        entries = self._path.iterdir() if self._path.is_dir() else ()
        return [e for e in entries if _WHOLE.fullmatch(e.name) and (e / _ARRAYS).is_dir()]

    def cores(self) -> int | None:
        """Return on how many cores the checkpoint was computed, None where it does not say."""
        origin = self._path / str(self.step) / _ARRAYS / _ORIGIN
        found = read_json(origin).get("cores") if origin.exists() else None
        return found if type(found) is int else None

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

        Raises:
            WriteError: if they cannot be written; the checkpoint before is kept.
        """
        target, partial = self._path / str(step), self._path / f"{step}.saving"
        if not target.exists():
            parts = {
                part: {name: np.asarray(leaf) for name, leaf in named.items()}
                for part, named in {_ARRAYS: arrays, **others}.items()
            }
            shutil.rmtree(partial, ignore_errors=True)
            try:
                _write(partial, parts, step)
                for entry in (*partial.rglob("*"), partial):
                    fsync(entry)
                partial.rename(target)
                fsync(self._path)
            # Tensorstore raises a ValueError, which quotes the system, where a disk is full.
            except _OF_LIBRARIES as error:
                shutil.rmtree(partial, ignore_errors=True)  # which makes room again
                raise WriteError(target, _system_error(error)) from None
        self.tidy(step)

    def tidy(self, step: int | None = None) -> None:
        """Remove all but one checkpoint, by default the newest: older ones, and unfinished ones.

        What is no checkpoint is not this folder's own, and stays.
        """
        kept = self.step if step is None else step
        entries = self._path.iterdir() if self._path.is_dir() else ()
        unfinished = [e for e in entries if _UNFINISHED.fullmatch(e.name) and e.is_dir()]
        for entry in (*self._checkpoints(), *unfinished):
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
        """Load the same, and the step, which may be a later one than `step` was before."""
        while (step := self.step) is not None:
            folder = self._path / str(step)
            try:
                stored = _read(folder / part, like)
            except _OF_LIBRARIES as error:
                if self.step != step:  # a fit that goes on has replaced it
                    continue
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise CheckpointError(
                    f"{folder}: the checkpoint is damaged, or of another model, optimizer or "
                    f"JAX_DEFAULT_PRNG_IMPL ({reason[:200]}); give those it was made with, restore "
                    "it from a copy, or start again with --overwrite"
                ) from None
            return step, {
                name: jnp.asarray(leaf, like[name].dtype) for name, leaf in stored.items()
            }
        raise CheckpointError(f"{self._path}: got no checkpoint, expected one to load")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of any tree by their path, as `CheckpointFolder` saves them."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def with_leaves(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """Return the tree with its leaves replaced by those of the same path."""
    return jax.tree.unflatten(
        jax.tree.structure(tree), [leaves[name] for name in named_leaves(tree)]
    )


def checksums(folder: Path) -> str:
    """Return the SHA-256 of every file, as `sha256sum --check` reads it beside the folder."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise ValueError(f"{path.relative_to(folder)} is a link, expected a file")
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder.parent)}\n")
    return "".join(lines)


class _Uncopied(np.ndarray):
    """An array that orbax does not copy: it does so for saves that outlast their call."""

    def __deepcopy__(self, memo: Any) -> "_Uncopied":
        return self


def _write(checkpoint: Path, parts: Mapping[str, Mapping[str, np.ndarray]], step: int) -> None:
    """Write the parts of a checkpoint by orbax, and their checksums beside them."""
    import orbax.checkpoint as ocp  # here, since it takes an eighth of the time of all imports

    options = ocp.options.MultiprocessingOptions()
    if jax.process_count() > 1:  # what this process saves is whole in its memory
        this = jax.process_index()
        options = ocp.options.MultiprocessingOptions(
            primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process{this}"
        )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    checkpoint.mkdir(parents=True)
    # Not the asynchronous one, which gives up after ten minutes by the time of day: a clock that is
    # set forward would end a save.
    with (
        _without_pattern(checkpoint) as folder,
        ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer,
    ):
        for part, arrays in parts.items():
            uncopied = {name: leaf.view(_Uncopied) for name, leaf in arrays.items()}
            checkpointer.save(folder / part, args=ocp.args.StandardSave(uncopied))
            # Orbax reports no error where it found nothing to merge, and none could be loaded.
            _check_same(_open(checkpoint / part), arrays)
            origin = json.dumps({"step": step, "cores": cores()})
            (checkpoint / part / _ORIGIN).write_text(origin, "utf-8")
            _checksum_file(checkpoint / part).write_text(checksums(checkpoint / part), "utf-8")


def _read(folder: Path, expected: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Read arrays as they were saved, if they have the names and shapes that are expected."""
    # Before tensorstore opens them: a file cut short can end the process there.
    _check_sizes(folder, expected)
    _check_files(folder)
    arrays = _open(folder)
    _check_same(arrays, expected)
    for name, array in arrays.items():  # of which one chunk is allocated at a time
        chunk = tuple(size or 1 for size in array.chunk_layout.read_chunk.shape or ())
        if math.prod(chunk) > max(1, math.prod(array.shape)):
            raise ValueError(f"array {name} of {array.shape} is in chunks of {chunk}")
    reads = {name: array.read() for name, array in arrays.items()}
    return {name: read.result() for name, read in reads.items()}


def _open(folder: Path) -> dict[str, "tensorstore.TensorStore"]:
    """Open the arrays that orbax saved, without reading them.

    By tensorstore, as orbax does, and without orbax's event loop: where an array is damaged, orbax
    closes the loop, and those that are still being read then print a traceback each.
    """
    import tensorstore

    place = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    keys = tensorstore.KvStore.open(place).result().list().result()
    names = [key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")]
    plain = {"driver": "zarr", "fill_missing_data_reads": False}  # what is missing is no zero
    stores = {name: plain | {"kvstore": place | {"path": f"{name}/"}} for name in names}
    opened = {name: tensorstore.open(store, read=True) for name, store in stores.items()}
    return {name: future.result() for name, future in opened.items()}


@contextmanager
def _without_pattern(folder: Path) -> Iterator[Path]:
    """Give the folder, through a link where a glob would read its path as a pattern.

    Orbax merges what it has written by a glob on the absolute path. It finds nothing below a
    folder named `[2024]`, and could find another run's files below one named `*`.
    """
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="probattn-") as temporary:
        link = Path(temporary) / "link"
        link.symlink_to(folder)
        yield link


def _system_error(error: Exception) -> OSError:
    """Return what the system said, of an exception that may be another library's."""
    if isinstance(error, OSError):
        return error
    if quoted := re.search(r"os_error_code='([0-9]+)'", str(error)):
        return OSError(int(quoted[1]), os.strerror(int(quoted[1])))
    return OSError(one_line(error)[:200])


def _checksum_file(folder: Path) -> Path:
    """Return where the checksums of a part stand: beside it."""
    return folder.with_name(_CHECKSUMS if folder.name == _ARRAYS else f"{_CHECKSUMS}.{folder.name}")


def _check_files(folder: Path) -> None:
    """Refuse files that are not those that were saved."""
    path = _checksum_file(folder)
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path.name} has more than {_LARGEST} bytes")
    stored = set(path.read_text(encoding="utf-8").splitlines())
    changed = stored ^ set(checksums(folder).splitlines())
    if changed:
        names = sorted({line.partition("  ")[2] for line in changed})
        raise ValueError(f"files that do not fit their checksums: {', '.join(names)}")
    origin = folder / _ORIGIN
    if origin.exists():  # earlier versions saved none
        step = read_json(origin).get("step")
        if str(step) != folder.parent.name:
            raise ValueError(f"it is of step {step}, whatever its name")


def _check_sizes(folder: Path, expected: Mapping[str, Any]) -> None:
    """Refuse, before they are read, arrays and files that are too large."""
    arrays = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in expected.values())
    check_memory("its arrays", arrays)
    files = sum(path.lstat().st_size for path in folder.rglob("*"))
    largest = _SLACK + 2 * arrays  # one in single precision may have been saved in double
    if files > largest:
        raise ValueError(f"it has {files} bytes, expected at most {largest}")


def _dtype(array: Any) -> np.dtype:
    """Return the dtype of a NumPy array, or of one that tensorstore has opened."""
    return np.dtype(getattr(array.dtype, "numpy_dtype", array.dtype))


def _check_same(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse other names, shapes or dtypes than are expected."""
    if stored.keys() != expected.keys():
        difference = sorted(stored.keys() ^ expected.keys())
        raise ValueError(f"it differs in the arrays {', '.join(difference[:5])}")
    for name, leaf in expected.items():
        shape, dtype = stored[name].shape, _dtype(stored[name])
        # A run fitted in one floating precision may be opened in a process that has another.
        both_floating = all(jnp.issubdtype(kind, jnp.floating) for kind in (dtype, leaf.dtype))
        if shape != leaf.shape or not (both_floating or dtype == leaf.dtype):
            raise ValueError(f"array {name} is {dtype} {shape}, expected {leaf.dtype} {leaf.shape}")
