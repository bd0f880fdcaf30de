"""The proofs that conditionals have mass one: against loops, quadrature, and an adversary.

The adversary looks for contexts that break a proof, by gradient descent from many starts at once.
Each proof is followed by a test in which the same search breaks what the proof does not cover.
"""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probattn as pa
from tests.support import dense
from tests.support.adversary import STARTS, lowest_found, starts, units
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


def of_attraction(largest, shape):
    """W_Q and W_K, one for each start, whose (A + A^T) / 2 has this largest eigenvalue.

    Every other has an antisymmetric part some ten times as large, and so a norm.
    """
    rng = np.random.default_rng(0)
    w_query, w_key = rng.standard_normal((2, STARTS, *shape))
    w_key *= np.where(np.sum(w_query * w_key, axis=(1, 2)) < 0, -1, 1)[:, None, None]
    coupling = w_key @ np.swapaxes(w_query, -1, -2) / np.sqrt(shape[1])
    now = np.linalg.eigvalsh((coupling + np.swapaxes(coupling, -1, -2)) / 2)[:, -1]
    w_key *= (largest / now)[:, None, None]
    turn = np.tril(rng.standard_normal((STARTS, shape[1], shape[1])), -1)
    turn[::2] = 0
    turn *= 10 * largest
    w_key += w_query @ (turn - np.swapaxes(turn, -1, -2))
    return jnp.asarray(w_query), jnp.asarray(w_key)


def antipodal_eigenvalues(w_query, w_key, bound):
    """Of Sigma A at x_t = 0 after two tokens far out along the top eigenvector of (A + A^T) / 2."""
    coupling = np.asarray(w_key @ jnp.swapaxes(w_query, -1, -2)) / np.sqrt(w_query.shape[-1])
    top = np.linalg.eigh((coupling + np.swapaxes(coupling, -1, -2)) / 2)[1][..., -1]
    far = 1e4 * top
    x = np.stack([far, -far, 0 * far], axis=-2)
    blocks = dense.blocks(x, np.asarray(w_query), np.asarray(w_key), bound)[:, -1]
    return np.linalg.eigvals(np.eye(blocks.shape[-1]) - blocks)


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

every_threshold = pytest.mark.parametrize(
    "shape", [(1, 1), *(pytest.param(s, marks=SLOW) for s in ((2, 2), (3, 3), (5, 2)))], ids=str
)


@both_dtypes
@pytest.mark.parametrize("bound", [1e-2, 0.7, 30.0])
def test_bounded_coupling_is_proper_up_to_the_threshold_and_no_further(bound, dtype):
    """The antisymmetric part is no matter, and the norm none: it is ten times the threshold."""
    step = 1e-3 if dtype == np.float32 else 1e-11
    inside, outside = (
        tuple(np.asarray(w, dtype) for w in of_attraction(ratio / bound**2, (5, 2)))
        for ratio in (1 - step, 1 + step)
    )
    assert np.all(is_proper(*inside, bound=bound))
    assert not np.any(is_proper(*outside, bound=bound))
    assert not np.any(is_proper(*inside))
    np.testing.assert_array_equal(pa.is_proper(*inside, bound=bound), True)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 3), (5, 2)], ids=str)
@pytest.mark.parametrize("far", [2, 4])
def test_no_context_below_the_threshold_folds(shape, far):
    """A search, and the proof's bound on the real parts of the eigenvalues of Sigma A."""
    weights = of_attraction(0.99 / 0.7**2, shape)
    assert np.all(is_proper(*weights, bound=0.7))
    fixed = (0.7 * units(-1, far), *weights, 0.7)
    lowest = lowest_found(determinant, starts(shape[0]), fixed)
    assert lowest.min() > 0
    inputs = (np.asarray(part) for part in (fixed[0] * starts(shape[0]), *weights))
    blocks = dense.blocks(*inputs, 0.7)
    eigenvalues = np.linalg.eigvals(np.eye(shape[0]) - blocks)
    assert np.all(eigenvalues.real <= 0.99 + 1e-9)


@every_threshold
def test_an_antipodal_pair_folds_every_coupling_above_the_threshold(shape):
    """Two ways to the same: its eigenvalue, and the determinant of the library."""
    for ratio, proper in ((0.99, True), (1.01, False)):
        weights = of_attraction(ratio / 0.7**2, shape)
        assert np.all(is_proper(*weights, bound=0.7) == proper)
        found = antipodal_eigenvalues(*weights, 0.7)
        largest = np.max(found.real, axis=-1)
        np.testing.assert_allclose(largest, ratio, rtol=1e-6)
        assert np.all((largest < 1) == proper)


@every_threshold
def test_an_antipodal_pair_folds_every_attraction_of_an_unbounded_context(shape):
    weights = of_attraction(1e-3, shape)
    assert not np.any(is_proper(*weights))
    assert np.all(np.max(antipodal_eigenvalues(*weights, None).real, axis=-1) > 1)


