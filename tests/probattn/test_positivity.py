"""The sufficient condition for positive determinants against blocks in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probattn as pa
from probattn.positivity import certainly_positive
from tests.support.cases import BY_NAME, CASES, LARGE_CASES, LONG_CASE, SINGULAR_CASES, make

pytestmark = pytest.mark.usefixtures("strict_promotion")
EVERY = [*CASES, *SINGULAR_CASES, *LARGE_CASES, LONG_CASE]
surely = jax.jit(certainly_positive)


def lowest(arguments, bound=None):
    """Lowest eigenvalue of the symmetric part of every R_t, of centred covariances."""
    arguments = (np.asarray(each, np.float64) for each in arguments)
    blocks = np.asarray(pa.reduced_blocks(*arguments, bound=bound))
    return np.linalg.eigvalsh((blocks + np.swapaxes(blocks, -1, -2)) / 2)[..., 0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_what_is_called_positive_is(case, dtype):
    arguments = make(case, dtype)
    sure = np.asarray(surely(*arguments))
    assert np.all(lowest(arguments)[sure] > 0)
    assert np.all(sure[:2])


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


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_with_one_direction_it_is_the_sign_of_the_determinant(scale):
    """Of rank one, with keys along the queries, nothing is lost."""
    x, w_query, _ = make(BY_NAME["rank_one"])
    x = scale * np.random.default_rng(1).standard_normal((200, *x.shape))
    sign, log_abs = pa.log_det(x, w_query, w_query)
    far = np.abs(np.asarray(log_abs)) > 1e-9
    assert far.sum() > 700
    np.testing.assert_array_equal(surely(x, w_query, w_query)[far], sign[far] > 0)


@pytest.mark.parametrize("case", [case for case in EVERY if case.kind == "repulsive"], ids=str)
def test_repulsive_attention_is_positive_at_any_scale(case):
    x, w_query, w_key = make(case)
    assert np.all(surely(10 * x, w_query, w_key))


def test_a_bounded_context_is_seen_as_it_is():
    """Which makes a context positive that is not without the bound."""
    x, w_query, w_key = make(BY_NAME["square_twice_folded"])
    wide = np.asarray(certainly_positive(x, w_query, w_key, bound=3.0))
    narrow = np.asarray(certainly_positive(x, w_query, w_key, bound=0.5))
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
