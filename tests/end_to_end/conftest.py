"""What makes whole stories cheap enough to be told."""

import pytest

from tests.support.small import quick_compilation


@pytest.fixture(name="quick_compilation")
def quick_compilation_fixture():
    with quick_compilation():
        yield
