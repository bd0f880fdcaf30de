"""Checkpoints: to the last bit, the newest alone, whole or refused."""

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probattn.inference import load_run
from probattn.inference.runs import checkpoints
from probattn.inference.runs.checkpoints import (
    CheckpointError,
    CheckpointFolder,
    named_leaves,
    with_leaves,
)
from probattn.inference.runs.files import WriteError
from probattn.inference.runtime.cores import cores
from tests.support.made_runs import (
    ARRAYS,
    assert_same,
    draw,
    make_run,
)
from tests.support.refusals import refusal
from tests.support.tiny_run import files_of


@pytest.fixture
def folder(place):
    folder = CheckpointFolder(place)
    folder.save(3, ARRAYS)
    return folder


def test_a_checkpoint_comes_back_to_the_last_bit(folder):
    assert folder.step == 3
    assert_same(folder.load(ARRAYS), ARRAYS)
    shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in ARRAYS.items()}
    assert_same(folder.load(shapes), ARRAYS)


def test_what_is_saved_last_is_what_stays(folder):
    """Also where a fit that goes on takes steps again that a killed one had taken."""
    other = ARRAYS | {"count": jnp.int32(7)}
    folder.save(2, other)
    assert folder.step == 2
    assert_same(folder.load(other), other)


def test_a_checkpoint_that_is_replaced_while_it_is_read(folder, monkeypatch):
    other, checksums = ARRAYS | {"count": jnp.int32(7)}, checkpoints.checksums

    def replaced_meanwhile(part):
        if part.parent.name == "3":
            folder.save(4, other)
        return checksums(part)

    monkeypatch.setattr(checkpoints, "checksums", replaced_meanwhile)
    assert_same(folder.load(other), other)


def test_only_the_newest_checkpoint_is_kept(folder, place):
    newer = ARRAYS | {"count": jnp.int32(0)}
    folder.save(20, newer)
    assert folder.step == 20
    assert [path.name for path in place.iterdir()] == ["20"]
    assert_same(folder.load(ARRAYS), newer)


def test_a_step_that_is_saved_already_is_left_as_it_is(folder, place):
    before = files_of(place)
    folder.save(3, ARRAYS)
    assert files_of(place) == before


def test_a_save_that_fails_keeps_the_checkpoint_before(folder, place):
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        folder.save(4, ARRAYS | {"count": gone})
    assert folder.step == 3
    assert_same(folder.load(ARRAYS), ARRAYS)
    folder.save(4, ARRAYS)
    assert [path.name for path in place.iterdir()] == ["4"]


@pytest.mark.parametrize("name", ["[2024] thesis", "r[b]", "a*b?"])
def test_a_checkpoint_below_a_folder_whose_name_is_a_pattern(tmp_path, name, monkeypatch):
    """Orbax merges by a glob on the absolute path; it is given another one, which goes again."""
    place, temporary = tmp_path / name / "latest", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    folder, newer = CheckpointFolder(place), {"count": jnp.int32(7)}
    folder.save(3, ARRAYS, more={"one": jnp.ones(2)})
    assert_same(folder.load(ARRAYS), ARRAYS)
    assert_same(folder.load({"one": jnp.ones(2)}, part="more"), {"one": jnp.ones(2)})
    folder.save(20, newer)
    assert [path.name for path in place.iterdir()] == ["20"]
    assert_same(folder.load(newer), newer)
    assert list(temporary.iterdir()) == []


def test_a_save_of_what_could_not_be_loaded_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    """As orbax leaves it, without an error, where it finds nothing to merge."""
    place = tmp_path / "[2024] thesis" / "latest"
    folder = CheckpointFolder(place)
    folder.save(3, ARRAYS)
    monkeypatch.setattr(checkpoints.glob, "escape", str)
    message = refusal(WriteError, folder.save, 4, ARRAYS)
    assert message.startswith(f"{place / '4'}: cannot be written: ")
    assert [path.name for path in place.iterdir()] == ["3"]
    assert_same(folder.load(ARRAYS), ARRAYS)


def test_the_remains_of_an_interrupted_save_are_no_checkpoint(folder, place):
    shutil.copytree(place / "3", place / "9.orbax-checkpoint-tmp")
    assert folder.step == 3
    folder.save(5, ARRAYS)
    assert [path.name for path in place.iterdir()] == ["5"]


def test_no_checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path / "none")
    assert folder.step is None
    assert refusal(CheckpointError, folder.load, ARRAYS).startswith(f"{tmp_path / 'none'}: got no")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("like", "reason"),
    [
        ({"count": jnp.zeros(2, jnp.int32)}, "array count is int32 (), expected int32 (2,)"),
        ({"a.b": jnp.zeros((70, 90))}, "array a.b is float64 (90, 70), expected float64 (70, 90)"),
        ({"key": jnp.zeros(2, jnp.int32)}, "array key is uint32 (2,), expected int32 (2,)"),
        ({"more": jnp.zeros(2)}, "it differs in the arrays more"),
        ({"key": None}, "it differs in the arrays key"),
    ],
)
def test_a_checkpoint_of_another_model(folder, like, reason, place):
    expected = {name: leaf for name, leaf in (ARRAYS | like).items() if leaf is not None}
    message = refusal(CheckpointError, folder.load, expected)
    assert message.startswith(f"{place / '3'}: ")
    assert reason in message


