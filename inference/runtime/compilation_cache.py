"""Compiled programs, kept on disk between runs."""

import jax

from probattn.user_cache import user_cache

LEAST_SECONDS = 0.01  # shortest compilation to keep: reading from disk takes milliseconds itself
_MOST_BYTES = 2**30  # JAX then removes the programs that were not used for longest


def keep_compiled_programs() -> None:
    """Keep compiled programs in the user's cache, so that a second start need not compile.

    A setting of the whole process: for commands, not for functions that others call. Where JAX was
    told where to keep them (`JAX_COMPILATION_CACHE_DIR`), that stands; so does
    `JAX_ENABLE_COMPILATION_CACHE=0`.
    """
    folder = user_cache()
    if jax.config.jax_compilation_cache_dir is not None or folder is None:
        return
    try:
        (folder / "compiled").mkdir(parents=True, exist_ok=True)
    except OSError:  # a cache is a convenience: without it everything still works
        return
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
