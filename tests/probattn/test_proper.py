"""The proofs that conditionals have mass one: against loops, quadrature, and an adversary.

The adversary looks for contexts that break a proof, by gradient descent from many starts at once.
Each proof is followed by a test in which the same search breaks what the proof does not cover.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probattn as pa
from tests.support import dense
from tests.support.adversary import STARTS, lowest_found, of_norm, starts, units
from tests.support.dense import quick_jit

pytestmark = pytest.mark.usefixtures("strict_promotion")
both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
SLOW = pytest.mark.slow
# (d, r); the search is compiled for each.
slow_shapes = [pytest.param((1, 1), marks=SLOW), pytest.param((2, 2), marks=SLOW)]
every_shape = pytest.mark.parametrize("shape", [*slow_shapes, (4, 2)], ids=str)

certificate = quick_jit(pa.certificate)
is_proper = quick_jit(pa.is_proper)
log_det = quick_jit(pa.log_det)
residual = quick_jit(pa.residual)


# ---- the adversary ----------------------------------------------------------------------------


def determinant(point, unit, w_query, w_key, bound):
    """Of the last block, descended by its logarithm."""
    sign, log_abs = pa.log_det(unit * point, w_query, w_key, bound=bound)
    return log_abs[:, -1], (sign * jnp.exp(log_abs))[:, -1]


def minus_norm(point, unit, w_query, w_key, bound):
    """Of the last Sigma A."""
    block = pa.jacobian_blocks(unit * point, w_query, w_key, bound=bound)[:, -1]
    norm = jnp.linalg.norm(jnp.eye(block.shape[-1]) - block, ord=2, axis=(-2, -1))
    return -norm, -norm


def factored(coupling):
    """W_Q and W_K of couplings (..., d, d), with r = d."""
    width = coupling.shape[-1]
    w_key = np.broadcast_to(np.sqrt(width) * np.eye(width), coupling.shape)
    return jnp.asarray(np.swapaxes(coupling, -1, -2)), jnp.asarray(w_key)


def repulsive(shape):
    """Couplings A = -S + K, one for each start: S large, small or zero; every other K zero."""
    width, rank = shape
    rng = np.random.default_rng(0)
    root = rng.standard_normal((STARTS, width, rank)) * rng.choice([0, 0.1, 1], (STARTS, 1, 1))
    below = np.tril(rng.standard_normal((STARTS, width, width)), -1)
    below[::2] = 0
    return below - np.swapaxes(below, -1, -2) - root @ np.swapaxes(root, -1, -2)


# ---- is_proper: repulsive couplings -----------------------------------------------------------


@pytest.mark.slow
@both_dtypes
@pytest.mark.parametrize("shape", [(1, 1), (5, 2), (2, 4), (64, 32), (64, 1)], ids=str)
def test_queries_opposite_to_keys_are_proper_after_rounding(shape, dtype):
    w_query = np.random.default_rng(0).standard_normal((100, *shape)).astype(dtype)
    scales = np.logspace(-6, 6, 100).astype(dtype)[:, None, None]
    assert np.all(is_proper(scales * w_query, -scales * w_query))
    assert not np.any(is_proper(scales * w_query, scales * w_query))


@pytest.mark.parametrize(("dtype", "positive"), [(np.float32, 1e-5), (np.float64, 1e-14)])
def test_rounding_forgives_no_more_than_rounding(dtype, positive):
    negative, mixed = (np.diag([-1, entry]).astype(dtype) for entry in (-positive, positive))
    assert is_proper(negative, np.eye(2, dtype=dtype))
    assert not is_proper(mixed, np.eye(2, dtype=dtype))


@pytest.mark.slow
@every_shape
def test_no_context_brings_the_determinant_of_a_repulsive_coupling_below_one(shape):
    weights = factored(repulsive(shape))
    assert np.all(is_proper(*weights))
    lowest = lowest_found(determinant, starts(shape[0]), (units(-2, 3), *weights, None))
    assert lowest.min() > 1 - 1e-12
    # The proof says more; a double eigenvalue of one moves with the root of the rounding.
    inputs = (np.asarray(part) for part in (starts(shape[0]), *weights))
    eigenvalues = np.linalg.eigvals(dense.blocks(*inputs))
    assert np.all(eigenvalues.real >= 1 - 1e-6)


@pytest.mark.slow
@every_shape
def test_search_folds_what_is_repulsive_in_all_directions_but_one(shape):
    coupling = repulsive(shape)
    # The least repulsive direction of each made slightly attractive.
    values, vectors = np.linalg.eigh(coupling + np.swapaxes(coupling, -1, -2))
    last = vectors[..., -1]
    coupling += (0.1 - values[:, -1, None, None] / 2) * last[:, :, None] * last[:, None, :]
    weights = factored(coupling)
    assert not np.any(is_proper(*weights))
    lowest = lowest_found(determinant, starts(shape[0]), (units(-2, 3), *weights, None))
    assert np.mean(lowest <= 0) > 0.1


# ---- is_proper: bounded contexts --------------------------------------------------------------


@both_dtypes
@pytest.mark.parametrize("bound", [1e-2, 0.7, 30.0])
def test_bounded_coupling_is_proper_up_to_the_inverse_square_of_the_bound(bound, dtype):
    inside, outside = (
        tuple(np.asarray(w, dtype) for w in of_norm(ratio / bound**2, (5, 2)))
        for ratio in (1 - 1e-5, 1 + 1e-5)
    )
    assert np.all(is_proper(*inside, bound=bound))
    assert not np.any(is_proper(*outside, bound=bound))
    assert not np.any(is_proper(*inside))
    np.testing.assert_array_equal(pa.is_proper(*inside, bound=bound), True)


@pytest.mark.slow
@every_shape
@pytest.mark.parametrize(
    ("ratio", "bound", "proper"), [(0.99, 0.7, True), (1.05, 0.7, False), (0.99, None, False)]
)
def test_contexts_fold_a_coupling_only_above_the_limit_or_without_a_bound(
    shape, ratio, bound, proper
):
    weights = of_norm(ratio / 0.7**2, shape)
    assert np.all(is_proper(*weights, bound=bound)[::2] == proper)
    fixed = (0.7 * units(-1, 2), *weights, bound)
    lowest = lowest_found(determinant, starts(shape[0]), fixed)
    # 1 - 0.99 = 0.01 is in reach, and the search near it.
    assert (0 < lowest.min() < 0.03) if proper else (np.mean(lowest[::2] <= 0) > 0.1)


@pytest.mark.slow
@every_shape
def test_no_context_makes_sigma_times_the_coupling_as_large_as_one(shape):
    fixed = (0.7 * units(-1, 2), *of_norm(0.99 / 0.7**2, shape), 0.7)
    lowest = lowest_found(minus_norm, starts(shape[0]), fixed)
    assert 0.97 < -lowest.min() < 0.99 + 1e-12


# ---- is_proper: what a user may pass ----------------------------------------------------------


@pytest.mark.parametrize(
    ("coupling", "bound", "expected"),
    [
        (-0.3, None, True),
        (0.0, None, True),
        (1e-9, None, False),
        (0.24, 2.0, True),
        (0.26, 2.0, False),
        (-9.0, 2.0, True),
    ],
)
def test_scalar_coupling(coupling, bound, expected):
    """The paper's a: proper where a <= 0, or a c^2 < 1."""
    weights = np.full((1, 1), coupling), np.ones((1, 1))
    for function in (pa.is_proper, is_proper):
        answer = function(*weights, bound=bound)
        assert answer.shape == ()
        assert answer.dtype == bool
        assert bool(answer) == expected