@pytest.mark.parametrize("damage", ["emptied", "halved", "removed", "flipped"])
def test_a_damaged_checkpoint_is_refused(folder, damage, caplog, place):
    for name, whole in files_of(place / "3").items():
        path = place / "3" / name
        middle = len(whole) // 2
        if damage == "removed":
            path.unlink()
        else:
            flipped = whole[:middle] + bytes([whole[middle] ^ 0x55]) + whole[middle + 1 :]
            changed = {"emptied": b"", "halved": whole[:middle], "flipped": flipped}
            path.write_bytes(changed[damage])
        message = refusal(CheckpointError, folder.load, ARRAYS)
        assert message.startswith(f"{place / '3'}: the checkpoint is damaged")
        assert message.endswith("or start again with --overwrite")
        path.write_bytes(whole)
    assert_same(folder.load(ARRAYS), ARRAYS)
    assert [record.getMessage() for record in caplog.records] == []  # the error is one line


def test_a_checkpoint_under_the_name_of_another_step_is_refused(folder, place):
    (place / "3").rename(place / "4")
    message = refusal(CheckpointError, folder.load, ARRAYS)
    assert message.startswith(f"{place / '4'}: ")
    assert "it is of step 3, whatever its name" in message


def test_a_checkpoint_of_an_earlier_version_names_neither_step_nor_cores(folder, place):
    assert folder.cores() == cores()
    part = place / "3" / "arrays"
    (part / "origin.json").unlink()
    (place / "3" / "SHA256SUMS").write_text(checkpoints.checksums(part), "utf-8")
    assert_same(folder.load(ARRAYS), ARRAYS)
    assert folder.cores() is None


def test_what_is_no_checkpoint_stays_and_is_not_in_the_way(folder, place):
    (place / "notes.txt").write_text("mine")
    for name in ("mine", "2024", "007"):
        (place / name).mkdir()
        (place / name / "thesis.tex").write_text("mine")
    before = {name: text for name, text in files_of(place).items() if not name.startswith("3/")}
    assert folder.step == 3
    folder.save(5, ARRAYS)
    folder.tidy()
    assert folder.step == 5
    assert_same(folder.load(ARRAYS), ARRAYS)
    after = {name: text for name, text in files_of(place).items() if not name.startswith("5/")}
    assert after == before


def test_a_checkpoint_with_a_file_more_is_refused(folder, place):
    (place / "3" / "arrays" / "more").write_bytes(b"")
    assert "checksums: arrays/more" in refusal(CheckpointError, folder.load, ARRAYS)


def test_a_checkpoint_of_links_is_refused(folder, place, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    file = next(path for path in (place / "3" / "arrays").rglob("*") if path.is_file())
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert f"{file.name} is a link" in refusal(CheckpointError, folder.load, ARRAYS)


def test_checksums_are_those_of_sha256sum(folder, place):
    checks = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(checks, cwd=place / "3", capture_output=True).returncode == 0


def test_parameters_of_a_single_precision_run_open_in_double(tmp_path):
    """A MAP fitted as usual, opened by a script that enabled float64 to sample."""
    run = make_run(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    single = {name: leaf.astype(jnp.float32) for name, leaf in draw(run.parameter_shapes()).items()}
    run.best.save(8, single)
    opened = load_run(tmp_path).parameters
    for name, leaf in single.items():
        np.testing.assert_array_equal(opened[name], leaf)


def test_parameters_of_a_double_precision_run_open_in_single(made):
    code = f"""
        import numpy as np
        from probattn.inference import load_run
        run = load_run({str(made.path)!r})
        values = run.parameters.values()
        print({{str(value.dtype) for value in values}}, sum(np.abs(v).sum() for v in values))
    """
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_ENABLE_X64": "0"},
    )
    assert child.returncode == 0, child.stderr
    dtypes, total = child.stdout.rsplit(maxsplit=1)
    assert dtypes == "{'float32'}"
    expected = sum(np.abs(value).sum() for value in made.parameters.values())
    assert float(total) == pytest.approx(expected, rel=1e-5)


def test_leaves_by_name_and_back():
    tree = {"svi": (jnp.zeros(2), {"w": jnp.ones(3)}), "n": None, "count": jnp.int32(4)}
    leaves = named_leaves(tree)
    assert leaves.keys() == {"svi.0", "svi.1.w", "count"}
    changed = with_leaves(tree, leaves | {"svi.1.w": jnp.arange(3.0)})
    assert jax.tree.structure(changed) == jax.tree.structure(tree)
    np.testing.assert_array_equal(changed["svi"][1]["w"], [0, 1, 2])
    np.testing.assert_array_equal(changed["svi"][0], [0, 0])
