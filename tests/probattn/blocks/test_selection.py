"""What few elements of a batch need is computed for those alone, and is differentiable."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probattn.blocks.selection import compute_where


@pytest.mark.parametrize("unsettled", [[], [7], [0, 50, 99], list(range(100))])
@pytest.mark.parametrize("at_once", [1, 8, 1000])
def test_unsettled_elements_are_found_in_as_few_calls_as_hold_them(
    unsettled: list[int], at_once: int
) -> None:
    values = jnp.arange(1.0, 101.0).reshape(20, 5)
    settled = jnp.ones(100, bool).at[jnp.asarray(unsettled, int)].set(False).reshape(20, 5)
    called = []

    def square(picked: jax.Array) -> tuple[jax.Array, jax.Array]:
        jax.debug.callback(lambda picked: called.append(picked), picked)
        return values.ravel()[picked] ** 2, picked % 2 == 0

    squares, even = jax.jit(lambda: compute_where(square, settled, at_once))()
    jax.effects_barrier()
    assert len(called) == -(-len(unsettled) // min(at_once, 100))
    np.testing.assert_array_equal(squares[~settled], values[~settled] ** 2)
    np.testing.assert_array_equal(
        even.ravel()[np.asarray(unsettled, int)], np.array(unsettled) % 2 == 0
    )
    assert squares.shape == even.shape == (20, 5)
    assert even.dtype == bool


def test_derivatives_and_vmap_are_those_of_what_is_computed() -> None:
    settled = jnp.arange(12) % 4 != 0

    def total(values: jax.Array) -> jax.Array:
        found = compute_where(lambda picked: values[picked] ** 3, settled, 2)
        return jnp.sum(jnp.where(settled, 0.0, found))

    values = jnp.linspace(0.5, 2.0, 36).reshape(3, 12)
    expected = np.where(settled, 0.0, 3 * values**2)
    np.testing.assert_allclose(jax.vmap(jax.grad(total))(values), expected, rtol=1e-6)
    second = jax.hessian(total)(values[0])
    np.testing.assert_allclose(second, np.diag(np.where(settled, 0.0, 6 * values[0])), rtol=1e-6)
