"""The two ways to the determinants, and what they keep in memory, against double precision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import subjaxprs

import probattn as pa
from probattn.blocks import determinants, moments
from probattn.blocks.geometry import Projections
from tests.support.dense import dense_of, flat, log_abs_slopes, quick_jit
from tests.support.few_inputs import (
    INPUTS,
    LONG,
    SHORT,
    defined,
    differences,
    inputs,
    reduced_blocks,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")
scales = pytest.mark.parametrize("scale", [SHORT, LONG])
SLOW = pytest.mark.slow
FEW, ALL = determinants.FEW, determinants.ALL


@pytest.fixture(autouse=True)
def two_ways(monkeypatch):
    """However few the numbers are."""
    monkeypatch.setattr(determinants, "FEW", 0)
    monkeypatch.setattr(determinants, "ALL", 0)


def weighted(function, *arguments):
    """One number in which no position can hide another's error."""
    found = function(*arguments)
    return jnp.vdot(found, np.random.default_rng(1).standard_normal(found.shape))


def log_abs(*arguments):
    return pa.log_det(*arguments)[1]


# The programs of this file, compiled once for each length. They take both ways, as the fixture
# above has it whenever they are traced.
value_and_slopes = quick_jit(partial(jax.value_and_grad(weighted, (1, 2, 3)), log_abs))
true_value_and_slopes = quick_jit(partial(jax.value_and_grad(weighted, (1, 2, 3)), defined))


def log_abs_of_projections(*projected):
    projected = Projections(*projected)
    return determinants.determinant_values(lambda _, log_abs: log_abs, projected)[1]


def error_of_single_precision(compiled, scale):
    """Largest error of log|det|, relative to its block's condition, of sharp but exact weights."""
    rng = np.random.default_rng(0)
    queries, keys = (scale * rng.standard_normal((2, 40, 4))).astype(np.float32)
    keys[:, 0] = rng.permutation(40)  # so that logits are whole numbers
    queries, keys = queries - queries[0], keys - keys[0]
    own = np.tile(np.array([10, 0, 0, 0], np.float32), (40, 1))
    found = compiled(own, own, queries, keys)
    own, queries, keys = (array.astype(np.float64) for array in (own, queries, keys))
    blocks = reduced_blocks(pa.attention_weights(own, keys), queries, keys)
    sizes = np.linalg.svd(blocks, compute_uv=False)
    error = np.abs(np.asarray(found) - np.linalg.slogdet(blocks)[1])
    return np.max(error * sizes[:, -1] / sizes[:, 0]) / np.finfo(np.float32).eps


@pytest.mark.slow
def test_single_precision_loses_four_bits_at_most():
    """The promise is 1e-5, which is 84 times the rounding error."""
    compiled = jax.jit(log_abs_of_projections)
    for scale in (0.1, 0.3, 1.0, 3.0, 30.0):
        assert error_of_single_precision(compiled, scale) <= 16, scale


@pytest.mark.slow
def test_second_moments_everywhere_would_lose_some(monkeypatch):
    monkeypatch.setattr(moments, "LARGEST_MOMENT", np.inf)
    compiled = jax.jit(partial(log_abs_of_projections))
    assert error_of_single_precision(compiled, 30.0) > 100


@scales
@pytest.mark.parametrize(
    "length",
    [
        7,
        pytest.param(130, marks=SLOW),
        *(pytest.param(n, marks=pytest.mark.nightly) for n in (70, 300)),
    ],
)
def test_value_and_derivative_match_the_definition(length, scale):
    arguments = inputs(length, scale)
    value = value_and_slopes(*arguments)
    expected = true_value_and_slopes(*arguments)
    tolerance = 1e-10 if scale == SHORT else 1e-8
    np.testing.assert_allclose(value[0], expected[0], rtol=tolerance)
    for one, other in zip(value[1], expected[1], strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())


@scales
def test_few_numbers_take_one_way_with_the_same_result(scale, monkeypatch):
    def conditions():
        return str(jax.make_jaxpr(partial(log_abs))(*arguments)).count(" cond[")

    arguments = inputs(7, scale)
    assert conditions() > 0
    expected = value_and_slopes(*arguments)
    monkeypatch.setattr(determinants, "FEW", FEW)
    assert conditions() == 0
    one_way = partial(jax.value_and_grad(weighted, (1, 2, 3)), log_abs)
    found = quick_jit(one_way)(*arguments)
    tolerance = 1e-10 if scale == SHORT else 1e-8
    np.testing.assert_allclose(found[0], expected[0], rtol=tolerance)
    for one, other in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize("summed", [True, pytest.param(False, marks=SLOW)])
def test_every_position_is_centred_where_one_needs_it(summed, monkeypatch):
    """Queries that are far from the first, which nobody attends to: moments lose their digits."""
    monkeypatch.setattr(determinants, "ALL", ALL)
    rng = np.random.default_rng(0)
    own, queries, keys = 0.3 * rng.standard_normal((3, 7, 3))
    own[:, 0], keys[0, 0] = 1, -200
    queries[1:] += 1e5

    def found(own, queries, keys):
        _, value = determinants.determinant_values(
            lambda _, log_abs: log_abs, Projections(own, own, queries, keys), summed=summed
        )
        return jnp.sum(value)

    def expected(own, queries, keys):
        blocks = reduced_blocks(pa.attention_weights(own, keys), queries, keys)
        return jnp.sum(jnp.linalg.slogdet(blocks)[1])

    one, other = (
        quick_jit(jax.value_and_grad(of, (0, 1, 2)))(own, queries, keys) for of in (found, expected)
    )
    np.testing.assert_allclose(one[0], other[0], rtol=1e-9)
    for slope, true in zip(one[1], other[1], strict=True):
        np.testing.assert_allclose(slope, true, atol=1e-9 * np.abs(true).max())


