"""Text coloured by its margins: what is shown of which token, and that it can be read."""

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from probattn.inference import figures as plots
from tests.support.figure_parts import collection, text_figure


def test_each_token_is_coloured_by_its_margin():
    tokens = ["the", " cat", " sat", "\n", "on"]
    margin = np.array([0.9, 0.1, 0.5, 0.3, 0.7])
    figure = text_figure(tokens, margin, support=[1], label="post hoc, sigma_min")
    page, bar = figure.axes
    faces = collection(page, "tokens").get_facecolor()
    brightness = faces[:, :3] @ [0.299, 0.587, 0.114]
    assert np.argsort(brightness).tolist() == np.argsort(margin).tolist()
    [box] = collection(page, "support").get_paths()
    assert (box.get_extents().x0, box.get_extents().x1) == (3, 7)  # " cat" in columns 3 to 6
    assert "margin (post hoc, sigma_min)" in bar.get_xlabel()
    assert "".join(text.get_text() for text in page.texts) == "thecatsat↵on"
    rows = [text.get_position()[1] // 1 for text in page.texts]
    assert rows == [0] * 10 + [1] * 2


def test_the_ink_contrasts_with_its_background():
    page = text_figure(list("abcdefghij"), np.linspace(0, 1, 10)).axes[0]
    faces = collection(page, "tokens").get_facecolor()
    for text, face in zip(page.texts, faces, strict=True):
        light, dark = sorted(map(luminance, (to_rgba(text.get_color()), face)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2.1, level AA


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_margins_that_are_not_finite_have_a_colour_of_their_own():
    margin = np.array([np.nan, -np.inf, np.inf, 0.2, 0.8])
    figure = text_figure(list("abcde"), margin)
    nan, below, above, low, high = collection(figure.axes[0], "tokens").get_facecolor()
    assert nan[0] == nan[1] == nan[2]
    np.testing.assert_allclose(below, low)
    np.testing.assert_allclose(above, high)
    assert "no margin" in figure.texts[0].get_text()


@pytest.mark.parametrize("constant", [np.nan, np.inf, 0.0, 1.0])
def test_no_token_stands_out_where_all_margins_are_the_same(constant):
    page = text_figure(list("ab"), [constant] * 2).axes[0]
    first, second = collection(page, "tokens").get_facecolor()
    assert luminance(first) > 0.5
    np.testing.assert_array_equal(first, second)


def test_awkward_characters_are_drawn_without_a_warning(tmp_path):
    text = "$x_{1}$ $5\t\r\n\x00\x1b \u4e2d\u6587 \U0001f600 e\u0301 \u00a0\u200b \ud800\\frac{"
    figure = text_figure([*text, "", "$$"], np.ones(len(text) + 2), support=[0])
    plots.save_figure(figure, tmp_path / "text.png")  # a missing glyph would warn: an error here
    drawn = "".join(each.get_text() for each in figure.axes[0].texts)
    assert drawn.startswith("$x_{1}$$5⇥\ufffd↵\ufffd\ufffd")
    assert not any(each.get_parse_math() for each in figure.axes[0].texts)
    cells = sum(
        int(p.get_extents().width) for p in collection(figure.axes[0], "tokens").get_paths()
    )
    assert cells == len(text) + 2  # the empty token goes with the one before it


def test_a_character_of_several_tokens_is_drawn_once():
    """With the smallest of their margins, and boxed if one of them is a support token."""
    tokens = ["caf", "é", "", "", "!", ""]
    margin = np.array([0.9, 0.8, 0.1, np.nan, 0.7, np.nan])
    figure = text_figure(tokens, margin, support=[2])
    same = text_figure(["caf", "é", "!"], np.array([0.9, 0.1, 0.7]), support=[1])
    for gid in ("tokens", "support"):
        drawn, expected = (collection(each.axes[0], gid) for each in (figure, same))
        np.testing.assert_allclose(drawn.get_facecolor(), expected.get_facecolor())
        for path, other in zip(drawn.get_paths(), expected.get_paths(), strict=True):
            np.testing.assert_array_equal(path.vertices, other.vertices)
    assert "".join(each.get_text() for each in figure.axes[0].texts) == "café!"
    assert "no margin" not in figure.texts[0].get_text()


def test_a_cut_is_stated():
    figure = text_figure(["ab "] * 1000, np.ones(1000), support=[1, 999], max_characters=120)
    caption = figure.texts[0].get_text()
    assert "first 120 of 3000 characters" in caption
    assert "1 of 2" in caption
    assert len(collection(figure.axes[0], "tokens").get_paths()) == 40
    whole = text_figure(["ab "] * 40, np.ones(40), max_characters=120)
    assert "characters" not in whole.texts[0].get_text()
    many = text_figure(["\n"] * 500, np.ones(500))
    assert "first 100 of 500 characters" in many.texts[0].get_text()
    assert many.get_figheight() < 25
