"""Compiled programs, kept on disk between runs.

JAX keeps them as files, and each holds native code, which the process that reads it executes. JAX
itself checks neither whose they are nor whether they are whole. It replaces no file that it cannot
read, and warns of it at every start.
"""

import os
import re
import stat
import warnings
from collections.abc import Callable
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any

import jax

from probattn.user_cache import user_cache

LEAST_SECONDS = 0.01  # shortest compilation to keep: reading from disk takes milliseconds itself
MOST_BYTES = 2**30  # beyond it, a start removes the programs that were not used for longest

_TROUBLE = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '(.+)': (.*)", re.DOTALL
)


def keep_compiled_programs(tell: Callable[[str], None]) -> None:
    """Keep compiled programs in the user's cache, so that a second start need not compile.

    A setting of the whole process: for commands, not for functions that others call. Where JAX was
    told where to keep them (`JAX_COMPILATION_CACHE_DIR`), that stands; so does
    `JAX_ENABLE_COMPILATION_CACHE=0`. Nothing is kept where others could put programs of theirs.

    Args:
        tell: prints a line; it is called once at most.
    """
    cache = user_cache()
    told = jax.config.jax_compilation_cache_dir is not None
    if told or cache is None or not jax.config.jax_enable_compilation_cache:
        return
    folder = cache / "compiled"
    try:
        if fault := _make_private(folder):
            tell(f"compiled programs are not kept: {fault}")
            return
        _prune(folder)
    except OSError:  # a cache is a convenience: without it everything still works
        return
    _mend(folder, tell)
    # JAX's own limit of size is not set. It would take a lock for every program, and wait ten
    # seconds for each while another process holds it.
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def _make_private(folder: Path) -> str | None:
    """Make a folder that nobody else can read or write, and return why it is none, if it is not."""
    user, system = os.geteuid(), Path("/").stat().st_uid
    parent = folder.parent.resolve()
    for path in (parent, *parent.parents):
        if not path.exists():
            continue
        status = path.stat()
        if status.st_uid not in (user, system):
            return f"{path} belongs to another user, who could put programs there"
        if _others_write(status) and not status.st_mode & stat.S_ISVTX:
            return f"others may write to {path}, and put programs there: chmod go-w helps"
    for path in (*reversed(folder.parents), folder):  # whatever the umask
        path.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return f"{folder} is a link: expected a folder; remove it"
    if status.st_uid != user:
        return f"{folder} belongs to another user, who could put programs there; remove it"
    if _others_write(status):
        return f"others may write to {folder}, and may have put programs there; remove it"
    if status.st_mode & 0o077:
        with suppress(OSError):  # on a disk that is read alone
            folder.chmod(0o700)
    return None


def _others_write(status: os.stat_result) -> bool:
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _prune(folder: Path) -> None:
    def used(entry: os.DirEntry[str]) -> float:
        return max(entry.stat().st_atime, entry.stat().st_mtime)

    with os.scandir(folder) as entries:
        files = [entry for entry in entries if entry.is_file(follow_symlinks=False)]
    kept = 0
    for entry in sorted(files, key=used, reverse=True):
        kept += entry.stat().st_size
        if kept > MOST_BYTES:
            Path(entry).unlink(missing_ok=True)


def _mend(folder: Path, tell: Callable[[str], None]) -> None:
    """Remove what JAX says it cannot read, so that it writes it anew; tell what it cannot write.

    JAX says so by warnings, with the name of the program, which its file's name begins with.
    """
    show, silent = warnings.showwarning, False

    def mend(message: Warning | str, *details: Any, **options: Any) -> None:
        nonlocal silent
        trouble = _TROUBLE.fullmatch(str(message))
        if trouble is None:
            show(message, *details, **options)
        elif trouble[1] == "reading":
            for entry in folder.glob(f"{escape(trouble[2])}-*"):
                with suppress(OSError):
                    entry.unlink(missing_ok=True)
        elif not silent:
            silent = True
            tell(f"compiled programs are not kept in {folder}: {trouble[3]}")

    warnings.filterwarnings("always", "Error (reading|writing) persistent compilation cache")
    warnings.showwarning = mend
