"""Where the project lies, and what is imported from its benchmarks."""

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


@contextmanager
def scripts(folder, names):
    """Import the modules of a folder by name, as its own scripts import them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield {name: importlib.import_module(name) for name in names}
        for name in names:
            sys.modules.pop(name, None)


def scripts_fixture(folder, names):
    """Make a fixture of a test module, `scripts`, that is modules of a folder by name."""

    @pytest.fixture(scope="module", name="scripts")
    def modules():
        with scripts(folder, names) as found:
            yield found

    return modules


@contextmanager
def benchmark(name):
    """Import a module of `benchmarks/`; they import each other from there."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))
        sys.modules.pop(name, None)
