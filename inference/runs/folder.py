"""The folder of a run: what may lie in it, one writer at a time, nothing that leads out of it.

A run may come from anybody. What is read must lie in its folder, and what is written must not leave
it: so there are no links in a run, and no devices or pipes, which could be read for ever.
"""

import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from probattn.inference.config_files import LARGEST
from probattn.inference.runs.files import (
    RunError,
    check_name,
    final_name,
    read_json,
    write_errors,
)
from probattn.inference.runs.locks import OWNER, hold
from probattn.messages import describe

ENTRIES = (
    "config.toml",
    "data.json",
    "metrics.jsonl",
    "summary.json",
    "checkpoints",
    "post_hoc_prior.npz",
    "start.npz",
    "model",
    "segments",
    "posterior.nc",
    "figures",
)
"""What a run directory consists of, beside its lock."""

FORMAT = 2
"""Of the runs that this version makes. Those of the earliest versions name no format."""

BOUNDED_FORMAT = 2
"""The first format in which parameters of a bounded coupling mean what they mean now."""

LOCK_SECONDS = 60.0
"""To wait for the lock with work that is done: but for fits and samplers nobody holds it long."""

_REPLACED = "replaced"  # where the run that is being replaced lies
_PUT_ASIDE = "put-aside"  # where older versions put its entries first

# Most bytes of what is read in one go. In memory, JSON may take twenty times as many.
_LARGEST = {
    "config.toml": LARGEST,
    "data.json": 2**23,  # the largest vocabulary takes half of them
    "summary.json": 2**23,
    "metrics.jsonl": 2**25,  # at 1,600 for each report of the longest fit
}
# What a run's own commands write into it, and a kill may leave under a temporary name.
_WRITTEN = re.compile(
    r"(figures/((training|noise|noise_kinds|barrier|smallest_margin|support_probability)\.png|"
    r"noise\.csv)|segments/[0-9]+-[0-9]+\.npz|"
    + "|".join(re.escape(name) for name in ENTRIES if "." in name)
    + ")"
)


def check_folder(path: Path) -> None:
    """Refuse what no run holds: links, devices and pipes, and descriptions too large to read.

    Raises:
        RunError: it names the entry; or the path itself, where it is not UTF-8.
    """
    check_name(path)
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            entry = Path(folder, name)
            try:
                status = entry.lstat()
            except FileNotFoundError:  # a temporary file of a process that is writing
                continue
            if stat.S_ISLNK(status.st_mode):
                raise RunError(
                    f"{entry}: is a link: expected files and folders of the run's own; put what it "
                    "leads to in its place, or remove it"
                )
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                raise RunError(f"{entry}: is no file and no folder; remove it from the run")
    for name, largest in _LARGEST.items():
        entry = path / name
        if entry.exists() and entry.stat().st_size > largest:
            raise RunError(
                f"{entry}: has {entry.stat().st_size} bytes: expected at most {largest}; it is not "
                "what was written there"
            )


