"""The page in a browser: its numbers, its controls and keys, and that it asks for nothing."""

import csv
import dataclasses
import json
import re
import time

import numpy as np
import pytest

from probattn.inference.pages.page import LARGE_MATTER, QUANTITIES, page_html
from tests.support.browser import (
    axe,
    browser,
    choose,
    click,
    console,
    current,
    number,
    open_page,
    press,
    requests,
    require_browser,
    size,
    three_digits,
    violations,
)
from tests.support.made_pages import COUNT, HOSTILE, TOKENS, WINDOW, made_page

pytestmark = pytest.mark.slow


def test_every_number_of_every_token_is_that_of_numpy(driver, file, page):
    open_page(driver, file)
    shown = """(() => {
        const details = document.getElementById('details');
        const cells = (selector) =>
            [...details.querySelectorAll(selector)].map((e) => e.textContent);
        const lists = [...details.querySelectorAll('ol, h3 + p')].map((list) =>
            [...list.querySelectorAll('li')].map((item) =>
                [...item.querySelectorAll('span')].map((e) => e.textContent)));
        return [cells('tbody td'), cells('dd[data-value]'), cells('dd'), lists];
    })()"""
    found = press(driver, "ArrowRight", times=COUNT - 1, shown=shown)
    assert len(found) == COUNT - 1
    for token, (values, of_runs, facts, lists) in enumerate(found, start=1):
        expected = [each.values[name][token] for each in page.series for name in each.values]
        np.testing.assert_equal([number(cell) for cell in values], three_digits(expected))
        losses = [page.of_runs[run]["loss"][token] for run in ("first", "second")]
        assert [number(cell) for cell in of_runs] == three_digits(losses)
        assert facts[0] == f"{token} of the text"
        assert facts[1] == f"{token // WINDOW}, position {token % WINDOW}"
        for past, items in zip(
            (page.series[0].covariance, page.series[0].attention), lists, strict=True
        ):
            percents = np.rint(100 * past.share[token])
            assert [(share, back) for share, back in items] == [
                (f"{percent:.0f} %" if percent else "< 1 %", f"{back} back")
                for percent, back in zip(percents, past.behind[token], strict=True)
                if back
            ]


