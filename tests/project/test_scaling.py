"""The exponents that the scaling benchmark states."""

import numpy as np
import pytest

from tests.support.project import benchmark


@pytest.fixture(scope="module", name="scaling")
def scaling_fixture():
    with benchmark("scaling") as module:
        yield module


def test_exponent_is_that_of_a_power_law_above_a_constant(scaling):
    values = np.array([1, 2, 16, 32, 64])
    assert scaling.exponent(values, 3 * values**1.7) == pytest.approx(1.7)
    with_floor = np.maximum(3 * values**1.7, 200)  # of the lowest two
    assert scaling.exponent(values, with_floor) == pytest.approx(1.7)


def test_sizes_vary_one_at_a_time_from_the_base(scaling):
    for name, values in scaling.GRID.items():
        position = scaling.NAMES.index(name)
        assert len(values) >= 5
        assert scaling.BASE[position] in values
        np.testing.assert_array_equal(np.divide(values[1:], values[:-1]), 2)


def test_memory_of_blocks_of_all_sequences_would_be_noticed(scaling):
    """Beside half of them, which is taken for none."""
    few, many = scaling.ALIVE
    assert few[1:] == many[1:]
    assert few[1] >= 256
    blocks = 4 * few[1] * few[3] ** 2
    for per_sequence, none_alive in ((blocks, False), (blocks / 8, True)):
        memory = [10**6 + int(size[0] * per_sequence) for size in scaling.ALIVE]
        found = scaling._per_sequence(scaling.ALIVE, memory)
        assert found["no_blocks_alive"] == none_alive
        assert found["ratio"] == pytest.approx(per_sequence / blocks)
