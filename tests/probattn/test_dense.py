"""The oracle of the tests, by complex steps, against the definition that JAX differentiates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probattn import _reference as reference
from tests.support import dense
from tests.support.cases import BY_NAME, make

MORE = [name for name in BY_NAME if BY_NAME[name].length == 6 and "offset" not in name]


@functools.partial(dense.quick_jit, static_argnames="bounded")
def differentiated(x, w_query, w_key, bound, *, bounded):
    """Residual, D_t, R_t, and the derivative of D_t by everything, from the slow definition."""

    def blocks(*inputs):
        given = inputs if bounded else inputs[:3]
        jacobian = [
            reference.jacobian_block(*given[:3], t, *given[3:]) for t in range(len(inputs[0]))
        ]
        return (jnp.stack(jacobian),) * 2

    inputs = x, w_query, w_key, bound
    slopes, found = jax.jacfwd(blocks, (0, 1, 2, 3), has_aux=True)(*inputs)
    given = inputs if bounded else inputs[:3]
    return reference.residual(*given), found, slopes, reference.reduced_blocks(*given)


def compare(name, bound, length=6):
    x, *weights = make(BY_NAME[name])
    inputs = x[:length], *weights
    scale = 1.0 if bound is None else bound
    found = differentiated(*inputs, np.float64(scale), bounded=bound is not None)
    own = dense.dense_of(*inputs, bound)
    theirs = jax.tree.leaves((found[0], found[1], found[2]))
    compared = zip((own.residual, own.blocks, *own.slopes), theirs, strict=True)
    for number, (one, other) in enumerate(compared):
        atol = 1e-12 * (1 + np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=atol, err_msg=f"{name}, {number}")
    reduced = dense.reduced_blocks(*inputs, bound)
    np.testing.assert_allclose(reduced, found[3], rtol=1e-11, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("name", ["thin", "thin_scale_3", "thin_repeated_tokens"])
def test_complex_steps_are_the_derivatives_of_the_bounded_definition(name):
    compare(name, 1.5, length=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("bound", [None, pytest.param(0.3, marks=pytest.mark.nightly)])
def test_complex_steps_are_the_derivatives_of_every_definition(name, bound):
    compare(name, bound)


def test_whole_jacobian_is_that_of_the_definition():
    """Its blocks are I - Cov W_Q^T / sqrt(r), and above them there is nothing."""
    x, *weights = make(BY_NAME["scalar_folded"])
    inputs = x[:4], *weights
    jacobian = dense.whole_jacobian(*inputs, 1.5)
    expected = dense.quick_jit(reference.full_jacobian)(*inputs, 1.5)
    np.testing.assert_allclose(jacobian, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("bound", [None, 1.5])
def test_theorem_1_holds_in_every_case(bound):
    for case in BY_NAME.values():
        found = dense.dense(case, bound=bound)
        atol = 1e-9 if "offset" in case.kind else 1e-12 * (1 + np.abs(found.blocks).max())
        own = dense.blocks(*make(case), bound)
        np.testing.assert_allclose(own, found.blocks, rtol=0, atol=atol, err_msg=str(case))
