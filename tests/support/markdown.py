"""Markdown pages of the project: their links, headings and blocks of code."""

import re
from pathlib import Path

from tests.support.project import ROOT


def pages() -> list[Path]:
    """Return every Markdown file that belongs to the project."""
    folders = ("docs", "examples", "benchmarks")
    nested = [path for folder in folders for path in (ROOT / folder).rglob("*.md")]
    return sorted([*ROOT.glob("*.md"), *nested])


def _divided(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Divide a page into its prose, and its fenced blocks with what stands behind the fence."""
    prose, blocks, fence = [], [], ""
    for line in text.splitlines(keepends=True):
        mark = re.match(r"(`{3,}|:{3,})(.*)", line)
        if fence and line.rstrip() == fence:
            fence = ""
        elif fence:
            blocks[-1] = blocks[-1][0], blocks[-1][1] + line
        elif mark:
            fence = mark[1]
            blocks.append((mark[2].strip(), ""))
        else:
            prose.append(line)
    return "".join(prose), blocks


def code_blocks(text: str, *languages: str) -> list[str]:
    """Return what stands in fences of these languages; "" is a fence without one."""
    return [block for language, block in _divided(text)[1] if language in languages]


def links(text: str) -> list[str]:
    """Return the targets of links and images outside of code."""
    prose = re.sub(r"`[^`\n]+`", "code", _divided(text)[0])
    return re.findall(r"\]\(([^()\s]+)\)", prose)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub and the site make of the headings."""
    titles = re.findall(r"^#{1,6} (.+?)\s*$", _divided(text)[0], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