def test_the_table_and_the_csv_file_show_the_same(driver, file, page):
    open_page(driver, file)
    click(driver, "#table-box summary")
    driver.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 50))")
    rows = driver.execute_script(
        "return [...document.querySelectorAll('#table tbody tr')].map((row) =>"
        " [...row.children].map((cell) => cell.textContent))"
    )
    assert len(rows) == 100
    first = page.series[0]
    for token, row in enumerate(rows):
        expected = [each[token] for each in (*first.values.values(), page.of_runs["first"]["loss"])]
        assert [row[0], *row[2:4]] == [str(token), str(token // WINDOW), str(token % WINDOW)]
        cells = [str(number(cell)) for cell in row[4:-1]]
        assert sorted(cells) == sorted(map(str, three_digits(expected)))
        assert row[-1] == str(int(first.support[token]))
    click(driver, "#rows-next")
    caption = driver.execute_script("return document.querySelector('#table caption').textContent")
    assert caption == f"Tokens 101 to {COUNT} of {COUNT}"

    # What is shown, saved: the difference of two stages where it is at most -0.2.
    click(driver, "[name=show][value=d]")
    choose(driver, "limit", "-0.2")
    click(driver, "#csv")
    folder = file_in(driver)
    table = wait_for(folder / "margins.csv")
    difference = first.values["margin"] - page.series[2].values["margin"]
    with table.open(encoding="utf-8", newline="") as stream:
        saved = list(csv.DictReader(stream))
    kept = np.flatnonzero(difference <= -0.2)
    assert np.isnan(difference).any()  # what is not known is not at most -0.2
    assert [int(row["index"]) for row in saved] == kept.tolist()
    token_texts = [TOKENS[i] if TOKENS[i] != "\ud800" else "\ufffd" for i in kept]
    assert [row["token"] for row in saved] == token_texts
    said = [float(row["difference of margin (sigma_min)"]) for row in saved]
    np.testing.assert_allclose(said, difference[kept], atol=6e-3)  # of numbers of three digits
    margins = [float(row["first: head 1 margin (sigma_min)"]) for row in saved]
    np.testing.assert_equal(margins, three_digits(first.values["margin"][kept]))


def file_in(driver):
    from pathlib import Path

    [argument] = [each for each in driver.capabilities["chrome"].values() if "profile" in str(each)]
    return Path(argument).parent


def wait_for(path):
    for _ in range(100):
        if path.exists():
            return path
        time.sleep(0.1)
    raise AssertionError(f"{path} did not come")


@pytest.mark.parametrize("text", ["hostile", "characters", "one token"])
def test_a_hostile_text_is_shown_and_harmless(driver, tmp_path, text):
    tokens = {
        "hostile": [HOSTILE[i % len(HOSTILE)] for i in range(96)],
        "characters": list("x" * 100_000),
        "one token": [*"a b c" * 6, "x" * 100_000, "."],
    }[text]
    path = tmp_path / "page.html"
    path.write_text(page_html(made_page(tokens, runs=("run",), stages=1)), encoding="ascii")
    requests(driver), console(driver)
    open_page(driver, path)
    drawn = driver.execute_script(
        "return [...document.querySelectorAll('#rows .t')].map((token) =>"
        " [Number(token.dataset.token), token.textContent, token.getBoundingClientRect().width])"
    )
    texts = {}
    for token, content, width in drawn:  # a token that is cut by the end of a row has two pieces
        assert content.strip() or tokens[token] == " "
        assert width > 3
        texts[token] = texts.get(token, "") + content
    assert list(texts) == list(range(len(texts)))
    if text == "hostile":
        assert len(texts) == 96
        for token, hostile in enumerate(HOSTILE):
            if hostile.isascii() and hostile.isprintable() and hostile:
                assert texts[token] == hostile
        assert texts[HOSTILE.index("\u202eright to left\u202c")] == "<202E>right to left<202C>"
        assert texts[HOSTILE.index("\n")] == "\u21b5"
    else:
        rows = driver.execute_script(
            "return [...document.querySelectorAll('.row')].map((row) =>"
            " Math.max(...[...row.children].map((each) => each.getBoundingClientRect().right)))"
        )
        inside = driver.execute_script(
            "return document.getElementById('text').getBoundingClientRect().right"
        )
        assert 10 < len(rows) < 100  # those in view
        assert max(rows) <= inside
    title = driver.execute_script(
        "return [document.title, document.querySelectorAll('img').length]"
    )
    assert title == ["a text - margins", 0]
    assert requests(driver) == []
    assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert console(driver) == []


def test_a_request_is_refused(driver, file):
    open_page(driver, file)
    console(driver)
    answer = driver.execute_async_script(
        "const done = arguments[0];"
        "fetch('http://127.0.0.1:9/').then(() => done('asked'), (error) => done(error.message));"
    )
    assert answer == "Failed to fetch"
    assert any("Content Security Policy" in said for said in console(driver))


def test_the_keyboard_alone_reaches_everything(driver, file, page):
    from selenium.webdriver.common.keys import Keys

    open_page(driver, file)
    choose(driver, "find", "e")  # its buttons are there with matches alone
    wanted = set(
        driver.execute_script(
            "return [...document.querySelectorAll('select, button, input, summary, [tabindex]')]"
            ".filter((each) => each.checkVisibility() && !each.disabled"
            " && (each.type !== 'radio' || each.checked)).map((each) => each.id || each.name"
            " || each.textContent)"
        )
    )
    assert {"a", "b", "q", "limit", "find", "csv", "text", "overview", "details"} <= wanted
    reached = set()
    driver.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    for _ in range(len(wanted) + 25):
        driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(
            driver.execute_script(
                "const each = document.activeElement;"
                "return each.id || each.name || each.textContent"
            )
        )
    assert wanted <= reached

    text = driver.find_element("id", "text")
    text.send_keys(Keys.CONTROL, Keys.HOME)
    assert current(driver) == 0
    support = np.flatnonzero(page.series[0].support).tolist()
    places = []
    for _ in range(len(support) + 1):
        text.send_keys("n")
        places.append(current(driver))
    start = support[1:] if support[0] == 0 else support
    assert places == [*start, *support][: len(places)]
    text.send_keys("p", Keys.ENTER)
    pinned = current(driver)
    past = page.series[0].attention
    painted = driver.execute_script(
        "return [...document.querySelectorAll('#rows .t[style]')]"
        ".map((e) => Number(e.dataset.token))"
    )
    expected = {pinned - back for back in past.behind[pinned].tolist() if back}
    assert set(painted) - {pinned} <= expected  # those in view
    assert len(set(painted) - {pinned}) > 2
    selected = "return document.querySelector('[aria-selected=true]')?.id"
    assert driver.execute_script(selected) == f"t{pinned}"
    text.send_keys(Keys.ESCAPE)
    assert driver.execute_script(selected) is None
    text.send_keys("/")
    assert driver.execute_script("return document.activeElement.id") == "find"
    overview = driver.find_element("id", "overview")
    overview.send_keys(Keys.END)
    assert current(driver) == COUNT - 1
    assert overview.get_attribute("aria-valuenow") == str(COUNT - 1)


def test_controls_and_the_address(driver, file, page):
    open_page(driver, file)
    first, second = (page.series[i].values["margin"] for i in (0, 2))
    said = "return document.getElementById('said').textContent"
    choose(driver, "limit", "0.25")
    assert driver.execute_script(said) == (
        f"{(np.array(three_digits(first)) <= 0.25).sum()} of {COUNT} tokens at most 0.25"
    )
    choose(driver, "limit", "")
    choose(driver, "find", "MARGIN")
    assert driver.execute_script(said) == "3 matches"
    assert "".join(TOKENS[current(driver) :][:6]) == "margin"
    click(driver, "#find-next")
    click(driver, "#find-next")
    click(driver, "#find-next")
    hits = driver.execute_script(
        "return [...document.querySelectorAll('#rows .h')].map((e) => e.textContent).join('')"
    )
    assert hits == "margin" * 3
    click(driver, "[name=scale][value=log]")
    click(driver, "[name=show][value=b]")
    choose(driver, "b", "2")
    legend = "return document.getElementById('of').textContent"
    assert driver.execute_script(legend) == "margin (sigma_min), second: head 1"
    limits = "return ['low', 'high'].map((id) => document.getElementById(id).textContent)"
    inner = np.array(three_digits(second))[np.arange(COUNT) % WINDOW >= 2]
    positive = np.sort(inner[inner > 0])
    low, high = map(number, driver.execute_script(limits))
    assert (low, high) == (
        positive[round(0.01 * (len(positive) - 1))],
        positive[round(0.99 * (len(positive) - 1))],
    )
    infeasible = np.flatnonzero(second <= 0)
    hatched = driver.execute_script(
        "return [...document.querySelectorAll('#rows .x')].map((e) => Number(e.dataset.token))"
    )
    assert set(hatched) == set(infeasible.tolist())
    time.sleep(0.4)
    address = driver.current_url
    assert "show=b" in address
    assert "find=MARGIN" in address
    at = current(driver)
    open_page(driver, file, "#" + address.partition("#")[2])
    assert driver.execute_script(legend) == "margin (sigma_min), second: head 1"
    assert driver.execute_script(said) == "3 matches"
    assert driver.execute_script("return document.querySelector('[value=log]').checked")
    assert current(driver) == at
    open_page(driver, file, "#a=99&at=-5&pin=1e9&q=constructor&show=z&limit=x&log=maybe")
    assert driver.execute_script(legend) == "margin (sigma_min), first: head 1"
    assert current(driver) == 0
    assert console(driver) == []


def test_of_what_is_bad_where_it_is_large_the_limit_is_a_least_value(driver, file, page, tmp_path):
    size(driver, 1280, 900)
    open_page(driver, file, "#q=certificate&limit=1")
    certificate = np.array(three_digits(page.series[0].values["certificate"]))
    kept = certificate >= 1
    said = "return ['said', 'side'].map((id) => document.getElementById(id).textContent)"
    assert driver.execute_script(said) == [
        f"{kept.sum()} of {COUNT} tokens at least 1",
        "At least",
    ]
    coloured = (
        "return [...new Set([...document.querySelectorAll('#rows .t[style]')]"
        ".map((each) => Number(each.dataset.token)))]"
    )
    assert driver.execute_script(coloured) == np.flatnonzero(kept).tolist()
    choose(driver, "q", "margin")
    margin = np.array(three_digits(page.series[0].values["margin"]))
    assert np.isnan(margin).any()
    assert driver.execute_script(said) == [
        f"{(margin <= 1).sum()} of {COUNT} tokens at most 1",
        "At most",
    ]
    assert driver.execute_script(coloured) == np.flatnonzero(margin <= 1).tolist()
    click(driver, "#table-box summary")
    driver.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 50))")
    click(driver, "#rows-next")
    rows = (
        "return [...document.querySelectorAll('#table tbody tr')]"
        ".map((each) => each.children[0].textContent)"
    )
    assert driver.execute_script(rows) == [str(i) for i in np.flatnonzero(margin <= 1)[100:]]
    choose(driver, "limit", "")
    assert driver.execute_script(said)[0] == ""
    assert len(driver.execute_script(coloured)) == COUNT


