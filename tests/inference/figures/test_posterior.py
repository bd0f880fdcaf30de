"""Figures of posteriors: what is drawn where, and refusals of what cannot be drawn."""

import numpy as np
import pytest

from probattn.inference import figures as plots
from tests.support.figure_parts import legend

DRAWS = np.random.default_rng(0).normal(0.6, 0.05, (4, 500))


def vertical(axes):
    """Positions of the upright lines of a panel."""
    lines = (line.get_xdata() for line in axes.lines)
    return [float(x[0]) for x in lines if len(x) == 2 and x[0] == x[1]]


def test_posterior_has_unit_area_and_marks_stand_where_they_belong():
    figure = plots.smallest_margin(DRAWS, {"ce": 0.5, "full": 0.71})
    (axes,) = figure.axes
    assert {0.5, 0.71} <= set(vertical(axes))
    assert legend(figure)[:4] == ["posterior", "each chain", "ce", "full"]
    (area,) = axes.patches
    heights, edges, _ = area.get_data()
    assert np.sum(heights * np.diff(edges)) == pytest.approx(1)
    middles = (edges[1:] + edges[:-1]) / 2
    assert np.sum(heights * np.diff(edges) * middles) == pytest.approx(DRAWS.mean(), abs=0.005)


def test_weights_of_the_barrier_over_the_posterior():
    weights = {1.0: 0.7, 0.05: 0.5, 0.3: 0.61}
    figure = plots.barrier_weights(DRAWS, weights, {"ce": 0.2})
    left, right = figure.axes
    assert {0.5, 0.61, 0.7, 0.2} <= set(vertical(left))
    curve = right.lines[-1]
    assert list(curve.get_xdata()) == [0.05, 0.3, 1.0]
    assert list(curve.get_ydata()) == [0.5, 0.61, 0.7]
    assert right.get_xscale() == "log"
    level = [float(line.get_ydata()[0]) for line in right.lines[:2]]
    assert level == [pytest.approx(np.median(DRAWS)), 0.2]
    assert {"margin 0.05", "margin 0.3", "margin 1", "ce"} <= set(legend(figure))


def test_support_map_shows_probabilities_and_symbols():
    probability = np.zeros((2, 5))
    probability[0, 3], probability[1, 2] = 0.9, 0.2
    symbols = [list("ab cd"), ["e", "\ufffd", "$x$", "\n", "f"]]
    figure = plots.support_map(probability, symbols)
    axes, bar = figure.axes
    np.testing.assert_array_equal(axes.collections[0].get_array(), probability)
    texts = [text.get_text() for text in axes.texts]
    assert texts[:5] == ["a", "b", "\N{OPEN BOX}", "c", "d"]
    assert texts[5:8] == ["e", "\N{MIDDLE DOT}", "$x$"]
    assert axes.texts[3].get_color() == "white"  # on black
    assert bar.get_ylabel() == "P(support token)"
    large = plots.support_map(np.full((100, 64), 1 / 64), [["x"] * 64] * 100)
    assert not large.axes[0].texts


def test_reliability_leaves_empty_bins_out():
    curves = {"one": ([0.1, np.nan, 0.9], [0.2, np.nan, 0.7]), "other": ([0.5], [0.5])}
    figure = plots.reliability_diagram(curves)
    _, one, other = figure.axes[0].lines
    np.testing.assert_array_equal(one.get_xdata(), [0.1, 0.9])
    np.testing.assert_array_equal(one.get_ydata(), [0.2, 0.7])
    assert len(other.get_xdata()) == 1


@pytest.mark.parametrize(
    "draws", [np.zeros(3), np.zeros((0, 5)), np.full((1, 2), np.nan), np.full((1, 2), np.inf)]
)
def test_draws_that_cannot_be_drawn(draws):
    with pytest.raises(
        ValueError, match=r"draws have shape .*: expected \(chain, draw\), at least"
    ):
        plots.smallest_margin(draws)


def test_draws_whose_margin_is_not_known_are_left_out_and_counted():
    draws = DRAWS.copy()
    draws[1, :100] = np.nan
    draws[3] = np.nan
    for figure in (
        plots.smallest_margin(draws, {"ce": 0.5}),
        plots.barrier_weights(draws, {0.1: 0.5, 0.3: 0.6}, {}),
    ):
        axes = figure.axes[0]
        assert legend(figure)[0] == "posterior without 600 of 2000 draws: not known"
        (area,) = axes.patches
        heights, edges, _ = area.get_data()
        middles = (edges[1:] + edges[:-1]) / 2
        known = np.concatenate([DRAWS[0], DRAWS[1, 100:], DRAWS[2]])
        assert np.sum(heights * np.diff(edges)) == pytest.approx(1)
        assert np.sum(heights * np.diff(edges) * middles) == pytest.approx(known.mean(), abs=0.005)
        chains = [line for line in axes.lines if len(line.get_xdata()) == len(middles)]
        assert len(chains) == 3
    assert figure.axes[1].lines[0].get_ydata()[0] == pytest.approx(np.median(known))


def test_weights_and_probabilities_that_cannot_be_drawn():
    for weights in ({}, {0.0: 0.5}, {np.inf: 0.5}):
        with pytest.raises(ValueError, match=r"weights are \[.*\]: expected finite numbers > 0"):
            plots.barrier_weights(DRAWS, weights, {})
    with pytest.raises(ValueError, match=r"probability has shape \(3,\): expected \(sequence"):
        plots.support_map(np.zeros(3))