def test_weights_that_are_not_finite_are_not_proper_and_spoil_no_others():
    rng = np.random.default_rng(0)
    w_query = rng.standard_normal((4, 3, 2))
    w_key = -w_query
    w_query[1, 2, 0], w_key[3, 0, 1] = np.nan, np.inf
    for bound in (None, 1e-3):
        np.testing.assert_array_equal(
            is_proper(w_query, w_key, bound=bound), [True, False, True, False]
        )


@pytest.mark.slow
def test_leading_axes_broadcast_under_jit_and_vmap():
    w_query = np.random.default_rng(0).standard_normal((3, 1, 4, 2))
    w_key = np.stack([-w_query[0, 0], w_query[1, 0]])
    expected = [[True, False], [False, False], [False, False]]
    np.testing.assert_array_equal(pa.is_proper(w_query, w_key), expected)
    np.testing.assert_array_equal(is_proper(w_query, w_key), expected)
    over_queries = jax.vmap(pa.is_proper, in_axes=(0, None))
    np.testing.assert_array_equal(over_queries(w_query, w_key), expected)
    over_bounds = jax.vmap(lambda bound: pa.is_proper(w_query, w_key, bound=bound))
    np.testing.assert_array_equal(over_bounds(jnp.array([1e-3, 1e3])), [np.ones((3, 2)), expected])