def test_every_value_is_looked_for_at_the_end_that_is_bad():
    proved = {"margin", "low", "high", "certified_probability", "embedding_margin", "radius"}
    assert set(QUANTITIES) - LARGE_MATTER == proved


def test_sequences_have_no_place_in_a_text(driver, page, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page_html(dataclasses.replace(page, sequences=True)), encoding="ascii")
    open_page(driver, path, "#at=70")
    facts = driver.execute_script(
        "return [...document.querySelectorAll('#details > dl')].map((e) => e.textContent)"
    )
    assert facts[0] == "token70 of those shownsequence2, position 6"
    overview = driver.find_element("id", "overview").get_attribute("aria-valuetext")
    assert overview.startswith("sequence 2, position 6, ")
    assert "begins a sequence" in driver.find_element("id", "legend").text
    assert console(driver) == []


@pytest.mark.parametrize("broken", ["no series", "damaged data", "while it is read"])
def test_a_page_whose_script_fails_says_so(driver, file, tmp_path, broken):
    text = file.read_text("ascii")
    start, data, end = re.split('(?<=id="data">)(.*?)(?=</script>)', text, flags=re.DOTALL)
    content = json.loads(data)
    if broken == "no series":
        content["series"] = []
    elif broken == "damaged data":
        content["blobs"][0] = content["blobs"][0][:-40]
    path = tmp_path / "page.html"
    data = json.dumps(content).replace("<", "\\u003c")
    path.write_text(f"{start}{data}{end}", encoding="ascii")
    driver.get("about:blank")
    driver.get(path.as_uri())
    failed = driver.find_element("id", "failed")
    if broken == "while it is read":
        open_page(driver, path)
        assert not driver.find_element("id", "failed").is_displayed()
        failed = driver.find_element("id", "failed")
        driver.execute_script("document.getElementById('low').remove()")
        choose(driver, "limit", "0.5")
    for _ in range(50):
        if failed.is_displayed():
            break
        time.sleep(0.1)
    assert failed.text.startswith("The script of this page has failed (")
    assert "TypeError" in failed.text
    console(driver)


