"""Public functions called by themselves: one program, the same numbers, the same refusals."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probattn as pa
from probattn.one_program import one_program

RNG = np.random.default_rng(0)
# A shape of which no other test has programs.
X, (W_QUERY, W_KEY) = RNG.standard_normal((7, 3)), RNG.standard_normal((2, 3, 2))
FUNCTIONS = {
    "log_det": pa.log_det,
    "stability_margin": pa.stability_margin,
    "certificate": pa.certificate,
    "residual": pa.residual,
}


def programs(caplog, function, *arguments, **options):
    """Return how many programs a call has compiled."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "jax"), jax.log_compiles():
        jax.block_until_ready(function(*arguments, **options))
    return sum("Finished XLA compilation" in record.message for record in caplog.records)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_call_compiles_one_program_and_the_next_one_none(caplog, name):
    function = FUNCTIONS[name]
    assert programs(caplog, function, X, W_QUERY, W_KEY) == 1
    assert programs(caplog, function, 2 * X, W_KEY, W_QUERY) == 0


def test_it_is_what_the_operations_give_one_by_one():
    with jax.disable_jit():
        expected = pa.stability_margin(X, W_QUERY, W_KEY, "reduced", bound=1.5)
    found = pa.stability_margin(X, W_QUERY, W_KEY, "reduced", bound=1.5)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_number_for_the_bound_keeps_the_precision_of_the_arrays():
    single = (array.astype(np.float32) for array in (X, W_QUERY, W_KEY))
    assert pa.residual(*single, bound=1.5).dtype == jnp.float32


def test_a_bound_is_any_number_above_zero():
    expected = pa.residual(X, W_QUERY, W_KEY, bound=1e10)
    np.testing.assert_array_equal(pa.residual(X, W_QUERY, W_KEY, bound=10**10), expected)
    np.testing.assert_array_equal(pa.residual(X, W_QUERY, W_KEY, bound=np.float64(1e10)), expected)


def test_a_fault_of_the_program_alone_is_raised():
    @one_program()
    def not_traceable(x):
        return float(x.sum())

    with pytest.raises(jax.errors.ConcretizationTypeError):
        not_traceable(X)


def test_a_refusal_is_one_line():
    with pytest.raises(ValueError, match="expected both as") as raised:
        pa.log_det(X, W_QUERY, W_KEY[:2])
    assert "\n" not in str(raised.value)
    assert getattr(raised.value, "__notes__", []) == []
