"""Margins and support tokens against dense singular values and closed forms."""

import functools
import inspect
import math
from typing import get_args

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probattn as pa
from probattn import margins
from tests.support.cases import (
    BY_NAME,
    LARGE_CASES,
    SCALAR,
    SINGULAR_POSITION,
    THIN,
    WIDE,
    Case,
    evaluated,
    main_shapes,
    make,
    of_shape,
    shapes,
)
from tests.support.dense import (
    dense,
    flat,
    margin_slopes,
    quick_jit,
    real_eigenvalue_at_most_zero,
    reduced_blocks,
    signed_sigma_min,
)

pytestmark = pytest.mark.usefixtures("strict_promotion", "strict_ranks")

KINDS = ["sigma_min", "reduced", "det", "log_det"]
EPS32 = np.finfo(np.float32).eps
# Singular values and eigenvalues take long to compile.
margin_shapes = shapes("rank_one", "one_token", "two_tokens", "square")
embedding_margin = quick_jit(pa.embedding_margin)
margin_and_crossed = quick_jit(
    lambda *inputs: (pa.stability_margin(*inputs), pa.infeasible(*inputs))
)
infeasible = quick_jit(margins.infeasible)


@quick_jit
@jax.vmap
def every_margin(*inputs):
    """Each kind, the embedding margin, and what is infeasible."""
    kinds = {kind: pa.stability_margin(*inputs, kind=kind) for kind in KINDS}
    return kinds | {"embedding": pa.embedding_margin(*inputs), "crossed": pa.infeasible(*inputs)}


@jax.jit
@jax.vmap
def both_margins_32(*inputs):
    return {kind: pa.stability_margin(*inputs, kind=kind) for kind in ("sigma_min", "reduced")}


# One (T, …) array for each input.
margin_derivative = quick_jit(jax.vmap(jax.jacrev(pa.stability_margin, argnums=(0, 1, 2))))


def exactly(case, dtype=np.float64):
    """The numbers of a case after rounding to a dtype, in float64."""
    return tuple(array.astype(np.float64) for array in make(case, dtype))


def shape_of(case):
    return case.length, case.width, case.rank


def margins_of(name):
    return evaluated(every_margin, shape_of(BY_NAME[name]))[BY_NAME[name]]


def true_margin(case, kind="sigma_min", dtype=np.float64):
    blocks = dense(case, dtype).blocks
    if kind == "reduced":
        return signed_sigma_min(reduced_blocks(*exactly(case, dtype)))
    if kind == "sigma_min":
        return signed_sigma_min(blocks)
    if kind == "det":
        return np.linalg.det(blocks)
    sign, log_abs = np.linalg.slogdet(blocks)
    return np.where(sign > 0, log_abs, -np.inf)


# ---- margins ----------------------------------------------------------------------------------


@margin_shapes
def test_margin_matches_dense_blocks(shape):
    for case, found in evaluated(every_margin, shape).items():
        for kind in KINDS:
            got, true = found[kind], true_margin(case, kind)
            if kind == "log_det":
                sigma_min = np.abs(true_margin(case))
                assert np.array_equal(np.isneginf(got), np.isneginf(true)), case
                finite = np.isfinite(true)
                bound = np.maximum(1e-9, 8 * np.finfo(np.float64).eps / sigma_min[finite])
                assert np.all(np.abs(got[finite] - true[finite]) <= bound), case
            else:
                # An absolute error of rounding keeps the sign of the nearest margin, 1e-8.
                np.testing.assert_allclose(
                    got, true, rtol=1e-10, atol=1e-12, err_msg=f"{case}, {kind}"
                )


@pytest.mark.slow
@main_shapes
def test_margin_in_float32_matches_float64_oracle(shape):
    for case, found in evaluated(both_margins_32, shape, np.float32).items():
        for kind, margin in found.items():
            assert margin.dtype == np.float32
            true = true_margin(case, kind, np.float32)
            largest = np.abs(reduced_blocks(*exactly(case, np.float32))).max()
            np.testing.assert_allclose(
                margin,
                true,
                rtol=1e-5,
                atol=16 * EPS32 * (1 + largest),
                err_msg=f"{case}, {kind}",
            )


