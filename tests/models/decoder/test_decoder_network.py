"""The decoder against transformers, the project's own network, and itself with a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probattn.inference.pretrained.architectures import decoder_config
from probattn.inference.pretrained.parameter_names import ParameterNames
from probattn.models import transformer
from probattn.models.decoder.config import DecoderConfig
from probattn.models.decoder.network import (
    apply_layer,
    decoder_logits,
    embed,
    extend,
    first_stage,
    init_cache,
)
from tests.support import numpy_network
from tests.support.tiny_checkpoints import (
    CONFIGS,
    POSITIONS,
    random_tensor,
    random_tokens,
    reference,
)

FAST = "gemma3_text"  # it has nearly everything
FAMILIES = [
    pytest.param(name, marks=[] if name == FAST else [pytest.mark.slow]) for name in CONFIGS
]
WITHIN = 1e-4


@functools.cache
def tiny(name):
    """Configuration, parameters and tokens of a tiny checkpoint."""
    config = decoder_config(CONFIGS[name])
    names = ParameterNames(CONFIGS[name]["model_type"], config)
    tensors = {key: random_tensor(key, shape) for key, shape in names.shapes.items()}
    return config, names.read(tensors), random_tokens(name)


@functools.cache
def whole_logits(name):
    config, parameters, tokens = tiny(name)
    return np.asarray(jax.jit(functools.partial(decoder_logits, config=config))(parameters, tokens))


def own_network(seed=0):
    """The project's network as a setting of the decoder: configuration, parameters, the original's.

    It is a GPT without biases whose output is tied to the embedding.
    """
    width, heads = numpy_network.WIDTH, numpy_network.HEADS
    config = DecoderConfig(
        vocabulary=numpy_network.VOCABULARY,
        width=width,
        layers=numpy_network.LAYERS,
        heads=heads,
        key_heads=heads,
        head_width=width // heads,
        context=numpy_network.BLOCK,
        hidden=4 * width,
        norm="layer",
        norm_eps=1e-5,
        rotary=None,
        activation="gelu_tanh",
        gated=False,
        tied=True,
    )
    original = numpy_network.random_parameters(seed)
    layers = {}
    for layer in range(numpy_network.LAYERS):
        query, key, value = np.split(original["attention_in"][layer], 3, axis=-1)
        one_per_head = (width, heads, width // heads)
        layers[str(layer)] = {
            "attention_norm": {"gain": original["attention_norm"][layer]},
            "query": {"weights": query.reshape(one_per_head)},
            "key": {"weights": key.reshape(one_per_head)},
            "value": {"weights": value.reshape(one_per_head)},
            "out": {"weights": original["attention_out"][layer].reshape(heads, -1, width)},
            "mlp_norm": {"gain": original["mlp_norm"][layer]},
            "up": {"weights": original["mlp_in"][layer]},
            "down": {"weights": original["mlp_out"][layer]},
        }
    parameters = {
        "embedding": {
            "tokens": original["token_embedding"],
            "positions": original["position_embedding"],
        },
        "layers": layers,
        "final_norm": {"gain": original["final_norm"]},
    }
    return config, parameters, original


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers(name):
    logits = whole_logits(name)
    assert logits.dtype == np.float32
    expected = reference(name)["logits"]
    assert np.abs(expected).max() > 1  # no near-uniform predictions, which hide a wrong layer
    np.testing.assert_allclose(logits[np.array(POSITIONS)], expected, rtol=0, atol=WITHIN)


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_generation_equals_the_whole_forward(name):
    """Beyond the shortest windows, token by token, with one compiled step."""
    config, parameters, tokens = tiny(name)
    room = 56
    step = jax.jit(functools.partial(extend, config=config), donate_argnums=1)
    cache = init_cache(config, (), room)
    for position in range(room):
        logits, cache = step(parameters, cache, tokens[position : position + 1])
        expected = whole_logits(name)[position]
        np.testing.assert_allclose(np.asarray(logits)[0], expected, rtol=0, atol=WITHIN)
    overfull, _ = step(parameters, cache, tokens[room : room + 1])
    assert np.all(np.isnan(overfull))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "qwen3_variant"])
def test_a_cache_takes_several_tokens_of_several_sequences(name):
    config, parameters, tokens = tiny(name)
    both = np.stack([tokens[:42], tokens[100:142]])
    expected = jax.jit(functools.partial(decoder_logits, config=config))(parameters, both)
    step = jax.jit(functools.partial(extend, config=config))
    cache = init_cache(config, (2,), 42)
    for start in range(0, 42, 21):
        logits, cache = step(parameters, cache, both[:, start : start + 21])
        np.testing.assert_allclose(logits, expected[:, start : start + 21], rtol=0, atol=WITHIN)


def test_the_own_network_is_a_setting_of_the_decoder():
    config, parameters, original = own_network()
    tokens = numpy_network.random_tokens(1)
    logits = jax.jit(functools.partial(decoder_logits, config=config))(parameters, tokens)
    x = transformer.embed(original, tokens)
    whole = jax.jit(functools.partial(transformer.logits, heads=numpy_network.HEADS))
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, whole(original, x), rtol=0, atol=1e-12)


def test_the_first_stage_is_what_the_first_layer_attends_with():
    """With an MLP that adds nothing, the layer adds what NumPy gathers from the stage."""
    config, parameters, tokens = tiny("qwen3_variant")
    tokens = tokens[:30]
    layer = parameters["layers"]["0"]
    silent = layer | {"down": {"weights": np.zeros_like(layer["down"]["weights"])}}
    x, stage, after = jax.jit(
        lambda: (
            embed(parameters, tokens, config),
            first_stage(parameters, tokens, config),
            apply_layer(silent, embed(parameters, tokens, config), config, 0),
        )
    )()
    added = np.zeros((30, config.width))
    for head in range(config.heads):
        group = head // (config.heads // config.key_heads)
        weights = np.zeros((30, 30))
        for t in range(30):
            seen = slice(max(0, t + 1 - config.window(0)), t + 1)
            query, keys = (np.asarray(each, np.float64) for each in (stage.queries, stage.keys))
            weights[t, seen] = numpy_network.numpy_softmax(
                config.scale * keys[group, seen] @ query[head, t]
            )
        added += weights @ stage.values[group] @ layer["out"]["weights"][head]
    added += layer["out"]["bias"]
    assert config.window(0) < 30
    np.testing.assert_allclose(after - x, added, rtol=0, atol=1e-5)


def test_queries_and_keys_of_the_first_stage_come_from_its_matrices():
    """Without norm and rotation they are n W and a bias, the same for every token."""
    config, parameters, tokens = tiny("gpt2")
    stage = jax.jit(functools.partial(first_stage, config=config))(parameters, tokens[:9])
    for found, matrix, name in (
        (stage.queries, stage.w_query, "query"),
        (stage.keys, stage.w_key, "key"),
    ):
        bias = parameters["layers"]["0"][name]["bias"]
        linear = np.asarray(stage.normalised) @ np.asarray(matrix)
        np.testing.assert_allclose(found - linear, np.repeat(bias[:, None], 9, 1), atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma2", "qwen3_variant"])
@pytest.mark.usefixtures("strict_promotion", "strict_ranks")
def test_no_dtype_or_rank_is_mixed_in_any_direction(name):
    config, parameters, tokens = tiny(name)
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), parameters)
    batch = np.broadcast_to(tokens[:5], (2, 3, 5))
    shape = jax.eval_shape(lambda p: decoder_logits(p, batch, config), half)
    assert (shape.shape, shape.dtype) == ((2, 3, 5, config.vocabulary), np.float32)
    gradient = jax.eval_shape(
        jax.grad(lambda p: jnp.sum(decoder_logits(p, batch, config) ** 2)), half
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.bfloat16)}
    mapped = jax.eval_shape(jax.vmap(lambda t: first_stage(parameters, t, config)), batch[0])
    assert mapped.keys.shape == (3, config.key_heads, 5, config.head_width)
    cache = jax.eval_shape(lambda: init_cache(config, (2, 3), 5))
    logits, after = jax.eval_shape(lambda c: extend(parameters, c, batch, config), cache)
    assert logits.shape == shape.shape
    assert jax.tree.map(lambda leaf: leaf.shape, after) == jax.tree.map(
        lambda leaf: leaf.shape, cache
    )


def test_too_many_tokens_and_unknown_ids_are_refused():
    config, parameters, _ = tiny("gpt2")
    with pytest.raises(ValueError, match=r"^there are 321 tokens: expected 1 to 320, which the co"):
        decoder_logits(parameters, np.zeros(321, np.int64), config)
    with pytest.raises(ValueError, match=r"^tokens are 3 to 61: expected symbols from 0 to 60, "):
        decoder_logits(parameters, np.array([3, 61]), config)
    with pytest.raises(ValueError, match=r"^there are 321 tokens: expected 1 to 320, which the co"):
        init_cache(config, (), 321)
    cache = init_cache(config, (), 3)
    with pytest.raises(ValueError, match=r"^there are 4 tokens: expected 1 to 3, which the cache "):
        extend(parameters, cache, np.zeros(4, np.int64), config)
