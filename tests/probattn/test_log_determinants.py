"""Log-determinants and the relaxed barrier against dense Jacobians and closed forms."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probattn as pa
from probattn import _reference as reference
from tests.support.cases import (
    BY_NAME,
    CASES,
    LARGE_CASES,
    LONG_CASE,
    SINGULAR_CASES,
    SINGULAR_POSITION,
    THIN,
    Case,
    make,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")
all_cases = pytest.mark.parametrize("case", CASES, ids=str)
both_dtypes = pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["f64", "f32"])

EVERY_INPUT = (0, 1, 2)
log_det = jax.jit(pa.log_det)
reduced_blocks = jax.jit(pa.reduced_blocks)
jacobian_blocks = jax.jit(pa.jacobian_blocks)
barrier = jax.jit(pa.relaxed_barrier)
# The derivative of every position's log|det D_t|, one (T, …) array for each input.
derivative = jax.jit(jax.jacrev(lambda *inputs: pa.log_det(*inputs)[1], argnums=EVERY_INPUT))


def exactly(case, dtype):
    """The numbers of a case after rounding to a dtype, in float64."""
    return tuple(jnp.asarray(array, np.float64) for array in make(case, dtype))


def flat(parts):
    """Derivatives of T numbers with respect to each input, side by side: shape (T, inputs)."""
    return np.concatenate([np.reshape(part, (len(part), -1)) for part in parts], axis=1)


@functools.cache
def true_blocks(case, dtype=np.float64):
    inputs = exactly(case, dtype)
    return np.array([reference.jacobian_block(*inputs, t) for t in range(case.length)])


def true_sigma_min(case, dtype=np.float64):
    return np.linalg.svd(true_blocks(case, dtype), compute_uv=False)[:, -1]


def true_log_abs_at(x, w_query, w_key, t):
    return reference.log_det_at(x, w_query, w_key, t)[1]


@functools.cache
def true_derivative(case, dtype=np.float64):
    """Position by position, so that a singular block spoils its own row only."""
    inputs = exactly(case, dtype)
    rows = []
    for t in range(case.length):
        parts = jax.grad(true_log_abs_at, argnums=EVERY_INPUT)(*inputs, t)
        rows.append(np.concatenate([np.ravel(part) for part in parts]))
    return np.array(rows)


@all_cases
def test_log_det_matches_dense_jacobian(case):
    sign, log_abs = log_det(*make(case))
    true_sign, true_log_abs = np.linalg.slogdet(true_blocks(case))
    np.testing.assert_array_equal(sign, true_sign)
    # 1e-9 absolute, except within 2e-6 of a singular block: there one rounding of an entry, eps,
    # already moves log|det| by eps / sigma_min, in the oracle as in the code.
    sigma_min = true_sigma_min(case)
    bound = np.where(sigma_min > 2e-6, 1e-9, 8 * np.finfo(np.float64).eps / sigma_min)
    assert np.all(np.abs(log_abs - true_log_abs) <= bound)


def rounding_of_zero(inputs):
    """What rounding leaves of a derivative that is zero, as where all the past is one token."""
    x, w_query, w_key = inputs
    return 8 * np.finfo(x.dtype).eps * np.abs(x).max() * np.abs(w_query).max() * np.abs(w_key).max()


@all_cases
def test_derivative_matches_dense_jacobian(case):
    """Relative to each position's largest derivative."""
    inputs = make(case)
    got, true = flat(derivative(*inputs)), true_derivative(case)
    sigma_min = true_sigma_min(case)
    # Twice the bound of the value: the oracle's own derivative has the same condition.
    relative = np.where(sigma_min > 2e-6, 1e-9, 16 * np.finfo(np.float64).eps / sigma_min)
    bound = relative * np.abs(true).max(1) + rounding_of_zero(inputs)
    assert np.all(np.abs(got - true) <= bound[:, None])


def single_precision_bound(sigma_min):
    """1e-5 where sigma_min(D) >= 0.1, and in proportion to the condition nearer the boundary."""
    return np.where(sigma_min >= 0.1, 1e-5, 8 * np.finfo(np.float32).eps / sigma_min)