def test_first_two_positions_are_always_safe():
    for case, found in evaluated(every_margin, THIN).items():
        first = np.array([found[kind][:2] for kind in KINDS])
        expected = [[1, 1], [1, 1], [1, 1], [0, 0]]
        np.testing.assert_array_equal(first, expected, err_msg=str(case))


def test_folded_token_ranks_below_every_safe_one():
    """Past (−4, 4), a = 0.3: sigma_min is 3.8, and the margin −3.8."""
    found = margins_of("scalar_tied_logits")
    for kind in ("sigma_min", "reduced", "det"):
        np.testing.assert_allclose(found[kind][:3], [1, 1, -3.8], rtol=1e-14)
    np.testing.assert_array_equal(found["log_det"][:3], [0, 0, -np.inf])


def test_scalar_margins_agree():
    """Three kinds say 1 − a Var."""
    for case, found in evaluated(every_margin, SCALAR).items():
        # Of tokens that share a large offset the smallest digits differ.
        options = {"rtol": 1e-13, "atol": 1e-15, "err_msg": str(case)}
        np.testing.assert_allclose(found["sigma_min"], found["det"], **options)
        np.testing.assert_allclose(found["reduced"], found["det"], **options)


@pytest.mark.slow
@hypothesis.given(st.integers(0, 2**32 - 1), st.floats(0, 3))
def test_margin_is_at_most_one_with_fewer_queries_than_dimensions(seed, scale):
    """And it is negative where the position is infeasible, and there alone."""
    inputs = make(Case("", *THIN, scale=scale, seed=seed))
    margin, crossed = map(np.asarray, margin_and_crossed(*inputs))
    assert np.all(margin <= 1 + 1e-14)
    np.testing.assert_array_equal(margin < 0, crossed)


@margin_shapes
def test_infeasible_is_a_real_eigenvalue_of_the_dense_block_at_most_zero(shape):
    """Which two negative eigenvalues hide from the determinant."""
    for case, found in evaluated(every_margin, shape).items():
        expected = real_eigenvalue_at_most_zero(dense(case).blocks)
        # The nearest steered block is 1e-8 from singular: well above rounding, on either side.
        np.testing.assert_array_equal(found["crossed"], expected, err_msg=str(case))


def test_a_twice_folded_token_is_infeasible_in_every_sense_but_the_determinant():
    """After (2, 0), (-2, 0), (0, 2), (0, -2) the token 0 with A = I has D = -I, determinant 1."""
    length, width, rank = WIDE
    x = np.zeros((length, width))
    x[:4] = [[2, 0], [-2, 0], [0, 2], [0, -2]]
    w_query = np.eye(width, rank)
    count = len(of_shape(WIDE))  # for which it is compiled
    inputs = (x, w_query, math.sqrt(rank) * w_query)
    found = every_margin(*(np.broadcast_to(array, (count, *array.shape)) for array in inputs))
    at_zero = {name: float(values[0, 4]) for name, values in found.items()}
    del at_zero["embedding"]  # of a singular value that is not simple
    expected = {"sigma_min": -1, "reduced": -1, "crossed": 1, "det": 1, "log_det": 0}
    assert at_zero == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_does_not_hide_a_fold_of_two_equal_eigenvalues(dtype):
    """D = -I, turned by many angles: rounding makes its eigenvalues a complex pair at some."""
    past = np.array([[2.0, 0], [-2, 0], [0, 2], [0, -2], [0, 0]])
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, 200)
    turns = np.array([[np.cos(angles), -np.sin(angles)], [np.sin(angles), np.cos(angles)]])
    turns = np.moveaxis(turns, -1, 0)
    x = np.einsum("kij,tj->kti", turns, past).astype(dtype)
    w = (turns * 2**0.25).astype(dtype)
    margin, crossed = margin_and_crossed(x, w, w)
    np.testing.assert_allclose(margin[:, -1], -1, rtol=1e-5)
    assert np.all(crossed[:, -1])


