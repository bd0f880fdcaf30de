"""The decoder against transformers, the project's own network, and itself with a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probattn.inference.pretrained.architectures import decoder_config
from probattn.inference.pretrained.parameter_names import ParameterNames
from probattn.models import transformer
from probattn.models.decoder.attention import attention_layer
from probattn.models.decoder.config import DecoderConfig
from probattn.models.decoder.network import (
    apply_layer,
    decoder_logits,
    embed,
    extend,
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


def test_the_attention_of_a_layer_is_what_the_layer_attends_with():
    """With an MLP that adds nothing, the layer adds what NumPy gathers from queries and keys."""
    config, parameters, tokens = tiny("qwen3_variant")
    tokens = tokens[:30]
    own = parameters["layers"]["0"]
    silent = own | {"down": {"weights": np.zeros_like(own["down"]["weights"])}}

    def computed():
        x = embed(parameters, tokens, config)
        stage = attention_layer(own, config, 0).stage(x)
        return x, stage.values[0], stage.queries, stage.keys, apply_layer(silent, x, config, 0)

    x, n, queries, keys, after = (np.asarray(each, np.float64) for each in jax.jit(computed)())
    value = own["value"]
    added = np.zeros((30, config.width))
    for head in range(config.heads):
        group = head // (config.heads // config.key_heads)
        weights = np.zeros((30, 30))
        for t in range(30):
            seen = slice(max(0, t + 1 - config.window(0)), t + 1)
            weights[t, seen] = numpy_network.numpy_softmax(
                config.scale * keys[head, seen] @ queries[head, t]
            )
        values = n @ value["weights"][:, group] + value["bias"][group]
        added += weights @ values @ own["out"]["weights"][head]
    added += own["out"]["bias"]
    assert config.window(0) < 30
    np.testing.assert_allclose(after - x, added, rtol=0, atol=1e-5)


def test_the_attention_of_a_layer_has_all_that_the_layer_has():
    """For every family, with the numbers of the tree: a part left out would be no error."""
    for name in CONFIGS:
        config, parameters, _ = tiny(name)
        for number in range(config.layers):
            own = parameters["layers"][str(number)]
            layer = attention_layer(own, config, number)
            for leaf, found in (("query", layer.w_query), ("value", layer.w_value)):
                np.testing.assert_array_equal(found, own[leaf]["weights"].swapaxes(0, 1))
            np.testing.assert_array_equal(layer.w_out, own["out"]["weights"])
            for leaf, found in (("key", layer.key_bias), ("out", layer.out_bias)):
                assert (found is None) == ("bias" not in own[leaf])
            one = config.norm == "rms_plus_one"
            np.testing.assert_array_equal(layer.norm.gain, one + own["attention_norm"]["gain"])
            assert (layer.query_norm is None) == ("query_norm" not in own)
            assert (layer.out_norm is None) == ("attention_post_norm" not in own)
            assert (layer.rotary is None) == (config.layer_rotary(number) is None)
            assert layer.cap == config.attention_cap
            assert layer.scale == config.scale
            window = config.window(number)
            assert layer.window == (None if window is None else window - 1)


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
    layer = attention_layer(half["layers"]["0"], config, 0)
    mapped = jax.eval_shape(jax.vmap(lambda t: layer.stage(embed(parameters, t, config))), batch[0])
    assert mapped.keys.shape == (3, config.heads, 5, config.head_width)
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


def test_a_token_that_is_not_kept_might_as_well_not_be_there():
    config, parameters, tokens = tiny("llama")
    own, length, lost = parameters["layers"]["0"], 6, 2
    x = embed(parameters, tokens[..., :length], config)
    heads = (*x.shape[:-2], config.heads, length, length)
    kept = jnp.ones(heads, bool).at[..., lost + 1 :, lost].set(False)
    moved = x.at[..., lost, :].add(1.0)
    found, after = (apply_layer(own, each, config, 0, kept=kept) for each in (x, moved))
    others = np.arange(length) != lost
    np.testing.assert_array_equal(found[..., others, :], after[..., others, :])
    assert np.abs(found[..., lost, :] - after[..., lost, :]).max() > 0.1
    whole = apply_layer(own, x, config, 0)
    before = slice(0, lost + 1)
    np.testing.assert_allclose(found[..., before, :], whole[..., before, :], atol=1e-6)
    assert np.abs(found - whole).max() > 1e-3
    everything = apply_layer(own, x, config, 0, kept=jnp.ones(heads, bool))
    np.testing.assert_array_equal(everything, whole)
