"""Weights and residual against explicit loops, and what every public function promises."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probattn as pa
from tests.support import dense
from tests.support.cases import BY_NAME, THIN, evaluated, every_shape, main_shapes, make
from tests.support.dense import quick_jit

pytestmark = pytest.mark.usefixtures("strict_promotion", "strict_ranks")

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
    "margin_lower_bound": pa.margin_lower_bound,
}
SLOW = pytest.mark.slow


def everything(*inputs):
    return {name: function(*inputs) for name, function in PER_POSITION.items()}


# One program with all functions in it for each shape; `mapped` takes stacked inputs.
compiled, mapped = quick_jit(everything), quick_jit(jax.vmap(everything))
per_position = pytest.mark.parametrize("name", PER_POSITION)
attention_weights = quick_jit(pa.attention_weights)
residuals = quick_jit(jax.vmap(pa.residual))


@quick_jit
@jax.vmap
def weights_of(x, w_query, w_key):
    return pa.attention_weights(x @ w_query, x @ w_key)


def agree(found, expected, **options):
    """Every function's result, or that at an index of it, with another."""
    assert set(found) == set(expected) == set(PER_POSITION)
    for name in PER_POSITION:
        assert found[name].shape == expected[name].shape, name
        np.testing.assert_allclose(found[name], expected[name], err_msg=name, **options)


def at(found, index):
    return {name: np.asarray(part)[index] for name, part in found.items()}


def random_inputs(seed, batch=(), heads=(), shape=THIN, dtype=np.float64):
    length, width, rank = shape
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*batch, length, width))
    w_query = 0.5 * rng.standard_normal((*heads, width, rank))
    w_key = 0.5 * rng.standard_normal((*heads, width, rank))
    return tuple(array.astype(dtype) for array in (x, w_query, w_key))


@every_shape
def test_weights_match_explicit_softmax(shape):
    for case, weights in evaluated(weights_of, shape).items():
        x, w_query, w_key = make(case)
        # Products of this size enter the logits, and their rounding the weights.
        largest_product = np.abs(x @ w_query).max() * np.abs(x @ w_key).max()
        expected = dense.weights(x, w_query, w_key)[1]
        atol = 1e-14 * (1 + largest_product)
        np.testing.assert_allclose(weights, expected, rtol=0, atol=atol, err_msg=str(case))


def check_distributions(shape, dtype):
    for case, weights in evaluated(weights_of, shape, dtype).items():
        assert weights.dtype == dtype
        assert np.all(weights[np.triu_indices(case.length)] == 0), case
        assert np.all(weights >= 0), case
        rtol = 4 * np.finfo(dtype).eps
        np.testing.assert_allclose(weights[1:].sum(-1), 1.0, rtol=rtol, err_msg=str(case))


@every_shape
def test_weights_are_strictly_causal_distributions(shape):
    check_distributions(shape, np.float64)


@main_shapes
def test_weights_are_strictly_causal_distributions_in_float32(shape):
    check_distributions(shape, np.float32)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_large_logits_stay_finite(dtype):
    queries, keys = np.full((4, 1), 100, dtype), np.array([[100], [99], [-100], [0]], dtype)

    def square_of_last_row(queries):
        return jnp.sum(pa.attention_weights(queries, keys)[3] ** 2)

    square, gradient = quick_jit(jax.value_and_grad(square_of_last_row))(queries)
    # Logits 10000, 9900, −10000.
    np.testing.assert_allclose(attention_weights(queries, keys)[3], [1, 0, 0, 0], atol=1e-40)
    assert square == 1
    assert np.all(np.isfinite(gradient))


def test_gradient_at_first_row_is_zero_not_nan():
    x, w_query, w_key = make(BY_NAME["thin"])
    gradient = quick_jit(jax.grad(lambda q: jnp.sum(pa.attention_weights(q, x @ w_key)[0])))(
        x @ w_query
    )
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_shift_of_all_keys_leaves_weights_unchanged():
    x, w_query, w_key = make(BY_NAME["thin"])
    shifted = attention_weights(x @ w_query, x @ w_key + 7.0)
    np.testing.assert_allclose(shifted, attention_weights(x @ w_query, x @ w_key), atol=1e-14)


@every_shape
def test_residual_matches_explicit_softmax(shape):
    for case, found in evaluated(residuals, shape).items():
        # Relative to the embeddings, of which the residual is a difference.
        atol = 1e-11 * (1 + np.abs(make(case)[0]).max())
        expected = dense.residual(*make(case))
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol, err_msg=str(case))


def test_conditional_mean_is_what_the_residual_takes_away():
    x, w_query, w_key = make(BY_NAME["thin"])
    found = compiled(x, w_query, w_key)
    mean = found["conditional_mean"]
    np.testing.assert_array_equal(mean[:2], [0 * x[0], x[0]])
    np.testing.assert_allclose(x - mean, found["residual"], atol=1e-14)