def test_margin_is_not_positive_exactly_where_the_position_is_infeasible():
    """Whatever two negative eigenvalues make of the determinant."""
    hidden = 0
    for case, found in evaluated(every_margin, WIDE).items():
        for kind in ("sigma_min", "reduced"):
            np.testing.assert_array_equal(found[kind] <= 0, found["crossed"], err_msg=str(case))
        hidden += np.sum(found["crossed"] & (found["det"] > 0))
    assert hidden > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["f64", "f32"])
def test_infeasible_of_many_positions_some_of_which_need_no_eigenvalues(dtype):
    """Those with a positive definite symmetric part, in a batch with others; mapped too."""
    x, w_query, w_key = (jnp.asarray(array) for array in make(LARGE_CASES[0], dtype))
    inputs = x[None], jnp.stack([w_query, 3 * w_query]), w_key[None]
    blocks = reduced_blocks(*(np.asarray(array, np.float64) for array in inputs))
    definite = np.linalg.eigvalsh((blocks + np.swapaxes(blocks, -1, -2)) / 2)[..., 0] > 0
    eigenvalues = np.linalg.eigvals(blocks)
    expected = np.any((eigenvalues.imag == 0) & (eigenvalues.real <= 0), axis=-1)
    assert 0.2 < np.mean(definite) < 0.8
    assert 0 < np.mean(expected) < np.mean(~definite)
    np.testing.assert_array_equal(infeasible(*inputs), expected)
    mapped = quick_jit(jax.vmap(margins.infeasible, in_axes=(None, 0, None)))
    np.testing.assert_array_equal(mapped(x, inputs[1], w_key), expected)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_position_that_is_not_finite_is_infeasible(value):
    x, *weights = map(jnp.asarray, make(LARGE_CASES[0]))
    broken = x.at[..., -2, :].set(value)
    found = infeasible(broken, *weights)
    assert found[..., -2:].all()
    np.testing.assert_array_equal(found[..., :-2], infeasible(x, *weights)[..., :-2])


def test_no_position_is_infeasible_where_there_is_none():
    weights = jnp.ones((4, 2))
    assert infeasible(jnp.zeros((0, 5, 4)), weights, weights).shape == (0, 5)


def test_unknown_kind_lists_the_kinds():
    # Beneath the type checker of the test run, which refuses it first.
    function = inspect.unwrap(pa.stability_margin)
    with pytest.raises(ValueError, match=r"'sigma'.*'sigma_min', 'reduced', 'det', 'log_det'"):
        function(*make(BY_NAME["thin"]), kind="sigma")


# ---- the derivative of the margin -------------------------------------------------------------


# Smallest singular value simple, or the block constant to first order.
SMOOTH = [
    "length_1",
    "length_2",
    "scalar_tied_logits",
    "scalar_folded",
    "rank_one_attractive",
    "thin",
    "thin_folded",
    "thin_repeated_tokens",
    "thin_margin_1e-08",
    "square",
    "square_all_equal",
    "square_margin_-1e-08",
    "square_twice_folded",
    "wide",
    "wide_folded",
]


# Without two tokens, which the values above have.
derivative_shapes = shapes("rank_one", "one_token", "two_tokens", "square", "wide")


def smooth(shape):
    return of_shape(shape, [BY_NAME[name] for name in SMOOTH])


@derivative_shapes
def test_margin_derivative_matches_dense_singular_values(shape):
    """Also at T = 1, with repeated tokens, and with fewer than r + 1 past tokens."""
    assert smooth(shape)
    for case in smooth(shape):
        got = flat(evaluated(margin_derivative, shape)[case])
        true = flat(margin_slopes(dense(case))[:3])
        # A margin of 1e-8 has the derivative of a margin of 1: it is the singular vectors that
        # count.
        atol = 1e-10 * np.abs(true).max(initial=1)
        np.testing.assert_allclose(got, true, rtol=1e-9, atol=atol, err_msg=str(case))


