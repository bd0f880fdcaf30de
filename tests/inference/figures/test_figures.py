"""Figures: what they show is what they were given, and they are legible and written whole."""

import math
import os
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from probattn.inference import figures as plots
from probattn.inference import figures as robustness_plots
from tests.support.figure_parts import legend, text_figure

STEPS = [10, 20, 30]
NOISE = {
    "noise_absolute": [0, 0.1, 0.5],
    "bpc_absolute": [2.0, 3.0, 5.0],
    "noise_relative": [0, 0.5],
    "bpc_relative": [2.5, 3.0],
}


def row(step, **changed):
    return {
        "step": step,
        "bpc": 2.0 + 1 / step,
        "validation_bpc": 2.1 + 1 / step,
        "min_margin": 0.5 - step / 100,
        "min_margin_kind": "reduced, separate",
        "infeasible_fraction": 0.0,
    } | changed


def rows(**changed):
    return [row(step, **changed) for step in STEPS]


def lines(axes, label):
    return [line for line in axes.lines if line.get_label() == label]


def boundaries(axes, along="y"):
    """Lines at margin 0 that cross the whole panel."""
    get = ("get_ydata", "get_xdata") if along == "y" else ("get_xdata", "get_ydata")
    ends = [[np.asarray(getattr(line, each)()).tolist() for each in get] for line in axes.lines]
    return [each for each in ends if each == [[0, 0], [0, 1]]]


# A label and a text that invite trouble: no legend entry, bad mathematics, no glyph, and long.
ODD = "_cost $\\frac{$\n\u4e2d " + "runs/of/a/very/long/name/" * 3
MARGIN = np.random.default_rng(0).uniform(-0.2, 1.0, 3000)
SWEEP = np.array([[0, 1, 1, 1], [0.1, 1.4, 1.3, 1.5], [0.5, np.nan, np.nan, np.nan]])
WATCHED = {
    "mean_margin": 1.0001,
    "mean_log_det": -0.3,
    "coupling_eigenvalue_min": -120.5,
    "coupling_eigenvalue_max": 0.4,
    "embedding_rms": 0.1,
}
EXAMPLES = {
    "training": lambda: plots.training_curves(
        {
            "ce": rows(min_margin_kind="reduced, first layer"),
            ODD: [
                *rows(),
                row(40, min_margin=-0.1),
                row(50, bpc=math.inf, validation_bpc=math.nan),
            ],
            "two rows": [row(7, min_margin_kind="$\\frac{$ \u4e2d"), row(9, min_margin_kind="det")],
        }
    ),
    "training, no margins": lambda: plots.training_curves({ODD: rows(min_margin=None)}),
    "noise": lambda: plots.noise_sweep({"ce": NOISE, ODD: NOISE}),
    "kinds of noise": lambda: robustness_plots.noise_kinds(
        {
            label: {
                (kind, unit): SWEEP
                for kind in ("gaussian", "ascent-1", "ascent-10")
                for unit in ("noise (embedding units)", "noise / embedding RMS")
            }
            | {("substitution", "probability"): SWEEP}
            for label in ("ce", ODD)
        }
    ),
    "loss by margin": lambda: robustness_plots.loss_by_margin(
        {
            by: dict.fromkeys(("post hoc", "trained", ODD), SWEEP[:, 1:])
            for by in ("margin", "embedding margin", "margin of heads")
        }
    ),
    "barrier": lambda: robustness_plots.barrier_curves(
        {
            "ce": rows(min_margin_kind="reduced, first layer", **WATCHED),
            ODD: rows(**WATCHED | {"mean_log_det": None, "infeasible_fraction": 0.0}),
        }
    ),
    "along": lambda: plots.margin_along_text(
        {"post hoc, sigma_min": MARGIN, ODD: np.full(3000, np.nan)},
        support=[5, 17],
        window_starts=np.arange(0, 3000, 64),
        title=ODD,
    ),
    "along, one token": lambda: plots.margin_along_text({ODD: [-np.inf]}, support=[0]),
    "text": lambda: text_figure(list(ODD), MARGIN[: len(ODD)], support=[3, 4], label=ODD),
    "distribution": lambda: plots.margin_distribution({"ce": MARGIN, ODD: [np.nan, -np.inf, 0.5]}),
}


@pytest.fixture(scope="module", params=EXAMPLES)
def example(request):
    figure = EXAMPLES[request.param]()
    figure.draw_without_rendering()
    return figure


def test_every_figure_has_a_column_width_and_keeps_its_marks_inside(example):
    assert example.get_figwidth() in (3.4, 7.0)
    box = example.get_tightbbox()  # in inches
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= example.get_figwidth()
    assert box.y1 <= example.get_figheight()


def test_no_legend_covers_a_panel(example):
    for found in example.legends:
        for axes in example.axes:
            assert not found.get_window_extent().overlaps(axes.get_window_extent())