@all_cases
def test_float32_log_det_matches_float64_oracle(case):
    sign, log_abs = log_det(*make(case, np.float32))
    assert log_abs.dtype == np.float32
    blocks = true_blocks(case, np.float32)
    true_sign, true_log_abs = np.linalg.slogdet(blocks)
    sigma_min = true_sigma_min(case, np.float32)
    # Below, rounding one entry of the block to float32 may turn the sign.
    determined = sigma_min > 8 * np.finfo(np.float32).eps
    np.testing.assert_array_equal(np.asarray(sign)[determined], true_sign[determined])
    bound = single_precision_bound(sigma_min)
    assert np.all(
        np.abs(np.asarray(log_abs) - true_log_abs) <= bound * np.maximum(1, np.abs(true_log_abs))
    )


def logit_rounding(inputs):
    """What rounding of the products q_t·k_s adds to the relative error of the weights."""
    x, w_query, w_key = inputs
    largest = np.abs(x @ w_query).max() * np.abs(x @ w_key).max() * np.sqrt(w_query.shape[1])
    return 8 * np.finfo(np.float32).eps * largest


@all_cases
def test_float32_derivative_matches_float64_oracle(case):
    inputs = make(case, np.float32)
    got, true = flat(derivative(*inputs)), true_derivative(case, np.float32)
    relative = single_precision_bound(true_sigma_min(case, np.float32))
    if case.scale > 1 or case.kind in ("offset", "key_offset", "one_hot"):
        # Logits in the tens to millions: the weights' own error dominates.
        relative = relative + logit_rounding(inputs)
    bound = relative * np.abs(true).max(1) + rounding_of_zero(inputs)
    assert np.all(np.abs(got - true) <= bound[:, None])


@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_float32_at_training_size_matches_float64_oracle(case):
    """Value and derivative at r = 32, early and late in the sequence."""
    exact, inputs = exactly(case, np.float32), make(case, np.float32)
    sign, log_abs = (np.asarray(part) for part in log_det(*inputs))
    got = flat(derivative(*inputs))
    for t in (2, 10, case.length - 1):
        block = reference.jacobian_block(*exact, t)
        true_sign, true_log_abs = np.linalg.slogdet(block)
        true = jax.grad(true_log_abs_at, argnums=EVERY_INPUT)(*exact, t)
        true = np.concatenate([np.ravel(part) for part in true])
        relative = single_precision_bound(np.linalg.svd(block, compute_uv=False)[-1])
        assert sign[t] == true_sign
        assert abs(log_abs[t] - true_log_abs) <= relative * max(1, abs(true_log_abs))
        assert np.abs(got[t] - true).max() <= relative * np.abs(true).max()


@jax.jit
@functools.partial(jax.value_and_grad, argnums=EVERY_INPUT)
def log_abs_at(x, w_query, w_key, t):
    return pa.log_det(x, w_query, w_key)[1][t]


@pytest.mark.parametrize("t", [63, 64, 99])
def test_long_sequence_matches_dense_jacobian(t):
    inputs = exactly(LONG_CASE, np.float64)
    true_value, true = jax.value_and_grad(true_log_abs_at, argnums=EVERY_INPUT)(*inputs, t)
    value, got = log_abs_at(*inputs, t)
    np.testing.assert_allclose(value, true_value, rtol=0, atol=1e-9)
    for one, other in zip(got, true, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("function", "heads", "summed"),
    [
        (pa.log_det, (), False),
        (pa.log_det, (2,), True),
        (pa.relaxed_barrier, (2,), False),
        (pa.relaxed_barrier, (), True),
    ],
)
def test_many_large_blocks_are_taken_in_turns(function, heads, summed):
    """Sequences of which not all are formed at once: value and derivative of each alone."""
    rng = np.random.default_rng(0)
    x = 0.3 * rng.standard_normal((12, *(1 for _ in heads), 90, 6))
    w_query, w_key = rng.standard_normal((2, *heads, 6, 16))

    def total(x, w_query, w_key):
        found = function(x, w_query, w_key, summed=summed)
        return sum(jnp.sum(part) for part in jax.tree.leaves(found))

    derive = jax.jit(jax.value_and_grad(total, EVERY_INPUT))
    value, gradients = derive(x, w_query, w_key)
    alone = [derive(one, w_query, w_key) for one in x]
    np.testing.assert_allclose(value, sum(one for one, _ in alone), rtol=1e-12)
    np.testing.assert_allclose(gradients[0], [own[0] for _, own in alone], atol=1e-12)
    for number in (1, 2):
        summed = sum(own[number] for _, own in alone)
        np.testing.assert_allclose(gradients[number], summed, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["length_1", "scalar_folded", "square_twice_folded", "thin"])
