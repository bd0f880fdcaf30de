"""Exceptions of the package: they go from process to process."""

import copy
import importlib
import pickle
import pkgutil
import signal
from pathlib import Path

import pytest

import probattn
from probattn.inference.pretrained.errors import PretrainedError
from probattn.inference.runs.files import WriteError
from probattn.inference.runtime.signals import Ended, Interrupted
from probattn.text.byte_pairs import UnknownCharacter

# Those that are made of anything but a message.
MADE = {
    Ended: Ended(signal.SIGTERM),
    Interrupted: Interrupted(signal.SIGINT),
    WriteError: WriteError(Path("run/lock"), OSError(28, "No space left on device")),
    PretrainedError: PretrainedError("model.gguf", "has no tensors"),
    UnknownCharacter: UnknownCharacter("U", 2, 1),
}


def exceptions():
    for module in pkgutil.walk_packages(probattn.__path__, "probattn."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, new = set(), {BaseException}
    while new := {kind for parent in new for kind in parent.__subclasses__()} - found:
        found |= new
    return sorted(
        (kind for kind in found if kind.__module__.startswith("probattn.")),
        key=lambda kind: kind.__name__,
    )


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))]
)
def test_every_exception_can_be_copied_and_pickled(copied):
    """Otherwise a pool of processes waits for it for ever."""
    kinds = exceptions()
    assert MADE.keys() <= set(kinds)
    for kind in kinds:
        error = MADE[kind] if kind in MADE else kind("what, and why")
        again = copied(error)
        assert (type(again), str(again), again.args) == (kind, str(error), error.args)
        for name in ("errno", "signum", "position"):
            assert getattr(again, name, None) == getattr(error, name, None)