def test_curves_differ_without_colour():
    figure = plots.noise_sweep({str(number): NOISE for number in range(5)})
    styles = [(line.get_linestyle(), line.get_marker()) for line in figure.axes[0].lines]
    dashes = {line._unscaled_dash_pattern for line in figure.axes[0].lines}
    assert len(set(styles)) == 5
    assert len(dashes) == 5


def test_training_curves_show_both_texts_and_the_margin():
    figure = plots.training_curves({"ce": rows(), "full": rows(bpc=3.0)})
    curves, margins = figure.axes
    training, validation = lines(curves, "ce")
    assert training.get_xydata().tolist() == [[s, 2.0 + 1 / s] for s in STEPS]
    assert validation.get_xydata().tolist() == [[s, 2.1 + 1 / s] for s in STEPS]
    assert training.is_dashed()
    assert not validation.is_dashed()
    assert training.get_linewidth() < validation.get_linewidth()
    assert lines(curves, "full")[0].get_ydata().tolist() == [3.0] * 3
    [margin] = lines(margins, "ce")
    assert margin.get_xydata().tolist() == [[s, 0.5 - s / 100] for s in STEPS]
    assert legend(figure)[:2] == ["ce", "full"]
    assert {"training text", "validation text"} <= set(legend(figure))
    assert curves.get_ylabel() == "bits per character"
    assert "step" in curves.get_xlabel()


def test_margins_of_different_kinds_share_no_panel():
    runs = {"ce": rows(min_margin_kind="reduced, first layer"), "margin": rows()}
    _, first, second = plots.training_curves(runs).axes
    assert "(reduced, first layer)" in first.get_ylabel()
    assert "(reduced, separate)" in second.get_ylabel()
    assert lines(first, "ce")
    assert not lines(first, "margin")
    assert lines(second, "margin")
    assert not lines(second, "ce")
    assert len(boundaries(first)) == len(boundaries(second)) == 1


def test_what_was_not_measured_is_left_out():
    runs = {
        "ce": [row(10), row(20, min_margin=None, validation_bpc=None), row(30)],
        "none": rows(min_margin=None, min_margin_kind=None),
    }
    curves, margins = plots.training_curves(runs).axes
    assert lines(curves, "ce")[1].get_xdata().tolist() == [10, 30]
    assert lines(margins, "ce")[0].get_xdata().tolist() == [10, 30]
    assert not lines(margins, "none")
    assert len(plots.training_curves({"none": runs["none"]}).axes) == 1


def test_the_steep_start_does_not_flatten_the_rest():
    steps = range(1, 101)
    runs = {"ce": [row(s, bpc=2.0, validation_bpc=9.0 if s < 5 else 2 + 1 / s) for s in steps]}
    low, high = plots.training_curves(runs).axes[0].get_ylim()
    assert low < 2.0
    assert 2.05 < high < 3.0
    rising = {"ce": [row(s, validation_bpc=2.0 + s) for s in steps]}
    assert plots.training_curves(rising).axes[0].get_ylim()[1] > 102


def test_infeasible_margins_are_shaded_and_only_they():
    feasible = plots.training_curves({"ce": rows()})
    assert "infeasible" not in legend(feasible)
    assert not feasible.axes[1].patches
    figure = plots.training_curves({"ce": rows(min_margin=-0.3)})
    [shade] = figure.axes[1].patches
    assert shade.get_extents().transformed(figure.axes[1].transData.inverted()).y1 == (
        pytest.approx(0, abs=1e-12)
    )
    assert shade.get_y() == pytest.approx(figure.axes[1].get_ylim()[0])
    assert shade.get_y() < -0.3
    assert "infeasible" in legend(figure)


def test_noise_is_shown_absolute_and_relative_and_degradation_starts_at_one():
    figure = plots.noise_sweep({"ce": NOISE})
    points = [lines(axes, "ce")[0].get_xydata().tolist() for axes in figure.axes]
    assert points[0] == [[0, 2.0], [0.1, 3.0], [0.5, 5.0]]
    assert points[1] == [[0, 1.0], [0.1, 1.5], [0.5, 2.5]]
    assert points[2] == [[0, 2.5], [0.5, 3.0]]
    assert points[3] == [[0, 1.0], [0.5, 1.2]]
    for axes, x, y in zip(figure.axes, "aarr", ("", "clean", "", "clean"), strict=True):
        unit = {"a": "embedding units", "r": "embedding RMS"}[x]
        assert unit in axes.get_xlabel()
        assert "bits per character" in axes.get_ylabel()
        assert ("clean" in axes.get_ylabel()) == bool(y)
    letters = [axes.get_title("left").strip() for axes in figure.axes]
    assert letters == ["(a)", "(b)", "(c)", "(d)"]


