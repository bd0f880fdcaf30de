"""The folder of the user's cache that is ours."""

import os
import stat
from pathlib import Path


def user_cache() -> Path | None:
    """Return `$XDG_CACHE_HOME/probattn`, by default `~/.cache/probattn`; None without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification has relative values ignored
        return Path(base) / "probattn"
    try:
        return Path.home() / ".cache" / "probattn"
    except RuntimeError:
        return None


def private_folder(name: str) -> Path | None:
    """Make a folder in the user's cache that nobody else can write to.

    Returns:
        The folder, or None where there is no home, it cannot be made or written to, or what is
        there is a link, somebody else's or writable by others.
    """
    root = user_cache()
    if root is None:
        return None
    folder = root / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    trusted = (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid == os.geteuid()
        and not status.st_mode & 0o022
        and os.access(folder, os.W_OK | os.X_OK)
    )
    return folder if trusted else None
