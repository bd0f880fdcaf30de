"""What the tests of guides share: a folder with a text of three symbols."""

import pytest

from tests.support.guide_runs import tiny_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the text stands, and runs of it."""
    folder = tmp_path_factory.mktemp("guides")
    (folder / "text").write_text(tiny_text())
    return folder
