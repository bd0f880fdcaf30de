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
    LARGE_CASES,
    LONG_CASE,
    REGISTERED,
    SCALAR,
    SINGULAR_CASES,
    SINGULAR_POSITION,
    THIN,
    WIDE,
    Case,
    evaluated,
    every_shape,
    main_shapes,
    make,
    of_shape,
    stacked,
)
from tests.support.dense import (
    dense,
    dense_of,
    determinant_slopes,
    flat,
    last_block,
    last_log_abs_slope,
    log_abs_slopes,
    quick_jit,
    sigma_min,
    whole_jacobian,
)
from tests.support.dense import reduced_blocks as true_reduced_blocks
from tests.support.few_inputs import differences

pytestmark = pytest.mark.usefixtures("strict_promotion")
both_dtypes = pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["f64", "f32"])

EVERY_INPUT = (0, 1, 2)
EPS32, EPS64 = np.finfo(np.float32).eps, np.finfo(np.float64).eps
DELTA = 1e-3
log_det = jax.jit(pa.log_det)


def values(*inputs):
    """Every function of the blocks, at every position."""
    return (
        *pa.log_det(*inputs),
        pa.relaxed_barrier(*inputs, DELTA),
        pa.reduced_blocks(*inputs),
        pa.jacobian_blocks(*inputs),
    )


def derivative(*inputs):
    """The derivative of every position's log|det D_t|, one (T, ...) array for each input."""
    return jax.jacrev(lambda *inputs: pa.log_det(*inputs)[1], argnums=EVERY_INPUT)(*inputs)


# Of all cases of a shape at once. Single precision is compiled as users have it: its rounding is
# what the tests below are about.
values = quick_jit(jax.vmap(values))
derivatives = quick_jit(jax.vmap(derivative))
log_det_32 = jax.jit(jax.vmap(pa.log_det))
derivatives_32 = jax.jit(jax.vmap(derivative))


def regular(case):
    return case not in SINGULAR_CASES


def true_slopes(case, dtype=np.float64):
    return flat(log_abs_slopes(dense(case, dtype))[:3])


@every_shape
def test_log_det_matches_dense_jacobian(shape):
    for case, (sign, log_abs, *_) in evaluated(values, shape).items():
        true_sign, true_log_abs = np.linalg.slogdet(dense(case).blocks)
        if not regular(case):
            continue
        np.testing.assert_array_equal(sign, true_sign, err_msg=str(case))
        # 1e-9 absolute, except within 2e-6 of a singular block: there one rounding of an entry,
        # eps, already moves log|det| by eps / sigma_min, in the oracle as in the code.
        smallest = sigma_min(dense(case))
        bound = np.where(smallest > 2e-6, 1e-9, 8 * EPS64 / smallest)
        assert np.all(np.abs(log_abs - true_log_abs) <= bound), case


def rounding_of_zero(inputs):
    """What rounding leaves of a derivative that is zero, as where all the past is one token."""
    x, w_query, w_key = inputs
    return 8 * np.finfo(x.dtype).eps * np.abs(x).max() * np.abs(w_query).max() * np.abs(w_key).max()


@every_shape
def test_derivative_matches_dense_jacobian(shape):
    """Relative to each position's largest derivative."""
    for case, parts in evaluated(derivatives, shape).items():
        if not regular(case):
            continue
        got, true = flat(parts), true_slopes(case)
        smallest = sigma_min(dense(case))
        # Twice the bound of the value: the oracle's own derivative has the same condition.
        relative = np.where(smallest > 2e-6, 1e-9, 16 * EPS64 / smallest)
        bound = relative * np.abs(true).max(1) + rounding_of_zero(make(case))
        assert np.all(np.abs(got - true) <= bound[:, None]), case


def single_precision_bound(smallest):
    """1e-5 where sigma_min(D) >= 0.1, and in proportion to the condition nearer the boundary."""
    return np.where(smallest >= 0.1, 1e-5, 8 * EPS32 / smallest)