def test_all_of_the_text_is_printed(driver, tmp_path):
    tokens = list("some words of a long text to go on"[:32] * 100)
    path = tmp_path / "page.html"
    path.write_text(page_html(made_page(tokens, runs=("run",), stages=1)), encoding="ascii")
    open_page(driver, path)
    count = "return document.querySelectorAll('#rows [role=option]').length"
    assert driver.execute_script(count) < 3200
    driver.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert driver.execute_script(count) == 3200
    driver.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert driver.execute_script(count) < 3200


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (380, False)])
def test_axe_finds_nothing_wrong(file, tmp_path, width, dark):
    require_browser()
    assert "axe v4" in axe()[:40]
    with browser(tmp_path / "browser", width=width, dark=dark) as driver:
        open_page(driver, file, "#at=70&limit=0.4&find=the&show=d")
        click(driver, "#table-box summary")
        time.sleep(0.2)
        assert violations(driver) == "[]"
        driver.execute_script("location.hash = '#at=70&pin=70'")
        time.sleep(0.2)
        assert violations(driver) == "[]"
        wide = "return document.documentElement.scrollWidth"
        assert driver.execute_script(wide) <= width


def test_of_a_long_text_the_part_in_view_is_made(driver, tmp_path):
    """Which is what opens a page of any length at once."""
    tokens = list("the token of a margin, and so on" * 625)
    path = tmp_path / "page.html"
    path.write_text(page_html(made_page(tokens, runs=("run",), stages=12)), encoding="ascii")
    size(driver, 1280, 900)
    open_page(driver, path)
    options = "return document.querySelectorAll('#rows [role=option]').length"
    assert driver.execute_script(options) < 6000
    press(driver, "End", control=True)
    assert current(driver) == 19_999
    assert driver.execute_script("return document.getElementById('text').scrollTop") > 5000
