"""Debian's Chromium, headless, driven by selenium; where there is none, tests are skipped.

With PROBATTN_REQUIRE_BROWSER=1, as in CI, they fail instead.
"""

import importlib.metadata
import json
import os
import shutil
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-dev-shm-usage",
)


def require_browser():
    """Skip the test where there is no browser, or fail if there must be one."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing and os.environ.get("PROBATTN_REQUIRE_BROWSER") == "1":
        pytest.fail(f"{' and '.join(missing)} not found: install Debian's chromium-driver")
    if missing:
        pytest.skip(f"{' and '.join(missing)} not found")


@contextmanager
def browser(folder, *, width=1280, height=900, dark=False):
    """A browser with a new profile in a folder that does not exist yet."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.add_argument(f"--user-data-dir={folder / 'profile'}")
    for flag in FLAGS:
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        driver.set_script_timeout(60)
        size(driver, width, height)
        if dark:
            scheme = {"name": "prefers-color-scheme", "value": "dark"}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield driver
    finally:
        driver.quit()


def size(driver, width, height):
    """Give the page so many pixels."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def open_page(driver, path, address=""):
    """Load a page afresh, and wait until it is drawn; how many milliseconds that took."""
    driver.get("about:blank")
    driver.get(path.as_uri() + address)
    ready = """
        const done = arguments[0];
        const look = () => document.documentElement.dataset.ready
            ? done(Number(document.documentElement.dataset.ready)) : setTimeout(look, 10);
        look();
    """
    return driver.execute_async_script(ready)


@cache
def axe():
    """The text of axe-core, which a package for selenium carries."""
    files = importlib.metadata.files("axe-selenium-python")
    [script] = [file for file in files if file.name == "axe.min.js"]
    return script.locate().read_text("utf-8")


def violations(driver):
    """What axe-core finds wrong: rule and elements."""
    # Through the protocol of the developer tools: the page's own policy lets no other script in.
    driver.execute_cdp_cmd("Runtime.evaluate", {"expression": axe()})
    found = driver.execute_cdp_cmd(
        "Runtime.evaluate",
        {
            "expression": "axe.run(document).then((found) => JSON.stringify(found.violations.map("
            "(each) => [each.id, each.nodes.map((node) => node.html)])))",
            "awaitPromise": True,
            "returnByValue": True,
        },
    )
    return found["result"]["value"]


def requests(driver):
    """Every address that was asked for since the last call, but the page itself and about:."""
    events = [json.loads(each["message"])["message"] for each in driver.get_log("performance")]
    sent = [
        each["params"]["request"]["url"]
        for each in events
        if each["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in sent if not url.startswith(("file:", "about:", "data:,"))]


def console(driver):
    """What the browser has said since the last call."""
    return [entry["message"] for entry in driver.get_log("browser")]


def number(shown):
    """The number that a cell shows."""
    plain = shown.replace("\u2212", "-").replace("\u221e", "inf").replace("\u2013", "nan")
    return float(plain)


def three_digits(values):
    return [float(f"{value:.2e}") for value in np.asarray(values).tolist()]


def press(driver, key, *, times=1, shown="null", control=False):
    """Press a key in the text so many times, and return what an expression gives after each."""
    return driver.execute_script(
        "const text = document.getElementById('text'), found = [];"
        f"for (let i = 0; i < {times}; i++) {{"
        f"text.dispatchEvent(new KeyboardEvent('keydown', {{key: {json.dumps(key)}, "
        f"ctrlKey: {str(control).lower()}, cancelable: true, bubbles: true}}));"
        f"found.push({shown}); }} return found;"
    )


def current(driver):
    return int(
        driver.execute_script("return document.querySelector('#rows .c, #rows .p').dataset.token")
    )


def choose(driver, name, value):
    """Set a control as a user does, and let the page know."""
    driver.execute_script(
        "const one = document.getElementById(arguments[0]);"
        "one.value = arguments[1];"
        "for (const kind of ['input', 'change'])"
        " one.dispatchEvent(new Event(kind, {bubbles: true}));",
        name,
        value,
    )


def click(driver, selector):
    driver.execute_script("document.querySelector(arguments[0]).click()", selector)