@main_shapes
def test_float32_log_det_matches_float64_oracle(shape):
    for case, (sign, log_abs) in evaluated(log_det_32, shape, np.float32).items():
        if not regular(case):
            continue
        assert log_abs.dtype == np.float32
        found = dense(case, np.float32)
        true_sign, true_log_abs = np.linalg.slogdet(found.blocks)
        smallest = sigma_min(found)
        # Below, rounding one entry of the block to float32 may turn the sign.
        determined = smallest > 8 * EPS32
        np.testing.assert_array_equal(sign[determined], true_sign[determined], err_msg=str(case))
        bound = single_precision_bound(smallest) * np.maximum(1, np.abs(true_log_abs))
        assert np.all(np.abs(log_abs - true_log_abs) <= bound), case


def logit_rounding(inputs):
    """What rounding of the products q_t·k_s adds to the relative error of the weights."""
    x, w_query, w_key = inputs
    largest = np.abs(x @ w_query).max() * np.abs(x @ w_key).max() * np.sqrt(w_query.shape[1])
    return 8 * EPS32 * largest


@pytest.mark.slow
@main_shapes
def test_float32_derivative_matches_float64_oracle(shape):
    for case, parts in evaluated(derivatives_32, shape, np.float32).items():
        if not regular(case):
            continue
        inputs = make(case, np.float32)
        got, true = flat(parts), true_slopes(case, np.float32)
        relative = single_precision_bound(sigma_min(dense(case, np.float32)))
        if case.scale > 1 or case.kind in ("offset", "key_offset", "one_hot"):
            # Logits in the tens to millions: the weights' own error dominates.
            relative = relative + logit_rounding(inputs)
        bound = relative * np.abs(true).max(1) + rounding_of_zero(inputs)
        assert np.all(np.abs(got - true) <= bound[:, None]), case


def at_positions(*inputs, positions):
    """Sign and log|det D_t| everywhere, and the derivative at some positions."""

    def log_abs(*inputs):
        sign, log_abs = pa.log_det(*inputs)
        return log_abs[np.array(positions)], (sign, log_abs)

    return jax.jacrev(log_abs, EVERY_INPUT, has_aux=True)(*inputs)


@pytest.mark.slow
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_float32_at_training_size_matches_float64_oracle(every):
    """Value and derivative at r = 32, early and late in the sequence."""
    positions = (2, 10, 63)
    compiled = jax.jit(functools.partial(at_positions, positions=positions))
    rng = np.random.default_rng(0)
    for case in LARGE_CASES:
        got, (sign, log_abs) = jax.tree.map(np.asarray, compiled(*make(case, np.float32)))
        exact = tuple(array.astype(np.float64) for array in make(case, np.float32))
        for row, t in enumerate(positions):
            past = exact[0][: t + 1], *exact[1:]
            block = last_block(*past)
            true_sign, true_log_abs = np.linalg.slogdet(block)
            relative = single_precision_bound(np.linalg.svd(block, compute_uv=False)[-1])
            assert sign[t] == true_sign, case
            assert abs(log_abs[t] - true_log_abs) <= relative * max(1, abs(true_log_abs)), case
            for number in EVERY_INPUT:
                size = past[number].size
                entries = np.arange(size) if every else rng.choice(size, 40, replace=False)
                true = last_log_abs_slope(past, number, entries)
                largest = np.abs(got[number][row]).max()
                error = np.abs(np.ravel(got[number][row])[entries] - true)
                assert error.max() <= relative * largest, (case, t, number)