def test_sum_over_positions_is_log_det_of_whole_jacobian(name):
    """The Jacobian is block triangular; the oracle does not know."""
    case = BY_NAME[name]
    sign, log_abs = log_det(*make(case))
    true_sign, true_log_abs = reference.log_det_total(*exactly(case, np.float64))
    assert np.prod(sign) == true_sign
    assert abs(log_abs.sum() - true_log_abs) <= 1e-9


@all_cases
def test_blocks_match_their_definitions(case):
    inputs = exactly(case, np.float64)
    blocks = jacobian_blocks(*inputs)
    np.testing.assert_allclose(blocks, true_blocks(case), rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        reduced_blocks(*inputs), reference.reduced_blocks(*inputs), rtol=0, atol=1e-9
    )
    for t in range(min(2, case.length)):
        np.testing.assert_array_equal(blocks[t], np.eye(case.width))


@hypothesis.given(
    st.integers(0, 2**32 - 1), st.sampled_from(["thin", "square", "wide"]), st.floats(-2, 1)
)
def test_sylvester_identity(seed, shape, log_scale):
    template = BY_NAME[shape]
    case = Case("", template.length, template.width, template.rank, 10**log_scale, seed)
    dense = np.linalg.det(jacobian_blocks(*make(case)))
    reduced = np.linalg.det(reduced_blocks(*make(case)))
    np.testing.assert_allclose(dense, reduced, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["scalar", "scalar_repulsive", "scalar_scale_3", "scalar_folded"])
def test_scalar_closed_form(name):
    """Prop. 1: D_t = 1 − a Var_alpha(x)."""
    x, w_query, w_key = make(BY_NAME[name])
    a = w_query[0, 0] * w_key[0, 0]
    sign, log_abs = log_det(x, w_query, w_key)
    for t in range(1, len(x)):
        past = x[:t, 0]
        alpha = np.exp(a * x[t, 0] * past)
        alpha /= alpha.sum()
        variance = alpha @ past**2 - (alpha @ past) ** 2
        np.testing.assert_allclose(sign[t] * np.exp(log_abs[t]), 1 - a * variance, atol=1e-12)


def test_folded_example_of_the_design():
    """Past (−4, 4), a = 0.3: 1 − a Var = −3.8."""
    sign, log_abs = log_det(*make(BY_NAME["length_3_tied_logits"]))
    np.testing.assert_allclose(sign, [1, 1, -1])
    np.testing.assert_allclose(log_abs, [0, 0, np.log(3.8)], atol=1e-14)


@pytest.mark.parametrize("name", ["square_twice_folded", "wide_twice_folded"])
def test_two_negative_eigenvalues_have_positive_sign(name):
    t = SINGULAR_POSITION
    eigenvalues = np.linalg.eigvals(true_blocks(BY_NAME[name])[t])
    assert np.sum(eigenvalues.real < 0) == 2
    assert log_det(*make(BY_NAME[name]))[0][t] == 1


@both_dtypes
@pytest.mark.parametrize("case", SINGULAR_CASES, ids=str)
def test_exactly_singular_block_leaves_other_positions_alone(case, dtype):
    inputs = make(case, dtype)
    sign, log_abs = (np.asarray(part) for part in log_det(*inputs))
    true_sign, true_log_abs = np.linalg.slogdet(true_blocks(case, dtype))
    singular = true_sign == 0
    assert singular.sum() == 1
    assert np.all(sign[singular] == 0)
    assert np.all(log_abs[singular] == -np.inf)
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    np.testing.assert_allclose(log_abs[~singular], true_log_abs[~singular], atol=tolerance)
    got, true = flat(derivative(*inputs))[~singular], true_derivative(case, dtype)[~singular]
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(got, true, rtol=0, atol=tolerance * np.abs(true).max())


SECOND_ORDER = Case("second_order", 4, 2, 2, seed=93, kind="attractive")


def weighted(log_abs):
    """One number in which no position can hide another's error."""
    return jnp.dot(log_abs, jnp.arange(1.0, 5.0))


def unpack(flat_inputs):
    x, w_query, w_key = jnp.split(flat_inputs, [8, 12])
    return x.reshape(4, 2), w_query.reshape(2, 2), w_key.reshape(2, 2)


