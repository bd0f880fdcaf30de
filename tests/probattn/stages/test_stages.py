"""Stages of real attention against whole causal maps that complex steps differentiate."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probattn as pa
from tests.support import real_attention as real
from tests.support.dense import quick_jit

pytestmark = pytest.mark.usefixtures("strict_promotion", "strict_ranks")

# One program for everything that is asked of a stage: what costs here is compiling.
FAST = ("all",)
EVERY = [
    pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in real.OPTIONS
]


@quick_jit
def determinants(stage):
    return {
        "blocks": pa.jacobian_blocks(stage),
        "log_det": pa.log_det(stage),
    }


@quick_jit
def margins(stage):
    return {
        "barrier": pa.relaxed_barrier(stage, delta=1e-2),
        "reduced": pa.reduced_blocks(stage),
        "margin": pa.stability_margin(stage),
        "reduced_margin": pa.stability_margin(stage, kind="reduced"),
        "infeasible": pa.infeasible(stage),
    }


@functools.cache
def given(name):
    options = real.OPTIONS[name]
    n = real.numbers(options)
    stage = real.layer(options, n).stage(n["x"])
    tokens = real.tokens(options, n)
    dense = [
        real.diagonal_blocks(functools.partial(real.residuals, options, n, head=head), tokens)
        for head in range(options.heads)
    ]
    return stage, np.stack(dense)


@pytest.mark.parametrize("name", EVERY)
def test_blocks_are_those_of_the_whole_causal_map(name):
    stage, dense = given(name)
    got = determinants(stage)
    np.testing.assert_allclose(got["blocks"], dense, atol=1e-13)
    sign, log_abs = np.linalg.slogdet(dense)
    np.testing.assert_array_equal(got["log_det"][0], sign)
    np.testing.assert_allclose(got["log_det"][1], log_abs, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", real.OPTIONS)
def test_margins_are_those_of_the_whole_causal_map(name):
    stage, dense = given(name)
    got = jax.tree.map(np.asarray, margins(stage))
    far = np.linalg.det(dense) > 1e-2
    log_abs = np.linalg.slogdet(dense)[1]
    np.testing.assert_allclose(got["barrier"][far], -log_abs[far], atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(got["reduced"]), np.linalg.det(dense), atol=1e-12)
    smallest = np.linalg.svd(dense, compute_uv=False)[..., -1]
    values = np.linalg.eigvals(dense)
    beyond = np.any((abs(values.imag) < 1e-12) & (values.real <= 0), axis=-1)
    np.testing.assert_array_equal(got["infeasible"], beyond)
    np.testing.assert_allclose(got["margin"], np.where(beyond, -smallest, smallest), atol=1e-13)
    of_reduced = np.linalg.svd(got["reduced"], compute_uv=False)[..., -1]
    np.testing.assert_allclose(abs(got["reduced_margin"]), of_reduced, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rotary", "interleaved", "all"])
def test_derivatives_are_those_of_finite_differences(name):
    """Of log determinant and margin, by the stream and by the query matrix."""
    options = real.OPTIONS[name]
    n = real.numbers(options)
    mixed = np.random.default_rng(1).standard_normal((2, options.heads, real.T))

    def total(x, w_query):
        layer = dataclasses.replace(real.layer(options, n), w_query=w_query)
        stage = layer.stage(x)
        values = pa.log_det(stage)[1], pa.stability_margin(stage)
        return sum(jnp.sum(part * value) for part, value in zip(mixed, values, strict=True))

    at = jnp.asarray(n["x"]), jnp.asarray(n["w_query"])
    steps = np.random.default_rng(2)
    along = tuple(jnp.asarray(steps.standard_normal(part.shape)) for part in at)

    @jax.jit
    def both(h):
        slopes = jax.grad(total, (0, 1))(*at)
        moved = [[a + sign * h * s for a, s in zip(at, along, strict=True)] for sign in (1, -1)]
        forward = sum(jnp.sum(g * s) for g, s in zip(slopes, along, strict=True))
        return forward, (total(*moved[0]) - total(*moved[1])) / (2 * h)

    exact, differences = both(1e-6)
    np.testing.assert_allclose(exact, differences, rtol=1e-6)


@pytest.mark.slow
def test_stages_are_mapped_and_batched():
    """Of several sequences as one by one, by vmap as by leading axes, and in single precision."""
    options = real.OPTIONS["all"]
    n = real.numbers(options)
    layer = real.layer(options, n)
    x = jnp.stack([jnp.asarray(n["x"]), jnp.asarray(real.numbers(options, seed=5)["x"])])

    def values(x):
        stage = layer.stage(x)
        return pa.log_det(stage)[1], pa.stability_margin(stage), pa.block_spectrum(x, layer)

    one = jax.jit(values)
    single = [jax.tree.map(np.asarray, one(row)) for row in x]
    expected = jax.tree.map(lambda *parts: np.stack(parts), *single)
    for together in (jax.jit(values)(x), jax.jit(jax.vmap(values))(x)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), together, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-11), (np.float32, 3e-5)])
def test_long_heads_are_iterated_to_the_same_margins(dtype, tolerance):
    """The way of one head at a time, in which products are taken block by block."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((90, 32))
    matrices = rng.standard_normal((2, 2, 32, 8)) / 4
    layer = pa.AttentionLayer(*matrices.astype(dtype), rotary=pa.Rotary.of(8))
    stage = layer.stage(x.astype(dtype))
    exact = pa.AttentionLayer(*matrices, rotary=pa.Rotary.of(8)).stage(x)
    margin = np.asarray(jax.jit(pa.stability_margin)(stage))
    dense = np.linalg.svd(np.asarray(pa.jacobian_blocks(exact)), compute_uv=False)[..., -1]
    assert margin.dtype == dtype
    assert dense.min() < 0.3
    np.testing.assert_allclose(abs(margin), dense, atol=tolerance)


