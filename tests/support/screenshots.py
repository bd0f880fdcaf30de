"""The pictures of docs/margin-page.md: `python -m tests.support.screenshots PAGE` makes them.

PAGE is a file of `probattn margins --html`. It needs Chromium, and what the tests need.
"""

import sys
import tempfile
from pathlib import Path

from tests.support.browser import browser, open_page
from tests.support.project import ROOT

PICTURES = {
    "margin_page": (1280, 900, False, "#at=300"),
    "margin_page_pinned": (1280, 900, True, "#at=300&pin=300"),
    "margin_page_narrow": (380, 800, False, "#at=300&limit=0.2"),
}

if __name__ == "__main__":
    for name, (width, height, dark, address) in PICTURES.items():
        with (
            tempfile.TemporaryDirectory() as folder,
            browser(Path(folder), width=width, height=height, dark=dark) as driver,
        ):
            open_page(driver, Path(sys.argv[1]).resolve(), address)
            if width < 500:
                driver.execute_script("document.getElementById('legend').scrollIntoView()")
            driver.save_screenshot(str(ROOT / "docs/images" / f"{name}.png"))
