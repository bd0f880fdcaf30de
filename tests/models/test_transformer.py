"""The network against loops in plain NumPy, and what of it the objective may rely on."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probattn as pa
from probattn.models import transformer
from tests.support.numpy_network import (
    BATCH,
    BLOCK,
    HEADS,
    LAYERS,
    RANK,
    SHAPES,
    VOCABULARY,
    WIDTH,
    numpy_attention_logits,
    numpy_embed,
    numpy_logits,
    numpy_norm,
    random_parameters,
    random_stream,
    random_tokens,
)


@functools.cache
def compiled_logits(heads=HEADS, precision="float32"):
    return jax.jit(functools.partial(transformer.logits, heads=heads, precision=precision))


@pytest.mark.parametrize("heads", [1, HEADS, WIDTH])
def test_logits_match_plain_numpy(heads):
    parameters, x = random_parameters(0), random_stream(1)
    result = compiled_logits(heads)(parameters, x)
    expected = numpy_logits(parameters, x, heads)
    assert result.shape == (BATCH, BLOCK, VOCABULARY)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", [1, BLOCK - 1])
def test_a_shorter_sequence_matches_plain_numpy(length):
    parameters, x = random_parameters(0), random_stream(1, length)
    expected = numpy_logits(parameters, x)
    np.testing.assert_allclose(compiled_logits()(parameters, x), expected, rtol=0, atol=1e-10)


def test_one_layer_is_the_network_without_the_second():
    parameters = random_parameters(2)
    one = {
        name: value[:1] if name in transformer.LAYER_PARAMETERS else value
        for name, value in parameters.items()
    }
    x = random_stream(3)
    np.testing.assert_allclose(compiled_logits()(one, x), numpy_logits(one, x), rtol=0, atol=1e-10)


def test_float32_parameters_give_float32_logits():
    parameters, x = random_parameters(0, np.float32), random_stream(1, dtype=np.float32)
    result = compiled_logits()(parameters, x)
    assert result.dtype == np.float32
    expected = numpy_logits(parameters, x)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_bfloat16_products_stay_close_and_logits_stay_float32():
    """Within a few roundings to 8 bits of the largest logit, and not the float32 answer."""
    parameters, x = random_parameters(0, np.float32), random_stream(1, dtype=np.float32)
    result = compiled_logits(precision="bfloat16")(parameters, x)
    expected = numpy_logits(parameters, x)
    assert result.dtype == np.float32
    error = np.abs(result - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 8 * float(jnp.finfo(jnp.bfloat16).eps)


def test_bfloat16_logits_are_not_rounded_to_bfloat16():
    """Rounded, two symbols less than half a percent apart would tie."""
    parameters, x = random_parameters(0, np.float32), random_stream(1, dtype=np.float32)
    result = compiled_logits(precision="bfloat16")(parameters, x)
    rounded = result.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.mean(np.asarray(result == rounded)) < 0.1


def test_bfloat16_gradients_come_in_the_dtype_of_the_parameters():
    parameters, x = random_parameters(0, np.float32), random_stream(1, dtype=np.float32)

    def size(parameters):
        logits = transformer.logits(parameters, x, heads=HEADS, precision="bfloat16")
        return jnp.sum(logits**2)

    gradients = jax.eval_shape(jax.grad(size), parameters)
    assert {name: leaf.dtype for name, leaf in gradients.items()} == dict.fromkeys(
        SHAPES, np.float32
    )


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"float16.*expected.*float32.*bfloat16"):
        transformer.logits(random_parameters(0), random_stream(1), heads=HEADS, precision="float16")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("cut", range(1, BLOCK))
def test_the_future_changes_no_bit_of_the_past(cut, precision):
    parameters, x = random_parameters(4, np.float32), random_stream(5, dtype=np.float32)
    changed = x.copy()
    changed[:, cut:] = 10 * random_stream(6, dtype=np.float32)[:, cut:]
    logits = compiled_logits(precision=precision)
    before, after = (np.asarray(logits(parameters, stream)) for stream in (x, changed))
    np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
    # Attention is inclusive: what a position sees begins with itself, and holds all of its past.
    assert np.all(np.any(before[:, cut:] != after[:, cut:], axis=-1))


def test_sequences_of_a_batch_do_not_see_each_other():
    parameters, x = random_parameters(4), random_stream(5)
    changed = x.copy()
    changed[1] = random_stream(6)[1]
    before, after = (np.asarray(compiled_logits()(parameters, stream)) for stream in (x, changed))
    np.testing.assert_array_equal(before[[0, 2]], after[[0, 2]])
    assert np.all(np.any(before[1] != after[1], axis=-1))


@pytest.mark.parametrize("length", [1, BLOCK])
def test_embed_adds_the_position_to_the_token(length):
    parameters, tokens = random_parameters(7), random_tokens(8, (BATCH, length))
    result = transformer.embed(parameters, jnp.asarray(tokens))
    np.testing.assert_array_equal(result, numpy_embed(parameters, tokens))


@pytest.mark.parametrize("heads", [1, HEADS])
def test_first_layer_gives_the_attention_logits_of_the_first_layer(heads):
    """Those of the oracle, which `test_logits_match_plain_numpy` ties to the network."""
    parameters, x = random_parameters(9), random_stream(10)
    normalised, w_query, w_key = transformer.attention_inputs(parameters, x, heads=heads)
    assert normalised.shape == x.shape
    assert w_query.shape == w_key.shape == (heads, WIDTH, WIDTH // heads)
    for b, head in np.ndindex(BATCH, heads):
        rows = np.array([numpy_norm(row, parameters["attention_norm"][0]) for row in x[b]])
        expected = numpy_attention_logits(rows, parameters["attention_in"][0], head, heads)
        query, key = normalised[b] @ w_query[head], normalised[b] @ w_key[head]
        np.testing.assert_allclose(query @ key.T / np.sqrt(WIDTH // heads), expected, atol=1e-12)


def test_layers_above_the_attention_stage_add_nothing_to_the_log_determinant():
    """Given the layer below, x -> x - F(layer below) has the identity as Jacobian.

    Proposition 3 and Corollary 6.1: the map from all stages' states to all stages' residuals is
    triangular, and its log-determinant that of the one attention stage.
    """
    parameters = random_parameters(11)
    rng = np.random.default_rng(12)
    w_query, w_key = rng.standard_normal((2, WIDTH, RANK))

    def next_state(layer, state):
        each = {name: parameters[name][layer] for name in transformer.LAYER_PARAMETERS}
        return transformer.apply_layer(each, state[None], HEADS, "float32")[0]

    def residuals(states):
        above = [states[n + 1] - next_state(n, states[n]) for n in range(LAYERS)]
        return jnp.stack([pa.residual(states[0], w_query, w_key), *above])

    states = rng.standard_normal((LAYERS + 1, BLOCK, WIDTH))
    size = BLOCK * WIDTH
    jacobian = np.asarray(jax.jit(jax.jacfwd(residuals))(states))
    blocks = jacobian.reshape(LAYERS + 1, size, LAYERS + 1, size).swapaxes(1, 2)
    for n in range(1, LAYERS + 1):
        np.testing.assert_array_equal(blocks[n, n], np.eye(size))
        np.testing.assert_array_equal(blocks[n - 1, n], np.zeros((size, size)))
        assert np.abs(blocks[n, n - 1]).max() > 0.1  # the layer below does matter
    sign, log_abs = np.linalg.slogdet(jacobian.reshape((LAYERS + 1) * size, -1))
    stage_sign, stage_log_abs = jax.jit(pa.log_det)(states[0], w_query, w_key)
    assert abs(log_abs) > 0.1
    assert sign == np.prod(stage_sign)
    np.testing.assert_allclose(log_abs, np.sum(stage_log_abs), rtol=0, atol=1e-10)


def loss_and_gradient(precision="float32", **options):
    def loss(parameters, x):
        found = transformer.logits(parameters, x, heads=HEADS, precision=precision, **options)
        return jnp.sum(jnp.sin(found))

    return jax.jit(jax.value_and_grad(loss))(random_parameters(0, np.float32), random_stream(1))


@pytest.mark.slow
def test_layers_that_are_computed_anew_have_the_same_derivative():
    found, expected = (loss_and_gradient(rematerialise=anew) for anew in (True, False))
    for got, true in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, true, rtol=2e-5, atol=2e-5)


def test_the_derivative_keeps_of_each_layer_its_input_alone():
    def kept(**options):
        def loss(x):
            return transformer.logits(random_parameters(0), x, heads=HEADS, **options).sum()

        _, pullback = jax.eval_shape(lambda x: jax.vjp(loss, x), random_stream(1))
        return [leaf.shape for leaf in jax.tree.leaves(pullback)]

    weights = (BATCH, HEADS, BLOCK, BLOCK)
    assert kept().count(weights) >= LAYERS
    assert weights not in kept(rematerialise=True)


@pytest.mark.slow
def test_cudnns_attention_is_that_of_the_network(monkeypatch):
    """Where there is no such device, JAX's own formula stands in for the kernel."""
    expected = loss_and_gradient("bfloat16")
    plain, asked = jax.nn.dot_product_attention, []

    def kernel(*args, implementation, **options):
        asked.append(implementation)
        return plain(*args, implementation="xla", **options)

    monkeypatch.setattr(transformer, "attends_by_cudnn", lambda dtype, rank: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    found = loss_and_gradient("bfloat16")
    assert asked == ["cudnn"] * LAYERS
    largest = max(jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(expected))
    for got, true in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, true, atol=4 * largest * jnp.finfo(jnp.bfloat16).eps)


@pytest.mark.parametrize(
    ("dtype", "rank", "version", "capability", "expected"),
    [
        (jnp.bfloat16, 64, "cuda 13000", "9.0", True),
        (jnp.bfloat16, 128, "cuda 13000", "8.0", True),
        (jnp.bfloat16, 136, "cuda 13000", "9.0", False),
        (jnp.bfloat16, 12, "cuda 13000", "9.0", False),
        (jnp.float32, 64, "cuda 13000", "9.0", False),
        (jnp.bfloat16, 64, "cuda 13000", "7.5", False),
        (jnp.bfloat16, 64, "cpu", None, False),
    ],
)
def test_cudnn_attends_where_it_has_the_kernel(
    monkeypatch, dtype, rank, version, capability, expected
):
    backend = SimpleNamespace(platform_version=version)
    device = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(transformer, "get_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert transformer.attends_by_cudnn(dtype, rank) is expected
