"""Estimated smallest singular values against NumPy's decomposition in double precision."""

import inspect
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_NAME, CASES, LARGE_CASES, SHAPES, SINGULAR_CASES, SINGULAR_POSITION, make

import probattn as pa
from probattn.elimination import eliminate
from probattn.monitoring import estimated_sigma_min

pytestmark = pytest.mark.usefixtures("strict_promotion")
EPS = np.finfo(np.float64).eps
margin_estimate = jax.jit(pa.margin_estimate, static_argnames="iterations")
reduced_blocks = jax.jit(pa.reduced_blocks)


def estimate(blocks, iterations=4):
    """With the matrices along the first axis, and LAPACK's inverse: it compiles soon."""
    found = eliminate(jnp.moveaxis(jnp.asarray(blocks), 0, -1), True)
    return np.asarray(estimated_sigma_min(found, iterations))


def exact(blocks):
    """Signed, and the condition number, which rounding is multiplied by."""
    sizes = np.linalg.svd(blocks, compute_uv=False)
    sign = np.where(np.linalg.det(blocks) > 0, 1, -1)
    return sign * sizes[:, -1], sizes[:, 0] / sizes[:, -1]


def small_blocks():
    """Of all cases by rank, positions 0 and 1 left out."""
    by_rank = {}
    for case in CASES:
        blocks = np.asarray(reduced_blocks(*make(case)), np.float64)[2:]
        by_rank.setdefault(case.rank, []).append(blocks)
    return {rank: np.concatenate(blocks) for rank, blocks in by_rank.items()}


@pytest.fixture(scope="module", name="blocks")
def blocks_fixture():
    large = {case.name: np.asarray(reduced_blocks(*make(case)))[2:] for case in LARGE_CASES}
    noise = np.random.default_rng(0).standard_normal((400, 32, 32)) / np.sqrt(32)
    small = {f"rank {rank}": found for rank, found in small_blocks().items()}
    return small | large | {"near the identity": np.eye(32) - 0.3 * noise, "any": noise}


def test_errors_are_those_that_the_docstring_states(blocks):
    for name, each in blocks.items():
        true, _ = exact(each)
        far = np.abs(true) > 1e-6  # nearer, rounding is seen
        got = estimate(each)
        np.testing.assert_array_equal(np.sign(got), np.sign(true), err_msg=name)
        error = np.abs(got / true - 1)[far]
        assert np.median(error) < 0.03, name
        assert np.max(error) < 0.2, name


@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_is_never_below_sigma_min_and_never_above_root_r_times_it(blocks, iterations):
    for name, each in blocks.items():
        true, condition = exact(each)
        ratio = estimate(each, iterations) / true
        rounding = 1 + 4 * each.shape[-1] * EPS * condition
        assert np.all(ratio >= 1 / rounding), name
        assert np.all(ratio <= np.sqrt(each.shape[-1]) * rounding), name


def test_iterations_only_improve_and_end_at_the_exact_value(blocks):
    each = blocks["large"]
    true, _ = exact(each)
    sizes = [np.abs(estimate(each, iterations)) for iterations in (0, 1, 2, 4, 64)]
    for before, after in itertools.pairwise(sizes):
        assert np.all(after <= before * (1 + 1e-12))
    assert np.median(sizes[0] / np.abs(true)) > 1.05
    assert np.quantile(sizes[-1] / np.abs(true), 0.9) < 1 + 1e-4


@pytest.mark.parametrize("label", SHAPES)
@pytest.mark.parametrize("kind", ["", "_folded"])
def test_margin_has_the_sign_convention_of_the_exact_one(label, kind):
    case = BY_NAME[label + kind]
    inputs = make(case)
    margin = np.asarray(margin_estimate(*inputs))
    true = np.asarray(pa.stability_margin(*inputs, kind="reduced"))
    np.testing.assert_array_equal(np.sign(margin), np.sign(true))
    np.testing.assert_allclose(margin, true, rtol=0.06)
    np.testing.assert_allclose(margin[:2], 1, rtol=1e-15)
    assert (margin[SINGULAR_POSITION] < 0) == (kind == "_folded")
    if case.rank == 1:
        np.testing.assert_allclose(margin, true, rtol=1e-13)


@pytest.mark.parametrize("case", SINGULAR_CASES, ids=str)
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["f64", "f32"])
def test_singular_block_has_margin_zero_and_leaves_the_others_alone(case, dtype):
    inputs = make(case, dtype)
    margin = np.asarray(margin_estimate(*inputs))
    true = np.asarray(pa.stability_margin(*inputs, kind="reduced"))
    singular = np.abs(true) < 1e-6
    assert singular.sum() == 1
    np.testing.assert_array_equal(margin == 0, singular)
    np.testing.assert_allclose(margin[~singular], true[~singular], rtol=0.06)


def test_nearly_singular_blocks_do_not_overflow():
    """Squares of the inverse of the first exceed what float32 holds."""
    blocks = np.stack([np.diag([1, 1e-25]), np.diag([1e20, -1])]).astype(np.float32)
    np.testing.assert_allclose(estimate(blocks), [1e-25, -1], rtol=1e-6)


def test_nan_stays_where_it_is():
    blocks = np.stack([np.eye(3)] * 3)
    blocks[1, 0, 0] = np.nan
    np.testing.assert_array_equal(np.isnan(estimate(blocks)), [False, True, False])


def test_sizes_of_zero():
    assert estimate(np.zeros((0, 3, 3))).shape == (0,)
    weights = jnp.ones((4, 2))
    assert pa.margin_estimate(jnp.zeros((0, 5, 4)), weights, weights).shape == (0, 5)


def test_has_no_derivative():
    x, w_query, w_key = make(BY_NAME["thin"])
    gradient = jax.grad(lambda x: jnp.sum(margin_estimate(x, w_query, w_key)))(jnp.asarray(x))
    np.testing.assert_array_equal(gradient, 0)


def test_a_negative_number_of_iterations_is_refused():
    function = partial(inspect.unwrap(pa.margin_estimate), iterations=-1)
    with pytest.raises(ValueError, match="iterations is -1: expected an integer >= 0"):
        function(*make(BY_NAME["thin"]))
