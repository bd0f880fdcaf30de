"""Figures of kinds of noise, of losses by margin and of the barrier: what they show.

`test_plots` has what is asked of every figure.
"""

import numpy as np
import pytest

from probattn.inference import figures as plots

ABSOLUTE, RELATIVE = "noise (embedding units)", "noise / embedding RMS"
SWEEP = [[0, 1, 1, 1], [0.5, 1.5, 1.4, 1.6]]


def curve(axes, number=0):
    return axes.lines[number].get_xydata().tolist()


def bars(axes, number=0):
    return [segment.tolist() for segment in axes.collections[number].get_segments()]


def watched(step, **changed):
    return {
        "step": step,
        "min_margin_kind": "reduced, separate",
        "mean_margin": 0.5,
        "mean_log_det": 2.0,
        "infeasible_fraction": 0.0,
        "coupling_eigenvalue_min": -3.0,
        "coupling_eigenvalue_max": 1.0,
        "embedding_rms": 0.1 * step,
    } | changed


def test_kinds_are_rows_and_units_columns():
    other = [[0, 1, 1, 1], [0.5, 2.5, 2.0, 3.0]]
    of_run = {(kind, unit): SWEEP for unit in (ABSOLUTE, RELATIVE) for kind in ("uniform", "asc")}
    of_run["substitution", "probability"] = other
    figure = plots.noise_kinds({"ce": of_run, "margin": {("uniform", RELATIVE): other}})
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == [
        *("(a)  uniform", "(b)  uniform", "(c)  asc", "(d)  asc", "(e)  substitution"),
    ]
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == ["", "", ABSOLUTE, RELATIVE, "probability"]  # once a column
    x0 = [round(axes.get_subplotspec().get_position(figure).x0, 3) for axes in figure.axes]
    assert x0[0] == x0[2] == x0[4] < x0[1] == x0[3]
    assert curve(figure.axes[0]) == [[0, 1], [0.5, 1.5]]
    assert bars(figure.axes[0]) == [[[0, 1], [0, 1]], [[0.5, 1.4], [0.5, 1.6]]]
    assert [len(axes.lines) for axes in figure.axes] == [1, 2, 1, 1, 1]
    assert curve(figure.axes[1], 1) == [[0, 1], [0.5, 2.5]]
    assert curve(figure.axes[4]) == [[0, 1], [0.5, 2.5]]
    assert "clean" in figure.get_supylabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ce", "margin"]


def test_groups_of_tokens_stand_in_order_with_their_intervals():
    rows = [[0.4, 0.3, 0.5], [0.2, 0.1, 0.3], [np.nan] * 3]
    figure = plots.loss_by_margin(
        {"margin": {"post hoc": rows, "trained": rows}, "other": {"post hoc": rows}}
    )
    first, second = figure.axes
    assert first.get_title("left") == "(a)  margin"
    assert [line.get_ydata()[:2].tolist() for line in first.lines[:2]] == [[0.4, 0.2]] * 2
    left, right = (line.get_xdata() for line in first.lines[:2])
    np.testing.assert_allclose((left + right) / 2, [1, 2, 3])
    assert np.all(left < right)
    assert bars(first)[0] == [[left[0], 0.3], [left[0], 0.5]]
    assert curve(second)[:2] == [[1, 0.4], [2, 0.2]]
    # A stage looks the same in every panel.
    assert first.lines[0].get_color() == second.lines[0].get_color() != first.lines[1].get_color()


def test_the_barrier_has_a_panel_for_each_quantity_and_stage():
    runs = {
        "ce": [
            watched(1, min_margin_kind="reduced, first layer"),
            watched(2, min_margin_kind="reduced, first layer"),
        ],
        "full": [watched(1), watched(2, mean_log_det=None)],
    }
    figure = plots.barrier_curves(runs)
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert len(labels) == len(set(labels)) == 9  # four of a stage, twice, and the embeddings
    panels = dict(zip(labels, figure.axes, strict=True))
    eigenvalues = panels["eigenvalues of A + A\N{MODIFIER LETTER CAPITAL T}\n(separate)"]
    assert [curve(eigenvalues, n) for n in (0, 1)] == [[[1, -3], [2, -3]], [[1, 1], [2, 1]]]
    assert curve(panels["mean log det (nats)\n(separate)"]) == [[1, 2]]
    assert curve(panels["mean log det (nats)\n(first layer)"]) == [[1, 2], [2, 2]]
    assert [curve(panels["embedding RMS"], n) for n in (0, 1)] == [[[1, 0.1], [2, 0.2]]] * 2
    assert panels["infeasible fraction\n(separate)"].get_ylim()[0] == 0


def test_rows_of_earlier_versions_are_left_out():
    old = {"step": 1, "min_margin_kind": "reduced, separate", "infeasible_fraction": 0.25}
    figure = plots.barrier_curves({"run": [old, watched(2)]})
    panels = {axes.get_ylabel().split("\n")[0]: axes for axes in figure.axes}
    assert curve(panels["mean margin"]) == [[2, 0.5]]
    assert curve(panels["infeasible fraction"]) == [[1, 0.25], [2, 0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.noise_kinds({}), "results: got no entries, expected at least one"),
        (lambda: plots.noise_kinds({"ce": {}}), "results: got no entries, expected at least one"),
        (
            lambda: plots.noise_kinds({"ce": {("uniform", RELATIVE): [[0, 1, 1]]}}),
            r"results\['ce'\]\[\('uniform', .* shape \(1, 3\), expected rows of 4 columns",
        ),
        (lambda: plots.loss_by_margin({}), "bins: got no entries"),
        (lambda: plots.loss_by_margin({"margin": {}}), r"bins\['margin'\]: got no entries"),
        (
            lambda: plots.loss_by_margin({"margin": {"post hoc": np.empty((0, 3))}}),
            r"shape \(0, 3\), expected rows of 3 columns",
        ),
        (lambda: plots.barrier_curves({}), "runs: got no entries"),
        (lambda: plots.barrier_curves({"run": [{"step": 1}]}), "runs: got no entries"),
    ],
)
def test_bad_input_names_what_was_got_and_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
