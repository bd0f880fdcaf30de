"""What `kill.py` calls whole after a kill, and what it calls torn."""

import hashlib
from pathlib import Path

import pytest

from tests.robustness.killing.whole import check_whole


@pytest.fixture(name="run")
def run_fixture(tmp_path):
    """Two checkpoints, of which a tidy run keeps the newer, and metrics."""
    for step in ("9", "10"):
        folder = tmp_path / "checkpoints" / "latest" / step
        folder.mkdir(parents=True)
        (folder / "array").write_bytes(b"numbers")
        digest = hashlib.sha256(b"numbers").hexdigest()
        (folder / "SHA256SUMS").write_text(f"{digest}  array\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    return tmp_path


def test_an_older_checkpoint_may_be_half_removed(run):
    (run / "checkpoints" / "latest" / "9" / "array").unlink()
    assert check_whole(run) == []


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("checkpoints/latest/10/array", b"number5"),
        ("metrics.jsonl", b'{"st\n{"step": 2}\n'),
        ("summary.json", b"{"),
        ("table.csv", b"a,b\n1,"),
        ("figure.png", b"\x89PNG"),
    ],
)
def test_a_torn_file_is_named(run, file, content):
    (run / file).write_bytes(content)
    [torn] = check_whole(run)
    assert torn.startswith(str(Path(file).parent / "SHA256SUMS") if "array" in file else file)
