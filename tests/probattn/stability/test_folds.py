"""The search for the nearest fold against closed forms and dense blocks."""

import functools

import jax
import numpy as np
import pytest

import probattn as pa
from tests.support.dense import blocks, quick_jit

pytestmark = pytest.mark.usefixtures("strict_promotion", "strict_ranks")
ONE = np.ones((1, 1))
KEY = jax.random.key(0)


@functools.cache
def search(joint=True, bound=None):
    found = functools.partial(pa.nearest_fold, key=KEY, joint=joint, bound=bound, starts=4)
    compiled = quick_jit(found)
    return lambda *inputs: tuple(np.asarray(part) for part in compiled(*inputs))


@pytest.mark.slow
@pytest.mark.parametrize("joint", [True, False], ids=["joint", "each"])
def test_search_finds_the_fold_of_a_pair(joint):
    x = np.array([[-0.6], [0.6], [0.0]])  # which folds at +- 1
    distance, found = search(joint)(x, ONE, ONE)
    assert distance == pytest.approx(0.4 * np.sqrt(2) if joint else 0.4, rel=1e-6)
    np.testing.assert_allclose(np.abs(found[:2, 0]), 1, rtol=1e-5)
    change = np.linalg.norm(found - x, axis=-1)
    assert distance == pytest.approx(np.linalg.norm(change) if joint else change.max(), rel=1e-12)


@pytest.mark.slow
def test_search_says_where_there_is_nothing_to_find():
    x = np.array([[-0.6], [0.6], [0.0]])
    inputs = np.stack([x, x, 2 * x, np.full_like(x, np.nan)])
    w_key = np.stack([ONE, -ONE, ONE, ONE])
    distance, found = search()(inputs, np.broadcast_to(ONE, (4, 1, 1)), w_key)
    assert distance[1] == np.inf  # repulsive: nothing folds
    assert distance[2] == 0  # which lies beyond the boundary itself
    assert np.isnan(distance[3])
    np.testing.assert_array_equal(found[1:3], inputs[1:3])


def test_position_chooses_the_block_and_two_tokens_never_fold():
    x = np.array([[-0.6], [0.6], [0.0], [5.0]])
    distance, found = pa.nearest_fold(x, ONE, ONE, key=KEY, position=1)
    assert distance == np.inf
    np.testing.assert_array_equal(found, x[:2])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"position": 3}, "position is 3: expected an integer from -3 to 2"),
        ({"position": True}, "position is True"),
        ({"starts": 0}, "starts is 0: expected an integer >= 1"),
        ({"bound": -1.0}, "bound is -1.0"),
    ],
)
def test_refusals_name_what_was_given(given, expected):
    with pytest.raises(ValueError, match=expected):
        pa.nearest_fold(np.zeros((3, 1)), ONE, ONE, key=KEY, **given)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bound", "dtype"),
    [
        (None, np.float64),
        (1.5, np.float32),
        pytest.param(None, np.float32, marks=pytest.mark.nightly),
        pytest.param(1.5, np.float64, marks=pytest.mark.nightly),
    ],
)
def test_what_is_found_is_on_the_boundary(bound, dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 6, 3))
    w_query = rng.standard_normal((60, 3, 2))
    w_key = w_query + 0.3 * rng.standard_normal((60, 3, 2))
    inputs = [part.astype(dtype) for part in (0.5 * x, w_query, w_key)]
    distance, found = search(bound=bound)(*inputs)
    assert found.dtype == distance.dtype == dtype
    reached = np.isfinite(distance) & (distance > 0)
    assert reached.sum() > 20
    exact = [np.asarray(part, np.float64) for part in (found, *inputs[1:])]
    sizes = np.linalg.svd(blocks(*exact, bound)[reached][:, -1], compute_uv=False)[:, -1]
    assert np.all(sizes < (1e-4 if dtype == np.float32 else 1e-9))
    change = np.linalg.norm((exact[0] - inputs[0]).reshape(60, -1), axis=-1)
    np.testing.assert_allclose(distance[reached], change[reached], rtol=1e-4)
    # A search from x alone finds nothing nearer.
    one = quick_jit(functools.partial(pa.nearest_fold, key=KEY, bound=bound, starts=1))
    assert np.all(distance <= np.asarray(one(*inputs)[0]) * (1 + 1e-5))
