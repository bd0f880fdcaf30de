"""The overview of the page in a browser: where it leads, its colours, and what it keeps."""

import base64
import dataclasses

import numpy as np
import pytest

from probattn.inference.pages.colours import ANCHORS, UNKNOWN
from probattn.inference.pages.page import page_html
from tests.support.browser import current, number, open_page, size, three_digits
from tests.support.made_pages import COUNT, WINDOW, made_page

pytestmark = pytest.mark.slow


def test_the_overview_leads_to_the_text(driver, file):
    open_page(driver, file)
    driver.execute_script(
        "const box = document.getElementById('overview'), frame = box.getBoundingClientRect();"
        "box.dispatchEvent(new MouseEvent('click', {bubbles: true, clientX: frame.right - 1,"
        " clientY: frame.top + 14}));"
    )
    assert current(driver) == COUNT - 1
    shown = driver.execute_script("return document.getElementById('a').value")
    assert shown == "1"  # the second lane


def test_a_click_on_the_label_of_a_lane_chooses_it_and_stays_where_the_reader_is(driver, file):
    open_page(driver, file, "#at=70")
    clicked = (
        "const box = document.getElementById('overview'), frame = box.getBoundingClientRect();"
        "box.dispatchEvent(new MouseEvent('click', {bubbles: true, clientX: frame.left + 20,"
        " clientY: frame.top + arguments[0]})); return document.getElementById('a').value;"
    )
    assert driver.execute_script(clicked, 26) == "2"  # the third lane
    assert current(driver) == 70
    assert driver.execute_script(clicked, 80) == "2"  # beside the line, which is of no lane
    assert current(driver) == 70


def lanes_of(driver, columns):
    """The colours of the lanes of the overview, (lane, column, 3), and where the line is drawn.

    The line is the height of its highest point in each column, from 0 to 1.
    """
    data, width, height, left = driver.execute_script(
        "const box = document.getElementById('overview'), canvas = box.querySelector('canvas');"
        "const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;"
        "let text = ''; for (const each of data) text += String.fromCharCode(each);"
        "return [btoa(text), canvas.width, canvas.height,"
        " Math.min(130, Math.round(box.clientWidth * 0.28))];"
    )
    pixels = np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)
    room = width - left
    assert columns == min(room, columns)
    middle = left + ((np.arange(columns) + 0.5) * room / columns).astype(int)
    top = height - 64
    lanes = pixels[5 : top - 6 : 11, middle, :3].astype(int)
    strip = pixels[top + 2 : top + 62, middle, 3] > 128  # within its frame; the ground is clear
    return lanes, 1 - (strip.argmax(0) - 2) / 56


def expected_colours(values, low, high):
    """The colours of cividis between the limits that the legend prints."""
    place = np.clip((values - low) / (high - low), 0, 1) * (len(ANCHORS) - 1)
    known = np.where(np.isnan(place), 0, place)
    channels = [np.interp(known, range(len(ANCHORS)), each) for each in np.array(ANCHORS).T]
    return np.where(np.isnan(place)[..., None], UNKNOWN, np.stack(channels, -1))


@pytest.mark.parametrize("show", ["a", "d"])
@pytest.mark.parametrize("quantity", ["margin", "certificate"])
def test_the_overview_has_the_colours_of_the_legend_and_keeps_what_is_looked_for(
    driver, tmp_path, quantity, show
):
    count, columns = 160 * WINDOW, 250
    page = made_page(list("token" * (count // 5)), runs=("run",), stages=3)
    rng = np.random.default_rng(1)
    scales = (1.0, 0.2, 3.0)  # so that limits of all stages are not those of the one shown
    series = [
        dataclasses.replace(
            each, values={**each.values, "certificate": s * rng.exponential(1, count)}
        )
        for s, each in zip(scales, page.series, strict=True)
    ]
    path = tmp_path / "page.html"
    html = page_html(dataclasses.replace(page, series=series))
    path.write_text(html, encoding="ascii")
    size(driver, 130 + columns + 32, 900)
    open_page(driver, path, f"#q={quantity}&show={show}&a=0&b=1")
    low, high = (number(driver.find_element("id", each).text) for each in ("low", "high"))
    values = np.array([three_digits(each.values[quantity]) for each in series])
    if show == "d":
        values -= values[1]
    inner = np.arange(count) % WINDOW >= 2
    ordered = np.sort(values[0][inner][np.isfinite(values[0][inner])])
    np.testing.assert_allclose(
        [low, high], [ordered[round(q * (len(ordered) - 1))] for q in (0.01, 0.99)], rtol=6e-3
    )
    wide = driver.execute_script("return document.getElementById('overview').clientWidth")
    columns = wide - min(130, int(wide * 0.28 + 0.5))
    column = np.arange(count) * columns // count
    worst = np.nanmax if quantity == "certificate" else np.nanmin
    shown = np.array([[worst(each[column == x]) for x in range(columns)] for each in values])
    lanes, line = lanes_of(driver, columns)
    # The legend prints three digits of its limits: a step between colours is at most 25 wide.
    assert np.abs(lanes - expected_colours(shown, low, high)).max() <= 3
    height = np.clip((shown[0] - low) / (high - low), 0, 1)
    assert (line > height - 0.05).all()  # the line goes through it, and may come from above
    peaks = np.flatnonzero(height > 0.99) if quantity == "certificate" else []
    assert (line[peaks] > 0.95).all()
    said = driver.find_element("id", "lanes").text
    assert said.startswith(f"The {'largest' if quantity == 'certificate' else 'smallest'} value of")
    assert said.endswith("of each stage \u2212 head 2") == (show == "d")
