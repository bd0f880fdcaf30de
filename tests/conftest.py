"""Settings of the whole suite. Each holds in every pytest-xdist worker: they are per process."""

import os

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

# Where the shape annotations are checked while the tests run. Public arguments are annotated
# loosely there, so that a user's mistake still reaches our own ValueError.
SHAPE_CHECKED = ["probattn.attention", "probattn.log_det", "probattn.margins"]

os.environ["MPLBACKEND"] = "Agg"
jax.config.update("jax_enable_x64", True)

hypothesis.settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.register_profile("nightly", max_examples=500, deadline=None)
hypothesis.settings.load_profile(os.environ.get("PROBATTN_HYPOTHESIS", "ci"))


def pytest_configure():
    install_import_hook(SHAPE_CHECKED, "beartype.beartype")


@pytest.fixture(scope="module")
def strict_promotion():
    """No silent mixing of dtypes: for the mathematics, not for libraries that rely on it."""
    with jax.numpy_dtype_promotion("strict"):
        yield
