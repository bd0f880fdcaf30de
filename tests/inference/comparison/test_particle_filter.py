"""The particle filter against quadrature, plain importance sampling, and what it promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from probattn import CausalAttention
from probattn.ancestral import solve_token
from probattn.inference.comparison import particle_filter as filtering
from probattn.inference.comparison.particle_filter import FilterError, filter_tokens
from tests.support.scalar_process import BIAS, CUT, EMISSION, of_three_tokens, softmax

# One dimension: (a, c). Repulsive, where the weights of the first two tokens matter most; and
# bounded, c^2 a = 0.96.
SCALAR = {"repulsive": (-2.0, None), "bounded": (0.24, 2.0)}
TOKENS = np.random.default_rng(2).integers(0, 3, (7, 5))
FEW = 20  # particles
regimes = pytest.mark.parametrize("regime", SCALAR)


def filtered(regime, tokens, key=0, **options):
    a, bound = SCALAR[regime]
    tokens = np.asarray(tokens)
    return filter_tokens(
        jax.random.key(key), tokens, np.array([[a]]), EMISSION, BIAS, bound=bound, **options
    )


def predictions_of(joint, tokens):
    """Of three tokens, each given those before it: (3, V)."""
    first, second, _ = tokens
    of_two = joint.sum(2)
    rows = (of_two.sum(1), of_two[first], joint[first, second])
    return np.stack([row / row.sum() for row in rows])


@pytest.mark.slow
@regimes
@pytest.mark.parametrize("tokens", [(0, 2, 1), (2, 2, 0)])
def test_predictions_are_those_of_quadrature(regime, tokens):
    joint = of_three_tokens(*SCALAR[regime])
    np.testing.assert_allclose(joint.sum(), 1, atol=1e-4)  # the quadrature's own error
    expected = predictions_of(joint, tokens)
    found = np.exp(filtered(regime, [tokens] * 200, particles=500).log_probabilities)
    error = found.std(0, ddof=1) / np.sqrt(200)
    assert np.all(np.abs(found.mean(0) - expected) < 4 * error)
    # Attention matters: a filter without it would be seen to be wrong.
    without = predictions_of(of_three_tokens(0.0, SCALAR[regime][1]), tokens)
    assert np.any(np.abs(without - expected) > 6 * error)


@pytest.mark.slow
@regimes
def test_the_product_of_predictions_is_unbiased(regime):
    """With so few particles that a single prediction is far off: 4, of which one goes on."""
    tokens, count = (0, 2, 0), 20_000
    log_p = filtered(regime, [tokens] * count, key=1, particles=4).log_probabilities
    products = np.exp(log_p[:, np.arange(3), tokens].sum(1))
    error = products.std(ddof=1) / np.sqrt(count)
    assert abs(products.mean() - of_three_tokens(*SCALAR[regime])[tokens]) < 4 * error
    assert error < 0.01 * products.mean()


@pytest.mark.slow
@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_predictions_in_two_dimensions_are_those_of_importance_sampling(count):
    """A coupling with a sense of rotation, and whole sequences drawn before any token is seen."""
    coupling = np.array([[-0.6, 1.5], [-1.1, -0.4]])
    emission = 1.5 * np.random.default_rng(0).normal(size=(2, 4))
    bias, tokens = np.array([0.1, 0.0, -0.2, 0.1]), np.array([1, 3, 0, 2, 2])
    found = filter_tokens(
        jax.random.key(0), np.tile(tokens, (100, 1)), coupling, emission, bias, particles=400
    )
    # W_Q and W_K of the coupling A = W_K W_Q^T / sqrt(2), split another way than in the code.
    process = CausalAttention(coupling.T, np.sqrt(2) * np.eye(2), 1.0, len(tokens))
    p = softmax(np.asarray(process.sample(jax.random.key(1), (count,))) @ emission + bias)
    seen = np.cumprod(p[:, np.arange(len(tokens)), tokens], axis=1)
    weights = np.concatenate([np.ones((count, 1)), seen[:, :-1]], axis=1)
    weights /= weights.sum(0)
    expected = np.einsum("nt,ntv->tv", weights, p)
    deviations = weights[..., None] * (p - expected)
    of_filter = np.exp(found.log_probabilities)
    error = np.hypot(of_filter.std(0, ddof=1) / 10, np.sqrt((deviations**2).sum(0)))
    assert np.all(np.abs(of_filter.mean(0) - expected) < 4 * error)


def test_without_an_emission_every_prediction_is_the_bias():
    found = filter_tokens(
        jax.random.key(0), TOKENS, [[-1.0]], np.zeros((1, 3)), BIAS, particles=FEW
    )
    expected = np.broadcast_to(np.log(softmax(BIAS)), (*TOKENS.shape, 3))
    np.testing.assert_allclose(found.log_probabilities, expected, rtol=1e-13)


def test_a_later_token_changes_no_earlier_prediction():
    changed = TOKENS.copy()
    changed[:, 2] = (TOKENS[:, 2] + 1) % 3
    one, other = (
        filtered("repulsive", each, particles=FEW).log_probabilities for each in (TOKENS, changed)
    )
    np.testing.assert_array_equal(one[:, :3], other[:, :3])
    assert np.all(np.any(one[:, 3:] != other[:, 3:], axis=-1))


@pytest.mark.slow
def test_the_result_is_a_function_of_key_and_sequence(monkeypatch):
    one = filtered("bounded", TOKENS, particles=FEW).log_probabilities
    again = filtered("bounded", TOKENS, particles=FEW).log_probabilities
    np.testing.assert_array_equal(again, one)
    assert np.all(filtered("bounded", TOKENS, key=1, particles=FEW).log_probabilities != one)
    same = filtered("bounded", TOKENS[[0] * len(TOKENS)], particles=FEW).log_probabilities
    assert len({sequence.tobytes() for sequence in same}) == len(TOKENS)
    # In batches of two and the last filled up: up to rounding, which other shapes change.
    monkeypatch.setattr(filtering, "NUMBERS", 2 * FEW * (2 * TOKENS.shape[1] + 3))
    batched = filtered("bounded", TOKENS, particles=FEW).log_probabilities
    np.testing.assert_allclose(batched, one, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
def test_probabilities_sum_to_one_in_the_dtype_given(dtype):
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 5, (6, 12))
    parameters = (-np.eye(3), 4 * rng.normal(size=(3, 5)), rng.normal(size=5))
    found = filter_tokens(jax.random.key(0), tokens, *(array.astype(dtype) for array in parameters))
    assert found.log_probabilities.dtype == dtype
    assert found.log_probabilities.shape == (6, 12, 5)
    total = np.exp(found.log_probabilities.astype(float)).sum(-1)
    np.testing.assert_allclose(total, 1, atol=20 * np.finfo(dtype).eps)
    assert found.unconverged.shape == (6, 12)
    assert found.unconverged.sum() == 0


def test_other_parameters_of_the_same_shapes_compile_nothing():
    filtered("bounded", TOKENS, particles=FEW)
    compiled = filtering._filter._cache_size()
    filtered("bounded", 2 - TOKENS, key=3, particles=FEW)
    filter_tokens(jax.random.key(0), 0 * TOKENS, [[0.1]], -EMISSION, BIAS, bound=1.5, particles=FEW)
    assert filtering._filter._cache_size() == compiled


def test_systematic_resampling_rounds_each_share_up_or_down():
    weights = np.array([0.31, 0.0, 0.02, 0.27, 0.4, 0.0])
    converged = jnp.array([True, False, True, True, True, False])
    log_weights = jnp.log(jnp.where(converged, weights, 3.0)) + 7  # a constant is no weight
    keys = jax.random.split(jax.random.key(0), 4000)
    resample = functools.partial(
        filtering._systematic, log_weights=log_weights, converged=converged
    )
    chosen = np.asarray(jax.jit(jax.vmap(resample))(keys))
    counts = (chosen[..., None] == np.arange(6)).sum(1)
    share = 6 * weights
    assert np.all((counts >= np.floor(share)) & (counts <= np.ceil(share)))
    error = np.sqrt(share % 1 * (1 - share % 1) / 4000)  # of a number that is rounded at random
    assert np.all(np.abs(counts.mean(0) - share) <= 4 * error)


def test_rounding_resamples_no_particle_of_weight_zero():
    """Of four million, the cumulated sum alone points at two."""
    rng = np.random.default_rng(0)
    log_weights = jnp.asarray(rng.normal(size=4000), jnp.float32)
    converged = jnp.asarray(rng.random(4000) < 0.5)
    resample = functools.partial(
        filtering._systematic, log_weights=log_weights, converged=converged
    )
    chosen = jax.jit(jax.vmap(resample))(jax.random.split(jax.random.key(0), 1000))
    assert np.all(np.asarray(converged)[np.asarray(chosen)])


@pytest.fixture(name="half_unsolved")
def half_unsolved_fixture(monkeypatch):
    """A solver that fails wherever the token is above `CUT`."""

    def solve(e, *context):
        found = solve_token(e, *context)
        failed = found.x[0] > CUT
        return found._replace(
            x=jnp.where(failed, jnp.nan, found.x), converged=found.converged & ~failed
        )

    monkeypatch.setattr(filtering, "solve_token", solve)
    filtering._filter.clear_cache()
    yield
    filtering._filter.clear_cache()


@pytest.mark.slow
@pytest.mark.usefixtures("half_unsolved")
def test_a_particle_that_is_not_solved_carries_no_weight_and_is_counted():
    tokens = (0, 2, 1)
    # A particle that fails at a later token was there before.
    joints = [of_three_tokens(*SCALAR["repulsive"], cut=t + 1) for t in range(3)]
    expected = np.stack([predictions_of(joint, tokens)[t] for t, joint in enumerate(joints)])
    found = filtered("repulsive", [tokens] * 200, particles=500)
    of_filter = np.exp(found.log_probabilities)
    error = of_filter.std(0, ddof=1) / np.sqrt(200)
    # 2e-3: the rule's error where the density is cut off, of second order in the step.
    assert np.all(np.abs(of_filter.mean(0) - expected) < 4 * error + 2e-3)
    whole = predictions_of(of_three_tokens(*SCALAR["repulsive"]), tokens)
    assert np.all(np.abs(whole - expected).max(1) > 0.1)
    share = stats.norm.sf(CUT)
    spread = 4 * np.sqrt(share * (1 - share) / (500 * 200))
    assert abs(found.unconverged[:, 0].mean() / 500 - share) < spread
    assert np.all(found.unconverged > 0)


@pytest.mark.slow
@pytest.mark.usefixtures("half_unsolved")
def test_a_filter_with_no_particle_left_says_where():
    with pytest.raises(FilterError, match=r"sequence \d: none of 1 particles converged at pos.* 0"):
        filtered("repulsive", [(0, 2, 1)] * 9, particles=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coupling": np.eye(2)}, r"shapes \(2, 2\), \(1, 3\) and \(3,\): expected \(d, d\), \(d"),
        ({"bias": np.zeros(4)}, r"\(1, 3\) and \(4,\): expected .* with the same d and V"),
        ({"emission": np.zeros(3)}, r"shapes \(1, 1\), \(3,\) and \(3,\): expected"),
        (
            dict.fromkeys(("coupling", "emission", "bias"), np.ones((1, 1), int)) | {"bias": [1]},
            "the parameters have dtype int64: expected float32 or float64",
        ),
        ({"tokens": np.zeros(3, int)}, r"tokens have shape \(3,\) and dtype int64: expected int"),
        ({"tokens": np.zeros((0, 3), int)}, r"tokens have shape \(0, 3\) .* N >= 1 and T >= 1"),
        ({"tokens": np.zeros((2, 3))}, "and dtype float64: expected integers"),
        ({"tokens": np.array([[0, 3]])}, "tokens are 0 to 3: expected symbols from 0 to 2"),
        ({"tokens": np.array([[-1, 2]])}, "tokens are -1 to 2: expected symbols from 0 to 2"),
        ({"particles": 0}, "particles is 0: expected an integer >= 1"),
        ({"particles": 2.5}, "particles is 2.5: expected an integer >= 1"),
        ({"bound": -1.0}, "bound is -1.0: expected a finite number > 0, or None"),
    ],
)
def test_bad_input(changes, message):
    given = {"tokens": np.zeros((2, 3), int), "coupling": -np.eye(1), "emission": EMISSION}
    with pytest.raises(ValueError, match=message):
        filter_tokens(jax.random.key(0), **(given | {"bias": BIAS} | changes))
