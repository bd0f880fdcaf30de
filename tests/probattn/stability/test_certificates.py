"""Certificates against loops, against the worst weights, and where rounding decides."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probattn as pa
from probattn import _reference as reference
from probattn.blocks.majorants import majorants
from tests.support import cases as registry
from tests.support import dense
from tests.support.adversary import lowest_found, of_norm, starts, units
from tests.support.cases import BY_NAME, LONG_CASE, THIN, Case, evaluated, make
from tests.support.dense import quick_jit

pytestmark = pytest.mark.usefixtures("strict_promotion", "strict_ranks")


def both(*inputs, bound=None):
    """The certificate and the lower bound of the margin."""
    return pa.certificate(*inputs, bound=bound), pa.margin_lower_bound(*inputs, bound=bound)


certificate = quick_jit(pa.certificate)
both_mapped = quick_jit(jax.vmap(both))
bounded_mapped = quick_jit(jax.vmap(functools.partial(both, bound=0.7)))
PROGRAMS = ((None, both_mapped), (0.7, bounded_mapped))


def gruess(x, w_query, w_key, bound=None):
    """The product of the diameters of balanced queries and keys, over four."""
    context = np.stack([reference.bounded(token, bound) for token in x])
    sides = reference.balanced(w_query, w_key)
    diameters = [
        [np.linalg.norm(side[:t, None] - side[:t], axis=-1).max(initial=0) for t in range(len(x))]
        for side in (context @ side for side in sides)
    ]
    return np.multiply(*diameters) / (4 * math.sqrt(sides[0].shape[1]))


def by_pairs(x, w_query, w_key):
    """rho_t, from all pairs of the past at once."""
    found = [gruess(x, w_query, w_key)]
    apart = x[:, None] - x
    for norm in reference.majorants(w_query, w_key):
        squared = np.einsum("abi,ij,abj->ab", apart, norm, apart)
        found.append([squared[:t, :t].max(initial=0) / 4 for t in range(len(x))])
    return np.min(found, axis=0)


def worst_weights(count, seed):
    """Weights over a past of this length: half on each of two tokens, and many others."""
    rng = np.random.default_rng(seed)
    pairs = [(a, b) for a in range(count) for b in range(a)]
    halves = np.zeros((len(pairs), count))
    for row, pair in zip(halves, pairs, strict=True):
        row[list(pair)] = 0.5
    others = [rng.dirichlet(np.full(count, spread), 40) for spread in (0.1, 0.5, 2)]
    return np.concatenate([halves, *others])


def blocks_under(weights, x, w_query, w_key):
    """I - Sigma A for covariances of x under given weights, (N, d, d)."""
    means = weights @ x
    second = np.einsum("ns,si,sj->nij", weights, x, x)
    covariances = second - means[:, :, None] * means[:, None, :]
    return np.eye(x.shape[1]) - covariances @ w_key @ w_query.T / math.sqrt(w_query.shape[1])


# ---- against loops ----------------------------------------------------------------------------


@registry.main_shapes
def test_certificate_and_margin_match_explicit_loops(shape):
    for bound, function in PROGRAMS:
        for case, (got, lower) in evaluated(function, shape).items():
            inputs = make(case)
            true = reference.certificate(*inputs, bound)
            # Squared distances of tokens that share a large offset lose its square.
            x, w_query, w_key = (np.abs(part).max() for part in inputs)
            atol = 1e-10 * x**2 * w_query * w_key
            np.testing.assert_allclose(got, true, rtol=1e-10, atol=atol, err_msg=f"{case}, {bound}")
            np.testing.assert_array_equal(got[:2], 0)
            true = reference.margin_lower_bound(*inputs, bound)
            np.testing.assert_allclose(lower, true, rtol=1e-6, atol=1e-9, err_msg=f"{case}")
            np.testing.assert_array_equal(lower > 0, got < 1)


def test_certificate_of_a_long_sequence_is_that_of_all_its_pairs():
    """Longer than the tile of rows whose pairs are held at a time."""
    inputs = make(LONG_CASE)
    np.testing.assert_allclose(certificate(*inputs), by_pairs(*inputs), rtol=1e-10)


@registry.main_shapes
def test_certificate_is_never_above_the_product_of_the_diameters(shape):
    for bound, function in PROGRAMS:
        for case, (got, _) in evaluated(function, shape).items():
            x, w_query, w_key = make(case)
            # All that rounding may add, even to a product of zero.
            size = np.abs(x).max() ** 2 * np.abs(w_query).max() * np.abs(w_key).max()
            limit = gruess(x, w_query, w_key, bound) * (1 + 1e-10) + 1e-11 * size
            assert np.all(got <= limit), (case, bound)


@pytest.mark.parametrize("bound", [None, 0.7])
def test_certificate_proves_nothing_of_a_past_that_is_not_finite(bound):
    x, w_query, w_key = make(BY_NAME["thin"])
    x[2, 0] = np.nan
    function, count = dict(PROGRAMS)[bound], len(registry.of_shape(THIN))

    def first_of(*inputs):
        return (part[0] for part in function(*(np.stack([part] * count) for part in inputs)))

    rho, lower = first_of(x, w_query, w_key)
    np.testing.assert_array_equal(rho < np.inf, np.arange(len(x)) <= 2)
    np.testing.assert_array_equal(lower[3:], 0)
    rho, lower = first_of(x, w_query * np.nan, w_key)
    assert not np.any(rho[2:] < 1)
    np.testing.assert_array_equal(lower[2:], 0)


def test_gruess_bound_is_attained_by_two_tokens():
    x, w_query, w_key = make(BY_NAME["scalar_tied_logits"])
    np.testing.assert_allclose(certificate(x, w_query, w_key)[:3], [0, 0, 4.8])
    np.testing.assert_allclose(dense.reduced_blocks(x, w_query, w_key)[2], 1 - 4.8)
    assert np.all(certificate(x, -w_query, w_key) < 1e-12)


def test_no_coupling_and_no_spread_have_a_certificate_of_zero():
    for name in ("scalar", "thin"):
        x, w_query, w_key = make(BY_NAME[name])
        zero = np.zeros_like(w_query)
        np.testing.assert_array_equal(certificate(x, zero, w_key), 0)
        np.testing.assert_array_equal(certificate(x, w_query, zero), 0)
        np.testing.assert_array_equal(certificate(np.zeros_like(x) + x[:1], w_query, w_key), 0)


@hypothesis.given(st.integers(0, 2**32 - 1))
def test_certificate_depends_on_the_coupling_only(seed):
    x, w_query, w_key = make(Case("", *THIN, seed=seed))
    gauge = np.random.default_rng(seed).standard_normal((2, 2)) + 3 * np.eye(2)
    expected = certificate(x, w_query, w_key)
    regauged = certificate(x, w_query @ gauge, w_key @ np.linalg.inv(gauge).T)
    np.testing.assert_allclose(regauged, expected, rtol=1e-9)
    shifted = certificate(x + 3.0, w_query, w_key)
    np.testing.assert_allclose(shifted, expected, rtol=1e-9)


# ---- what it proves ---------------------------------------------------------------------------


@registry.main_shapes
def test_no_weights_pass_the_certificate_or_the_margin(shape):
    """Eigenvalues have real parts of at least 1 - rho, whatever the weights are."""
    for case, (rho, lower) in evaluated(both_mapped, shape).items():
        x, w_query, w_key = make(case)
        for t in range(2, len(x)):
            blocks = blocks_under(worst_weights(t, t), x[:t] - x[0], w_query, w_key)
            # Eigenvalues that nearly coincide move with the root of the rounding.
            slack = 1e-6 * max(1, np.abs(blocks).max())
            assert np.all(np.linalg.eigvals(blocks).real >= 1 - rho[t] - slack), (case, t)
            smallest = np.linalg.svd(blocks, compute_uv=False)[:, -1]
            assert np.all(smallest >= lower[t] - 1e-12), (case, t)
            if rho[t] < 1:
                sign, log_abs = np.linalg.slogdet(blocks)
                assert np.all(sign == 1)
                least = min(w_query.shape) * np.log1p(-rho[t])
                assert np.all(log_abs >= least - 1e-6), (case, t)


@hypothesis.given(
    st.integers(0, 2**32 - 1),
    st.floats(0.1, 3),
    st.sampled_from([None, 0.5, 3.0]),
)
def test_certificate_bounds_the_eigenvalues_of_the_block(seed, scale, bound):
    x, w_query, w_key = make(Case("", *THIN, scale=scale, seed=seed))
    rho = np.asarray(certificate(x, w_query, w_key, bound=bound))
    eigenvalues = np.linalg.eigvals(dense.reduced_blocks(x, w_query, w_key, bound))
    assert np.all(eigenvalues.real.min(-1) >= 1 - rho - 1e-6)
    signs = np.linalg.slogdet(dense.reduced_blocks(x, w_query, w_key, bound))[0]
    assert np.all(signs[rho < 1] == 1)
    if bound is not None:  # a contraction for every context has a certificate in each
        coupling = w_key @ w_query.T / np.sqrt(THIN[2])
        assert np.all(rho <= bound**2 * np.linalg.norm(coupling, 2) + 1e-12)


def least_eigenvalue_at_certificate(point, unit, rho, w_query, w_key, bound):
    """Least real part of an eigenvalue of R_t, with the coupling scaled to the certificate rho."""
    x = unit * point
    now = pa.certificate(jax.lax.stop_gradient(x), w_query, w_key, bound=bound)[:, -1]
    root = jnp.sqrt(rho / now)[:, None, None]
    blocks = pa.reduced_blocks(x, root * w_query, root * w_key, bound=bound)[:, -1]
    margin = pa.stability_margin(x, root * w_query, root * w_key, "reduced", bound=bound)[:, -1]
    return margin, jnp.min(jnp.linalg.eigvals(jax.lax.stop_gradient(blocks)).real, axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize("bound", [None, 0.7], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(4, 2), *(pytest.param(s, marks=pytest.mark.nightly) for s in ((1, 1), (2, 4)))],
    ids=str,
)
def test_no_context_with_a_certificate_below_one_folds(shape, bound):
    """The eigenvalues keep real parts of 1 - rho, which the search reaches."""
    weights = of_norm(1.0, shape)
    for rho in (0.99, 1.05):
        fixed = units(-1, 1), rho, *weights, bound
        lowest = lowest_found(least_eigenvalue_at_certificate, starts(shape[0]), fixed)
        assert 1 - rho - 1e-6 <= lowest.min() < 1 - rho + 0.02


# ---- how much it proves -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "least", "gain"),
    [("repulsive", 1.0, 0.3), ("attractive", 0.5, 0.0), ("mixed", 0.8, 0.15)],
)
def test_share_that_is_certified_of_random_contexts(kind, least, gain):
    """All where the coupling is mostly repulsive; more than by the diameters where it is mixed."""
    rng = np.random.default_rng(0)
    count = len(registry.of_shape(THIN))
    proved, before = [], []
    for _ in range(200 // count):
        x = rng.standard_normal((count, THIN[0], THIN[1]))
        w_query, w_key = rng.standard_normal((2, count, *THIN[1:])) / 2
        w_key = {
            "repulsive": 0.3 * w_key - w_query,
            "attractive": 0.3 * w_key + w_query,
            "mixed": w_key,
        }[kind]
        inputs = x, w_query * np.exp(0.5 * rng.standard_normal((count, 1, 1))) / 2, w_key
        proved += list(np.asarray(both_mapped(*inputs)[0])[:, -1] < 1)
        before += [gruess(*one)[-1] < 1 for one in zip(*inputs, strict=True)]
    assert np.mean(proved) >= least
    assert np.mean(proved) >= np.mean(before) + gain
    assert 0.2 < np.mean(before) < 0.8


# ---- rounding ---------------------------------------------------------------------------------


def near_the_threshold(seed, bound):
    """Single-precision contexts whose certificate, in exact arithmetic, is 1 and a little more.

    Their tokens are moved by single roundings, on top of random couplings of every kind, matrices
    of different sizes and tokens with a large offset.
    """
    rng = np.random.default_rng(seed)
    count, exact = len(registry.of_shape(THIN)), dict(PROGRAMS)[bound]
    x = rng.standard_normal((count, THIN[0], THIN[1]))
    w_query, w_key = rng.standard_normal((2, count, *THIN[1:]))
    kind = np.arange(count) % 4
    w_key += np.array([0, 2, 0, 0])[kind][:, None, None] * w_query
    sizes = np.array([1, 1, 1e3, 1])[kind][:, None, None]
    x += np.array([0, 0, 0, 30])[kind][:, None, None] * (bound is None)
    x, w_query, w_key = (part.astype(np.float32) for part in (x, w_query * sizes, w_key / sizes))
    for _ in range(3):  # the certificate is linear in W_K
        rho = np.asarray(exact(*(part.astype(np.float64) for part in (x, w_query, w_key)))[0])
        w_key = (w_key / rho[:, -1, None, None]).astype(np.float32)
    for _ in range(10):
        towards = np.where(rng.random(w_key.shape) < 0.4, 0, np.copysign(np.inf, w_key))
        moved = np.nextafter(w_key, towards.astype(np.float32))
        rho = np.asarray(exact(*(part.astype(np.float64) for part in (x, w_query, moved)))[0])
        yield (x, w_query, moved), rho[:, -1]


@pytest.mark.parametrize("bound", [None, 0.7])
def test_single_precision_proves_nothing_that_is_false(bound):
    tried = 0
    function = dict(PROGRAMS)[bound]
    for seed in range(20):
        for inputs, exact in near_the_threshold(seed, bound):
            found = np.asarray(function(*inputs)[0])[:, -1]
            assert found.dtype == np.float32
            # In double precision rounding adds less than 1e-12 to these.
            above = exact >= 1 + 1e-12
            tried += np.sum(above & (exact < 1 + 1e-6))
            assert np.all(found[above] >= 1)
            assert np.all(found < exact + 1e-2)
    assert tried > 500


def test_single_precision_bounds_lie_on_the_safe_side_of_double_precision():
    for bound, function in PROGRAMS:
        single = evaluated(function, THIN, np.float32)
        for case, (rho, lower) in single.items():
            rounded = (part.astype(np.float64) for part in make(case, np.float32))
            inputs = [np.stack([part] * len(single)) for part in rounded]
            exact, exact_lower = (np.asarray(part[0]) for part in function(*inputs))
            rho, lower = rho.astype(np.float64), lower.astype(np.float64)
            assert np.all(rho >= exact * (1 - 1e-12)), (case, bound)
            assert np.all(lower <= exact_lower * (1 + 1e-12)), (case, bound)


def test_computed_factors_fall_short_by_no_more_than_they_say():
    """Of couplings of every kind, rank-deficient and badly scaled ones included."""
    rng = np.random.default_rng(0)
    w_query, w_key = rng.standard_normal((2, 400, 9, 3))
    kind = np.arange(400) % 8
    w_key[kind == 1] = w_query[kind == 1]
    w_key[kind == 2] = -w_query[kind == 2]
    w_query[kind == 3, :, 1:] = w_query[kind == 3, :, :1]
    w_query[kind == 4] *= np.logspace(0, -6, 3)
    w_key[kind == 5] = w_query[kind == 5] * np.logspace(-6, 6, 9)[:, None]
    w_key[kind == 6] = 1e4 * w_query[kind == 6] @ [[0, 1, 0], [-1, 0, 0], [0, 0, 0]]
    w_query, w_key = w_query.astype(np.float32), w_key.astype(np.float32)
    found = jax.tree.map(np.asarray, quick_jit(majorants)(w_query, w_key))
    query, key, positive = (part.astype(np.float64) for part in found[:3])
    coupling = w_key.astype(np.float64) @ np.swapaxes(w_query, -1, -2) / math.sqrt(3)
    symmetric = (coupling + np.swapaxes(coupling, -1, -2)) / 2
    for side in (positive, *((a * query + key / a) / 2 for a in (0.5, 1, 2))):
        excess = np.linalg.eigvalsh(symmetric - side @ np.swapaxes(side, -1, -2))[:, -1]
        assert np.all(excess <= found.shortfall / 2)


# ---- derivatives ------------------------------------------------------------------------------


@pytest.mark.slow
def test_gradient_matches_finite_differences_where_eigenvalues_coincide():
    """Couplings of every kind, of which one has singular values that are all equal."""
    rng = np.random.default_rng(3)
    x, w_query, w_key = rng.standard_normal((3, 4, 5, 2))
    x = rng.standard_normal((4, *THIN[:2]))
    w_key[1] = w_query[1] + 0.2 * w_key[1]
    w_key[2] = w_query[2] = np.linalg.qr(w_query[2])[0]
    w_query[3] *= 10
    inputs = x, w_query, w_key
    each = jax.vmap(lambda *one: jnp.sum(pa.certificate(*one)))
    total = quick_jit(each)
    gradients = quick_jit(jax.grad(lambda *stacked: jnp.sum(each(*stacked)), (0, 1, 2)))(*inputs)
    step, along = 1e-6, [rng.standard_normal(part.shape) for part in inputs]
    along[2][2] = along[1][2]  # the positive part has no derivative where it loses an eigenvalue
    above, below = (
        np.asarray(total(*(part + way * step * a for part, a in zip(inputs, along, strict=True))))
        for way in (1, -1)
    )
    slopes = sum(
        np.sum(np.asarray(gradient) * a, axis=(-2, -1))
        for gradient, a in zip(gradients, along, strict=True)
    )
    np.testing.assert_allclose(slopes, (above - below) / (2 * step), rtol=1e-5)
