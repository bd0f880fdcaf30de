"""The folder of the user's cache that is ours."""

import os
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