@pytest.mark.parametrize("name", ["thin", pytest.param("wide", marks=pytest.mark.slow)])
def test_margin_derivative_matches_finite_differences(name):
    """From the values alone."""
    case = BY_NAME[name]
    inputs = make(case)
    rng = np.random.default_rng(0)
    direction = [rng.standard_normal(array.shape) for array in inputs]
    count = len(of_shape(shape_of(case)))  # for which it is compiled

    def along(step):
        moved = (array + step * way for array, way in zip(inputs, direction, strict=True))
        many = (np.broadcast_to(array, (count, *array.shape)) for array in moved)
        return np.asarray(every_margin(*many)["sigma_min"][0])

    slope = (along(1e-6) - along(-1e-6)) / 2e-6
    parts = evaluated(margin_derivative, shape_of(case))[case]
    got = sum(np.tensordot(part, way, way.ndim) for part, way in zip(parts, direction, strict=True))
    np.testing.assert_allclose(got, slope, atol=1e-7)


@derivative_shapes
def test_every_margin_derivative_is_finite(shape):
    for case, parts in evaluated(margin_derivative, shape).items():
        assert all(np.all(np.isfinite(part)) for part in parts), case


# ---- embedding margin -------------------------------------------------------------------------


@margin_shapes
def test_embedding_margin_matches_oracle(shape):
    for case in smooth(shape):
        if case.kind == "all_equal":
            continue
        got = evaluated(every_margin, shape)[case]["embedding"]
        by_x = margin_slopes(dense(case))[0].reshape(case.length, -1)
        slope = np.linalg.norm(by_x, axis=1)
        with np.errstate(divide="ignore"):
            true = np.abs(true_margin(case)) / slope
        # Beyond 1e12 the slope is the rounding of zero.
        measurable = true < 1e12
        np.testing.assert_array_equal(got < 1e12, measurable, err_msg=str(case))
        # An error of rounding in the margin, over its slope.
        error = np.abs(got[measurable] - true[measurable])
        bound = 1e-9 * true[measurable] + 1e-14 / slope[measurable]
        assert np.all(error <= bound), case


@pytest.mark.slow
@pytest.mark.parametrize("bound", [None, 2.0])
@pytest.mark.parametrize(
    "name", ["thin", *(pytest.param(n, marks=pytest.mark.nightly) for n in ("square", "wide"))]
)
def test_the_derivative_of_the_embedding_margin_matches_finite_differences(name, bound):
    """Singular vectors move too. Infinite margins, which are left out here, add no NaN to it."""
    inputs = [jnp.asarray(array) for array in make(BY_NAME[name])]
    rng = np.random.default_rng(0)
    directions = [rng.standard_normal(array.shape) for array in inputs]

    @jax.jit
    def inverses(*arrays):
        distance = pa.embedding_margin(*arrays, bound=bound)
        return jnp.where(jnp.isfinite(distance), 1 / distance, 0.0)

    def along(step):
        moved = [array + step * way for array, way in zip(inputs, directions, strict=True)]
        return inverses(*moved)

    slope = (along(1e-6) - along(-1e-6)) / 2e-6
    got = jax.jacobian(inverses, argnums=(0, 1, 2))(*inputs)
    got = sum(np.tensordot(part, way, way.ndim) for part, way in zip(got, directions, strict=True))
    np.testing.assert_allclose(got, slope, rtol=1e-6, atol=1e-6 * np.abs(slope).max())


@pytest.mark.slow
def test_embedding_margin_is_infinite_where_nothing_moves_the_margin():
    x, w_query, w_key = make(BY_NAME["thin"])
    assert np.all(np.isposinf(embedding_margin(x, w_query, w_key)[:2]))
    assert np.all(np.isposinf(embedding_margin(x, 0 * w_query, w_key)))
    assert np.all(np.isposinf(embedding_margin(x, w_query, 0 * w_key)))