@pytest.mark.parametrize("bound", [None, 0.7])
def test_answer_depends_on_the_coupling_only(bound):
    """W_Q G and W_K G^-T have the coupling of W_Q and W_K."""
    rng = np.random.default_rng(0)
    w_query = rng.standard_normal((300, 5, 2))
    w_key = np.where(np.arange(300)[:, None, None] % 2, w_query, -w_query)
    w_key *= rng.choice([0.01, 1], 300)[:, None, None]
    gauge = rng.standard_normal((300, 2, 2)) + 3 * np.eye(2)
    before = is_proper(w_query, w_key, bound=bound)
    regauged = w_query @ gauge, w_key @ np.swapaxes(np.linalg.inv(gauge), -1, -2)
    assert 0 < before.sum() < 300
    np.testing.assert_array_equal(is_proper(*regauged, bound=bound), before)


@pytest.mark.parametrize("w_key", [(4, 3), (3, 2), (4,), (2, 4, 2), (4, 0)], ids=str)
def test_weights_of_wrong_shape_say_given_and_expected(w_key):
    with pytest.raises(ValueError, match=r"^[^\n]*expected[^\n]*$"):
        pa.is_proper(np.ones((3, 4, 2)), np.ones(w_key))


# ---- mass one ---------------------------------------------------------------------------------


def conditional_mass(past, coupling, bound):
    """Mass of p(x_t | past) for d = 1 and sigma = 1, by the trapezoidal rule."""
    token = np.linspace(-60, 60, 24_001)
    x = np.concatenate([np.broadcast_to(past, (len(token), len(past))), token[:, None]], axis=1)
    inputs = x[..., None], np.full((1, 1), coupling), np.ones((1, 1))
    e = residual(*inputs, bound=bound)[:, -1, 0]
    sign, log_abs = log_det(*inputs, bound=bound)
    density = np.exp(-(e**2) / 2 + log_abs[:, -1]) / np.sqrt(2 * np.pi)
    return np.trapezoid(np.where(sign[:, -1] > 0, density, 0), token)


@pytest.mark.parametrize(
    ("past", "coupling", "bound", "proper", "certified"),
    [
        pytest.param([-4.0, 4.0], -0.3, None, True, False, marks=pytest.mark.slow),
        pytest.param([-5.0, 6.0], -1.0, None, True, False, marks=pytest.mark.slow),
        ([-40.0, 40.0], 0.99, 1.0, True, True),
        ([-40.0, 40.0], 0.99 / 4, 2.0, True, True),
        ([-1.8, 1.8], 0.3, None, False, True),
    ],
)
def test_proven_conditional_has_mass_one(past, coupling, bound, proper, certified):
    weights = np.full((1, 1), coupling), np.ones((1, 1))
    assert is_proper(*weights, bound=bound) == proper
    rho = certificate(np.array([[*past, 0.0]]).T, *weights, bound=bound)[-1]
    assert (rho < 1) == certified
    assert conditional_mass(past, coupling, bound) == pytest.approx(1, abs=1e-9)


def test_folded_conditional_has_more_mass_than_one():
    """The example of the design; and a bounded context above its limit."""
    assert conditional_mass([-4.0, 4.0], 0.3, None) == pytest.approx(1.98, abs=0.005)
    assert conditional_mass([-40.0, 40.0], 3.0, 1.0) > 1.1
