"""Weights and residual against explicit loops, and what every public function promises."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probattn as pa
from probattn import _reference as reference
from tests.support.cases import BY_NAME, CASES, SINGULAR_CASES, THIN, make

pytestmark = pytest.mark.usefixtures("strict_promotion")

# Every public function of (x, w_query, w_key) with one result per position.
PER_POSITION = {
    "conditional_mean": pa.conditional_mean,
    "residual": pa.residual,
    "reduced_blocks": pa.reduced_blocks,
    "jacobian_blocks": pa.jacobian_blocks,
    "log_det_sign": lambda *inputs: pa.log_det(*inputs)[0],
    "log_det_abs": lambda *inputs: pa.log_det(*inputs)[1],
    "relaxed_barrier": pa.relaxed_barrier,
    "margin_sigma_min": pa.stability_margin,
    "margin_reduced": functools.partial(pa.stability_margin, kind="reduced"),
    "margin_det": functools.partial(pa.stability_margin, kind="det"),
    "margin_log_det": functools.partial(pa.stability_margin, kind="log_det"),
    "embedding_margin": pa.embedding_margin,
    "certificate": pa.certificate,
}
PUBLIC = {name: jax.jit(function) for name, function in PER_POSITION.items()}
per_position = pytest.mark.parametrize("name", PER_POSITION)
all_cases = pytest.mark.parametrize("case", CASES + SINGULAR_CASES, ids=str)

attention_weights = jax.jit(pa.attention_weights)


def random_inputs(seed, batch=(), heads=(), shape=THIN, dtype=np.float64):
    length, width, rank = shape
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*batch, length, width))
    w_query = 0.5 * rng.standard_normal((*heads, width, rank))
    w_key = 0.5 * rng.standard_normal((*heads, width, rank))
    return tuple(array.astype(dtype) for array in (x, w_query, w_key))


@all_cases
def test_weights_match_explicit_softmax(case):
    x, w_query, w_key = make(case)
    queries, keys = x @ w_query, x @ w_key
    # Products of this size enter the logits, and their rounding the weights.
    largest_product = np.abs(queries).max() * np.abs(keys).max()
    weights = attention_weights(queries, keys)
    expected = reference.attention_weights(jnp.asarray(queries), jnp.asarray(keys))
    np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-14 * (1 + largest_product))


@all_cases
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_weights_are_strictly_causal_distributions(case, dtype):
    x, w_query, w_key = make(case, dtype)
    weights = np.asarray(attention_weights(x @ w_query, x @ w_key))
    assert weights.dtype == dtype
    assert np.all(weights[np.triu_indices(case.length)] == 0)
    assert np.all(weights >= 0)
    np.testing.assert_allclose(weights[1:].sum(-1), 1.0, rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_large_logits_stay_finite(dtype):
    queries, keys = np.full((4, 1), 100, dtype), np.array([[100], [99], [-100], [0]], dtype)

    def square_of_last_row(queries):
        return jnp.sum(pa.attention_weights(queries, keys)[3] ** 2)

    square, gradient = jax.value_and_grad(square_of_last_row)(queries)
    # Logits 10000, 9900, −10000.
    np.testing.assert_allclose(pa.attention_weights(queries, keys)[3], [1, 0, 0, 0], atol=1e-40)
    assert square == 1
    assert np.all(np.isfinite(gradient))


def test_gradient_at_first_row_is_zero_not_nan():
    x, w_query, w_key = make(BY_NAME["thin"])
    gradient = jax.grad(lambda q: jnp.sum(pa.attention_weights(q, x @ w_key)[0]))(x @ w_query)
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_shift_of_all_keys_leaves_weights_unchanged():
    x, w_query, w_key = make(BY_NAME["thin"])
    shifted = attention_weights(x @ w_query, x @ w_key + 7.0)
    np.testing.assert_allclose(shifted, attention_weights(x @ w_query, x @ w_key), atol=1e-14)


@all_cases
def test_residual_matches_explicit_loop(case):
    inputs = make(case)
    expected = reference.residual(*map(jnp.asarray, inputs))
    # Relative to the embeddings, of which the residual is a difference.
    tolerance = 1e-11 * (1 + np.abs(inputs[0]).max())
    np.testing.assert_allclose(PUBLIC["residual"](*inputs), expected, rtol=0, atol=tolerance)


def test_conditional_mean_is_what_the_residual_takes_away():
    x, w_query, w_key = make(BY_NAME["thin"])
    mean = pa.conditional_mean(x, w_query, w_key)
    np.testing.assert_array_equal(mean[:2], [0 * x[0], x[0]])
    np.testing.assert_allclose(x - mean, pa.residual(x, w_query, w_key), atol=1e-14)


def test_no_tokens_have_no_weights():
    assert pa.attention_weights(np.ones((3, 0, 2)), np.ones((3, 0, 2))).shape == (3, 0, 0)


def test_coupling_is_the_bilinear_form_of_the_logits():
    x, w_query, w_key = make(BY_NAME["wide"])
    logits = (x @ w_query) @ (x @ w_key).T / np.sqrt(4)
    np.testing.assert_allclose(x @ pa.coupling(w_query, w_key) @ x.T, logits.T, atol=1e-14)


@per_position
@hypothesis.given(seed=st.integers(0, 2**32 - 1), cut=st.integers(1, THIN[0] - 1))
@hypothesis.settings(max_examples=10)
def test_future_tokens_change_nothing_in_the_past(name, seed, cut):
    x, w_query, w_key = random_inputs(seed)
    changed = x.copy()
    changed[cut:] = 100 * np.random.default_rng(seed + 1).standard_normal(x[cut:].shape)
    before, after = (np.asarray(PUBLIC[name](tokens, w_query, w_key)) for tokens in (x, changed))
    np.testing.assert_array_equal(before[:cut], after[:cut])


@per_position
def test_leading_axes_broadcast(name):
    """Sequences (B, 1, T, d) with one pair of matrices for each of H heads give (B, H, T, …)."""
    x, w_query, w_key = random_inputs(1, batch=(3, 1), heads=(2,))
    together = PUBLIC[name](x, w_query, w_key)
    one = PUBLIC[name]
    apart = np.array([[one(x[b, 0], w_query[h], w_key[h]) for h in range(2)] for b in range(3)])
    assert together.shape == apart.shape
    np.testing.assert_allclose(together, apart, rtol=1e-9, atol=1e-12)


@per_position
def test_heads_may_share_their_keys(name):
    x, w_query, w_key = random_inputs(5, heads=(2,))
    together = PUBLIC[name](x, w_query, w_key[0])
    apart = np.array([PUBLIC[name](x, w_query[h], w_key[0]) for h in range(2)])
    np.testing.assert_allclose(together, apart, rtol=1e-9, atol=1e-12)


def test_weights_and_coupling_broadcast_leading_axes():
    x, w_query, w_key = random_inputs(1, batch=(3, 1), heads=(2,))
    queries, keys = x @ w_query, x[0, 0] @ w_key
    weights = pa.attention_weights(queries, keys)
    assert weights.shape == (3, 2, 6, 6)
    np.testing.assert_allclose(
        weights[1, 1], pa.attention_weights(queries[1, 1], keys[1]), rtol=1e-12
    )
    np.testing.assert_allclose(
        pa.coupling(w_query, w_key)[1], pa.coupling(w_query[1], w_key[1]), rtol=1e-12
    )


@per_position
def test_vmap_and_eager_agree_with_jit(name):
    x, w_query, w_key = random_inputs(2, batch=(3,))
    mapped = jax.vmap(PER_POSITION[name], in_axes=(0, None, None))(x, w_query, w_key)
    for b in range(3):
        expected = PUBLIC[name](x[b], w_query, w_key)
        np.testing.assert_allclose(mapped[b], expected, rtol=1e-9, atol=1e-12)
    eager = PER_POSITION[name](x[0], w_query, w_key)
    np.testing.assert_allclose(eager, mapped[0], rtol=1e-9, atol=1e-12)


@per_position
def test_float32_in_float32_out(name):
    """The answer is that of float64 to single precision, and keeps the caller's dtype."""
    # A seed without two singular values that nearly tie, of which the vectors are ill-conditioned.
    inputs = random_inputs(6, dtype=np.float32)
    result = PUBLIC[name](*inputs)
    assert result.dtype == np.float32
    exact = PUBLIC[name](*(array.astype(np.float64) for array in inputs))
    np.testing.assert_allclose(result, exact, rtol=1e-4, atol=1e-5)