def test_no_tokens_have_no_weights():
    assert pa.attention_weights(np.ones((3, 0, 2)), np.ones((3, 0, 2))).shape == (3, 0, 0)


def test_coupling_is_the_bilinear_form_of_the_logits():
    x, w_query, w_key = make(BY_NAME["wide"])
    logits = (x @ w_query) @ (x @ w_key).T / np.sqrt(4)
    np.testing.assert_allclose(x @ pa.coupling(w_query, w_key) @ x.T, logits.T, atol=1e-14)


def broadcast(*inputs, count=6):
    """Inputs of one sequence and pair of matrices, so often that `mapped` is compiled once."""
    return tuple(np.broadcast_to(array, (count, *array.shape)).copy() for array in inputs)


@pytest.mark.slow
@hypothesis.given(seed=st.integers(0, 2**32 - 1), cut=st.integers(1, THIN[0] - 1))
def test_future_tokens_change_nothing_in_the_past(seed, cut):
    x, *weights = broadcast(*random_inputs(seed))
    x[1, cut:] = 100 * np.random.default_rng(seed + 1).standard_normal(x[0, cut:].shape)
    for name, found in mapped(x, *weights).items():
        np.testing.assert_array_equal(found[0][:cut], found[1][:cut], err_msg=name)


@pytest.mark.slow
def test_leading_axes_broadcast():
    """Sequences (B, 1, T, d) with one pair of matrices for each of H heads give (B, H, T, …)."""
    x, w_query, w_key = random_inputs(1, batch=(3, 1), heads=(2,))
    together = compiled(x, w_query, w_key)
    pairs = [(b, h) for b in range(3) for h in range(2)]
    apart = mapped(
        np.stack([x[b, 0] for b, _ in pairs]),
        np.stack([w_query[h] for _, h in pairs]),
        np.stack([w_key[h] for _, h in pairs]),
    )
    apart = {name: np.reshape(part, (3, 2, *part.shape[1:])) for name, part in apart.items()}
    agree(together, apart, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_heads_may_share_their_keys():
    x, w_query, w_key = random_inputs(5, heads=(2,))
    together = compiled(x, w_query, w_key[0])
    for head in range(2):
        apart = compiled(x, w_query[head], w_key[0])
        agree(at(together, head), apart, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["log_det_abs"])
def test_heads_of_a_few_functions_may_share_their_keys(name):
    x, w_query, w_key = random_inputs(5, heads=(2,))
    function = quick_jit(PER_POSITION[name])
    together = function(x, w_query, w_key[0])
    for head in range(2):
        apart = compiled(x, w_query[head], w_key[0])[name]
        np.testing.assert_allclose(together[head], apart, rtol=1e-9, atol=1e-12)


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


@pytest.mark.slow
def test_vmap_agrees_with_jit():
    x, *weights = random_inputs(2, batch=(6,))
    together = mapped(x, *broadcast(*weights))
    for b in range(3):
        agree(at(together, b), compiled(x[b], *weights), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name",
    [name if name == "residual" else pytest.param(name, marks=SLOW) for name in PER_POSITION],
)
def test_eager_agrees_with_jit(name):
    inputs = random_inputs(2)
    eager = PER_POSITION[name](*inputs)
    np.testing.assert_allclose(eager, compiled(*inputs)[name], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_float32_in_float32_out():
    """The answer is that of float64 to single precision, and keeps the caller's dtype."""
    # A seed without two singular values that nearly tie, of which the vectors are ill-conditioned.
    inputs = random_inputs(6, dtype=np.float32)
    result = compiled(*inputs)
    assert {part.dtype.name for part in result.values()} == {"float32"}
    exact = compiled(*(array.astype(np.float64) for array in inputs))
    # Rounding adds to the certificate, and never takes from it.
    raised = np.asarray(result["certificate"]) - np.asarray(exact["certificate"])
    assert np.all((raised >= 0) & (raised < 5e-4))
    exact["certificate"] = result["certificate"]
    agree(result, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "dtype"),
    [
        (2, np.float64),
        pytest.param(3, np.float64, marks=SLOW),
        pytest.param(3, np.float32, marks=SLOW),
    ],
)
def test_half_the_sequence_gives_half_the_answer(length, dtype):
    """A prefix alone says the same as the prefix inside the sequence."""
    x, w_query, w_key = random_inputs(4, dtype=dtype)
    whole = compiled(x, w_query, w_key)
    prefix = compiled(x[:length], w_query, w_key)
    tolerance = 1e-9 if dtype == np.float64 else 1e-4
    agree(prefix, at(whole, slice(length)), rtol=tolerance, atol=tolerance)


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
def test_wrong_shape_says_given_and_expected(name):
    for *shapes, quoted in BAD_INPUTS.values():
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
def test_integers_are_refused(name):
    for position in range(3):
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
