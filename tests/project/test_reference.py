"""docs/reference.md: every public name is in the section of its package, and no other."""

import importlib
import re

import pytest

from tests.support.project import ROOT

PAGE = ROOT / "docs/reference.md"
PACKAGES = ("probattn", "probattn.models", "probattn.inference")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_page_lists_what_can_be_imported(package):
    sections = re.split(r"^## `([\w.]+)`.*$", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    section = dict(zip(sections[1::2], sections[2::2], strict=True))[package]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    results = {name for row in rows for name in re.findall(r"`([A-Z]\w+)`", row[2])}
    public = set(importlib.import_module(package).__all__)
    assert listed <= public
    assert public <= listed | results


def test_what_only_the_theory_asks_for_is_there():
    process = importlib.import_module("probattn.process")
    sentence = re.search(r"`probattn\.process` has.*?\n\n", PAGE.read_text("utf-8"), re.DOTALL)[0]
    for name in re.findall(r"`([a-z_]+)`", sentence):
        assert callable(getattr(process, name)), name