def test_a_sweep_in_any_order_is_relative_to_its_point_without_noise():
    shuffled = NOISE | {"noise_absolute": [0.5, 0, 0.1], "bpc_absolute": [5.0, 2.0, 3.0]}
    axes = plots.noise_sweep({"ce": shuffled}).axes[1]
    assert axes.lines[0].get_xydata().tolist() == [[0, 1.0], [0.1, 1.5], [0.5, 2.5]]


def test_margins_along_a_text():
    first, second = np.array([1.0, 1.0, 0.2, 0.6]), np.array([1.0, 1.0, -0.4, 0.5])
    figure = plots.margin_along_text(
        {"post hoc, sigma_min": first, "trained, sigma_min": second},
        support=np.array([2, 3]),
        window_starts=[0, 2],
        title="a text",
    )
    above, below = figure.axes
    assert lines(above, "post hoc, sigma_min")[0].get_ydata().tolist() == first.tolist()
    assert lines(below, "trained, sigma_min")[0].get_xdata().tolist() == [0, 1, 2, 3]
    assert lines(below, "trained, sigma_min")[0].get_ydata().tolist() == second.tolist()
    [support] = lines(above, "support token")
    assert support.get_xydata().tolist() == [[2, 0.2], [3, 0.6]]
    assert support.get_marker() not in ("", "None")
    assert not lines(below, "support token")
    assert above.get_title("left") == "(a)  post hoc, sigma_min"
    assert below.get_title("left") == "(b)  trained, sigma_min"
    assert len(boundaries(above)) == len(boundaries(below)) == 1
    assert len(above.patches) == 0
    assert len(below.patches) == 1
    [ticks] = above.collections
    assert [segment[0][0] for segment in ticks.get_segments()] == [0, 2]
    assert figure.legends[0].get_title().get_text() == "a text"
    assert "tokens" in below.get_xlabel()


def test_a_long_text_keeps_every_dip():
    margin = np.random.default_rng(1).uniform(0.5, 1.0, 10_000)
    dips = [0, 4321, 9999]
    margin[dips] = [0.1, -0.2, 0.05]
    figure = plots.margin_along_text({"sigma_min": margin}, support=[4321])
    [line] = lines(figure.axes[0], "sigma_min")
    x, y = line.get_xdata(), line.get_ydata()
    assert len(x) <= 600
    assert set(dips) <= set(x.tolist())
    np.testing.assert_array_equal(y, margin[x])
    stretch = math.ceil(10_000 / 600)
    assert f"each {stretch} tokens" in figure.get_supylabel()
    for index, start in enumerate(range(0, 10_000, stretch)):
        assert y[index] == margin[start : start + stretch].min()


def test_margins_that_are_not_finite_still_have_a_support_token_in_sight():
    margin = [1.0, np.nan, -np.inf, np.inf, 0.5]
    axes = plots.margin_along_text({"log_det": margin}, support=[2]).axes[0]
    [support] = lines(axes, "support token")
    assert axes.get_ylim()[0] < support.get_ydata()[0] < 0
    drawn = lines(axes, "log_det")[0].get_ydata()
    assert np.isfinite(drawn).tolist() == [True, False, True, False, True]


def test_more_window_starts_than_can_be_told_apart_are_left_out():
    figure = plots.margin_along_text(
        {"sigma_min": np.ones(900)}, support=[], window_starts=np.arange(0, 900, 2)
    )
    assert not figure.axes[0].collections
    assert "window start" not in legend(figure)


def test_the_distribution_counts_tokens_at_or_below_each_margin():
    margin = np.array([0.5, 0.2, 0.9, 0.2])
    figure = plots.margin_distribution({"ce, sigma_min": margin, "full, sigma_min": [-0.25, 1.0]})
    [axes] = figure.axes
    x, y = lines(axes, "ce, sigma_min")[0].get_data()
    for value in margin:
        assert y[x <= value].max() == np.mean(margin <= value)
    assert axes.get_yscale() == "log"
    assert axes.get_xlim()[0] < -0.25
    assert len(boundaries(axes, "x")) == len(axes.patches) == 1
    for label, smallest in (("ce, sigma_min", "0.2"), ("full, sigma_min", "-0.25")):
        [line] = lines(axes, label)
        assert line.get_markevery() == [0]  # the marker is at the smallest
        assert f"{label} (min {smallest})" in legend(figure)