@functools.cache
def true_hessian():
    def objective(flat_inputs):
        return weighted(reference.log_det(*unpack(flat_inputs))[1])

    return np.asarray(jax.jit(jax.hessian(objective))(packed()))


def packed():
    return jnp.concatenate([jnp.ravel(array) for array in make(SECOND_ORDER)])


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
def test_hessian_matches_dense_jacobian(outer):
    """A Laplace approximation needs it: forward over reverse, and reverse over reverse."""
    hessian = jax.jit(outer(jax.jacrev(lambda inputs: weighted(pa.log_det(*unpack(inputs))[1]))))
    np.testing.assert_allclose(hessian(packed()), true_hessian(), rtol=0, atol=1e-9)


@jax.jit
def pushed_forward(inputs, tangents):
    return jax.jvp(lambda *inputs: pa.log_det(*inputs)[1], inputs, tangents)[1]


@pytest.mark.parametrize("name", ["square", "square_margin_-1e-04", "square_folded", "length_1"])
def test_forward_mode_is_the_derivative(name):
    case = BY_NAME[name]
    rng = np.random.default_rng(7)
    inputs = make(case)
    tangents = tuple(rng.standard_normal(array.shape) for array in inputs)
    got = pushed_forward(inputs, tangents)
    expected = true_derivative(case) @ np.concatenate([np.ravel(part) for part in tangents])
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


@hypothesis.given(st.integers(0, 2**32 - 1))
def test_symmetries(seed):
    """What leaves the determinants alone: a gauge, a rotation, and a shift of the past."""
    x, w_query, w_key = make(Case("", *THIN, seed=seed))
    log_abs = log_det(x, w_query, w_key)[1]
    rng = np.random.default_rng(seed)
    gauge = rng.standard_normal((2, 2)) + 3 * np.eye(2)
    regauged = log_det(x, w_query @ gauge, w_key @ np.linalg.inv(gauge).T)[1]
    np.testing.assert_allclose(regauged, log_abs, atol=1e-8)
    rotation = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    rotated = log_det(x @ rotation, rotation.T @ w_query, rotation.T @ w_key)[1]
    np.testing.assert_allclose(rotated, log_abs, atol=1e-8)
    # Moving every past token alike moves the keys alike, which the softmax does not see. Moving
    # x_t too would move the query, which it does.
    moved = x + np.array([1.0, -2.0, 0.5, 3.0, 0.0])
    moved[-1] = x[-1]
    np.testing.assert_allclose(log_det(moved, w_query, w_key)[1][-1], log_abs[-1], atol=1e-8)


# ---- the relaxed barrier ----------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=1)
def barrier_at(z, delta=1e-3):
    """Barrier of a scalar block 1 − 16 a = z, with weights that do not depend on a."""
    x = jnp.array([[-4.0], [4.0], [0.0]], z.dtype)
    return pa.relaxed_barrier(x, (1 - z[None, None]) / 16, jnp.ones((1, 1), z.dtype), delta)[2]


slope_at = jax.jit(jax.grad(barrier_at), static_argnums=1)
curvature_at = jax.jit(jax.grad(jax.grad(barrier_at)), static_argnums=1)


@pytest.mark.parametrize("delta", [1e-3, 0.1])
@pytest.mark.parametrize("multiple", [1e3, 3, 1.001, 0.999, 0.5, 0, -0.5, -1, -9.99])
def test_barrier_formula_and_its_derivatives(multiple, delta):
    z, u = jnp.asarray(multiple * delta), 1 - multiple
    if multiple >= 1:
        value, slope, curvature = -np.log(z), -1 / z, 1 / z**2
    else:
        value, slope, curvature = u + u**2 / 2 - np.log(delta), -(1 + u) / delta, 1 / delta**2
    np.testing.assert_allclose(barrier_at(z, delta), value, rtol=1e-11)
    np.testing.assert_allclose(slope_at(z, delta), slope, rtol=1e-11)
    if multiple != 0:  # a second derivative at an exactly singular block is not on offer
        np.testing.assert_allclose(curvature_at(z, delta), curvature, rtol=1e-11)


