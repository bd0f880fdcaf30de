"""Determinants and inverses of many small matrices, against NumPy in double precision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probattn.blocks import elimination
from tests.support.dense import quick_jit

pytestmark = pytest.mark.usefixtures("strict_promotion")
both_dtypes = pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["f64", "f32"])
SLOW = pytest.mark.slow
# A few pivots at a time: 9 needs two turns.
ranks = pytest.mark.parametrize(
    "rank",
    [
        *(1, 3, 9),
        *(pytest.param(rank, marks=SLOW) for rank in (2, 8, 21)),
        pytest.param(64, marks=pytest.mark.nightly),
    ],
)
ways = pytest.mark.parametrize("pivoting", ["where needed", "always"])


@partial(jax.jit, static_argnames="pivoting")
def both(blocks, pivoting="where needed"):
    """What `determinant` and `eliminate` return of matrices along the first axis."""
    moved = jnp.moveaxis(blocks, 0, -1)
    found = elimination.eliminate(moved, pivoting)
    alone = elimination.determinant(moved, pivoting=pivoting)
    return alone, found._replace(inverse=jnp.moveaxis(found.inverse, -1, 0))


def eliminate(blocks, pivoting="where needed"):
    return both(blocks, pivoting)[1]


def matrices(kind, rank, count=50, seed=0):
    noise = np.random.default_rng(seed).standard_normal((count, rank, rank)) / np.sqrt(rank)
    if kind == "near the identity":  # as reduced blocks are, far from the boundary
        return np.eye(rank) - 0.3 * noise
    return noise  # which needs pivoting


def unit(blocks, dtype):
    """What rounding one entry of a matrix moves its log determinant by, (count,)."""
    sizes = np.linalg.svd(blocks, compute_uv=False)
    return np.finfo(dtype).eps * sizes[:, 0] / sizes[:, -1]


@ways
@ranks
@both_dtypes
def test_matches_numpy(rank, dtype, pivoting):
    for kind in ("near the identity", "any"):
        blocks = matrices(kind, rank).astype(dtype)
        exact = blocks.astype(np.float64)
        sign, log_abs = np.linalg.slogdet(exact)
        inverse = np.linalg.inv(exact)
        alone, found = both(blocks, pivoting)
        bound = 4 * np.sqrt(rank) * unit(exact, dtype)
        for got_sign, got_log_abs in (alone[:2], (found.sign, found.log_abs)):
            assert got_log_abs.dtype == dtype
            np.testing.assert_array_equal(got_sign, sign, err_msg=kind)
            assert np.all(np.abs(np.asarray(got_log_abs) - log_abs) <= bound), kind
        error = np.abs(np.asarray(found.inverse) - inverse).max((1, 2))
        assert np.all(error / np.abs(inverse).max((1, 2)) <= bound), kind


@both_dtypes
@pytest.mark.parametrize("rank", [3, 9, *(pytest.param(rank, marks=SLOW) for rank in (2, 5, 16))])
def test_one_matrix_that_needs_pivoting_is_enough(rank, dtype):
    """A leading entry of zero, or as small as a rounding error, among matrices that need none."""
    blocks = matrices("near the identity", rank).astype(dtype)
    for leading in (0.0, np.finfo(dtype).eps / 8):
        blocks[7] = np.roll(np.eye(rank), 1, axis=0)  # a cyclic permutation
        blocks[7, 0, 0] = leading
        sign, log_abs = np.linalg.slogdet(blocks.astype(np.float64))
        found = eliminate(blocks)
        np.testing.assert_array_equal(found.sign, sign)
        np.testing.assert_allclose(found.log_abs, log_abs, atol=8 * np.finfo(dtype).eps)
        product = blocks[7] @ np.asarray(found.inverse[7])
        np.testing.assert_allclose(product, np.eye(rank), atol=8 * np.finfo(dtype).eps)


@pytest.mark.parametrize("rank", [3, pytest.param(9, marks=SLOW)])
def test_without_pivoting_what_loses_digits_is_named_and_harmless(rank):
    blocks = matrices("near the identity", rank)
    blocks[7] = np.roll(np.eye(rank), 1, axis=0)  # its first pivot is zero
    blocks[8, 0, 0] = 1e-9
    (_, log_abs, alone), found = both(blocks, pivoting="never")
    stable = ~np.isin(np.arange(len(blocks)), [7, 8])
    np.testing.assert_array_equal(alone, stable)
    np.testing.assert_array_equal(found.stable, stable)
    for of in (log_abs, found.log_abs):
        np.testing.assert_allclose(
            of, np.where(stable, np.linalg.slogdet(blocks)[1], 0), atol=1e-12
        )
    kept = np.where(stable[:, None, None], np.linalg.inv(blocks), 0)
    np.testing.assert_allclose(found.inverse, kept, rtol=1e-9, atol=1e-12)


few_ranks = pytest.mark.parametrize("rank", [1, 3, 9, pytest.param(16, marks=SLOW)])


@ways
@few_ranks
def test_singular_matrix_leaves_the_others_alone(rank, pivoting):
    blocks = matrices("near the identity", rank)
    blocks[2, :, 0] = 0
    (sign, log_abs, _), found = both(blocks, pivoting)
    assert sign[2] == 0
    assert log_abs[2] == -np.inf
    assert found.sign[2] == 0
    assert abs(found.nearby_sign[2]) == 1
    assert np.isfinite(found.log_abs[2])
    assert np.all(np.isfinite(found.inverse[2]))
    others = np.arange(len(blocks)) != 2
    np.testing.assert_allclose(log_abs[others], np.linalg.slogdet(blocks[others])[1], atol=1e-12)


@few_ranks
def test_nan_stays_where_it_is(rank):
    blocks = matrices("near the identity", rank)
    blocks[2, 0, 0] = np.nan
    found = eliminate(blocks)
    assert np.isnan(found.log_abs[2])
    others = np.arange(len(blocks)) != 2
    true = np.linalg.slogdet(blocks[others])[1]
    np.testing.assert_allclose(found.log_abs[others], true, atol=1e-12)


@pytest.mark.slow
def test_mapped_is_a_larger_batch_with_one_condition():
    mapped, whole = quick_jit(jax.vmap(elimination.eliminate)), quick_jit(elimination.eliminate)
    for kind in ("near the identity", "any"):
        blocks = jnp.moveaxis(jnp.asarray(matrices(kind, 9, count=12).reshape(3, 4, 9, 9)), 0, -1)
        for one, other in zip(mapped(blocks), whole(blocks), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-10, err_msg=kind)
    # A mapped condition that depends on the element would be computed on both sides.
    assert " cond[" in str(jax.make_jaxpr(jax.vmap(elimination.determinant))(blocks))


@pytest.mark.slow
@pytest.mark.parametrize("function", [elimination.determinant, elimination.eliminate])
def test_lapack_is_not_called_where_nothing_is_to_be_pivoted(function):
    """XLA may move what does not change out of a loop, and then it runs in any case."""
    program = jax.jit(function).lower(jnp.zeros((4, 9, 9, 12))).compile().as_text()
    always = program[program.index("\nENTRY") :]
    assert "lapack" in program
    assert "lapack" not in always


@pytest.mark.slow
@ways
@pytest.mark.parametrize("rank", [3, pytest.param(9, marks=SLOW)])
def test_derivatives_match_those_of_numpy_s_definitions(rank, pivoting):
    """Value and inverse along a line of matrices, first and second derivative."""
    start, slope = matrices("near the identity", rank, count=2, seed=1)

    def line(t, library):
        blocks = (start + t * 0.1 * slope)[None]
        if library:
            return jnp.linalg.slogdet(blocks)[1][0], jnp.linalg.inv(blocks)[0]
        found = eliminate(blocks, pivoting)
        return found.log_abs[0], found.inverse[0]

    def both_orders(t, library):
        first = jax.jacfwd(partial(line, library=library))
        return jax.jacfwd(lambda t: (first(t),) * 2, has_aux=True)(t)

    got, expected = (quick_jit(partial(both_orders, library=which))(0.3) for which in (False, True))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_no_matrices():
    found = eliminate(jnp.zeros((0, 3, 3)))
    assert found.inverse.shape == (0, 3, 3)
    assert elimination.determinant(jnp.zeros((2, 9, 9, 0)))[1].shape == (2, 0)