@pytest.mark.slow
@pytest.mark.parametrize("length", [7, pytest.param(130, marks=SLOW)])
@pytest.mark.parametrize(
    "number", [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in INPUTS[1:])]
)
def test_derivative_in_one_input_alone(number, length):
    """As where a matrix is fixed: forward and reverse mode agree, and with the definition."""
    arguments = list(inputs(length, SHORT))

    def of_one(array, function):
        return weighted(function, *arguments[:number], array, *arguments[number + 1 :])

    own = arguments[number]
    direction = np.random.default_rng(2).standard_normal(own.shape)

    @quick_jit
    def both_modes(own):
        pushed = jax.jvp(lambda array: of_one(array, log_abs), (own,), (direction,))[1]
        return jax.grad(of_one)(own, log_abs), pushed

    expected = true_value_and_slopes(*arguments)[1][number]
    gradient, pushed = both_modes(own)
    np.testing.assert_allclose(gradient, expected, atol=1e-9)
    np.testing.assert_allclose(pushed, np.vdot(expected, direction), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("length", [7, pytest.param(130, marks=SLOW)])
def test_derivative_in_the_bound_alone(length):
    arguments = inputs(length)

    def of(bound):
        return weighted(partial(log_abs_bounded, arguments), bound)

    def log_abs_bounded(arguments, bound):
        return pa.log_det(*arguments, bound=bound)[1]

    bound, step = jnp.asarray(1.5), 1e-5
    value, derivative = quick_jit(of), quick_jit(jax.grad(of))
    slope = (value(bound + step) - value(bound - step)) / (2 * step)
    np.testing.assert_allclose(derivative(bound), slope, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [pytest.param(np.float64, marks=SLOW), np.float32], ids=str)
def test_a_long_token_changes_no_bit_of_the_past(dtype):
    x, w_query, w_key = inputs(9, SHORT, dtype)

    @jax.jit
    def past(x):
        return jax.value_and_grad(lambda x: jnp.sum(pa.log_det(x, w_query, w_key)[1][:5]))(x)

    value, gradient = past(x)
    later_value, later_gradient = past(x.at[5:].multiply(1e3))
    np.testing.assert_array_equal(later_value, value)
    np.testing.assert_array_equal(later_gradient, gradient)
    # Of a token so far away that its products overflow there is no derivative.
    np.testing.assert_array_equal(past(x.at[5:].multiply(1e25))[0], value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "in_axes",
    [pytest.param((0, 0, 0), marks=SLOW), (0, None, 0), pytest.param((None, 1, None), marks=SLOW)],
)
def test_mapped_is_a_larger_batch_with_one_condition(in_axes):
    mapped = jax.vmap(log_abs, in_axes)
    compiled, alone = quick_jit(mapped), quick_jit(log_abs)
    for scale in (SHORT, LONG):
        arguments = inputs(7, scale)
        batched = [
            array if axis is None else np.stack([array, array[::-1] * 1.0], axis=axis)
            for array, axis in zip(arguments, in_axes, strict=True)
        ]
        found = compiled(*batched)
        for number in range(2):
            own = [
                array if axis is None else np.take(array, number, axis)
                for array, axis in zip(batched, in_axes, strict=True)
            ]
            np.testing.assert_allclose(found[number], alone(*own), rtol=1e-9, atol=1e-9)
    program = str(jax.make_jaxpr(mapped)(*batched))
    # Two in all: whether any position is to be centred, and whether any of a part of them is.
    # Mapped ones would be selections instead.
    assert program.count(" cond[") == 2


@pytest.mark.slow
def test_second_derivative_of_long_tokens():
    arguments = inputs(5, 12.0)
    hessian = quick_jit(jax.hessian(partial(weighted, log_abs)))(*arguments)
    signs = np.random.default_rng(1).standard_normal(5)  # those of `weighted`
    x, *others = map(np.asarray, arguments)

    def gradient(moved):
        slopes = log_abs_slopes(dense_of(moved.reshape(x.shape), *others))
        return signs @ flat(slopes)[:, : x.size]

    expected = differences(gradient, x.ravel()).reshape(hessian.shape)
    assert not np.all(short(*arguments))
    np.testing.assert_allclose(hessian, expected, atol=1e-7 * np.abs(expected).max())


def short(x, w_query, w_key):
    sizes = [np.linalg.norm((x - x[0]) @ w, axis=1) for w in (w_query, w_key)]
    return sizes[0].max() * sizes[1].max() <= 32 * np.sqrt(w_query.shape[1])


@pytest.mark.slow
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("function", [pa.log_det, pa.relaxed_barrier])
def test_no_blocks_of_all_sequences_are_alive(function, summed):
    """Neither forward nor backward is there an array of r x r numbers for every position."""
    sequences, length, rank = 32, 256, 16

    def total(*arguments):
        found = function(*arguments, summed=summed)
        return sum(jnp.sum(part) for part in jax.tree.leaves(found))

    shapes = [
        jax.ShapeDtypeStruct(shape, np.float32)
        for shape in ((sequences, length, 2), (2, rank), (2, rank))
    ]
    program = jax.make_jaxpr(jax.value_and_grad(total, INPUTS))(*shapes)
    sizes = list(sizes_within(program.jaxpr))
    assert length * rank**2 <= max(sizes) < sequences * length * rank**2 / 2


def sizes_within(jaxpr):
    """Of all arrays that a program computes, those of its loops and conditions included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
    for inner in subjaxprs(jaxpr):
        yield from sizes_within(inner)
