"""Settings of the whole suite. Each holds in every pytest-xdist worker: they are per process."""

import gc
import os
import signal
from pathlib import Path

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

# Where the shape annotations are checked while the tests run. Public arguments are annotated
# loosely there, so that a user's mistake still reaches our own ValueError.
SHAPE_CHECKED = [
    "probattn.arguments",
    "probattn.attention",
    "probattn.blocks.geometry",
    "probattn.log_determinants",
    "probattn.margins",
]

MOST_MAPPINGS = 30_000

# Tracing makes millions of objects and few cycles among them: collecting by default takes a tenth
# of the suite's time.
gc.set_threshold(200_000, 50, 100)
os.environ["MPLBACKEND"] = "Agg"
jax.config.update("jax_enable_x64", True)

hypothesis.settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.register_profile("nightly", max_examples=500, deadline=None)
hypothesis.settings.load_profile(os.environ.get("PROBATTN_HYPOTHESIS", "ci"))


def pytest_configure(config):
    # A shell may start the tests with SIGINT ignored, and commands then ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    install_import_hook(SHAPE_CHECKED, "beartype.beartype")
    # Most of the suite's time goes into compiling, of the same programs again and again. Thousands
    # of them are single operations, which JAX by default would not keep. Child processes read the
    # environment.
    compiled = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What runs at night alone is slow, too."""
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def strict_promotion():
    """No silent mixing of dtypes: for the mathematics, not for libraries that rely on it."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def strict_ranks():
    """No silent mixing of ranks, likewise."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(name="quick_compilation")
def quick_compilation_fixture():
    """Compile quickly, for whole stories: tiny programs do not repay XLA's optimisations."""
    from tests.support.small import quick_compilation  # later than the hook above

    with quick_compilation():
        yield


@pytest.fixture(scope="module", autouse=True)
def few_executables():
    """Drop compiled programs before there are too many.

    XLA maps each of them into memory. Linux allows a process 65,530 mappings, and XLA aborts when
    it gets no more.
    """
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(scope="session", name="tiny_run")
def tiny_run_fixture(tmp_path_factory):
    """A run of objective margin with its post-hoc prior: read it, never write to it."""
    # Imported here: the hook above must be in place before probattn is imported.
    from tests.support.tiny_run import fit_tiny_run

    return fit_tiny_run(tmp_path_factory)


@pytest.fixture(name="own_run")
def own_run_fixture(tiny_run, tmp_path):
    """A copy of the run, to do anything with."""
    from tests.support.tiny_run import copy_of

    return copy_of(tiny_run, tmp_path / "run")