@pytest.mark.slow
def test_long_sequence_matches_dense_jacobian():
    positions = (63, 64, 99)
    inputs = make(LONG_CASE)
    compiled = jax.jit(functools.partial(at_positions, positions=positions))
    got, (_, log_abs) = compiled(*inputs)
    for row, t in enumerate(positions):
        past = inputs[0][: t + 1], *inputs[1:]
        true = np.linalg.slogdet(last_block(*past))[1]
        np.testing.assert_allclose(log_abs[t], true, rtol=0, atol=1e-9)
        for number in EVERY_INPUT:
            one = np.ravel(got[number][row])
            other = last_log_abs_slope(past, number)
            np.testing.assert_allclose(one[: len(other)], other, rtol=0, atol=1e-9)
            np.testing.assert_array_equal(one[len(other) :], 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "heads", "summed"),
    [
        pytest.param(pa.log_det, (), False, marks=pytest.mark.nightly),
        (pa.log_det, (2,), True),
        pytest.param(pa.relaxed_barrier, (2,), False, marks=pytest.mark.nightly),
        pytest.param(pa.relaxed_barrier, (), True, marks=pytest.mark.nightly),
    ],
)
def test_many_large_blocks_are_taken_in_turns(function, heads, summed):
    """Sequences of which not all are formed at once: value and derivative of each alone.

    In `test_sums` few of them are formed at once, and it is soon compiled.
    """
    rng = np.random.default_rng(0)
    x = 0.3 * rng.standard_normal((12, *(1 for _ in heads), 90, 6))
    w_query, w_key = rng.standard_normal((2, *heads, 6, 16))

    def total(x, w_query, w_key):
        found = function(x, w_query, w_key, summed=summed)
        return sum(jnp.sum(part) for part in jax.tree.leaves(found))

    derive = quick_jit(jax.value_and_grad(total, EVERY_INPUT))
    value, gradients = derive(x, w_query, w_key)
    alone = [derive(one, w_query, w_key) for one in x]
    np.testing.assert_allclose(value, sum(one for one, _ in alone), rtol=1e-12)
    np.testing.assert_allclose(gradients[0], [own[0] for _, own in alone], atol=1e-12)
    for number in (1, 2):
        summed = sum(own[number] for _, own in alone)
        np.testing.assert_allclose(gradients[number], summed, rtol=1e-10, atol=1e-10)


@every_shape
def test_sum_over_positions_is_log_det_of_whole_jacobian(shape):
    """The Jacobian is block triangular; the oracle does not know."""
    for case, (sign, log_abs, *_) in evaluated(values, shape).items():
        smallest = sigma_min(dense(case)).min()
        if not regular(case) or smallest < 1e-3 or case.kind == "key_offset":
            continue
        true_sign, true_log_abs = np.linalg.slogdet(whole_jacobian(*make(case)))
        assert np.prod(sign) == true_sign, case
        assert abs(log_abs.sum() - true_log_abs) <= 1e-9, case


@every_shape
def test_blocks_match_their_definitions(shape):
    for case, (*_, reduced, blocks) in evaluated(values, shape).items():
        np.testing.assert_allclose(blocks, dense(case).blocks, rtol=0, atol=1e-9, err_msg=str(case))
        true = true_reduced_blocks(*make(case))
        np.testing.assert_allclose(reduced, true, rtol=0, atol=1e-9, err_msg=str(case))
        identities = np.broadcast_to(np.eye(case.width), blocks[:2].shape)
        np.testing.assert_array_equal(blocks[:2], identities, err_msg=str(case))


both_blocks = quick_jit(lambda *inputs: (pa.jacobian_blocks(*inputs), pa.reduced_blocks(*inputs)))


@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from(["wide"]), st.floats(-2, 1))
def test_sylvester_identity(seed, shape, log_scale):
    template = BY_NAME[shape]
    case = Case("", template.length, template.width, template.rank, 10**log_scale, seed)
    of_blocks, of_reduced = (np.linalg.det(part) for part in both_blocks(*make(case)))
    np.testing.assert_allclose(of_blocks, of_reduced, rtol=1e-10, atol=1e-10)


def test_scalar_closed_form():
    """Prop. 1: D_t = 1 − a Var_alpha(x)."""
    for name in ("scalar", "scalar_repulsive", "scalar_scale_3", "scalar_folded"):
        x, w_query, w_key = make(BY_NAME[name])
        a = w_query[0, 0] * w_key[0, 0]
        sign, log_abs, *_ = evaluated(values, SCALAR)[BY_NAME[name]]
        for t in range(1, len(x)):
            past = x[:t, 0]
            alpha = np.exp(a * x[t, 0] * past)
            alpha /= alpha.sum()
            expected = 1 - a * (alpha @ past**2 - (alpha @ past) ** 2)
            found = sign[t] * np.exp(log_abs[t])
            np.testing.assert_allclose(found, expected, atol=1e-12, err_msg=name)