@pytest.mark.parametrize(
    "name",
    [
        "scalar_margin_1e-02",
        pytest.param("square_margin_-1e-04", marks=pytest.mark.slow),
        "thin_margin_1e-05",
    ],
)
def test_embedding_margin_is_the_distance_to_the_boundary(name):
    """A step of that length straight down, or up, the gradient ends at a singular block."""
    case, t = BY_NAME[name], SINGULAR_POSITION
    x, w_query, w_key = make(case)
    margin, distance = (margins_of(name)[kind][t] for kind in ("sigma_min", "embedding"))
    gradient = evaluated(margin_derivative, shape_of(case))[case][0][t]
    np.testing.assert_array_equal(gradient[t + 1 :], 0)
    step = -np.sign(margin) * distance * gradient / np.linalg.norm(gradient)
    count = len(of_shape(shape_of(case)))  # for which it is compiled
    moved = np.stack([x + step, *[x + step / 2] * (count - 1)])
    weights = (np.broadcast_to(array, (count, *array.shape)) for array in (w_query, w_key))
    after, half_way = every_margin(moved, *weights)["sigma_min"][:2, t]
    assert abs(after) < 0.05 * abs(margin)
    assert half_way == pytest.approx(margin / 2, rel=0.05)


# ---- support tokens ---------------------------------------------------------------------------


def test_support_tokens_are_the_smallest_margins_first():
    margin = np.array([-9.0, -8.0, 0.5, -0.1, 0.7, 0.2])
    np.testing.assert_array_equal(pa.support_tokens(margin), [3])
    np.testing.assert_array_equal(pa.support_tokens(margin, k=4), [3, 5, 2, 4])


def test_support_tokens_break_ties_to_the_earliest():
    margin = np.array([0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 1.0])
    np.testing.assert_array_equal(pa.support_tokens(margin, k=5), [3, 4, 5, 2, 6])
    infinite = np.array([0.0, 0.0, 1.0, -np.inf, -np.inf])
    np.testing.assert_array_equal(pa.support_tokens(infinite, k=2), [3, 4])


def test_support_tokens_put_what_is_not_known_first():
    margin = np.array([1.0, 1.0, 0.5, np.nan, -np.inf, 0.2])
    np.testing.assert_array_equal(pa.support_tokens(margin, k=4), [3, 4, 5, 2])


@pytest.mark.slow
@pytest.mark.parametrize("kind", get_args(margins.MarginKind))
def test_a_margin_after_a_token_that_is_not_finite_is_not_known(kind):
    x = np.ones((5, 2), np.float32)
    x[2] = np.nan
    weights = np.eye(2, dtype=np.float32)
    known = np.isfinite(pa.stability_margin(x, weights, weights, kind=kind))
    np.testing.assert_array_equal(known, [True, True, False, False, False])


def test_support_tokens_refuse_a_count_that_is_no_integer():
    with pytest.raises(ValueError, match="k is True: expected an integer"):
        pa.support_tokens(np.ones(5), k=True)


def test_support_tokens_of_a_batch_under_jit_and_vmap():
    margin = np.random.default_rng(0).integers(0, 3, (2, 5, 7)).astype(np.float64)
    expected = 2 + np.argsort(margin[..., 2:], axis=-1, stable=True)[..., :3]
    function = functools.partial(pa.support_tokens, k=3)
    np.testing.assert_array_equal(function(margin), expected)
    np.testing.assert_array_equal(jax.jit(function)(margin), expected)
    np.testing.assert_array_equal(jax.vmap(function)(margin), expected)


def test_steered_token_is_the_support_token():
    margin = margins_of("scalar_margin_-1e-07")["sigma_min"]
    np.testing.assert_array_equal(pa.support_tokens(margin, k=2), [SINGULAR_POSITION, 5])


@pytest.mark.parametrize(
    ("length", "k", "message"),
    [
        (0, 1, "0.*expected|expected.*0"),
        (1, 1, "1.*expected|expected.*1"),
        (2, 1, "2.*expected|expected.*2"),
        (5, 4, "k is 4.*expected"),
        (5, 0, "k is 0.*expected"),
        (5, -1, "k is -1.*expected"),
    ],
)
def test_support_tokens_refuse_what_does_not_exist(length, k, message):
    with pytest.raises(ValueError, match=message):
        pa.support_tokens(np.ones(length), k=k)


def test_support_tokens_refuse_a_number():
    with pytest.raises(ValueError, match=r"\(\).*expected|expected.*\(\)"):
        pa.support_tokens(np.ones(()))
