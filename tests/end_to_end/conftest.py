"""What makes whole stories cheap enough to be told."""

import jax
import pytest


@pytest.fixture(name="quick_compilation")
def quick_compilation_fixture():
    """Compile without XLA's expensive optimisations, which tiny programs do not repay.

    Not for checks of digits: sums may be taken in another order.
    """
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