def test_folded_example_of_the_design():
    """Past (−4, 4), a = 0.3: 1 − a Var = −3.8."""
    sign, log_abs, *_ = evaluated(values, SCALAR)[BY_NAME["scalar_tied_logits"]]
    np.testing.assert_allclose(sign[:3], [1, 1, -1])
    np.testing.assert_allclose(log_abs[:3], [0, 0, np.log(3.8)], atol=1e-14)


@pytest.mark.parametrize(
    "name", [pytest.param("square_twice_folded", marks=pytest.mark.slow), "wide_twice_folded"]
)
def test_two_negative_eigenvalues_have_positive_sign(name):
    case, t = BY_NAME[name], SINGULAR_POSITION
    eigenvalues = np.linalg.eigvals(dense(case).blocks[t])
    assert np.sum(eigenvalues.real < 0) == 2
    assert evaluated(values, (case.length, case.width, case.rank))[case][0][t] == 1


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(SCALAR, np.float64, id="scalar_f64"),
        pytest.param(WIDE, np.float64, id="wide_f64"),
        pytest.param(SCALAR, np.float32, id="scalar_f32", marks=pytest.mark.slow),
        pytest.param(WIDE, np.float32, id="wide_f32"),
    ],
)
def test_exactly_singular_block_leaves_other_positions_alone(shape, dtype):
    exact = dtype == np.float64
    found = evaluated(values if exact else log_det_32, shape, dtype)
    slopes = evaluated(derivatives if exact else derivatives_32, shape, dtype)
    for case in of_shape(shape, SINGULAR_CASES):
        sign, log_abs, *_ = found[case]
        true_sign, true_log_abs = np.linalg.slogdet(dense(case, dtype).blocks)
        singular = true_sign == 0
        assert singular.sum() == 1, case
        assert np.all(sign[singular] == 0), case
        assert np.all(log_abs[singular] == -np.inf), case
        tolerance = 1e-12 if exact else 1e-5
        np.testing.assert_allclose(log_abs[~singular], true_log_abs[~singular], atol=tolerance)
        got, true = flat(slopes[case])[~singular], true_slopes(case, dtype)[~singular]
        assert np.all(np.isfinite(got)), case
        atol = tolerance * np.abs(true).max()
        np.testing.assert_allclose(got, true, rtol=0, atol=atol, err_msg=str(case))


SECOND_ORDER = Case("second_order", 4, 2, 2, seed=93, kind="attractive")


def weighted(log_abs):
    """One number in which no position can hide another's error."""
    return jnp.dot(log_abs, jnp.arange(1.0, 5.0))


def unpack(flat_inputs):
    x, w_query, w_key = flat_inputs[:8], flat_inputs[8:12], flat_inputs[12:]
    return x.reshape(4, 2), w_query.reshape(2, 2), w_key.reshape(2, 2)


def packed():
    return np.concatenate([np.ravel(array) for array in make(SECOND_ORDER)])


def true_gradient(flat_inputs):
    return np.arange(1.0, 5.0) @ flat(log_abs_slopes(dense_of(*unpack(flat_inputs)))[:3])


@pytest.mark.slow
@pytest.mark.parametrize("outer", [jax.jacfwd, pytest.param(jax.jacrev, marks=pytest.mark.slow)])
def test_hessian_matches_dense_jacobian(outer):
    """A Laplace approximation needs it: forward over reverse, and reverse over reverse."""
    hessian = quick_jit(outer(jax.jacrev(lambda inputs: weighted(pa.log_det(*unpack(inputs))[1]))))
    expected = differences(true_gradient, packed())
    np.testing.assert_allclose(hessian(packed()), expected, rtol=0, atol=1e-9)