def enter(path: Path) -> None:
    """Refuse a run that cannot be read, once what a killed --overwrite put aside is back.

    A folder that holds no run is left to the caller.

    Raises:
        RunError: if it holds what no run does or is of a newer version, or another process is just
            replacing it.
        WriteError: if the run that was put aside cannot be brought back.
    """
    if not any((path / name).exists() for name in ("config.toml", _REPLACED, _PUT_ASIDE)):
        return
    check_folder(path)
    if _is_put_aside(path):
        with locked(path):  # which brings it back
            pass
    description = path / "data.json"
    if description.exists():
        found = read_json(description).get("format", 0)
        if type(found) is not int or found < 0:
            raise RunError(f"{description}: damaged: format is {describe(found)}")
        if found > FORMAT:
            raise RunError(
                f"{path}: is a run of format {found}, and this version of probattn reads formats "
                f"up to {FORMAT}; update probattn to use it"
            )


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuse a directory that a new run would damage.

    Raises:
        RunError: if the path is not UTF-8, holds a run and `overwrite` is not set, or holds
            anything else.
    """
    check_name(path)
    for parent in path.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise RunError(f"{path}: expected a directory for the run, and {parent} is a file")
    if not path.exists():
        return
    if not path.is_dir():
        raise RunError(f"{path}: expected a directory for the run, got a file")
    names = (final_name(entry.name) for entry in path.iterdir())
    known = (*ENTRIES, "lock", OWNER, _PUT_ASIDE, _REPLACED)
    others = sorted(name for name in names if name not in known)
    if others:
        raise RunError(
            f"{path}: holds {', '.join(others[:3])}, which is no part of a run; "
            "expected a new or empty directory"
        )
    check_folder(path)
    if (path / "config.toml").exists() and not overwrite:
        raise RunError(
            f"{path}: holds another run; continue it with --resume, replace it with --overwrite, "
            "or choose another directory"
        )


def clear(path: Path, names: Iterable[str] = ENTRIES) -> None:
    """Remove all that a run consists of, the configuration first; its folder and its lock stay.

    Raises:
        WriteError: if something cannot be removed.
    """
    for name in names:
        entry = path / name
        with write_errors(entry):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)


@contextmanager
def replacement(path: Path, *, overwrite: bool) -> Iterator[None]:
    """Set aside the run that a new one replaces, under the lock that the caller holds.

    It is removed after the block. But it comes back if the block raises before the new run has a
    checkpoint to resume from, draws or a published model.

    Args:
        path: of both runs.
        overwrite: false where a run goes on, which may be one that replaces another.

    Raises:
        WriteError: if something cannot be moved or removed.
    """
    try:
        if overwrite:
            _set_aside(path)
        yield
    except BaseException:
        if is_replacing(path):
            _bring_back(path)
        else:
            _drop(path)
        raise
    _drop(path)


def is_replacing(path: Path) -> bool:
    """Tell whether the run that was there before would come back if the new one failed now."""
    if not (path / _REPLACED).is_dir():
        return False
    saved = *path.glob("checkpoints/latest/*"), *path.glob("segments/*.npz")
    begun = any(re.fullmatch(r"[0-9]+|[0-9]+-[0-9]+\.npz", entry.name) for entry in saved)
    imported = (path / "model").is_dir() and (path / "config.toml").exists()
    return not ((begun or imported) and _is_whole(path))


def put_aside(path: Path) -> Path | None:
    """Return where the run lies that the one here is replacing, None if it replaces none."""
    return path / _REPLACED if _is_whole(path) else None


def _is_whole(path: Path) -> bool:
    """Tell whether the old run is wholly set aside: its configuration goes last, and returns first.

    Until then all that lies beside is of the old run too.
    """
    return (path / _REPLACED / "config.toml").exists()


def _set_aside(path: Path) -> None:
    if not (path / "config.toml").exists() or is_replacing(path):
        clear(path)  # what there may be is no run, or one that a kill ended before it had begun
        return
    _drop(path)
    with write_errors(path):
        (path / _REPLACED).mkdir()
        for name in reversed(ENTRIES):
            if (path / name).exists():
                (path / name).rename(path / _REPLACED / name)


def _bring_back(path: Path, aside: str = _REPLACED) -> None:
    if _is_whole(path):
        clear(path)
    with write_errors(path):
        for name in ENTRIES:
            if (path / aside / name).exists():
                (path / aside / name).rename(path / name)
        (path / aside).rmdir()


def _drop(path: Path) -> None:
    if (path / _REPLACED).is_dir():
        clear(path / _REPLACED, reversed(ENTRIES))
        with write_errors(path):
            (path / _REPLACED).rmdir()


@contextmanager
def locked(path: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock of a run directory, which is made if need be; a thread may hold it twice.

    Args:
        path: of the run.
        wait: seconds to wait for whoever else holds it.

    Raises:
        RunError: if another process or thread holds it.
        WriteError: if nothing can be written there.
    """
    with write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with hold(path / "lock", wait=wait) as first:
        if first:
            _tidy(path)
        yield


def _tidy(path: Path) -> None:
    """Remove what processes that were killed have left: nobody else is writing."""
    for folder in (path, path / "segments", path / "figures"):
        for entry in folder.iterdir() if folder.is_dir() else ():
            name = final_name(entry.name)
            written = (folder.relative_to(path) / name).as_posix()
            if name != entry.name and _WRITTEN.fullmatch(written):
                with write_errors(entry):
                    entry.unlink()
    for entry in path.glob("checkpoints/*/*.saving"):
        if re.fullmatch(r"[0-9]+\.saving", entry.name) and entry.is_dir():
            with write_errors(entry):
                shutil.rmtree(entry)
    if (path / _PUT_ASIDE).is_dir():
        _bring_back(path, _PUT_ASIDE)
    if _is_put_aside(path):
        _bring_back(path)


def _is_put_aside(path: Path) -> bool:
    """Tell whether the run that was there before lies aside, and no new one has taken its place.

    A new run stays: it is what --resume goes on with, and the old one lies aside until it ends.
    """
    replacing = (path / "config.toml").exists() and _is_whole(path)
    return (path / _PUT_ASIDE).is_dir() or ((path / _REPLACED).is_dir() and not replacing)
