"""Check a built site, without a network: `python docs/_extensions/check_site.py build/docs`.

Every link to a page, a heading or a file of the site must lead there, and no page may load a
script, a style or an image from elsewhere.
"""

import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"img": "src", "script": "src", "iframe": "src", "source": "src", "link": "href"}
HINTS = {"next", "prev", "search", "index", "author", "copyright", "canonical"}


class Page(HTMLParser):
    """What a page links to, what it loads, and the places in it that a link can name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note one element."""
        given = {name: value or "" for name, value in attrs}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        hint = HINTS & set(given.get("rel", "").split())
        if (target := given.get(LOADED.get(tag, ""))) and not (tag == "link" and hint):
            self.loaded.append(target)


def pages(site: Path) -> list[Path]:
    """Return the pages of a site; what lies in _static belongs to the theme."""
    return [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]


@cache
def read(path: Path) -> Page:
    """Parse a page once."""
    return Page(path.read_text("utf-8"))


def faults(site: Path) -> list[str]:
    """Return what is wrong with the pages of a site, a line each."""
    found = []
    for path in pages(site):
        page, name = read(path), path.relative_to(site)
        found += [f"{name} loads {each}" for each in page.loaded if urlsplit(each).netloc]
        for link in {*page.links, *page.loaded}:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            if not target.exists():
                found.append(f"{name} links to {link}, which is not there")
            elif not parts.fragment or target.suffix != ".html":
                continue
            elif unquote(parts.fragment) not in read(target).places:
                found.append(f"{name} links to {link}, which has no such place")
    return found


if __name__ == "__main__":
    site = Path(sys.argv[1]).resolve()
    lines = faults(site)
    print(*lines, sep="\n", end="\n" if lines else "")
    number = len(pages(site))
    sys.exit(f"{len(lines)} faults in {number} pages" if lines or not number else None)