def test_the_distribution_says_what_it_does_not_show():
    figure = plots.margin_distribution({"ce": [np.nan, -np.inf, 0.5, np.inf]})
    [line] = lines(figure.axes[0], "ce")
    assert line.get_xydata().tolist() == [[0.5, 2 / 3]]
    assert "3 not finite" in legend(figure)[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.training_curves({}), "runs: got no entries, expected at least one"),
        (lambda: plots.training_curves({"ce": []}), r"runs\['ce'\]: got no rows, expected"),
        (lambda: plots.noise_sweep({}), "results: got no entries, expected"),
        (
            lambda: plots.noise_sweep({"ce": NOISE | {"bpc_relative": [1.0]}}),
            "inhomogeneous",
        ),
        (
            lambda: plots.noise_sweep({"ce": NOISE | {"noise_relative": [0.1, 0.5]}}),
            "got noise 0.1 with BPC 2.5 for the least noise_relative, expected noise 0",
        ),
        (
            lambda: plots.noise_sweep({"ce": NOISE | {"bpc_relative": [0.0, 1.0]}}),
            "got noise 0 with BPC 0 .* expected noise 0 with a positive BPC",
        ),
        (
            lambda: plots.noise_sweep({"ce": NOISE | {"noise_relative": [], "bpc_relative": []}}),
            "got no points for the least noise_relative, expected",
        ),
        (lambda: plots.margin_along_text({}, support=[]), "margins: got no entries, expected"),
        (
            lambda: plots.margin_along_text({"a": [1.0], "b": [1.0, 2.0]}, support=[]),
            r"margins\['b'\]: got 2 margins, expected one for each .* the 1 of margins\['a'\]",
        ),
        (
            lambda: plots.margin_along_text({"a": np.ones((2, 3))}, support=[]),
            r"margins\['a'\]: got an array of shape \(2, 3\), expected one dimension",
        ),
        (
            lambda: plots.margin_along_text({"a": []}, support=[]),
            r"margins\['a'\]: got 0 margins, expected one for each token",
        ),
        (
            lambda: plots.margin_along_text({"a": [1.0, 1.0]}, support=[2]),
            "support: got position 2, expected 0 to 1",
        ),
        (
            lambda: plots.margin_along_text({"a": [1.0]}, support=[], window_starts=[0.5]),
            "window_starts: got float64 of shape .* expected a vector of integers",
        ),
        (lambda: text_figure(["a", "b"], [1.0]), "margin: got 1 margins for 2 tokens, expected"),
        (lambda: text_figure([], []), "margin: got 0 margins for 0 tokens, expected"),
        (lambda: text_figure(["a"], [1.0], support=[-1]), "support: got position -1, expected 0"),
        (
            lambda: text_figure(["a"], [1.0], max_characters=0),
            "max_characters: got 0, expected at least 1",
        ),
        (lambda: plots.margin_distribution({}), "margins: got no entries, expected"),
        (
            lambda: plots.margin_distribution({"a": [np.nan]}),
            r"margins\['a'\]: got 1 margins, none finite, expected at least one",
        ),
        (lambda: plots.save_figure(Figure(), "figure.pdf"), "path: got 'figure.pdf', expected"),
    ],
)
def test_bad_input_names_what_was_got_and_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_figure_is_a_png_of_200_dots_per_inch_in_a_new_folder(tmp_path):
    figure = plots.noise_sweep({"ce": NOISE})
    path = plots.save_figure(figure, tmp_path / "new" / "figures" / "noise.png")
    image = path.read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    size = int.from_bytes(image[16:20], "big"), int.from_bytes(image[20:24], "big")
    assert size == (round(200 * figure.get_figwidth()), round(200 * figure.get_figheight()))
    assert [each.name for each in path.parent.iterdir()] == ["noise.png"]


@pytest.mark.parametrize("broken", ["savefig", "replace"])
def test_a_failed_write_leaves_the_old_figure(broken, tmp_path, monkeypatch):
    def half(_, file, **options):
        file.write(b"half of a picture")
        raise OSError(28, "No space left on device")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "noise.png"
    path.write_bytes(b"the old figure")
    if broken == "savefig":
        monkeypatch.setattr(Figure, "savefig", half)
    else:
        monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        plots.save_figure(Figure(), path)
    assert path.read_bytes() == b"the old figure"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_an_error_and_nothing_is_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        plots.save_figure(Figure(), tmp_path / "file" / "noise.png")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_the_user_style_neither_matters_nor_changes(tmp_path):
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "savefig.bbox": "tight"}):
        before = dict(matplotlib.rcParams)
        figure = plots.noise_sweep({"ce": NOISE})
        path = plots.save_figure(figure, tmp_path / "noise.png")
        assert dict(matplotlib.rcParams) == before
        assert figure.axes[0].xaxis.label.get_size() == 8
        assert figure.axes[0].xaxis.get_major_ticks()[0].label1.get_size() == 7
        assert int.from_bytes(path.read_bytes()[16:20], "big") == 1400


@pytest.mark.slow
def test_matplotlib_is_loaded_by_the_first_figure_and_pyplot_never():
    code = """
import sys, probattn.inference
assert "matplotlib" not in sys.modules
from probattn.inference import figures as plots
from probattn.inference import figures as robustness_plots
plots.margin_distribution({"a": [0.5]})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
