"""A cap on what heads attract: it holds for all parameters, and costs nothing where it is none."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from probattn import coupling, is_proper, table_certificate
from probattn.models import LanguageModelConfig, ObjectiveConfig, transformer
from probattn.models.coupling import capped_weights
from probattn.models.language import attention_stage
from tests.support.numpy_network import (
    BLOCK,
    HEADS,
    LAYERS,
    RANK,
    VOCABULARY,
    WIDTH,
    numpy_embed,
    numpy_logits,
    random_parameters,
    random_stream,
)

CAP, REACH = 0.9, 1.7
MODEL = LanguageModelConfig(
    layers=LAYERS, heads=HEADS, width=WIDTH, block=BLOCK, prior_rank=RANK, spectral_cap=CAP
)
capped = jax.jit(functools.partial(capped_weights, cap=CAP))


def couplings(width=6, rank=2, seed=0):
    """W_Q and W_K, (kinds, d, r) each."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, width, rank))
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    zero, one = np.zeros_like(q), q * [1.0, 0.0]
    queries = [q, q, q, q, q, one, zero, q, q * [1, 1e-3]]
    keys = [k, q, -q, q @ turn, q @ (5 * turn + np.diag([1, -1])), one, zero, zero, k * [1e-3, 1]]
    return np.stack(queries), np.stack(keys)


def largest_attraction(w_query, w_key):
    """Eigenvalue and eigenvector, in float64."""
    matrix = np.asarray(coupling(np.float64(w_query), np.float64(w_key)))
    values, vectors = np.linalg.eigh((matrix + matrix.swapaxes(-1, -2)) / 2)
    return values[..., -1], vectors[..., -1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_cap_holds_for_every_coupling_of_every_size(dtype):
    reach = np.asarray(REACH, dtype)
    for scale in (1e-2, 1.0, 100.0, 1e4):
        for raw in zip(*couplings(), strict=True):
            weights = capped(*((scale * part).astype(dtype) for part in raw), reach=reach)
            assert weights[0].dtype == dtype
            value, vector = largest_attraction(*weights)
            assert REACH**2 * value < CAP
            assert is_proper(*weights, bound=reach)
            # The worst table: both ends of a diameter, shortened by what rounding may add.
            table = (np.stack([vector, -vector]) * reach * (1 - 4 * np.finfo(dtype).eps)).astype(
                dtype
            )
            assert table_certificate(table, *weights).rho <= CAP


def test_strong_attraction_comes_near_the_cap_and_repulsion_stays_as_it_is():
    queries, keys = couplings()
    attractive, repulsive = (
        capped(100 * queries[kind], 100 * keys[kind], reach=REACH) for kind in (1, 2)
    )
    assert REACH**2 * largest_attraction(*attractive)[0] > 0.99 * CAP
    weak = capped(1e-3 * queries[1], 1e-3 * keys[1], reach=REACH)
    np.testing.assert_allclose(weak[0], 1e-3 * queries[1], rtol=1e-4)
    # The bound is not exact: it takes 0.7 % of the repulsion for attraction.
    repelled = capped(queries[2], keys[2], reach=REACH)
    assert np.linalg.norm(repelled[0]) > 0.9 * np.linalg.norm(queries[2])
    assert np.linalg.norm(repulsive[0]) > 10 * np.linalg.norm(attractive[0])


@pytest.mark.slow
def test_derivatives_are_those_of_finite_differences():
    queries, keys = couplings()
    for kind, scale in ((0, 0.1), (0, 10.0), (2, 3.0), (4, 1.0)):
        arguments = scale * queries[kind], scale * keys[kind], np.float64(REACH)
        check_grads(lambda q, k, c: capped(q, k, reach=c), arguments, order=2, rtol=1e-4)


def test_matrices_of_zeros_have_a_derivative():
    queries, keys = couplings()
    slope = jax.grad(lambda q, k: jnp.sum(capped(q, k, reach=REACH)[1]), argnums=(0, 1))
    for kind in (6, 7):
        for part in slope(queries[kind], keys[kind]):
            assert np.all(np.isfinite(part))


@pytest.mark.slow
def test_no_input_folds_a_head_of_a_capped_network():
    parameters = {name: 100 * value for name, value in random_parameters(0).items()}
    rng = np.random.default_rng(1)
    streams = rng.standard_normal((40, 1, WIDTH)) * np.logspace(-2, 3, 40)[:, None, None]
    x, w_query, w_key = transformer.attention_inputs(parameters, streams, heads=HEADS, cap=CAP)
    table = np.concatenate([x[:, 0], -x[:, 0]])
    assert np.all(table_certificate(table, w_query, w_key).rho <= CAP)
    _, *free = transformer.attention_inputs(parameters, streams, heads=HEADS)
    assert np.all(table_certificate(table, *free).rho > 1)


@pytest.mark.slow
def test_a_capped_network_is_the_network_with_capped_matrices():
    parameters, x = random_parameters(0), random_stream(1)
    changed = transformer.capped(parameters, heads=HEADS, cap=CAP)
    found = transformer.logits(parameters, x, heads=HEADS, cap=CAP)
    np.testing.assert_allclose(found, numpy_logits(changed, x), rtol=0, atol=1e-10)
    values = np.s_[..., 2 * WIDTH :]
    np.testing.assert_array_equal(
        changed["attention_in"][values], parameters["attention_in"][values]
    )
    assert transformer.capped(parameters, heads=HEADS, cap=None) is parameters
    # Head by head, layer by layer.
    gains = np.abs(parameters["attention_norm"]).max(-1)
    rank = WIDTH // HEADS
    for layer, head in np.ndindex(LAYERS, HEADS):
        query, key = (
            parameters["attention_in"][layer][:, start + head * rank :][:, :rank]
            for start in (0, WIDTH)
        )
        expected = capped(query, key, reach=np.sqrt(WIDTH) * gains[layer])
        for start, part in zip((0, WIDTH), expected, strict=True):
            got = changed["attention_in"][layer][:, start + head * rank :][:, :rank]
            np.testing.assert_allclose(got, part, rtol=1e-12)


@pytest.mark.parametrize(
    ("attention", "bound"), [("separate", None), ("separate", 0.6), ("normalised", None)]
)
def test_no_text_folds_the_capped_stage(attention, bound):
    config = dataclasses.replace(MODEL, bound=bound)
    objective = ObjectiveConfig("margin", attention=attention)
    rng = np.random.default_rng(2)
    weights = {name: 30 * rng.standard_normal((WIDTH, RANK)) for name in ("w_query", "w_key")}
    parameters = random_parameters(3) | weights
    tokens = np.repeat(np.arange(VOCABULARY)[:, None], BLOCK, axis=1)
    x = numpy_embed(parameters, tokens)
    stage = attention_stage(parameters, x, config=config, objective=objective)
    x, *matrices = stage["x"].reshape(-1, WIDTH), stage["w_query"], stage["w_key"]
    rho = table_certificate(x, *matrices, bound=stage["bound"]).rho
    assert 0.05 * CAP < rho <= CAP
    assert table_certificate(x, *weights.values(), bound=stage["bound"]).rho > 1


@pytest.mark.parametrize("cap", [0.0, 1.0, -0.5, np.nan, np.inf])
def test_a_cap_that_proves_nothing_is_refused(cap):
    with pytest.raises(ValueError, match=r"model.spectral_cap is .*: expected a number between 0"):
        dataclasses.replace(MODEL, spectral_cap=cap)