def test_the_plain_stage_is_that_of_embeddings_and_matrices():
    rng = np.random.default_rng(4)
    x, w_query, w_key = rng.standard_normal((6, 5)), *rng.standard_normal((2, 5, 2)) / 2

    def both(of):
        def values(*arrays):
            return of(*arrays, bound=0.8), of(pa.AttentionStage.plain(*arrays, bound=0.8))

        return quick_jit(values)(x, w_query, w_key)

    for plain, staged in (both(pa.jacobian_blocks), both(pa.log_det)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-13), plain, staged)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bare", "all"])
def test_a_token_that_is_not_finite_reaches_later_positions_alone(name):
    options = real.OPTIONS[name]
    n = real.numbers(options)
    lost = n["x"].copy()
    lost[4] = np.nan
    layer = real.layer(options, n)
    margin, clean = (np.asarray(quick_jit(pa.log_det)(layer.stage(x))[1]) for x in (lost, n["x"]))
    np.testing.assert_array_equal(margin[:, :4], clean[:, :4])
    assert np.isnan(margin[:, 5:]).all()


def plain():
    rng = np.random.default_rng(0)
    x, w_query, w_key = rng.standard_normal((4, 3)), *rng.standard_normal((2, 3, 2))
    return pa.AttentionStage.plain(x, w_query, w_key)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s: pa.coupling(s), "no single matrix A"),
        (lambda s: pa.is_proper(s), "no single matrix A"),
        (lambda s: pa.embedding_margin(s), "derivatives of keys"),
        (lambda s: pa.log_det(s, s.w_query, s.w_query), "the stage alone"),
        (lambda s: pa.log_det(s, bound=1.0), "the stage alone"),
        (lambda s: pa.log_det(s.values), "one AttentionStage"),
        (lambda s: pa.coupling(s.w_query), "w_key is missing"),
        (lambda s: pa.log_det(dataclasses.replace(s, keys=s.keys[1:])), "keys has shape"),
        (lambda s: pa.log_det(dataclasses.replace(s, cap=-1.0)), "cap is -1.0"),
        (lambda s: pa.log_det(dataclasses.replace(s, scale=0.0)), "scale is 0.0"),
        (lambda s: pa.log_det(dataclasses.replace(s, window=0)), "window is 0"),
        (
            lambda s: pa.certificate(dataclasses.replace(s, transforms=np.ones((4, 2, 2)))),
            "positional=True",
        ),
    ],
)
def test_what_a_stage_cannot_have_is_refused_in_one_line(call, said):
    with pytest.raises(ValueError, match=said) as refused:
        call(plain())
    assert "\n" not in str(refused.value)


def test_layers_that_do_not_fit_are_refused():
    options = real.OPTIONS["biases"]
    n = real.numbers(options)
    layer = real.layer(options, n)
    for changed, said in (
        ({"w_key": n["w_key"][:, :, :1]}, "w_key has shape"),
        ({"w_key": np.zeros((3, real.D, real.R))}, "expected a number that divides 2"),
        ({"query_bias": n["query_bias"][:1]}, "query_bias has shape"),
        ({"w_value": n["w_value"].astype(int)}, "w_value has dtype int64"),
        ({"norm": pa.Norm(np.ones(real.D + 1))}, "the gain of norm has shape"),
        ({"norm": pa.Norm(np.ones(real.D), np.ones(1))}, "the bias of norm has shape"),
        ({"query_norm": pa.Norm(np.ones(real.R), np.ones(2))}, "the bias of query_norm has shape"),
        ({"rotary": pa.Rotary(np.ones(real.R // 2 + 1))}, r"rotary have shape \(3,\): expected"),
        ({"rotary": pa.Rotary(np.ones((1, 2)))}, r"rotary have shape \(1, 2\): expected \(p,\)"),
        ({"rotary": pa.Rotary(np.ones(2, int))}, "frequencies of rotary has dtype int64"),
        ({"scale": math.nan}, "scale is nan: expected a finite number > 0, or None"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"cap": -1.0}, "cap is -1.0: expected a finite number > 0, or None"),
        ({"window": -1}, "window is -1: expected an integer >= 0, or None"),
        ({"window": True}, "window is True"),
    ):
        wrong = dataclasses.replace(layer, **changed)
        for call in (wrong.stage, functools.partial(pa.block_spectrum, layer=wrong)):
            with pytest.raises(ValueError, match=said) as refused:
                call(n["x"])
            assert "\n" not in str(refused.value)
    for call in (layer.stage, functools.partial(pa.block_spectrum, layer=layer)):
        with pytest.raises(ValueError, match=r"x has shape \(0, 6\).* none of them empty"):
            call(n["x"][:0])
    with pytest.raises(ValueError, match="no w_value"):
        pa.block_spectrum(n["x"], dataclasses.replace(layer, w_value=None))
    with pytest.raises(ValueError, match="an even number"):
        pa.Rotary.of(8, fraction=0.3)
