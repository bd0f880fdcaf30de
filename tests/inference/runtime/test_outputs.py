"""Outputs that fail or are closed: the work goes on."""

import io
import os
import subprocess
import sys

import pytest

from probattn.inference.runtime.outputs import Forgiving
from probattn.inference.runtime.progress import progress_bar

PROGRAM = """
import sys
from probattn.inference.runtime.outputs import keep_outputs_open, lost_output
keep_outputs_open()
with open(sys.argv[1], "w") as stream:
    assert stream.fileno() > 2
    for number in range(20000):
        print(number)
        print(number, file=sys.stderr)
    error = lost_output()
    stream.write(error.strerror if error else "done")
"""


class Broken(io.StringIO):
    """A terminal that is gone."""

    def write(self, text):
        raise BrokenPipeError

    def isatty(self):
        return True


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [Broken(), closed(), None])
def test_a_bar_goes_on_without_its_terminal(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("fit", total=2, unit="step") as bar:
        bar.update(1)
        bar.show(loss="2.5")
        bar.line("step 1")
        bar.update(1)


def test_what_can_be_written_is_written():
    stream = io.StringIO()
    forgiving = Forgiving(stream)
    forgiving.write("step 1\n")
    forgiving.flush()
    assert (stream.getvalue(), forgiving.isatty()) == ("step 1\n", False)


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    ("redirection", "said"),
    [
        ("2>&1 | head -1", "done"),
        (">&- 2>&-", "done"),
        ("2>&-", "done"),
        ("> /dev/full", "No space left on device"),
        ("2> /dev/full", "done"),
    ],
)
def test_a_process_goes_on_without_its_outputs(tmp_path, redirection, said, unbuffered):
    command = f'"$0" -c "$1" "$2" {redirection}'
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command, sys.executable, PROGRAM, tmp_path / "out"],
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (tmp_path / "out").read_text() == said
    assert "Error" not in result.stderr
