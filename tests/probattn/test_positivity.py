"""The sufficient condition for positive determinants against blocks in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probattn.positivity import certainly_positive
from tests.support import dense
from tests.support.cases import (
    BY_NAME,
    LARGE_CASES,
    LONG_CASE,
    RANK_ONE,
    REGISTERED,
    evaluated,
    every_shape,
    main_shapes,
    make,
)
from tests.support.dense import quick_jit

pytestmark = pytest.mark.usefixtures("strict_promotion")
surely = quick_jit(certainly_positive)
surely_mapped = quick_jit(jax.vmap(certainly_positive))
both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def lowest(arguments, bound=None):
    """Lowest eigenvalue of the symmetric part of every R_t, of centred covariances."""
    arguments = (np.asarray(each, np.float64) for each in arguments)
    blocks = dense.reduced_blocks(*arguments, bound)
    return np.linalg.eigvalsh((blocks + np.swapaxes(blocks, -1, -2)) / 2)[..., 0]


def check_sure(sure, case, dtype):
    assert np.all(lowest(make(case, dtype))[sure] > 0), case
    assert np.all(sure[:2]), case


@every_shape
def test_what_is_called_positive_is(shape):
    for case, sure in evaluated(surely_mapped, shape).items():
        check_sure(sure, case, np.float64)


@main_shapes
def test_what_is_called_positive_in_float32_is(shape):
    for case, sure in evaluated(surely_mapped, shape, np.float32).items():
        check_sure(sure, case, np.float32)


@both_dtypes
def test_what_is_called_positive_of_large_cases_is(dtype):
    for case in (*LARGE_CASES, LONG_CASE):
        check_sure(np.asarray(surely(*make(case, dtype))), case, dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_never_makes_it_too_sure(dtype):
    """Sharp attention, tokens far from the first one, and determinants near the boundary."""
    rng = np.random.default_rng(0)

    def powers(low, high):
        return 10 ** rng.uniform(low, high, (400, 1, 1))

    x = rng.standard_normal((400, 24, 6)) * powers(-1, 1.5)
    x[:, 1:] += rng.standard_normal((400, 1, 6)) * powers(-1, 4)
    w_key = rng.standard_normal((400, 6, 3))
    w_query = (w_key + 0.3 * rng.standard_normal((400, 6, 3))) * powers(-4, 0)
    arguments = tuple(each.astype(dtype) for each in (x, w_query, w_key))
    sure, lower = np.asarray(surely(*arguments)), lowest(arguments)
    assert np.sum(lower <= 0) > 300  # that it could have missed
    assert not np.any(sure & (lower <= 0))


def test_with_one_direction_it_is_the_sign_of_the_determinant():
    """Of rank one, with keys along the queries, nothing is lost."""
    _, w_query, _ = make(BY_NAME["rank_one"])
    for scale in (0.3, 1.0, 3.0):
        x = scale * np.random.default_rng(1).standard_normal((200, *RANK_ONE[:2]))
        determinants = dense.reduced_blocks(x, w_query, w_query)[..., 0, 0]
        far = np.abs(np.log(np.abs(determinants))) > 1e-9
        assert far.sum() > 700, scale
        sure = np.asarray(surely(x, w_query, w_query))
        np.testing.assert_array_equal(sure[far], determinants[far] > 0)


def test_repulsive_attention_is_positive_at_any_scale():
    repulsive = [case for case in REGISTERED if case.kind == "repulsive"]
    assert len(repulsive) == 5
    for case in repulsive:
        x, w_query, w_key = make(case)
        assert np.all(surely(10 * x, w_query, w_key)), case


def test_a_bounded_context_is_seen_as_it_is():
    """Which makes a context positive that is not without the bound."""
    x, w_query, w_key = make(BY_NAME["square_twice_folded"])
    wide, narrow = (np.asarray(surely(x, w_query, w_key, bound=bound)) for bound in (3.0, 0.5))
    assert np.all(lowest((x, w_query, w_key), 3.0)[wide] > 0)
    assert np.all(narrow)
    assert not np.all(surely(x, w_query, w_key))


def test_heads_and_sequences_broadcast():
    x, w_query, w_key = make(BY_NAME["thin"])
    heads = np.stack([w_query, 5 * w_query]), np.stack([w_key, 5 * w_key])
    both = surely(np.stack([x, 2 * x])[:, None], *heads)
    assert both.shape == (2, 2, len(x))
    np.testing.assert_array_equal(both[1, 1], surely(2 * x, 5 * w_query, 5 * w_key))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e200])
def test_nothing_is_sure_where_a_number_is_not_finite(value):
    x, w_query, w_key = make(BY_NAME["thin"])
    x[3] = value
    assert not np.any(surely(x, w_query, w_key)[4:])


def test_no_matrix_of_size_r_x_r_is_computed():
    x, w_query, w_key = jnp.ones((2, 7, 5)), jnp.ones((5, 50)), jnp.ones((5, 50))
    program = str(jax.make_jaxpr(certainly_positive)(x, w_query, w_key))
    assert "50,50" not in program