@per_position
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_half_the_sequence_gives_half_the_answer(name, dtype):
    """A prefix alone says the same as the prefix inside the sequence."""
    x, w_query, w_key = random_inputs(4, dtype=dtype)
    whole = PUBLIC[name](x, w_query, w_key)
    prefix = PER_POSITION[name](x[:3], w_query, w_key)
    tolerance = 1e-9 if dtype == np.float64 else 1e-4
    np.testing.assert_allclose(prefix, whole[:3], rtol=tolerance, atol=tolerance)


# Shapes of x, w_query and w_key, and what the message has to quote: a shape or its leading axes.
BAD_INPUTS = {
    "width": [(6, 4), (3, 2), (4, 2), (3, 2)],
    "both_widths": [(6, 4), (3, 2), (3, 2), (6, 4)],
    "rank": [(6, 4), (4, 2), (4, 3), (4, 3)],
    "x_is_a_vector": [(4,), (4, 2), (4, 2), (4,)],
    "w_query_is_a_vector": [(6, 4), (4,), (4, 2), (4,)],
    "w_key_is_a_vector": [(6, 4), (4, 2), (4,), (4,)],
    "leading_axes": [(5, 6, 4), (3, 4, 2), (4, 2), (5,)],
    "leading_axes_of_matrices": [(6, 4), (3, 4, 2), (2, 4, 2), (3,)],
    "length_0": [(0, 4), (4, 2), (4, 2), (0, 4)],
    "rank_0": [(6, 4), (4, 0), (4, 0), (4, 0)],
    "width_0": [(6, 0), (0, 2), (0, 2), (0, 2)],
}


