"""Blocks of a text: minibatches of the key alone, windows that miss and repeat nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probattn.text.batches import batched_rows, map_batches, random_blocks, windows

BLOCK = 8
# Every token once and out of order, so that a block shows where it was taken from.
TOKENS = jax.random.permutation(jax.random.key(0), 40).astype(jnp.int32)
STARTS = TOKENS.size - BLOCK


@functools.cache
def drawn(seed, batch):
    """Inputs, targets and the starts of the blocks in TOKENS."""
    inputs, targets = random_blocks(jax.random.key(seed), TOKENS, batch=batch, block=BLOCK)
    place = np.argsort(TOKENS)
    return np.asarray(inputs), np.asarray(targets), place[inputs[:, 0]]


# Minibatches


def test_blocks_are_pieces_of_the_text_and_targets_the_tokens_that_follow():
    inputs, targets, starts = drawn(1, 50)
    assert inputs.shape == targets.shape == (50, BLOCK)
    text = np.asarray(TOKENS)
    for row, start in enumerate(starts):
        np.testing.assert_array_equal(inputs[row], text[start : start + BLOCK])
        np.testing.assert_array_equal(targets[row], text[start + 1 : start + 1 + BLOCK])


def test_the_starts_are_a_function_of_the_key_alone():
    first = drawn(2, 50)[2]
    drawn(3, 50)  # what was drawn in between does not count
    again = random_blocks(jax.random.key(2), jnp.arange(40), batch=50, block=BLOCK)[0][:, 0]
    np.testing.assert_array_equal(again, first)  # nor do the tokens
    assert (drawn(3, 50)[2] != first).any()


def test_every_start_is_reached_and_equally_often():
    counts = np.bincount(drawn(4, 200 * STARTS)[2], minlength=STARTS)
    assert counts.size == STARTS
    assert counts.min() > 0
    statistic = ((counts - 200) ** 2 / 200).sum()  # Pearson's; both tails: cycling is not chance
    assert 1e-3 < jax.scipy.stats.chi2.sf(statistic, STARTS - 1) < 1 - 1e-3


def test_starts_of_a_minibatch_and_of_the_next_do_not_follow_from_each_other():
    starts = drawn(4, 200 * STARTS)[2]
    for other in (np.roll(starts, 1), drawn(5, 200 * STARTS)[2]):
        # A correlation over 6400 independent pairs is Normal(0, 1 / 80) by the central limit.
        assert abs(np.corrcoef(starts, other)[0, 1]) < 4 / 80


def test_a_text_of_one_block_and_its_last_target_has_one_start():
    inputs, targets = random_blocks(jax.random.key(0), TOKENS[: BLOCK + 1], batch=20, block=BLOCK)
    np.testing.assert_array_equal(inputs, np.tile(TOKENS[:BLOCK], (20, 1)))
    np.testing.assert_array_equal(targets, np.tile(TOKENS[1 : BLOCK + 1], (20, 1)))


@pytest.mark.parametrize("size", [BLOCK, BLOCK - 1, 0])
def test_a_text_too_short_for_a_target_is_refused(size):
    expected = rf"shape \({size},\): expected \(N,\) with N > block = {BLOCK}"
    draw = functools.partial(random_blocks, batch=2, block=BLOCK)
    for call in (draw, jax.jit(draw)):
        with pytest.raises(ValueError, match=expected):
            call(jax.random.key(0), TOKENS[:size])


def test_compiled_steps_draw_what_separate_calls_draw():
    keys = jax.random.split(jax.random.key(6), 3)

    @jax.jit
    def steps(keys, tokens):
        draw = functools.partial(random_blocks, batch=4, block=BLOCK)
        return jax.lax.scan(lambda carry, key: (carry, draw(key, tokens)), None, keys)[1]

    inputs, targets = steps(keys, TOKENS)
    for step, key in enumerate(keys):
        alone = random_blocks(key, TOKENS, batch=4, block=BLOCK)
        np.testing.assert_array_equal(inputs[step], alone[0])
        np.testing.assert_array_equal(targets[step], alone[1])


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint16])
def test_blocks_keep_the_type_of_the_tokens(dtype):
    blocks = random_blocks(jax.random.key(0), TOKENS.astype(dtype), batch=2, block=BLOCK)
    assert [array.dtype for array in blocks] == [dtype, dtype]


# Windows


@st.composite
def lengths_blocks_and_strides(draw):
    block = draw(st.integers(1, 40))
    return draw(st.integers(1, 200)), block, draw(st.integers(1, block))


def walk(length, block, stride):
    """The windows by the definition: where each begins, and what no earlier one held."""
    begin, seen = 0, 0
    while seen < length:
        end = min(begin + block, length)
        yield max(end - block, 0), list(range(seen, end))
        begin, seen = begin + stride, end


@given(lengths_blocks_and_strides())
def test_windows_report_every_position_once_and_in_order(sizes):
    length, block, stride = sizes
    cover = windows(length, block=block, stride=stride)
    assert cover.length == min(block, length)
    assert cover.reported.shape == (cover.starts.size, cover.length)
    text = np.random.default_rng(0).permutation(length)
    np.testing.assert_array_equal(cover.take(text)[cover.reported], text)


@given(lengths_blocks_and_strides())
def test_windows_are_those_of_a_walk_over_the_text(sizes):
    length, block, stride = sizes
    cover = windows(length, block=block, stride=stride)
    positions = cover.take(np.arange(length))
    walked = list(walk(length, block, stride))
    assert cover.starts.tolist() == [start for start, _ in walked]
    for row, (_, new) in enumerate(walked):
        assert positions[row][cover.reported[row]].tolist() == new


@given(lengths_blocks_and_strides())
def test_later_windows_give_context_and_the_last_ends_with_the_text(sizes):
    length, block, stride = sizes
    cover = windows(length, block=block, stride=stride)
    assert cover.starts[0] == 0
    assert cover.reported[0].all()
    assert cover.starts[-1] + cover.length == length
    assert cover.reported.any(axis=1).all()  # none is computed for nothing
    context = cover.reported.argmax(axis=1)  # tokens before the first position reported
    assert (context[1:] >= block - stride).all()


@pytest.mark.parametrize(
    ("length", "stride", "starts", "context"),
    [
        (10, 3, [0, 3, 6], [0, 1, 1]),
        (11, 3, [0, 3, 6, 7], [0, 1, 1, 3]),
        (8, None, [0, 4], [0, 0]),
        (9, None, [0, 4, 5], [0, 0, 3]),
        (4, 1, [0], [0]),
        (3, 1, [0], [0]),
        (6, 1, [0, 1, 2], [0, 3, 3]),
    ],
)
def test_windows_of_four_by_hand(length, stride, starts, context):
    cover = windows(length, block=4, stride=stride)
    assert cover.starts.tolist() == starts
    assert cover.reported.argmax(axis=1).tolist() == context


@pytest.mark.parametrize(
    ("length", "block", "stride", "reason"),
    [
        (0, 4, None, "the text has 0 positions: expected at least 1"),
        (9, 4, 0, "stride is 0: expected 1 <= stride <= block = 4"),
        (9, 4, 5, "stride is 5: expected 1 <= stride <= block = 4"),
        (9, 4, -1, "stride is -1: expected"),
        (9, 4, 2.0, "stride is 2.0: expected 1 <= stride <= block = 4, integer"),
        (9, 4, "2", "stride is '2': expected 1 <= stride <= block = 4, integer"),
        (9, 0, None, "block = 0"),
        (9, -3, None, "block = -3"),
    ],
)
def test_windows_refuse_what_is_out_of_range(length, block, stride, reason):
    with pytest.raises(ValueError, match=reason):
        windows(length, block=block, stride=stride)


# Fewer windows


@given(lengths_blocks_and_strides(), st.integers(0, 1000))
def test_spread_takes_as_many_windows_as_fit_evenly_over_the_text(sizes, most_tokens):
    length, block, stride = sizes
    cover = windows(length, block=block, stride=stride)
    some = cover.spread(most_tokens)
    total, count = cover.starts.size, some.starts.size
    assert count == max(1, min(total, most_tokens // cover.length))
    chosen = np.searchsorted(cover.starts, some.starts)
    assert some.length == cover.length
    np.testing.assert_array_equal(cover.starts[chosen], some.starts)
    np.testing.assert_array_equal(cover.reported[chosen], some.reported)
    assert chosen[0] == 0
    if count > 1:
        assert chosen[-1] == total - 1
        assert np.diff(chosen).min() >= 1  # none twice
        assert np.ptp(np.diff(chosen)) <= 1


def test_spread_of_enough_tokens_is_every_window():
    cover = windows(50, block=8, stride=5)
    everything = cover.spread(cover.starts.size * 8)
    np.testing.assert_array_equal(everything.starts, cover.starts)
    assert cover.spread(cover.starts.size * 8 - 1).starts.size == cover.starts.size - 1


def test_take_reads_the_tokens_of_each_window():
    taken = windows(9, block=4, stride=3).take(np.arange(100, 109))
    assert taken.tolist() == [[100, 101, 102, 103], [103, 104, 105, 106], [105, 106, 107, 108]]


def test_windows_of_a_text_of_two_billion_tokens_take_no_array_of_that_length():
    some = windows(2**31 - 1, block=64).spread(6400)
    assert (some.starts[0], some.starts[-1], len(some.starts)) == (0, 2**31 - 1 - 64, 100)
    assert some.reported[:-1].all()
    assert some.reported[-1].sum() == (2**31 - 1) % 64


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_windows_have_tokens_of_32_bits(dtype):
    taken = windows(9, block=4).take(np.arange(9, dtype=dtype))
    assert taken.dtype == np.int32


# Rows


@given(st.integers(0, 60), st.integers(1, 20))
def test_rows_come_in_order_in_batches_of_one_size(count, size):
    batches = list(batched_rows(count, size))
    assert {batch.shape for batch in batches} <= {(size,)}
    rows = np.concatenate([[], *batches])
    assert rows[:count].tolist() == list(range(count))
    assert set(rows[count:]) <= {count - 1}  # the filling
    assert rows.size - count < size  # no batch of filling alone


def test_results_cut_off_after_the_count_are_those_of_all_rows():
    values = np.random.default_rng(0).normal(size=(10, 3))
    calls = []

    def of_batch(number, rows):
        calls.append((number, rows.size))
        return {"sum": jnp.asarray(values[rows]).sum(axis=1), "rows": (values[rows],)}

    found = map_batches(of_batch, 10, 4)
    assert calls == [(0, 4), (1, 4), (2, 4)]
    assert isinstance(found["sum"], np.ndarray)
    np.testing.assert_array_equal(found["rows"][0], values)
    np.testing.assert_allclose(found["sum"], values.sum(axis=1), rtol=1e-5)