@quick_jit
@jax.vmap
def pushed_forward(inputs, tangents):
    return jax.jvp(lambda *inputs: pa.log_det(*inputs)[1], inputs, tangents)[1]


@pytest.mark.parametrize(
    "names",
    [
        ("thin", "thin_margin_1e-05", "thin_folded"),
        pytest.param(("square", "square_margin_-1e-04", "square_folded"), marks=pytest.mark.slow),
        pytest.param(("length_1",), marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_forward_mode_is_the_derivative(names):
    inputs = stacked([BY_NAME[name] for name in names])
    rng = np.random.default_rng(7)
    tangents = tuple(rng.standard_normal(array.shape) for array in inputs)
    got = pushed_forward(inputs, tangents)
    for number, name in enumerate(names):
        moved = np.concatenate([np.ravel(part[number]) for part in tangents])
        expected = true_slopes(BY_NAME[name]) @ moved
        np.testing.assert_allclose(got[number], expected, rtol=1e-9, atol=1e-9, err_msg=name)


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


def barrier_of(z, delta=DELTA):
    """Barrier of a scalar block 1 − 16 a = z, with weights that do not depend on a."""
    x = jnp.array([[-4.0], [4.0], [0.0]], z.dtype)
    return pa.relaxed_barrier(x, (1 - z[None, None]) / 16, jnp.ones((1, 1), z.dtype), delta)[2]


@functools.partial(quick_jit, static_argnums=1)
def barrier_and_derivatives(z, delta=DELTA):
    """Value, slope and curvature."""
    slope = jax.grad(barrier_of)
    return barrier_of(z, delta), slope(z, delta), jax.grad(slope)(z, delta)


def barrier_at(z):
    return barrier_and_derivatives(np.float64(z))[0]


def slope_at(z):
    return barrier_and_derivatives(np.float64(z))[1]


@pytest.mark.slow
@pytest.mark.parametrize("delta", [DELTA, pytest.param(0.1, marks=pytest.mark.slow)])
def test_barrier_formula_and_its_derivatives(delta):
    for multiple in (1e3, 3, 1.001, 0.999, 0.5, 0, -0.5, -1, -9.99):
        z, u = np.float64(multiple * delta), 1 - multiple
        if multiple >= 1:
            expected = -np.log(z), -1 / z, 1 / z**2
        else:
            expected = u + u**2 / 2 - np.log(delta), -(1 + u) / delta, 1 / delta**2
        found = barrier_and_derivatives(z, delta)
        # A second derivative at an exactly singular block is not on offer.
        count = 2 if multiple == 0 else 3
        np.testing.assert_allclose(
            found[:count], expected[:count], rtol=1e-11, err_msg=f"at {multiple} delta"
        )


@pytest.mark.slow
@pytest.mark.parametrize("multiple", [1, -10])
def test_barrier_is_twice_continuously_differentiable(multiple):
    """Finite differences of the value itself on either side of a joint of the formula."""
    delta = DELTA
    joint, step = multiple * delta, 1e-3 * delta
    below, above = (
        [float(barrier_at(joint + side * i * step)) for i in range(1, 4)] for side in (-1, 1)
    )
    assert below[0] - above[0] == pytest.approx(2 * step * (1 - multiple + 1) / delta, rel=1e-2)
    slopes = [(below[1] - below[0]) / step, (above[0] - above[1]) / step]
    np.testing.assert_allclose(slopes[0], slopes[1], rtol=1e-2)
    curvatures = [(side[0] - 2 * side[1] + side[2]) / step**2 for side in (below, above)]
    np.testing.assert_allclose(curvatures, 1 / delta**2, rtol=1e-2)


@pytest.mark.slow
def test_barrier_far_below_grows_but_no_longer_like_a_parabola():
    z = -np.logspace(-1, 30, 63)
    values = np.array([barrier_at(point) for point in z])
    slopes = np.array([slope_at(point) for point in z])
    assert barrier_at(-10.0) < 1e6 < 5e7
    # Like a logarithm, or its square: each decade adds at most as much as all before it.
    per_decade = np.diff(values[::2])
    assert np.all(per_decade > 0)
    assert per_decade[-1] < 2 * values[-1] / 30
    assert np.all(slopes < 0)
    assert np.all(np.diff(np.abs(slopes[z < -1])) < 0)


def test_barrier_decreases_in_the_determinant():
    """Its gradient leads back inside, from anywhere."""
    z = np.concatenate([-np.logspace(4, -6, 41), np.logspace(-6, 1, 29)])
    values = np.array([barrier_at(point) for point in z])
    assert np.all(np.diff(values) < 0)


@jax.jit
@functools.partial(jax.value_and_grad, argnums=EVERY_INPUT)
def total_barrier(x, w_query, w_key):
    return jnp.sum(pa.relaxed_barrier(x, w_query, w_key))


@pytest.mark.slow
@both_dtypes
@pytest.mark.parametrize("z", [0.0, -1e-3, -1e4, -1e30])
def test_barrier_is_finite_with_its_gradient(z, dtype):
    x = np.array([[-4.0], [4.0], [0.0]], dtype)
    w_query, w_key = np.full((1, 1), (1 - z) / 16, dtype), np.ones((1, 1), dtype)
    value, gradients = total_barrier(x, w_query, w_key)
    assert value.dtype == dtype
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def true_barrier(determinants, delta):
    return np.asarray(reference.relaxed_logarithm(jnp.asarray(determinants), delta))


@every_shape
def test_barrier_matches_dense_determinant(shape):
    for case, (_, log_abs, got, *_) in evaluated(values, shape).items():
        determinants = np.linalg.det(dense(case).blocks)
        within = determinants > -10 * DELTA
        true = true_barrier(determinants, DELTA)
        np.testing.assert_allclose(
            got[within], true[within], rtol=1e-9, atol=1e-9, err_msg=str(case)
        )
        inside = determinants > DELTA
        np.testing.assert_allclose(got[inside], -log_abs[inside], rtol=1e-14, atol=0)


@quick_jit
@jax.vmap
@functools.partial(jax.grad, argnums=EVERY_INPUT)
def barrier_gradient(x, w_query, w_key, counted):
    return jnp.dot(pa.relaxed_barrier(x, w_query, w_key, delta=0.05), counted)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("scalar_margin_1e-02", "scalar_singular"), marks=pytest.mark.slow),
        pytest.param(("square_margin_-1e-04", "square_margin_-1e-08"), marks=pytest.mark.slow),
        ("wide_singular", "wide_twice_singular"),
    ],
    ids=["scalar", "square", "wide"],
)
def test_barrier_gradient_matches_dense_determinant(names):
    """Through z = delta, 0 and below; at a block of rank d − 1, and of rank 0."""
    cases = [case for case in REGISTERED if case.name in names]
    found = [dense(case) for case in cases]
    determinants = np.array([np.linalg.det(one.blocks) for one in found])
    within = (determinants > -10 * 0.05).astype(np.float64)
    got = barrier_gradient(*stacked(cases), within)
    of_determinant = jax.vmap(jax.vmap(jax.grad(reference.relaxed_logarithm), (0, None)), (0, None))
    slopes = np.asarray(of_determinant(jnp.asarray(determinants), 0.05)) * within
    for number, case in enumerate(cases):
        for one, other in zip(got, determinant_slopes(found[number]), strict=False):
            expected = np.tensordot(slopes[number], other, 1)
            atol = 1e-9 * np.abs(expected).max()
            np.testing.assert_allclose(
                one[number], expected, rtol=1e-9, atol=atol, err_msg=str(case)
            )


@pytest.mark.parametrize("delta", [0.0, -1e-3, np.nan])
def test_barrier_refuses_delta_that_is_not_positive(delta):
    with pytest.raises(ValueError, match=r"delta.*expected"):
        pa.relaxed_barrier(*make(BY_NAME["thin"]), delta=delta)
