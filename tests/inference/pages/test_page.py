"""The file of a page: numbers, policy, escapes and size, without a browser."""

import base64
import dataclasses
import hashlib
import json
import re
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from matplotlib import colormaps

from probattn.inference.pages.colours import UNKNOWN, colours, ink
from probattn.inference.pages.notebook import facts_in_notebook, text_in_notebook
from probattn.inference.pages.numbers import codes, planes
from probattn.inference.pages.page import MOST_TOKENS, check_length, page_html
from tests.support.made_pages import HOSTILE, made_page


def value_of(code, least):
    """The inverse of `codes`, as its docstring states it."""
    if code < 4:
        return [np.nan, -np.inf, np.inf, 0.0][code]
    half, negative = divmod(code - 4, 2)
    exponent, mantissa = divmod(half, 900)
    return float(f"{'-' if negative else ''}{mantissa + 100}e{exponent + least - 2}")


@given(npst.arrays(np.float64, st.integers(1, 20), elements=st.floats(width=32)))
def test_numbers_keep_the_three_digits_that_python_would_print(values):
    found, least = codes(values)
    assert [repr(value_of(int(code), least)) for code in found] == [
        repr(float(f"{value:.2e}") + 0.0) for value in values.tolist()
    ]
    content, count = planes(found)
    whole = sum(content.reshape(count, -1)[rank].astype(int) << 8 * rank for rank in range(count))
    assert list(whole) == list(found)


def test_numbers_near_a_power_of_ten():
    values = np.array([0.9995, 0.99949, 9.995e-7, 999.5, 1000.0, 1e-3, -0.99951, 1.125, 1.135])
    found, least = codes(values)
    expected = [float(f"{value:.2e}") for value in values.tolist()]
    assert [value_of(int(code), least) for code in found] == expected


def test_the_colours_are_those_of_cividis_and_grey_for_none():
    values = np.append(np.linspace(0, 1, 256), np.nan)
    values[:3], values[-4:-1] = 0, 1  # so that the percentiles are the ends
    low, high = np.quantile(values[:-1], [0.01, 0.99])
    place = np.clip((values[:-1] - low) / (high - low), 0, 1)
    expected = np.asarray(colormaps["cividis"](place))[:, :3] * 255
    found = colours(values)
    assert np.abs(found[:-1] - expected).max() <= 13
    assert tuple(found[-1]) == UNKNOWN
    assert [ink(found[0]), ink(found[-2])] == ["#fff", "#000"]


@pytest.fixture(scope="module")
def hostile():
    tokens = [HOSTILE[i % len(HOSTILE)] for i in range(96)]
    return page_html(made_page(tokens, title="</title>{{data}}<b>&"))


def parts_of(page):
    """Style, JSON and script of a page."""
    return (
        re.search("<style>(.*?)</style>", page, re.DOTALL)[1],
        re.search('<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1],
        re.search("<script>(.*?)</script>", page, re.DOTALL)[1],
    )


def test_the_policy_allows_the_pages_own_script_and_style_and_nothing_else(hostile):
    style, _, script = parts_of(hostile)
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', hostile)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    digest = {
        name: base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        for name, part in (("script-src", script), ("style-src", style))
    }
    assert rules == {
        "default-src": "'none'",
        "script-src": f"'sha256-{digest['script-src']}'",
        "style-src": f"'sha256-{digest['style-src']}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_no_token_is_more_than_text(hostile):
    assert hostile.isascii()
    _, data, _ = parts_of(hostile)
    assert "<" not in data
    assert hostile.count("</script>") == 2
    assert hostile.count("</title>") == 1
    content = json.loads(data)
    bytes_ = zlib.decompress(base64.b64decode(content["blobs"][0]))
    numbers = np.frombuffer(bytes_, np.uint8)[content["tokens"]["at"] :][:96]
    assert [content["symbols"][number] for number in numbers] == [
        HOSTILE[i % len(HOSTILE)] for i in range(96)
    ]
    assert content["title"] == "</title>{{data}}<b>&"


def test_a_page_asks_for_nothing(hostile):
    style, _, script = parts_of(hostile)
    for source in (style, script):
        assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest|import\(", source)
    assert re.findall(r'(?:src|href)="([^"]*)"', hostile) == ["data:,"]


@pytest.mark.slow
def test_a_long_text_of_twelve_stages_has_four_million_bytes_and_the_past_that_fits():
    tokens = list("the token of a margin, and so on "[:32] * 625)
    assert len(tokens) == 20_000
    page = page_html(made_page(tokens, runs=("run",), stages=12))
    assert 3_000_000 < len(page) <= 4_000_000
    assert 1 <= json.loads(parts_of(page)[1])["ranks"] < 8
    short = page_html(made_page(tokens[:1600], runs=("run",), stages=12))
    assert json.loads(parts_of(short)[1])["ranks"] == 8


def test_texts_that_no_page_shows():
    with pytest.raises(ValueError, match=r"^a text: has no tokens: a page shows at least one$"):
        page_html(dataclasses.replace(made_page(["x"] * 32), tokens=[]))
    expected = r"^long: has 200,001 tokens: a page shows at most 200,000; give a shorter text$"
    with pytest.raises(ValueError, match=expected):
        check_length("long", MOST_TOKENS + 1)


def test_a_page_without_series_is_refused():
    expected = "^a text: has no margins: a page shows values of at least one attention stage$"
    with pytest.raises(ValueError, match=expected):
        page_html(dataclasses.replace(made_page(["x"] * 32), series=[]))


def test_a_notebook_shows_the_beginning_of_a_text():
    tokens = ["<b>", "\n", "", "\x1b", "x"] * 100
    values = np.linspace(-0.5, 1, 500)
    support = np.zeros(500, bool)
    support[4] = True
    series = {"head <1>": np.array([0.25, 0.5, np.nan])}
    shown = text_in_notebook("a & b", tokens, values, support, "margin", series, 500)
    assert "<b>a &amp; b</b>" in shown
    assert "&lt;b&gt;" in shown
    assert "<b><" not in shown
    assert "\x1b" not in shown
    assert "<script" not in shown
    assert shown.count("<span ") == 400
    assert "the first 400 of 500 tokens" in shown
    assert shown.count("box-shadow") == 1
    assert shown.count("line-through") == int((values[:400] <= 0).sum())
    assert "<td" in shown
    assert ">head &lt;1&gt;</td>" in shown
    assert ">0.25</td>" in shown
    red, green, blue = colours(values[:400])[4]
    assert f"background:rgb({red},{green},{blue})" in shown


def test_a_notebook_shows_facts():
    shown = facts_in_notebook("Run in <here>", {"loss": 1.23456, "name": "a&b"})
    assert "<b>Run in &lt;here&gt;</b>" in shown
    assert ">1.235</td>" in shown
    assert ">a&amp;b</td>" in shown