@pytest.mark.parametrize(("dtype", "trials"), [(np.float32, 4000), (np.float64, 4000)])
def test_rounding_at_the_threshold_falls_towards_not_proper(dtype, trials):
    """One dimension, and rank two of it: c^2 a by fractions, at neighbours of the threshold."""
    rng = np.random.default_rng(0)
    w_query = rng.uniform(0.5, 2, (trials, 1, 2)).astype(dtype)
    w_key = rng.uniform(0.5, 2, (trials, 1, 2)).astype(dtype) * np.array([1, -1], dtype)
    bound = dtype(0.7)
    total = np.sum(w_query * w_key, axis=(1, 2), dtype=np.float64) / math.sqrt(2)
    w_query /= np.abs(total * float(bound) ** 2).astype(dtype)[:, None, None]
    w_key *= np.sign(total).astype(dtype)[:, None, None]
    steps = rng.integers(-40, 41, (trials, 1, 2))
    w_query = (w_query * (1 + steps * np.finfo(dtype).eps)).astype(dtype)
    said = np.asarray(is_proper(w_query, w_key, bound=bound))
    exact = [
        Fraction(float(bound)) ** 2 * _scalar_coupling(*pair)
        for pair in zip(w_query, w_key, strict=True)
    ]
    # a carries 1 / sqrt(2), so it is squares that are compared
    true = np.array([value <= 0 or value**2 <= 2 for value in exact])
    assert 0.2 < true.mean() < 0.8
    assert not np.any(said & ~true)
    delta = 3 * np.finfo(dtype).eps * np.sum(np.abs(w_query * w_key), axis=(1, 2)) / math.sqrt(2)
    clear = np.array([float(value) for value in exact]) / math.sqrt(2)
    assert np.all(said[clear < 1 - 3 * float(bound) ** 2 * delta])


def _scalar_coupling(query, key):
    """The sum of q_i k_i, without rounding."""
    pairs = zip(query.ravel().tolist(), key.ravel().tolist(), strict=True)
    return sum(Fraction(q) * Fraction(k) for q, k in pairs)


def test_on_the_threshold_the_scalar_answer_is_no():
    """c^2 a = 1 is proper, since |phi| < c; in floating point nothing there is decided."""
    weights = np.full((1, 1), 0.25), np.ones((1, 1))
    assert not is_proper(*weights, bound=2.0)
    assert is_proper(np.full((1, 1), 0.25 * (1 - 1e-15)), np.ones((1, 1)), bound=2.0)


# ---- is_proper: what a user may pass ----------------------------------------------------------


@pytest.mark.parametrize(
    ("coupling", "bound", "expected"),
    [
        (-0.3, None, True),
        (0.0, None, True),
        (1e-9, None, False),
        (0.2499, 2.0, True),
        (0.2501, 2.0, False),
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


def test_weights_whose_norms_overflow_are_forgiven_nothing():
    """A = 1e5, and the square of 1e25 is beyond float32."""
    large, small = np.full((1, 1), 1e25, np.float32), np.full((1, 1), 1e-20, np.float32)
    assert not is_proper(large, small)
    assert not is_proper(large, small, bound=1.0)


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
        pytest.param([-4.0, 4.0], -0.3, None, True, True, marks=pytest.mark.slow),
        pytest.param([-5.0, 6.0], -1.0, None, True, True, marks=pytest.mark.slow),
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


def quarter_turn(top):
    """W_Q and W_K of A = diag(top, -1) + 5 J, with J a quarter turn."""
    coupling = np.diag([top, -1.0]) + 5 * np.array([[0, -1], [1, 0]])
    return coupling.T, np.sqrt(2) * np.eye(2)


@pytest.mark.slow
def test_mass_is_one_below_the_threshold_whatever_the_antisymmetric_part():
    """And more than one above it: 1.0032, or 1.0319 where the noise is a tenth of that."""
    below, above = quarter_turn(0.9), quarter_turn(1.1)
    assert is_proper(*below, bound=1.0)
    assert not is_proper(*above, bound=1.0)
    pair = np.array([[100.0, 0.0], [-100.0, 0.0]])
    rng = np.random.default_rng(0)
    for past in (pair, 10 * rng.standard_normal((3, 2)), 3 * rng.standard_normal((5, 2))):
        for scale in (1.0, 0.1):
            mass = pa.conditional_mass(past, *below, scale, bound=1.0)
            assert mass == pytest.approx(1, abs=1e-6)
    for scale, mass in ((1.0, 1.00319), (0.1, 1.03186)):
        found = pa.conditional_mass(pair, *above, scale, bound=1.0)
        assert found == pytest.approx(mass, abs=1e-5)


def test_a_far_pair_is_followed_by_too_much_mass_just_above_the_threshold():
    """In one dimension, c = 1 and sigma = 1; at the threshold itself |phi| < c saves it."""
    masses = [
        pa.conditional_mass([[-100.0], [100.0]], [[a]], [[1.0]], 1.0, bound=1.0)
        for a in (0.9, 1.0, 1.1, 1.5, 2.0)
    ]
    np.testing.assert_allclose(masses[:2], 1, atol=1e-12)
    assert np.all(np.diff(masses[1:]) > 1e-3)