@pytest.mark.parametrize("multiple", [1, -10])
def test_barrier_is_twice_continuously_differentiable(multiple):
    """Finite differences of the value itself on either side of a joint of the formula."""
    delta = 1e-3
    joint, step = multiple * delta, 1e-3 * delta
    below, above = (
        [float(barrier_at(jnp.asarray(joint + side * i * step), delta)) for i in range(1, 4)]
        for side in (-1, 1)
    )
    assert below[0] - above[0] == pytest.approx(2 * step * (1 - multiple + 1) / delta, rel=1e-2)
    slopes = [(below[1] - below[0]) / step, (above[0] - above[1]) / step]
    np.testing.assert_allclose(slopes[0], slopes[1], rtol=1e-2)
    curvatures = [(side[0] - 2 * side[1] + side[2]) / step**2 for side in (below, above)]
    np.testing.assert_allclose(curvatures, 1 / delta**2, rtol=1e-2)


def test_barrier_far_below_grows_but_no_longer_like_a_parabola():
    z = -np.logspace(-1, 30, 63)
    values = np.array([barrier_at(jnp.asarray(point)) for point in z])
    slopes = np.array([slope_at(jnp.asarray(point)) for point in z])
    assert barrier_at(jnp.asarray(-10.0)) < 1e6 < 5e7
    # Like a logarithm, or its square: each decade adds at most as much as all before it.
    per_decade = np.diff(values[::2])
    assert np.all(per_decade > 0)
    assert per_decade[-1] < 2 * values[-1] / 30
    assert np.all(slopes < 0)
    assert np.all(np.diff(np.abs(slopes[z < -1])) < 0)


def test_barrier_decreases_in_the_determinant():
    """Its gradient leads back inside, from anywhere."""
    z = np.concatenate([-np.logspace(4, -6, 41), np.logspace(-6, 1, 29)])
    values = np.array([barrier_at(jnp.asarray(point)) for point in z])
    assert np.all(np.diff(values) < 0)


@jax.jit
@functools.partial(jax.value_and_grad, argnums=EVERY_INPUT)
def total_barrier(x, w_query, w_key):
    return jnp.sum(pa.relaxed_barrier(x, w_query, w_key))


@both_dtypes
@pytest.mark.parametrize("z", [0.0, -1e-3, -1e4, -1e30])
def test_barrier_is_finite_with_its_gradient(z, dtype):
    x = np.array([[-4.0], [4.0], [0.0]], dtype)
    w_query, w_key = np.full((1, 1), (1 - z) / 16, dtype), np.ones((1, 1), dtype)
    value, gradients = total_barrier(x, w_query, w_key)
    assert value.dtype == dtype
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


@all_cases
def test_barrier_matches_dense_determinant(case):
    delta = 1e-3
    determinants = np.linalg.det(true_blocks(case))
    within = determinants > -10 * delta
    true = reference.relaxed_barrier(*exactly(case, np.float64), delta)
    got = np.asarray(barrier(*make(case)))
    np.testing.assert_allclose(got[within], true[within], rtol=1e-9, atol=1e-9)
    inside = determinants > delta
    log_abs = np.asarray(log_det(*make(case))[1])
    np.testing.assert_allclose(got[inside], -log_abs[inside], rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "case",
    [
        BY_NAME["scalar_margin_1e-02"],
        BY_NAME["square_margin_-1e-04"],
        BY_NAME["square_margin_-1e-08"],
        *SINGULAR_CASES,
    ],
    ids=str,
)
def test_barrier_gradient_matches_dense_determinant(case):
    """Through z = delta, 0 and below; at a block of rank d − 1, and of rank 0."""
    delta = 0.05
    inputs = exactly(case, np.float64)
    within = jnp.asarray(np.linalg.det(true_blocks(case)) > -10 * delta, np.float64)

    def got(*inputs):
        return jnp.dot(pa.relaxed_barrier(*inputs, delta=delta), within)

    def true(*inputs):
        return jnp.dot(reference.relaxed_barrier(*inputs, delta), within)

    gradients = (
        jax.jit(jax.grad(got, EVERY_INPUT))(*inputs),
        jax.grad(true, EVERY_INPUT)(*inputs),
    )
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9 * np.abs(other).max())


@pytest.mark.parametrize("delta", [0.0, -1e-3, np.nan])
def test_barrier_refuses_delta_that_is_not_positive(delta):
    with pytest.raises(ValueError, match=r"delta.*expected"):
        pa.relaxed_barrier(*make(BY_NAME["thin"]), delta=delta)