def refuses(function, shapes, quoted):
    """One line that quotes the shape given and says what was expected."""
    with pytest.raises(ValueError, match=r"^[^\n]*expected[^\n]*$") as error:
        function(*(np.ones(shape) for shape in shapes))
    assert str(quoted) in str(error.value)


@per_position
@pytest.mark.parametrize("fault", BAD_INPUTS)
def test_wrong_shape_says_given_and_expected(name, fault):
    *shapes, quoted = BAD_INPUTS[fault]
    refuses(PER_POSITION[name], shapes, quoted)


@pytest.mark.parametrize(
    ("keys", "quoted"),
    [
        ((6, 3), (6, 3)),
        ((5, 2), (5, 2)),
        ((2,), (2,)),
        ((), ()),
        ((2, 6, 2), (2,)),
        ((3, 6, 0), (3, 6, 0)),
    ],
)
def test_weights_of_wrong_shape_say_given_and_expected(keys, quoted):
    refuses(pa.attention_weights, [(3, 6, 2), keys], quoted)


def test_weights_of_rank_0_say_given_and_expected():
    refuses(pa.attention_weights, [(6, 0), (6, 0)], (6, 0))


@pytest.mark.parametrize(
    ("w_key", "quoted"),
    [((4, 3), (4, 3)), ((3, 2), (3, 2)), ((4,), (4,)), ((2, 4, 2), (2,)), ((4, 0), (4, 0))],
)
def test_coupling_of_wrong_shape_says_given_and_expected(w_key, quoted):
    refuses(pa.coupling, [(3, 4, 2), w_key], quoted)


@per_position
@pytest.mark.parametrize("position", [0, 1, 2])
def test_integers_are_refused(name, position):
    arrays = [np.ones(shape) for shape in [(6, 4), (4, 2), (4, 2)]]
    arrays[position] = arrays[position].astype(np.int32)
    with pytest.raises(ValueError, match=r"int32"):
        PER_POSITION[name](*arrays)


def test_integers_are_refused_by_weights_and_coupling():
    real, integer = np.ones((6, 2)), np.ones((6, 2), np.int32)
    for function in (pa.attention_weights, pa.coupling):
        for arguments in [(real, integer), (integer, real)]:
            with pytest.raises(ValueError, match=r"int32"):
                function(*arguments)
