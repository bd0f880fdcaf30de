"""The pictures of docs/margin-page.md: `python -m tests.support.screenshots PAGE` makes them.

PAGE is a file of `probattn margins --html`. It needs Chromium, and what the tests need.
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

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
            picture = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
            # In 256 colours it takes half of the room.
            path = ROOT / "docs/images" / f"{name}.png"
            picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
