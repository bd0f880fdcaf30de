"""A page of numbers that are made up, and a browser to look at it."""

import pytest

from probattn.inference.pages.page import page_html
from tests.support.browser import browser, require_browser
from tests.support.made_pages import COUNT, TOKENS, made_page


@pytest.fixture(scope="module")
def page():
    assert len(TOKENS) == COUNT
    return made_page(TOKENS)


@pytest.fixture(scope="module")
def file(page, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page_html(page), encoding="ascii")
    return path


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    require_browser()
    with browser(tmp_path_factory.mktemp("browser")) as driver:
        yield driver
